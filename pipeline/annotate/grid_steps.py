"""What is done to the relevance grids of a batch on the device before they are normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from legrad.inputs import neutral_patches
from legrad.masks.contrast import contrasted_by_image, distances_by_image
from legrad.masks.smoothing import smoothed_grids
from legrad.memory import uploaded
from legrad.text_cache import TextEmbedder
from pipeline.annotate.device_memory import sent
from pipeline.annotate.filters import NO_FILTERS, Filters, filters_of, rejections
from pipeline.annotate.texts import BACKGROUND, NEUTRAL, PROMPT, ImageMaps, images_of_maps, kinds_of_maps
from pipeline.config.masks import MasksConfig
from pipeline.output.stored_grids import STEPS
from pipeline.prompts.sample_prompts import Ensemble


@dataclass(frozen=True)
class Contrast:
    """Contrast between the texts of an image; see `legrad.contrasted_grids`.

    Attributes:
        share: share of the strongest other text's grid that is subtracted, above 0.
        with_prompts: whether prompts that no filter rejects take from each other; otherwise only background
            texts take from them.
    """

    share: float
    with_prompts: bool = True


@dataclass(frozen=True)
class GridSteps:
    """What is done to relevance grids before they are normalised.

    Attributes:
        filters: limits of similarity, peak, foreground contrast and lead.
        smooth: standard deviation of a Gaussian in cells; 0: none.
        contrast: None: no contrast between texts.
        backgrounds_compete: whether background texts still need maps afterwards; otherwise these end here.
        stores_maps: whether maps are stored, so that other masks can be made from them: grids are rounded to
            what is stored of them, and the distances between texts are kept.
        centre: mean embedding of texts of all kinds, for the distances, on the device; None: the origin.
    """

    filters: Filters = NO_FILTERS
    smooth: float = 0.0
    contrast: Contrast | None = None
    backgrounds_compete: bool = True
    stores_maps: bool = False
    centre: torch.Tensor | None = None

    @property
    def needs_distances(self) -> bool:
        """Whether the distances between texts are computed."""
        return self.stores_maps or self.contrast is not None


NO_STEPS = GridSteps()


def grid_steps_of(masks: MasksConfig, contrast_share: float, *, stores_maps: bool = False) -> GridSteps:
    """Return the steps that a configuration asks for.

    Args:
        masks: the configuration's section.
        contrast_share: `masks.contrast`, with null resolved.
        stores_maps: see `GridSteps`.
    """
    contrast = Contrast(contrast_share, masks.contrast_with == "all") if contrast_share else None
    # once background texts have taken their share, competing for pixels too would count them twice
    competes = masks.combine == "argmax" and contrast is None
    return GridSteps(filters_of(masks), masks.smooth, contrast, competes, stores_maps)


def with_centre(steps: GridSteps, texts: Sequence[Ensemble], embedder: TextEmbedder) -> GridSteps:
    """Return the steps with the centre of their distances: the mean embedding of texts of all kinds."""
    if not (steps.needs_distances and texts):
        return steps
    return replace(steps, centre=embedder.embed_ensembles(texts).unit_rows.double().mean(dim=0))


@dataclass(frozen=True)
class GridTexts:
    """The texts of a batch's grids.

    Attributes:
        unit_rows: embedding of each grid's text, [maps, embed_dim], on the device; None: the distances are
            known.
        similarities: cosine of each grid's text and its image, float [maps], on the CPU.
        distances: between the texts of each image but the neutral one, as
            `legrad.masks.contrast.distances_by_image` returns them; None: not known yet.
    """

    unit_rows: torch.Tensor | None
    similarities: np.ndarray
    distances: torch.Tensor | None = None

    def at(self, kept: np.ndarray) -> GridTexts:
        """Return the texts at some rows; the distances are not those of neutral texts, and stay."""
        if self.unit_rows is None:
            return replace(self, similarities=self.similarities[kept])
        rows = uploaded(torch.from_numpy(kept), self.unit_rows.device)
        return GridTexts(self.unit_rows[rows], self.similarities[kept], self.distances)

    def distances_of(self, owners: torch.Tensor, centre: torch.Tensor | None) -> torch.Tensor:
        """Return the distances; raises ValueError if they are neither known nor can be computed."""
        if self.distances is not None:
            return self.distances
        if self.unit_rows is None:
            raise ValueError("the texts have neither embeddings nor distances")
        return distances_by_image(self.unit_rows, owners, centre)


@dataclass(frozen=True)
class BatchGrids:
    """The grids of a batch after the steps, without those of the neutral text.

    Attributes:
        raw: relevance grids, float32 [maps, grid_height, grid_width].
        mask_grids: what masks are made from, as `raw`; the same object where nothing was done to it.
        peaks: maximum of each grid outside the patches that a neutral text claims, float32 [maps].
        rejections: which filter rejects each grid's text, as a position in `filters.STATUSES`, uint8 [maps];
            None: there is no filter.
        owners: for each grid the row of its image, int64 [maps], on the CPU.
        distances: between the texts of each image, background texts included, see `GridTexts`; None: not
            needed.
    """

    raw: torch.Tensor
    mask_grids: torch.Tensor
    peaks: torch.Tensor
    rejections: torch.Tensor | None
    owners: torch.Tensor
    distances: torch.Tensor | None = None

    def at(self, kept: np.ndarray) -> BatchGrids:
        """Return some of the grids, with the distances of all texts.

        Args:
            kept: whether a grid is kept, bool [maps].
        """
        if kept.all():
            return self
        on_cpu = torch.from_numpy(np.flatnonzero(kept))
        on_device = uploaded(on_cpu, self.raw.device)
        raw = self.raw[on_device]
        return BatchGrids(
            raw,
            raw if self.mask_grids is self.raw else self.mask_grids[on_device],
            self.peaks[on_device],
            None if self.rejections is None else self.rejections[on_device],
            self.owners[on_cpu],
            self.distances,
        )


def batch_grids(
    grids: torch.Tensor,
    chosen: Sequence[ImageMaps],
    texts: GridTexts,
    steps: GridSteps,
    neutral_threshold: float | None = None,
) -> BatchGrids:
    """Take the steps in this order: neutral text, filters, smoothing, contrast.

    Filters and peaks are of grids that are not smoothed yet; a prompt that a filter rejects takes nothing
    from the grids of others.

    Args:
        grids: raw relevance, float32 [maps, grid_height, grid_width], image by image in the order of
            `ImageMaps`.
        chosen: of each image, which of the grids are its own.
        texts: of the grids.
        steps: what is done.
        neutral_threshold: grids are zeroed where the neutral text's own grid, brought to [0, 1], exceeds
            this; None: there is no neutral text.
    """
    owners, kinds = images_of_maps(chosen), kinds_of_maps(chosen)
    mask_grids = grids
    if neutral_threshold is not None:
        kept = np.flatnonzero(kinds != NEUTRAL)
        grids, mask_grids = _without_claimed_patches(grids, owners, kept, neutral_threshold)
        owners, kinds, texts = owners[torch.from_numpy(kept)], kinds[kept], texts.at(kept)
    peaks = mask_grids.amax((1, 2))
    rejected, takes = _roles(grids, texts.similarities, owners, kinds, steps)
    mask_grids = smoothed_grids(mask_grids, steps.smooth)
    distances = texts.distances_of(owners, steps.centre) if steps.needs_distances else None
    if steps.contrast is not None and distances is not None:
        mask_grids = contrasted_by_image(
            mask_grids, owners, distances, share=steps.contrast.share, takes=takes
        )
    batch = BatchGrids(grids, mask_grids, peaks, rejected, owners, distances)
    return batch if steps.backgrounds_compete else batch.at(kinds == PROMPT)


def as_stored(grids: torch.Tensor) -> torch.Tensor:
    """Round raw grids to what is stored of them, so that masks from stored maps are the same to the bit.

    Args:
        grids: [maps, grid_height, grid_width].
    """
    peaks = grids.amax((1, 2), keepdim=True)
    shares = (grids / torch.where(peaks > 0, peaks, 1)).clamp(0, 1)
    return torch.round(shares * STEPS) / STEPS * peaks


def _roles(
    grids: torch.Tensor, similarities: np.ndarray, owners: torch.Tensor, kinds: np.ndarray, steps: GridSteps
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return for each grid, on the device: which filter rejects it, and whether it takes from others."""
    if not (steps.filters.reject or steps.contrast):
        return None, None
    columns = [similarities, owners.numpy(), kinds == BACKGROUND]
    sims, owner_column, background_column = sent(
        [column.astype(np.float64) for column in columns], grids.device
    )
    is_background = background_column.bool()
    rejected = None
    if steps.filters.reject:
        rejected = rejections(steps.filters, grids, sims, owner_column.long(), is_background)
    if steps.contrast is None:
        return rejected, None
    takes: torch.Tensor | None = is_background
    if steps.contrast.with_prompts:
        # no filter rejects a background text
        takes = None if rejected is None else rejected == 0
    return rejected, takes


def _without_claimed_patches(
    grids: torch.Tensor, owners: torch.Tensor, kept: np.ndarray, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the grids but the neutral ones; and the same, zeroed where the image's neutral one is high."""
    neutral = torch.bincount(owners).cumsum(0) - 1  # the last map of each image
    claimed = neutral_patches(grids[uploaded(neutral, grids.device)][:, None], threshold)
    rows = torch.from_numpy(kept)
    grids = grids[uploaded(rows, grids.device)]
    return grids, grids.masked_fill(claimed[uploaded(owners[rows], grids.device)], 0)
