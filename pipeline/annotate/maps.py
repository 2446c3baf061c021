"""The last part of the device step: relevance grids become the maps of each sample on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from legrad.heatmaps import Normalisation, heatmaps_of, minmax_normalise
from legrad.masks.refine import Refinement, dilations_for_patch, refine_heatmaps
from legrad.masks.runs import MAX_CHUNK_PIXELS, CutMaps, MapRuns, cost_pixels, cut_maps
from legrad.masks.thresholds import MaskRule
from pipeline.annotate.cutting import DeviceCut
from pipeline.annotate.grid_steps import (
    NO_STEPS,
    BatchGrids,
    GridSteps,
    GridTexts,
    as_stored,
    batch_grids,
)
from pipeline.annotate.sample_states import SampleMaps
from pipeline.annotate.segmenting import MapSharpener
from pipeline.annotate.texts import ImageMaps
from pipeline.config.masks import MasksConfig
from pipeline.output.label_map import mask_frame

CUT_TENSORS = ("changes", "counts", "thresholds")


@dataclass(frozen=True)
class MapSettings:
    """What is done to relevance grids on the device.

    Attributes:
        normalisation: when the model family's maps are brought to [0, 1].
        neutral_threshold: see `batch_grids`.
        grid_steps: what is done to grids before they are normalised.
        refinement: how heat maps are made to follow the pixels; None: not at all.
        sharpener: makes masks anew with a segmenter; None: there is none.
        cut: how masks are cut on the device; None: that is done later, on the CPU.
    """

    normalisation: Normalisation
    neutral_threshold: float | None = None
    grid_steps: GridSteps = NO_STEPS
    refinement: Refinement | None = None
    sharpener: MapSharpener | None = None
    cut: DeviceCut | None = None


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
        masks.refine_sharpness,
    )


def sample_maps(
    grids: torch.Tensor,
    chosen: Sequence[ImageMaps],
    texts: GridTexts,
    settings: MapSettings,
    *,
    pixels: torch.Tensor | None,
    image_sizes: Sequence[tuple[int, int]],
) -> list[SampleMaps]:
    """Filter, contrast, refine and cut the maps of a batch on their device, and share them out on the CPU.

    Args:
        grids: raw relevance, float32 [maps, grid_height, grid_width], image by image in the order of
            `ImageMaps`.
        chosen: of each image, which of the grids are its own.
        texts: of the grids.
        settings: what is done to the grids.
        pixels: first canvas of each image, uint8 [images, height, width, 3], on the device of the grids;
            None: there are none, and nothing is done that needs them.
        image_sizes: height and width of each original image in pixels.
    """
    if settings.grid_steps.stores_maps:
        grids = as_stored(grids)
    batch = batch_grids(grids, chosen, texts, settings.grid_steps, settings.neutral_threshold)
    ends = np.searchsorted(batch.owners.numpy(), np.arange(len(chosen) + 1)).tolist()
    mask_maps, labels = batch.mask_grids, None
    normalisation: Normalisation | None = settings.normalisation
    if pixels is not None and settings.refinement is not None:
        mask_maps = refined_maps(pixels, mask_maps, batch.owners, settings.refinement, settings.normalisation)
        normalisation = None
    if pixels is not None and settings.sharpener is not None:
        if normalisation is not None:
            mask_maps = heatmaps_of(mask_maps, pixels.shape[1], pixels.shape[2], normalisation)
        sharp = settings.sharpener.sharpened(
            pixels, mask_maps, _accepted_maps(batch, chosen, ends), (grids.shape[1], grids.shape[2])
        )
        mask_maps, labels, normalisation = sharp.heatmaps, sharp.instance_labels, None
    cut = None
    if settings.cut is not None:
        side = settings.cut.max_side
        of_images = [mask_frame(height, width, side) for height, width in image_sizes]
        frames = [of_images[image] for image in batch.owners.tolist()]
        cut = _cut_those_that_fit(mask_maps, frames, settings.cut.rule, normalisation)
    on_cpu = replace(
        _on_the_cpu(grids, batch, mask_maps, cut, is_refined=normalisation is None), instance_labels=labels
    )
    return [
        on_cpu.of_sample(_Places(start, end, first_grid, first_pair), maps, normalisation)
        for (start, end), first_grid, first_pair, maps in zip(
            itertools.pairwise(ends),
            _starts([len(maps.text_rows) for maps in chosen]),
            _starts([_contrasted_texts(maps) ** 2 for maps in chosen]),
            chosen,
            strict=True,
        )
    ]


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)][:-1]


def _contrasted_texts(maps: ImageMaps) -> int:
    """Return the number of an image's texts that have distances: all but the neutral one."""
    return maps.prompt_maps + maps.backgrounds


