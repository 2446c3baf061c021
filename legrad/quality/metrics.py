"""Metrics of heat maps: localisation against ground truth, recognition against labels, bootstrap intervals.

All functions are pure and take numpy arrays. A *pair* is one (image, prompt) with its heat map, its ground
truth and its valid pixels: ``valid`` is False where the ground truth is undecided (COCO's "ignore", VOC's
255), and such pixels are excluded from every metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % percentile-bootstrap interval.

    Attributes:
        value: the value on the whole set.
        low: 2.5th percentile over the resamples.
        high: 97.5th percentile over the resamples.
        images: number of images in the set.
    """

    value: float
    low: float
    high: float
    images: int


def pointing_hits(
    heatmaps: Float[np.ndarray, "pairs height width"],
    truth: Bool[np.ndarray, "pairs height width"],
    valid: Bool[np.ndarray, "pairs height width"],
) -> Bool[np.ndarray, " pairs"]:
    """Pointing game: whether the hottest valid pixel lies on the object, without any tolerance.

    Ties go to the first pixel in row-major order, so a constant map points at the first valid pixel.

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, section 4.1
        (there a margin of 15 pixels is allowed; here none).
    """
    candidates = np.where(valid, heatmaps, -np.inf).reshape(len(heatmaps), -1)
    hottest = candidates.argmax(axis=1)
    hits: NDArray[np.bool_] = (truth & valid).reshape(len(truth), -1)[np.arange(len(truth)), hottest]
    return hits


def foreground_iou(
    masks: Bool[np.ndarray, "pairs height width"],
    truth: Bool[np.ndarray, "pairs height width"],
    valid: Bool[np.ndarray, "pairs height width"],
) -> Float[np.ndarray, " pairs"]:
    """Return the intersection over union of the foreground over valid pixels; 1 if both masks are empty."""
    intersection = (masks & truth & valid).sum(axis=(1, 2))
    union = ((masks | truth) & valid).sum(axis=(1, 2))
    return _ratio_or_one(intersection, union)


def iou_at_thresholds(
    heatmaps: Float[np.ndarray, "pairs height width"],
    truth: Bool[np.ndarray, "pairs height width"],
    valid: Bool[np.ndarray, "pairs height width"],
    thresholds: Float[np.ndarray, " thresholds"],
) -> Float[np.ndarray, "pairs thresholds"]:
    """Return the foreground IoU of ``heatmap > threshold`` for every threshold, from one histogram per map.

    Args:
        heatmaps: maps on the scale of the thresholds.
        truth: pixels of the object.
        valid: pixels to include.
        thresholds: ascending.

    Raises:
        ValueError: the thresholds do not ascend.
    """
    if (np.diff(thresholds) <= 0).any():
        raise ValueError(f"expected strictly ascending thresholds, received {thresholds.tolist()}")
    bins = np.searchsorted(thresholds.astype(heatmaps.dtype), heatmaps, side="left")
    inside = _pixels_above(bins, truth & valid, len(thresholds))
    outside = _pixels_above(bins, ~truth & valid, len(thresholds))
    truth_area = (truth & valid).sum(axis=(1, 2))[:, None]
    return _ratio_or_one(inside, truth_area + outside)


def best_threshold(
    iou: Float[np.ndarray, "pairs thresholds"], thresholds: Float[np.ndarray, " thresholds"]
) -> tuple[float, int]:
    """Return the threshold with the highest mean IoU over the whole set, and its column.

    As it is chosen on the same pairs that it is reported for, its IoU is an upper bound for any threshold
    fixed in advance. Ties go to the lowest threshold.
    """
    column = int(iou.mean(axis=0).argmax())
    return float(thresholds[column]), column


def average_precision(
    heatmap: Float[np.ndarray, "height width"],
    truth: Bool[np.ndarray, "height width"],
    valid: Bool[np.ndarray, "height width"],
) -> float:
    """Return the average precision of the map as a ranking of all valid pixels, without subsampling.

    Only the order of the values matters, so a map and its min-max normalisation have the same value. As in
    scikit-learn, it is the precision at every distinct value, weighted by the recall that this value adds.

    Raises:
        ValueError: no valid pixel belongs to the object, so that the value is undefined.
    """
    labels = truth[valid]
    if not labels.any():
        raise ValueError(
            f"expected at least one valid pixel of the object, received none in {valid.sum()} valid pixels"
        )
    return average_precision_of(labels, heatmap[valid])


def own_object_preference(
    heatmaps: Float[np.ndarray, "2 height width"],
    truth: Bool[np.ndarray, "2 height width"],
    valid: Bool[np.ndarray, "2 height width"],
) -> Float[np.ndarray, " 2"]:
    """Compare the mean heat of each of two prompts' maps on its own object and on the other one.

    Args:
        heatmaps: normalised maps of the two prompts of one image.
        truth: the two objects, in the same order.
        valid: pixels to include.

    Returns:
        1 if the own object is hotter, 0 if the other one is, 0.5 if both are equal. The mean is 0.5 for maps
        that do not depend on the prompt.

    Raises:
        ValueError: an object has no valid pixel.
    """
    objects = (truth & valid).reshape(2, -1).astype(np.float64)
    areas = objects.sum(axis=1)
    if (areas == 0).any():
        raise ValueError(f"expected two objects with valid pixels, received areas {areas.tolist()}")
    mean_heat = heatmaps.reshape(2, -1).astype(np.float64) @ objects.T / areas
    own = np.diagonal(mean_heat)
    other = np.diagonal(mean_heat[:, ::-1])
    return np.where(np.isclose(own, other, rtol=1e-6, atol=1e-12), 0.5, own > other).astype(np.float64)


