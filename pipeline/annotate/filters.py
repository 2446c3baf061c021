"""Filters that reject prompts by similarity and raw grid; decided once, on the device of the grids."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from legrad.masks.thresholds import foreground_contrast
from pipeline.config.masks import MasksConfig
from pipeline.output.schema import OK

# statuses of prompts in the order in which the filters act; `rejections` returns positions in it
STATUSES = (OK, "rejected_similarity", "rejected_peak", "rejected_contrast", "rejected_lead")
# A sample's neighbours in its batch move a score by a rounding error; a score that misses a limit by no more
# than that is always within it.
SIMILARITY_ROUNDING = 1e-5
RELATIVE_ROUNDING = 1e-5


@dataclass(frozen=True)
class Filters:
    """Limits below which a prompt is rejected; None: no limit.

    Attributes:
        min_similarity: of the cosine of image and prompt.
        min_peak: of the maximum of the raw grid.
        min_foreground_contrast: of `legrad.masks.thresholds.foreground_contrast` of the raw grid.
        min_lead: of the similarity, less that of the image's most similar other text: one that has passed the
            other filters, or a background text. A prompt without another text passes.
    """

    min_similarity: float | None = None
    min_peak: float | None = None
    min_foreground_contrast: float | None = None
    min_lead: float | None = None

    @property
    def reject(self) -> bool:
        """Whether there is any limit."""
        return any(limit is not None for limit in astuple(self))


NO_FILTERS = Filters()


def filters_of(masks: MasksConfig) -> Filters:
    """Return the filters of a configuration that act before there are masks: all but `min_area`."""
    return Filters(masks.min_similarity, masks.min_peak, masks.min_foreground_contrast, masks.min_lead)


def rejections(
    filters: Filters,
    grids: torch.Tensor,
    similarities: torch.Tensor,
    owners: torch.Tensor,
    is_background: torch.Tensor,
) -> torch.Tensor:
    """Return for each map which filter rejects its text, without waiting for the device.

    Args:
        filters: at least one.
        grids: raw relevance, [maps, grid_height, grid_width].
        similarities: of each map's text to its image, float64 [maps].
        owners: for each map the row of its image, int64 [maps].
        is_background: for each map whether its text is a background text, which no filter rejects.

    Returns:
        Positions in `STATUSES`, uint8 [maps]; that of the first filter that rejects the text.
    """
    # a prompt whose relevance is not finite becomes an error later
    is_finite = (grids - grids).sum((1, 2)) == 0
    finite = torch.where(is_finite[:, None, None], grids, 0)
    status = torch.zeros(len(grids), dtype=torch.uint8, device=grids.device)

    def reject(which: str, falls_short: torch.Tensor) -> None:
        is_rejected = (status == 0) & falls_short & ~is_background
        status.masked_fill_(is_rejected, STATUSES.index(which))

    if filters.min_similarity is not None:
        reject("rejected_similarity", similarities < filters.min_similarity - SIMILARITY_ROUNDING)
    if filters.min_peak is not None:
        limit = filters.min_peak * (1 - RELATIVE_ROUNDING)
        reject("rejected_peak", finite.amax((1, 2)).double() < limit)
    if filters.min_foreground_contrast is not None:
        limit = filters.min_foreground_contrast * (1 - RELATIVE_ROUNDING)
        reject("rejected_contrast", foreground_contrast(finite).double() < limit)
    if filters.min_lead is not None:
        leads = leads_of(similarities, owners, (status == 0) & is_finite)
        reject("rejected_lead", leads < filters.min_lead - SIMILARITY_ROUNDING)
    return status


def leads_of(similarities: torch.Tensor, owners: torch.Tensor, is_left: torch.Tensor) -> torch.Tensor:
    """Return each similarity less the highest one of another text of the same image that is left.

    Args:
        similarities: of each text to its image, float [texts].
        owners: for each text the row of its image, less than the number of texts, int64 [texts].
        is_left: whether a text counts among the others.

    Returns:
        As `similarities`; infinity for a text without another one.
    """
    counted = similarities.masked_fill(~is_left, -torch.inf)
    best = _highest(counted, owners)
    is_best = counted == best
    # an image may have several texts that are best: each is then the others' best
    bests = torch.zeros_like(owners).scatter_add_(0, owners, is_best.to(owners.dtype))[owners]
    second = _highest(counted.masked_fill(is_best, -torch.inf), owners)
    return similarities - torch.where(is_best & (bests == 1), second, best)


def _highest(values: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Return for each value the highest one of its owner."""
    of_owner = torch.full_like(values, -torch.inf).scatter_reduce_(0, owners, values, "amax")
    return of_owner[owners]
