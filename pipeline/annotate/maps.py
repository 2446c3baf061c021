"""The end of the device step: relevance grids become the maps of each sample, in one trip to the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from legrad.heatmaps import Normalisation, heatmaps_of, minmax_normalise
from legrad.images import ImageTransform
from legrad.inputs import neutral_patches
from legrad.masks.refine import Refinement, dilations_for_patch, refine_heatmaps
from pipeline.annotate.sample_states import SampleMaps, TextMaps
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
    grids: torch.Tensor, pixels: torch.Tensor, chosen: Sequence[ImageMaps], settings: MapSettings
) -> list[SampleMaps]:
    """Zero, refine and normalise the grids of a batch on their device, and share them out on the CPU.

    Args:
        grids: raw relevance, float32 [maps, grid_height, grid_width], image by image in the order of
            `ImageMaps`.
        pixels: first canvas of each image, uint8 [images, height, width, 3], on the device of the grids.
        chosen: of each image, which of the grids are its own.
        settings: what is done to the grids.
    """
    owners = images_of_maps(chosen)
    mask_maps = grids
    if settings.neutral_threshold is not None:
        grids, mask_maps, owners = _without_claimed_patches(grids, owners, settings.neutral_threshold)
    peaks = mask_maps.amax((1, 2))
    if settings.refinement is not None:
        mask_maps = refined_maps(pixels, mask_maps, owners, settings.refinement, settings.normalisation)
    normalisation = settings.normalisation if settings.refinement is None else None
    on_cpu = _in_one_trip(grids, peaks, mask_maps)
    starts = torch.searchsorted(owners, torch.arange(len(chosen))).tolist()
    return [
        _maps_of_sample(on_cpu, start, maps, normalisation)
        for start, maps in zip(starts, chosen, strict=True)
    ]


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


def _in_one_trip(grids: torch.Tensor, peaks: torch.Tensor, mask_maps: torch.Tensor) -> TextMaps:
    """Bring the maps of a batch to the CPU, packed into one tensor."""
    has_other_maps = mask_maps is not grids
    columns = [grids.flatten(1), peaks[:, None], *([mask_maps.flatten(1)] if has_other_maps else [])]
    packed = torch.cat(columns, dim=1).cpu()
    own, own_peaks, others = torch.split(
        packed, [columns[0].shape[1], 1, packed.shape[1] - columns[0].shape[1] - 1], dim=1
    )
    own_grids = own.reshape(grids.shape)
    return TextMaps(
        own_grids, own_peaks[:, 0], others.reshape(mask_maps.shape) if has_other_maps else own_grids
    )


def _maps_of_sample(
    batch: TextMaps, start: int, maps: ImageMaps, normalisation: Normalisation | None
) -> SampleMaps:
    backgrounds = start + maps.prompt_maps + torch.arange(maps.backgrounds)
    return SampleMaps(
        _maps_at(batch, start + torch.from_numpy(maps.map_of_prompt)),
        _maps_at(batch, backgrounds),
        normalisation,
    )


def _maps_at(batch: TextMaps, rows: torch.Tensor) -> TextMaps:
    # copies, or a sample that waits to be written would hold its whole batch
    grids = batch.relevance_grids[rows]
    mask_maps = grids if batch.mask_maps is batch.relevance_grids else batch.mask_maps[rows]
    return TextMaps(grids, batch.peaks[rows], mask_maps)
