"""The last part of the device step: relevance grids become the maps of each sample on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from legrad.heatmaps import Normalisation, heatmaps_of, minmax_normalise
from legrad.images import ImageTransform
from legrad.inputs import neutral_patches
from legrad.masks.refine import Refinement, dilations_for_patch, refine_heatmaps
from pipeline.annotate.sample_states import SampleMaps
from pipeline.annotate.texts import ImageMaps, images_of_maps
from pipeline.config.masks import MasksConfig


@dataclass(frozen=True)
class MapSettings:
    """What is done to relevance grids on the device.

    Attributes:
        normalisation: when the model family's maps are brought to [0, 1].
        neutral_threshold: grids are zeroed where the neutral text's own grid, brought to [0, 1], exceeds
            this; None: there is no neutral text.
        refinement: how heat maps are made to follow the pixels; None: not at all.
    """

    normalisation: Normalisation
    neutral_threshold: float | None = None
    refinement: Refinement | None = None


def refinement_of(masks: MasksConfig, patch_pixels: int) -> Refinement | None:
    """Return the refinement that a configuration asks for; None for no refinement.

    Args:
        masks: the configuration's section.
        patch_pixels: side of a patch of the model's input.
    """
    if masks.refine == "none":
        return None
    return Refinement(
        masks.refine,
        masks.refine_iterations,
        tuple(masks.refine_dilations or dilations_for_patch(patch_pixels)),
        masks.refine_contrast,
    )


def map_bytes(transform: ImageTransform) -> int:
    """Return the bytes of one refined map, at most."""
    return transform.height * transform.width * torch.float32.itemsize


def sample_maps(
    grids: torch.Tensor,
    pixels: torch.Tensor,
    chosen: Sequence[ImageMaps],
    settings: MapSettings,
    image_sizes: Sequence[tuple[int, int]],  # noqa: ARG001
) -> list[SampleMaps]:
    """Zero, refine and normalise the grids of a batch on their device, and share them out on the CPU.

    Args:
        grids: raw relevance, float32 [maps, grid_height, grid_width], image by image in the order of
            `ImageMaps`.
        pixels: first canvas of each image, uint8 [images, height, width, 3], on the device of the grids.
        chosen: of each image, which of the grids are its own.
        settings: what is done to the grids.
        image_sizes: height and width of each original image in pixels.
    """
    owners = images_of_maps(chosen)
    mask_maps = None
    if settings.neutral_threshold is not None:
        grids, mask_maps, owners = _without_claimed_patches(grids, owners, settings.neutral_threshold)
    peaks = (grids if mask_maps is None else mask_maps).amax((1, 2))
    normalisation: Normalisation | None = settings.normalisation
    if settings.refinement is not None:
        own = grids if mask_maps is None else mask_maps
        mask_maps = refined_maps(pixels, own, owners, settings.refinement, settings.normalisation)
        if mask_maps.is_cuda:
            # moves a value by 2**-12 at most, while a heat map is uncertain by far more
            mask_maps = mask_maps.half()
        normalisation = None
    own_grids, own_peaks, *refined = in_one_trip([grids, peaks, *([] if mask_maps is None else [mask_maps])])
    own_mask_maps = refined[0] if refined else None
    shared: list[SampleMaps] = []
    start = 0
    for maps in chosen:
        prompt_maps = maps.prompt_maps
        end = start + prompt_maps + maps.backgrounds
        shared.append(
            SampleMaps(
                own_grids[start:end],
                own_peaks[start:end],
                None if own_mask_maps is None else own_mask_maps[start:end],
                maps.map_of_prompt,
                prompt_maps,
                normalisation,
            )
        )
        start = end
    return shared


def refined_maps(
    pixels: torch.Tensor,
    grids: torch.Tensor,
    owners: torch.Tensor,
    refinement: Refinement,
    normalisation: Normalisation,
) -> torch.Tensor:
    """Bring grids to heat maps that follow the edges of their images, all on one device.

    Args:
        pixels: RGB, uint8 [images, height, width, 3].
        grids: relevance grids, [maps, grid_height, grid_width].
        owners: for each grid the row of its image, int64 [maps], on the CPU.
        refinement: how.
        normalisation: when the model family's maps are brought to [0, 1].

    Returns:
        float32 [maps, height, width], each map from 0 to 1; a constant one becomes zeros.
    """
    images = pixels.permute(0, 3, 1, 2)
    height, width = images.shape[-2:]
    refined = refine_heatmaps(images, heatmaps_of(grids, height, width, normalisation), owners, refinement)
    # the mean of neighbours lowers a peak, and a fixed cut is meant for maps that reach 1
    return minmax_normalise(refined)


def _without_claimed_patches(
    grids: torch.Tensor, owners: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the grids but the neutral ones; the same, zeroed where the neutral one is high; their owners."""
    neutral = torch.bincount(owners).cumsum(0) - 1  # the last map of each image
    claimed = neutral_patches(grids[neutral.to(grids.device)][:, None], threshold)
    kept = torch.ones(len(owners), dtype=torch.bool).index_fill(0, neutral, False).nonzero().flatten()
    owners = owners[kept]
    grids = grids[kept.to(grids.device)]
    return grids, grids.masked_fill(claimed[owners.to(grids.device)], 0), owners


def in_one_trip(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Bring tensors of a device to the CPU by a single copy.

    Args:
        tensors: in the order of their element sizes, the largest first.
    """
    packed = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]).cpu()
    parts = torch.split(packed, [tensor.nbytes for tensor in tensors])
    return [
        part.view(tensor.dtype).view(tensor.shape).numpy()
        for part, tensor in zip(parts, tensors, strict=True)
    ]
