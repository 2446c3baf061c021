"""How good a label map is: IoU over classes, pixel figures and boundaries, with intervals over images.

What is counted is kept image by image, so that whole images can be resampled: every figure here is a function
of sums over images. Pure functions on numpy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Shaped
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from scipy.sparse import csr_array
from scipy.spatial import cKDTree

from legrad.quality.metrics import Estimate, draws_per_image

BACKGROUND = 0
BOUNDARY_TOLERANCE = 0.0075  # share of the image diagonal
DRAWS_AT_ONCE = 100  # bounds the sums that are held at a time

# Columns of a pixel tally.
COUNTED, KEPT, CORRECT, CORRECT_KEPT, MASKED, HIT, TRUE = range(7)

Sums = Float[np.ndarray, "draws columns"]


@dataclass(frozen=True)
class Overlap:
    """What prediction and truth have in common in one image, class by class, in pixels or in points.

    Attributes:
        class_ids: the classes that occur in either, ascending; 0 is background.
        truth: how many belong to the class.
        predicted: how many are said to.
        both: how many belong and are said to.
    """

    class_ids: Int[np.ndarray, " classes"]
    truth: Int[np.ndarray, " classes"]
    predicted: Int[np.ndarray, " classes"]
    both: Int[np.ndarray, " classes"]


@dataclass(frozen=True)
class OverlapTable:
    """The overlaps of a set of images, aligned.

    Attributes:
        class_ids: the classes that occur in any of them, ascending.
        counts: one row an image; all classes' truth, then all classes' predicted, then all classes' both.
    """

    class_ids: Int[np.ndarray, " classes"]
    counts: csr_array


def label_overlap(
    predicted: Integer[np.ndarray, "height width"],
    truth: Integer[np.ndarray, "height width"],
    counted: Bool[np.ndarray, "height width"],
) -> Overlap:
    """Count the pixels of every class in two label maps.

    Args:
        predicted: class of each pixel, 0 for background.
        truth: the same.
        counted: pixels that count; elsewhere the labels may be anything.
    """
    # sklearn's confusion_matrix takes 50 times as long, and of its cells only margins and diagonal are needed
    labels = [predicted[counted], truth[counted]]
    length = 1 + max((int(part.max(initial=0)) for part in labels), default=0)
    predicted_count, truth_count = (np.bincount(part, minlength=length) for part in labels)
    both = np.bincount(labels[0][labels[0] == labels[1]], minlength=length)
    class_ids = np.flatnonzero(predicted_count + truth_count)
    return Overlap(class_ids, truth_count[class_ids], predicted_count[class_ids], both[class_ids])


def point_overlap(
    class_ids: Int[np.ndarray, " points"],
    is_object: Bool[np.ndarray, " points"],
    is_predicted: Bool[np.ndarray, " points"],
) -> Overlap:
    """Count the points of every class: points said yes to, points predicted, and both.

    Args:
        class_ids: the class that each point was asked for; one place may be asked for several.
        is_object: whether the answer was yes.
        is_predicted: whether the prediction has that class there.

    Returns:
        Counts from which the IoU is yes and predicted / (yes, or no but predicted).

    Source: Benenson and Ferrari, "From colouring-in to pointillism", arXiv:2210.14142, which evaluates by
        the IoU of labelled points in place of pixels.
    """
    found, position = np.unique(class_ids, return_inverse=True)

    def count(chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
        return np.bincount(position[chosen], minlength=len(found))

    return Overlap(
        found.astype(np.intp), count(is_object), count(is_predicted), count(is_object & is_predicted)
    )


def tabulate_overlaps(overlaps: Sequence[Overlap]) -> OverlapTable:
    """Align the overlaps of a set of images, one row each."""
    counts = [np.stack([overlap.truth, overlap.predicted, overlap.both], axis=1) for overlap in overlaps]
    return tabulate_counts(
        np.concatenate([np.zeros((0, 3), dtype=np.intp), *counts]),
        np.concatenate([np.zeros(0, dtype=np.intp), *(overlap.class_ids for overlap in overlaps)]),
        np.repeat(np.arange(len(overlaps)), [len(overlap.class_ids) for overlap in overlaps]),
        len(overlaps),
    )


def tabulate_counts(
    counts: Shaped[np.ndarray, "items 3"],
    class_ids: Int[np.ndarray, " items"],
    images: Int[np.ndarray, " items"],
    image_count: int,
) -> OverlapTable:
    """Align what was counted of classes in images; items of the same class and image are added up.

    Args:
        counts: truth, predicted and both of each item.
        class_ids: the class of each item.
        images: the row of the image that each item belongs to.
        image_count: how many images there are, also such without items.
    """
    found, position = np.unique(class_ids, return_inverse=True)
    columns = position[:, None] + np.arange(3) * len(found)
    cells = (np.repeat(images, 3), columns.ravel())
    values = counts.astype(np.float64).ravel()
    return OverlapTable(found, csr_array((values, cells), shape=(image_count, 3 * len(found))))


def mean_iou(table: OverlapTable, *, background: bool) -> Callable[[Sums], Float[np.ndarray, " draws"]]:
    """The mean over classes of the intersection over union, as a function of summed overlaps.

    One confusion matrix over the whole set, not a mean over images. A class counts where it occurs in the
    truth or in the prediction; where none does the figure is NaN.

    Args:
        table: tells the columns.
        background: whether background is a class like the others.

    Source: Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", IJCV 2015,
        section 4.3.2 (there every class of a fixed list occurs).
    """
    chosen = np.flatnonzero(background | (table.class_ids != BACKGROUND))
    return lambda sums: _mean_of_defined(_class_iou(sums, len(table.class_ids))[:, chosen])


def class_iou(table: OverlapTable) -> dict[int, float]:
    """Intersection over union of every class that occurs, over the whole set."""
    sums = np.asarray(table.counts.sum(axis=0), dtype=np.float64).reshape(1, -1)
    iou = _class_iou(sums, len(table.class_ids))[0]
    pairs = zip(table.class_ids.tolist(), iou.tolist(), strict=True)
    return {class_id: value for class_id, value in pairs if not np.isnan(value)}


def pixel_tally(
    predicted: Integer[np.ndarray, "height width"],
    truth: Integer[np.ndarray, "height width"],
    counted: Bool[np.ndarray, "height width"],
    kept: Bool[np.ndarray, "height width"],
) -> Float[np.ndarray, " columns"]:
    """Count pixels of one image for what `share` divides; the columns are constants of this module.

    Args:
        predicted: class of each pixel, 0 for background and where the prediction does not commit itself.
        truth: class of each pixel.
        counted: pixels that count in the truth.
        kept: pixels for which the prediction commits itself.
    """
    correct, masked = counted & (predicted == truth), counted & (predicted != BACKGROUND)
    tally = np.zeros(7)
    tally[COUNTED] = counted.sum()
    tally[KEPT] = (counted & kept).sum()
    tally[CORRECT] = correct.sum()
    tally[CORRECT_KEPT] = (correct & kept).sum()
    tally[MASKED] = masked.sum()
    tally[HIT] = (masked & correct).sum()
    tally[TRUE] = (counted & (truth != BACKGROUND)).sum()
    return tally


def share(part: int, whole: int) -> Callable[[Sums], Float[np.ndarray, " draws"]]:
    """One column of summed tallies over another; NaN where that is 0."""
    return lambda sums: _ratio(sums[:, part], sums[:, whole])


def bootstrap_sums(
    counts: Float[np.ndarray, "images columns"] | csr_array,
    statistic: Callable[[Sums], Float[np.ndarray, " draws"]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate | None:
    """A function of sums over images, with its interval over resampled sets of images.

    Resamples on which it is NaN are left out.

    Args:
        counts: one row an image.
        statistic: of sums over the rows, for several sets at a time.
        resamples: how many bootstrap samples.
        seed: of numpy's default generator; the same seed and number of images give the same resamples.

    Returns:
        None where the figure is undefined on the whole set.
    """
    values = _resampled(counts, statistic, resamples, seed)
    return _estimate(values, counts.shape[0])


def bootstrap_difference(
    counts: Float[np.ndarray, "images columns"] | csr_array,
    other_counts: Float[np.ndarray, "other_images other_columns"] | csr_array,
    statistic: Callable[[Sums], Float[np.ndarray, " draws"]],
    other_statistic: Callable[[Sums], Float[np.ndarray, " draws"]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate | None:
    """How much more a figure is on one set of predictions than on another of the same images, paired.

    Both are resampled together, image by image, which leaves out what is hard or easy about the images.

    Args:
        counts: one row an image.
        other_counts: of the same images in the same order.
        statistic: of sums over ``counts``.
        other_statistic: of sums over ``other_counts``.
        resamples: how many bootstrap samples.
        seed: of numpy's default generator.

    Returns:
        None where either figure is undefined.

    Raises:
        ValueError: different numbers of images.
    """
    if counts.shape[0] != other_counts.shape[0]:
        raise ValueError(
            f"expected the same images, received {counts.shape[0]} and {other_counts.shape[0]} of them"
        )
    values = _resampled(counts, statistic, resamples, seed)
    other_values = _resampled(other_counts, other_statistic, resamples, seed)
    return _estimate(values - other_values, counts.shape[0])


def boundary_f(
    mask: Bool[np.ndarray, "height width"],
    truth: Bool[np.ndarray, "height width"],
    valid: Bool[np.ndarray, "height width"],
    *,
    tolerance: float = BOUNDARY_TOLERANCE,
) -> float:
    """F-measure of the boundary: harmonic mean of how much of either contour lies near the other.

    A boundary pixel is one of the mask with a neighbour, left, right, above or below, outside of it; the
    frame of the image is no boundary. Boundary pixels of the mask that do not count in the truth are neither
    right nor wrong, but the truth's may be found by them.

    Args:
        mask: predicted pixels.
        truth: pixels of the object.
        valid: pixels that count.
        tolerance: how far is near, as a share of the image diagonal.

    Returns:
        From 0 to 1. Where neither has a boundary 1 if they agree, else 0; where one has none 0.

    Source: Csurka et al., "What is a good evaluation measure for semantic segmentation?", BMVC 2013, section
        2.2, whose tolerance of 0.75 % of the diagonal is the default.
    """
    found, wanted = _boundary_pixels(mask), _boundary_pixels(truth)
    if not len(found) and not len(wanted):
        return float((mask == truth)[valid].all())
    if not len(found) or not len(wanted):
        return 0.0
    reach = tolerance * float(np.hypot(*mask.shape))
    judged = found[valid[tuple(found.T)]]
    precision = _share_near(judged, wanted, reach) if len(judged) else 1.0
    recall = _share_near(wanted, found, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary_pixels(mask: Bool[np.ndarray, "height width"]) -> Int[np.ndarray, "pixels 2"]:
    return np.argwhere(mask & ~binary_erosion(mask, border_value=1))


def _share_near(
    pixels: Int[np.ndarray, "pixels 2"], others: Int[np.ndarray, "others 2"], reach: float
) -> float:
    """Share of pixels with one of the others within reach, in pixels, the reach included."""
    distances, _ = cKDTree(others).query(pixels, distance_upper_bound=reach + 1)
    return float(np.mean(distances <= reach))


def _resampled(
    counts: Float[np.ndarray, "images columns"] | csr_array,
    statistic: Callable[[Sums], Float[np.ndarray, " draws"]],
    resamples: int,
    seed: int,
) -> Float[np.ndarray, " values"]:
    """The figure of the whole set, then of each resample."""
    images = counts.shape[0]
    draws = draws_per_image(images, resamples, seed) if images else np.zeros((resamples, 0))
    everything = np.concatenate([np.ones((1, images)), draws]).astype(np.float64)
    return np.concatenate(
        [
            statistic(np.asarray(everything[start : start + DRAWS_AT_ONCE] @ counts))
            for start in range(0, len(everything), DRAWS_AT_ONCE)
        ]
    )


def _estimate(values: Float[np.ndarray, " values"], images: int) -> Estimate | None:
    """The first value with the interval of all; None where it is undefined."""
    if np.isnan(values[0]):
        return None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Estimate(float(values[0]), float(low), float(high), images)


def _class_iou(sums: Sums, classes: int) -> Float[np.ndarray, "draws classes"]:
    truth, predicted, both = (sums[:, block * classes : (block + 1) * classes] for block in range(3))
    return _ratio(both, truth + predicted - both)


def _ratio(part: Float[np.ndarray, "*shape"], whole: Float[np.ndarray, "*shape"]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return ratio


def _mean_of_defined(values: Float[np.ndarray, "draws classes"]) -> Float[np.ndarray, " draws"]:
    defined = ~np.isnan(values)
    sums: NDArray[np.float64] = np.where(defined, values, 0).sum(axis=1)
    return _ratio(sums, defined.sum(axis=1).astype(np.float64))