def _accepted_maps(batch: BatchGrids, chosen: Sequence[ImageMaps], ends: Sequence[int]) -> list[list[int]]:
    """Return for each image the numbers of the maps of prompts that no filter rejects."""
    rejected = np.zeros(len(batch.raw), bool)
    if batch.rejections is not None:
        rejected = batch.rejections.cpu().numpy() > 0
    return [
        [number for number in range(start, start + maps.prompt_maps) if not rejected[number]]
        for start, maps in zip(ends, chosen, strict=False)
    ]


@dataclass(frozen=True)
class _DeviceMasks:
    """Masks that were cut on the device, and for each map of the batch whether it has one."""

    masks: CutMaps
    is_cut: list[bool]


def _cut_those_that_fit(
    mask_maps: torch.Tensor,
    frames: Sequence[tuple[int, int]],
    rule: MaskRule,
    normalisation: Normalisation | None,
) -> _DeviceMasks:
    is_cut = [cost_pixels(frame, mask_maps.shape[1]) <= MAX_CHUNK_PIXELS for frame in frames]
    if all(is_cut):
        return _DeviceMasks(cut_maps(mask_maps, frames, rule, normalisation), is_cut)
    fitting = [number for number, fits in enumerate(is_cut) if fits]
    maps = mask_maps[torch.tensor(fitting, dtype=torch.int64, device=mask_maps.device)]
    return _DeviceMasks(cut_maps(maps, [frames[number] for number in fitting], rule, normalisation), is_cut)


@dataclass(frozen=True)
class _Places:
    """Where the maps of a sample are in those of its batch.

    Attributes:
        start: first of its maps after the grid steps.
        end: end of these.
        first_grid: its first raw grid.
        first_pair: first of the distances between its texts.
    """

    start: int
    end: int
    first_grid: int
    first_pair: int


@dataclass(frozen=True)
class _BatchMaps:
    """The maps of a batch on the CPU.

    Attributes:
        grids: raw relevance of all texts, those included whose maps end with the grid steps.
        distances: between the texts of each image, see `GridTexts`; None: they are not kept.

    The others are those of `SampleMaps`.
    """

    grids: np.ndarray
    distances: np.ndarray | None
    peaks: np.ndarray
    rejections: np.ndarray | None
    mask_maps: np.ndarray | None
    runs: Sequence[MapRuns | None] | None
    instance_labels: np.ndarray | None = None

    def of_sample(self, places: _Places, maps: ImageMaps, normalisation: Normalisation | None) -> SampleMaps:
        """Return the maps of one sample as slices."""
        start, end = places.start, places.end
        runs = () if self.runs is None else self.runs[start:end]
        own_runs = tuple(each for each in runs if each is not None)
        has_runs = self.runs is not None and len(own_runs) == end - start
        # prompts come first, and background texts that compete next, before and after the steps
        grids = self.grids[places.first_grid : places.first_grid + len(maps.text_rows)]
        return SampleMaps(
            grids[: end - start],
            self.peaks[start:end],
            None if self.rejections is None else self.rejections[start:end],
            None if has_runs or self.mask_maps is None else self.mask_maps[start:end],
            maps.map_of_prompt,
            maps.prompt_maps,
            normalisation,
            own_runs if has_runs else None,
            None if self.instance_labels is None else self.instance_labels[start:end],
            grids[maps.prompt_maps :],
            self._distances_of(places, _contrasted_texts(maps)),
        )

    def _distances_of(self, places: _Places, texts: int) -> np.ndarray | None:
        if self.distances is None:
            return None
        return self.distances[places.first_pair : places.first_pair + texts**2].reshape(texts, texts)


def _on_the_cpu(
    grids: torch.Tensor,
    batch: BatchGrids,
    mask_maps: torch.Tensor,
    cut: _DeviceMasks | None,
    *,
    is_refined: bool,
) -> _BatchMaps:
    """Bring to the CPU what the rows of a batch need, by a single copy."""
    tensors = {"grids": grids, "peaks": batch.peaks}
    if batch.distances is not None:
        tensors["distances"] = batch.distances
    if cut is not None:
        tensors |= dict(zip(CUT_TENSORS, cut.masks.tensors, strict=True))
    if mask_maps is not batch.raw and (cut is None or not all(cut.is_cut)):
        # half precision moves a value from 0 to 1 by 2**-12 at most
        tensors["mask_maps"] = mask_maps.half() if is_refined and mask_maps.is_cuda else mask_maps
    if batch.rejections is not None:
        tensors["rejections"] = batch.rejections
    arrays = dict(zip(tensors, in_one_trip(list(tensors.values())), strict=True))
    runs: list[MapRuns | None] | None = None
    if cut is not None:
        found = iter(cut.masks.runs_of(*(arrays[name] for name in CUT_TENSORS)))
        runs = [next(found) if is_cut else None for is_cut in cut.is_cut]
    optional = {name: arrays.get(name) for name in ("distances", "rejections", "mask_maps")}
    return _BatchMaps(grids=arrays["grids"], peaks=arrays["peaks"], runs=runs, **optional)


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
