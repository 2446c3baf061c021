"""Metrics of label maps: IoU over classes, pixel shares and boundary F, with bootstrap intervals over images.

Counts are kept for each image, so that whole images can be resampled: every metric is a function of sums over
images. All functions are pure and take numpy arrays.
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
DRAWS_AT_ONCE = 100  # bounds the memory for sums

# Columns of a pixel tally.
COUNTED, KEPT, CORRECT, CORRECT_KEPT, MASKED, HIT, TRUE = range(7)

Sums = Float[np.ndarray, "draws columns"]


@dataclass(frozen=True)
class Overlap:
    """Overlap of prediction and truth in one image for each class, in pixels or in points.

    Attributes:
        class_ids: classes that occur in either, ascending; 0 is background.
        truth: number of pixels or points of the class in the truth.
        predicted: number in the prediction.
        both: number in both.
    """

    class_ids: Int[np.ndarray, " classes"]
    truth: Int[np.ndarray, " classes"]
    predicted: Int[np.ndarray, " classes"]
    both: Int[np.ndarray, " classes"]


@dataclass(frozen=True)
class OverlapTable:
    """Overlaps of a set of images in one table.

    Attributes:
        class_ids: classes that occur in any image, ascending.
        counts: one row for each image; columns are `truth` of all classes, then `predicted`, then `both`.
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
        truth: class of each pixel, 0 for background.
        counted: pixels to include; labels of all others are ignored.
    """
    # scikit-learn's confusion_matrix takes 50 times as long; only its margins and diagonal are needed here.
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
    """Count the labelled points of every class: positive points, predicted points, and both.

    Args:
        class_ids: class that each point is labelled for; one location may have labels for several classes.
        is_object: whether the point belongs to the class (a positive label).
        is_predicted: whether the prediction has that class at the point.

    Returns:
        Counts whose IoU is (positive and predicted) / (positive or predicted).

    Source: Benenson and Ferrari, "From colouring-in to pointillism", arXiv:2210.14142, which uses the IoU of
        labelled points instead of pixels.
    """
    found, position = np.unique(class_ids, return_inverse=True)

    def count(chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
        return np.bincount(position[chosen], minlength=len(found))

    return Overlap(
        found.astype(np.intp), count(is_object), count(is_predicted), count(is_object & is_predicted)
    )


def tabulate_overlaps(overlaps: Sequence[Overlap]) -> OverlapTable:
    """Collect the overlaps of a set of images in a table, one row for each image."""
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
    """Collect counts of classes in images in a table; items of the same class and image are summed.

    Args:
        counts: truth, predicted and both of each item.
        class_ids: class of each item.
        images: row of the image that each item belongs to.
        image_count: number of images, including those without items.
    """
    found, position = np.unique(class_ids, return_inverse=True)
    columns = position[:, None] + np.arange(3) * len(found)
    cells = (np.repeat(images, 3), columns.ravel())
    values = counts.astype(np.float64).ravel()
    return OverlapTable(found, csr_array((values, cells), shape=(image_count, 3 * len(found))))


def mean_iou(table: OverlapTable, *, background: bool) -> Callable[[Sums], Float[np.ndarray, " draws"]]:
    """Return the function from summed overlaps to the mean intersection over union over classes.

    The counts of all images are summed first; it is not a mean over images. Classes that occur neither in the
    truth nor in the prediction are excluded; without any class the result is NaN.

    Args:
        table: defines the columns.
        background: whether background is included as a class.

    Source: Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", IJCV 2015,
        section 4.3.2 (there every class of a fixed list occurs).
    """
    chosen = np.flatnonzero(background | (table.class_ids != BACKGROUND))
    return lambda sums: _mean_of_defined(_class_iou(sums, len(table.class_ids))[:, chosen])


def class_iou(table: OverlapTable) -> dict[int, float]:
    """Return the intersection over union of every class that occurs, over the whole set."""
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
    """Count pixels of one image, to be divided by `share`; the columns are constants of this module.

    Args:
        predicted: class of each pixel, 0 for background and for pixels that the prediction ignores.
        truth: class of each pixel.
        counted: pixels to include, by the truth.
        kept: pixels that the prediction does not ignore.
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
    """Return the function that divides one column of summed tallies by another; NaN if that is 0."""
    return lambda sums: _ratio(sums[:, part], sums[:, whole])


def bootstrap_sums(
    counts: Float[np.ndarray, "images columns"] | csr_array,
    statistic: Callable[[Sums], Float[np.ndarray, " draws"]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate | None:
    """Return a function of sums over images, with its interval over resampled sets of images.

    Resamples on which it is NaN are skipped.

    Args:
        counts: one row for each image.
        statistic: function of sums over rows, for several sets at a time.
        resamples: number of bootstrap samples.
        seed: seed of numpy's default generator; the same seed and number of images give the same resamples.

    Returns:
        None if the value is undefined on the whole set.
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
    """Return the difference of a value between two sets of predictions for the same images, paired.

    Both are resampled together by image, which removes the variance due to hard and easy images.

    Args:
        counts: one row for each image.
        other_counts: counts of the same images in the same order.
        statistic: function of sums over ``counts``.
        other_statistic: function of sums over ``other_counts``.
        resamples: number of bootstrap samples.
        seed: seed of numpy's default generator.

    Returns:
        None if either value is undefined.

    Raises:
        ValueError: the numbers of images differ.
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
    """Return the boundary F-measure: harmonic mean of the shares of either contour that lie near the other.

    A boundary pixel is a pixel of the mask with a 4-neighbour outside of the mask; the border of the image is
    no boundary. Boundary pixels of the mask that are not valid are excluded from precision, but still match
    boundary pixels of the truth.

    Args:
        mask: predicted pixels.
        truth: pixels of the object.
        valid: pixels to include.
        tolerance: maximal distance that is near, as a share of the image diagonal.

    Returns:
        From 0 to 1. If neither has a boundary: 1 if they agree, otherwise 0. If only one has a boundary: 0.

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
    """Return the share of pixels that have one of the others at a distance of at most `reach` pixels."""
    distances, _ = cKDTree(others).query(pixels, distance_upper_bound=reach + 1)
    return float(np.mean(distances <= reach))


def _resampled(
    counts: Float[np.ndarray, "images columns"] | csr_array,
    statistic: Callable[[Sums], Float[np.ndarray, " draws"]],
    resamples: int,
    seed: int,
) -> Float[np.ndarray, " values"]:
    """Return the value of the whole set, then of each resample."""
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
    """Return the first value with the interval of all values; None if it is undefined."""
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
