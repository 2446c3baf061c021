"""How well heat maps localise objects: pixel accuracy, mean IoU, mean average precision, pointing game.

    scores = legrad.localisation_scores(
        legrad.map_localisation(heatmap, truth) for heatmap, truth in zip(heatmaps, masks)
    )

One map is measured at a time, at the size of its mask, so that a set of any length takes no memory; the
measurements of each map are plain numbers, which can be stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from legrad.arguments import elements, shown
from legrad.errors import InputError
from legrad.quality.metrics import average_precision_of


@dataclass(frozen=True)
class MapLocalisation:
    """One heat map against the mask of its object, over valid pixels.

    Attributes:
        true_positives: pixels of the object that the map, cut at the threshold, covers.
        false_positives: other pixels that it covers.
        false_negatives: pixels of the object that it does not cover.
        true_negatives: other pixels that it does not cover.
        average_precision: of the map as a ranking of pixels; None if no pixel belongs to the object.
        two_class_average_precision: of the scores of both classes, heat for the object and 1 - heat for the
            rest, as one ranking.
        is_pointing_hit: whether the hottest pixel lies on the object; among equal ones, the first in
            row-major order.

    Example:
        >>> heatmap = torch.tensor([[0.9, 0.8], [0.2, 0.0]])
        >>> measured = legrad.map_localisation(heatmap, heatmap > 0.85)
        >>> measured.iou, measured.is_pointing_hit
        (0.5, True)
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int
    average_precision: float | None
    two_class_average_precision: float
    is_pointing_hit: bool

    @property
    def iou(self) -> float:
        """Intersection over union of the object; 1 if neither has a pixel."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives + self.false_negatives)


@dataclass(frozen=True)
class LocalisationScores:
    """Scores of a set of heat maps; all from 0 to 1, higher is better.

    Attributes:
        maps: number of maps.
        pixel_accuracy: share of the valid pixels of all maps that are labelled right.
        mean_iou: mean of two IoU, that of objects and that of the rest, each over the pixels of all maps.
        mean_average_precision: mean of `MapLocalisation.two_class_average_precision` over maps.
        foreground_iou: mean of `MapLocalisation.iou` over maps.
        average_precision: mean of `MapLocalisation.average_precision` over the maps with an object, or None.
        pointing_game: share of the maps whose hottest pixel lies on the object.

    Source: the first three are those of Chefer et al., "Transformer Interpretability Beyond Attention
        Visualization", CVPR 2021, section 4, as their code computes them
        (https://github.com/hila-chefer/Transformer-Explainability, `utils/metrices.py`). Pointing game: Zhang
        et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, section 4.1, without margin.

    Example:
        >>> truth = torch.tensor([[True, False], [True, False]])
        >>> scores = legrad.localisation_scores([legrad.map_localisation(truth.float(), truth)])
        >>> scores.maps, scores.pixel_accuracy, scores.mean_iou, scores.pointing_game
        (1, 1.0, 1.0, 1.0)
    """

    maps: int
    pixel_accuracy: float
    mean_iou: float
    mean_average_precision: float
    foreground_iou: float
    average_precision: float | None
    pointing_game: float


def map_localisation(
    heatmap: Float[np.ndarray, "height width"] | Float[Tensor, "height width"],
    truth: Bool[np.ndarray, "height width"] | Bool[Tensor, "height width"],
    valid: Bool[np.ndarray, "height width"] | Bool[Tensor, "height width"] | None = None,
    *,
    threshold: float = 0.5,
) -> MapLocalisation:
    """Measure one heat map against the mask of its object.

    Args:
        heatmap: values from 0 to 1, at the size of the mask; `legrad.heatmaps_of` makes it.
        truth: pixels of the object.
        valid: pixels that count; None: all.
        threshold: the map covers the pixels that exceed it.

    Returns:
        Plain numbers, of which `localisation_scores` makes the scores of a set.

    Raises:
        InputError: shapes or dtypes differ from those expected, a value is not from 0 to 1, or no pixel is
            valid.

    Example:
        >>> heatmap = torch.tensor([[0.9, 0.8], [0.2, 0.0]])
        >>> truth = torch.tensor([[True, False], [False, False]])
        >>> measured = legrad.map_localisation(heatmap, truth, threshold=0.5)
        >>> measured.true_positives, measured.false_positives
        (1, 1)
    """
    heat, mask = _array(heatmap), _array(truth)
    counted = np.ones(mask.shape, dtype=bool) if valid is None else _array(valid)
    _check(heat, mask, counted)
    values, labels = heat[counted], mask[counted]
    covered = values > threshold
    return MapLocalisation(
        true_positives=int((covered & labels).sum()),
        false_positives=int((covered & ~labels).sum()),
        false_negatives=int((~covered & labels).sum()),
        true_negatives=int((~covered & ~labels).sum()),
        average_precision=average_precision_of(labels, values) if labels.any() else None,
        two_class_average_precision=average_precision_of(
            np.concatenate([~labels, labels]), np.concatenate([1 - values, values])
        ),
        is_pointing_hit=bool(labels[values.argmax()]),
    )


def localisation_scores(maps: Iterable[MapLocalisation]) -> LocalisationScores:
    """Return the scores of a set of heat maps.

    Args:
        maps: measurements of the maps, one after the other; an iterator is read once.

    Raises:
        InputError: there is no map.

    Example:
        >>> heatmaps = legrad.minmax_normalise(grids)
        >>> truths = grids > 0.5 * grids.amax(dim=(1, 2), keepdim=True)
        >>> measured = map(legrad.map_localisation, heatmaps, truths)  # one map at a time
        >>> legrad.localisation_scores(measured).pointing_game
        1.0
    """
    count, with_object = 0, 0
    pixels = np.zeros(4, dtype=np.int64)
    sums = np.zeros(4)
    for each in elements(maps, "maps", "measurements"):
        if not isinstance(each, MapLocalisation):
            raise InputError(f"maps[{count}]: expected what map_localisation returns, received {shown(each)}")
        count += 1
        with_object += each.average_precision is not None
        pixels += (each.true_positives, each.false_positives, each.false_negatives, each.true_negatives)
        sums += (
            each.two_class_average_precision,
            each.iou,
            each.average_precision or 0.0,
            each.is_pointing_hit,
        )
    if not count:
        raise InputError("maps: expected at least one map, received none")
    hit, false_alarm, missed, rejected = pixels.tolist()
    wrong = false_alarm + missed
    return LocalisationScores(
        maps=count,
        pixel_accuracy=_ratio(hit + rejected, hit + rejected + wrong),
        mean_iou=(_ratio(hit, hit + wrong) + _ratio(rejected, rejected + wrong)) / 2,
        mean_average_precision=float(sums[0] / count),
        foreground_iou=float(sums[1] / count),
        average_precision=float(sums[2] / with_object) if with_object else None,
        pointing_game=float(sums[3] / count),
    )


def _array(values: np.ndarray | Tensor) -> np.ndarray:
    if not isinstance(values, Tensor | np.ndarray):
        raise InputError(f"heatmap, truth, valid: expected tensors or arrays, received {shown(values)}")
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _check(heat: np.ndarray, mask: np.ndarray, counted: np.ndarray) -> None:
    if heat.ndim != 2 or heat.shape != mask.shape or heat.shape != counted.shape:
        raise InputError(
            "heatmap, truth, valid: expected [height, width] of one size, received "
            f"{list(heat.shape)}, {list(mask.shape)} and {list(counted.shape)}"
        )
    if mask.dtype != np.bool_ or counted.dtype != np.bool_:
        raise InputError(f"truth, valid: expected truth values, received {mask.dtype} and {counted.dtype}")
    if not counted.any():
        raise InputError("valid: expected at least one valid pixel, received none")
    if not np.issubdtype(heat.dtype, np.floating) or not ((heat >= 0) & (heat <= 1)).all():
        raise InputError(
            "heatmap: expected floating-point values from 0 to 1, received others; legrad.heatmaps_of "
            "normalises grids"
        )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
