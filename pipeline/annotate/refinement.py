"""Heat maps of a batch on the device, made to follow the pixels that went into the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from legrad.heatmaps import Normalisation, first_of_equal_maps, heatmaps_of, minmax_normalise
from legrad.images import ImageTransform
from legrad.masks.refine import Refinement, dilations_for_patch, refine_heatmaps
from pipeline.config.masks import MasksConfig


def refinement_of(masks: MasksConfig, patch_pixels: int) -> Refinement | None:
    """Read which refinement is wanted, if any.

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
    """Memory of one refined map at most."""
    return transform.height * transform.width * torch.float32.itemsize


def refined_maps(
    pixels: Sequence[np.ndarray],
    grids: Sequence[torch.Tensor],
    refinement: Refinement,
    normalisation: Normalisation,
    device: torch.device,
) -> list[torch.Tensor]:
    """Bring every image's grids to refined heat maps.

    Args:
        pixels: of each image what went into the model, RGB, uint8 [height, width, 3], all of one size.
        grids: of each image its relevance grids, [maps, grid_height, grid_width].
        refinement: how.
        normalisation: when the model family's maps are brought to [0, 1].
        device: where to compute.

    Returns:
        For each image float32 on the CPU, [maps, height, width], each map from 0 to 1; a constant one zeros.
        Equal grids have equal maps, to the last bit.
    """
    places = [first_of_equal_maps(own_grids) for own_grids in grids]
    firsts = [sorted(set(own_places)) for own_places in places]
    counts = [len(own_firsts) for own_firsts in firsts]
    image_index = torch.repeat_interleave(torch.arange(len(pixels)), torch.tensor(counts))
    images = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2)
    height, width = images.shape[-2:]
    distinct = torch.cat([own_grids[own] for own_grids, own in zip(grids, firsts, strict=True)])
    heatmaps = heatmaps_of(distinct.to(device), height, width, normalisation)
    refined = refine_heatmaps(images, heatmaps, image_index, refinement)
    # the mean of neighbours lowers a peak, and a fixed cut is meant for maps that reach 1
    maps = torch.split(minmax_normalise(refined).cpu(), counts)
    return [
        own_maps[np.searchsorted(own_firsts, own_places)]
        for own_maps, own_firsts, own_places in zip(maps, firsts, places, strict=True)
    ]