def top1_hits(
    scores: Float[np.ndarray, "images classes"], present: Bool[np.ndarray, "images classes"]
) -> Bool[np.ndarray, " images"]:
    """Return whether the highest-scoring class is in the image; ties go to the lower class index."""
    hits: NDArray[np.bool_] = present[np.arange(len(scores)), scores.argmax(axis=1)]
    return hits


def recall_at_present_count(
    scores: Float[np.ndarray, "images classes"], present: Bool[np.ndarray, "images classes"]
) -> Float[np.ndarray, " images"]:
    """Return R@n: the share of an image's n present classes that are among its n highest-scoring classes.

    Ties go to the lower class index.

    Raises:
        ValueError: no class is present in one of the images.
    """
    counts = present.sum(axis=1)
    if (counts == 0).any():
        raise ValueError(f"expected a present class in every image, image {int(counts.argmin())} has none")
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked_present = np.take_along_axis(present, order, axis=1)
    within = np.arange(scores.shape[1]) < counts[:, None]
    recall: NDArray[np.float64] = (ranked_present & within).sum(axis=1) / counts
    return recall


def mean_average_precision(
    scores: Float[np.ndarray, "images classes"], present: Bool[np.ndarray, "images classes"]
) -> float:
    """Return mAP: average precision of ranking images by a class's score, averaged over occurring classes.

    Raises:
        ValueError: no class occurs in any image.
    """
    occurring = present.any(axis=0)
    if not occurring.any():
        raise ValueError(
            f"expected a class that occurs, received {present.shape[1]} classes without any image"
        )
    columns = np.flatnonzero(occurring)
    return float(np.mean([average_precision_of(present[:, column], scores[:, column]) for column in columns]))


def presence_auroc(
    scores: Float[np.ndarray, "images classes"], present: Bool[np.ndarray, "images classes"]
) -> float:
    """Return the AUROC of present against absent classes, over all (image, class) scores pooled.

    Raises:
        ValueError: no class is present, none is absent, or a score is not finite.

    Source: Mann and Whitney (1947): the share of (present, absent) pairs in which the present class has the
        higher score; ties count half.
    """
    from scipy.stats import rankdata

    if present.all() or not present.any():
        raise ValueError("expected present and absent classes, received only one of the two")
    if not np.isfinite(scores).all():
        raise ValueError("expected finite scores, received NaN or infinity")
    positives = int(present.sum())
    wins = float(rankdata(scores, axis=None)[present.ravel()].sum()) - positives * (positives + 1) / 2
    return wins / (positives * (present.size - positives))


def bootstrap_mean(
    values: Float[np.ndarray, " pairs"],
    image_index: Int[np.ndarray, " pairs"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the mean over pairs; whole images are resampled, as pairs of one image are not independent.

    Args:
        values: one value for each pair.
        image_index: the image of each pair; any integers.
        resamples: number of bootstrap samples.
        seed: seed of numpy's default generator; the same seed gives the same interval.

    Raises:
        ValueError: there is no pair.
    """
    if not len(values):
        raise ValueError("expected at least one pair, received none")
    images, image_of_pair = np.unique(image_index, return_inverse=True)
    sums = np.bincount(image_of_pair, weights=values)
    counts = np.bincount(image_of_pair)
    draws = draws_per_image(len(images), resamples, seed)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(np.mean(values)), float(low), float(high), len(images))


def bootstrap_statistic(
    statistic: Callable[[NDArray[np.intp]], float],
    image_count: int,
    *,
    resamples: int = 100,
    seed: int = 0,
) -> Estimate:
    """Return a statistic of a set of images, with its interval over resampled sets.

    A resample on which the statistic is undefined (it raises ValueError) is skipped.

    Args:
        statistic: function from the row numbers of a set of images, with repetitions, to the value.
        image_count: number of images.
        resamples: number of bootstrap samples.
        seed: seed of numpy's default generator.

    Raises:
        ValueError: the statistic is undefined on the whole set.
    """
    value = statistic(np.arange(image_count))
    draws = draws_per_image(image_count, resamples, seed)
    resampled = [value]
    for draw in draws:
        try:
            resampled.append(statistic(np.repeat(np.arange(image_count), draw)))
        except ValueError:
            continue
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value, float(low), float(high), image_count)


def draws_per_image(image_count: int, resamples: int, seed: int) -> Int[np.ndarray, "resamples images"]:
    """Draw how often each image occurs in each resample; each resample has as many images as the set."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(image_count, np.full(image_count, 1.0 / image_count), size=resamples)


def average_precision_of(labels: Bool[np.ndarray, " items"], scores: Float[np.ndarray, " items"]) -> float:
    """Return the average precision of a ranking with at least one positive label; ties share a precision."""
    positives, negatives = np.sort(scores[labels]), np.sort(scores[~labels])
    true_alarms = len(positives) - np.searchsorted(positives, positives, side="left")
    false_alarms = len(negatives) - np.searchsorted(negatives, positives, side="left")
    return float(np.mean(true_alarms / (true_alarms + false_alarms)))


def _pixels_above(
    bins: Int[np.ndarray, "pairs height width"], counted: Bool[np.ndarray, "pairs height width"], count: int
) -> Int[np.ndarray, "pairs thresholds"]:
    """Count the pixels above each threshold for every pair: those whose bin number exceeds its column."""
    pair_of_pixel = np.arange(len(bins))[:, None, None] * (count + 1)
    histogram = np.bincount((pair_of_pixel + bins)[counted], minlength=len(bins) * (count + 1))
    at_least = histogram.reshape(len(bins), count + 1)[:, ::-1].cumsum(axis=1)[:, ::-1]
    return at_least[:, 1:]


def _ratio_or_one(
    intersection: Int[np.ndarray, "*shape"], union: Int[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Return intersection over union; 1 for two empty sets."""
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)
