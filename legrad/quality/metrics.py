"""How good a map is: localisation against ground truth, recognition against labels, and how sure we are.

Everything here is a pure function on numpy arrays. A *pair* is one (image, prompt) with its heat map, its
ground truth and the pixels that count: ``valid`` is False where the annotator of the ground truth did not
decide (COCO's "ignore", VOC's 255), and such pixels take part in nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % percentile-bootstrap interval.

    Attributes:
        value: the figure on the whole set.
        low: 2.5th percentile over the resamples.
        high: 97.5th percentile over the resamples.
        images: how many images it rests on.
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
    """Intersection over union of the foreground, over valid pixels; 1 where both masks are empty there."""
    intersection = (masks & truth & valid).sum(axis=(1, 2))
    union = ((masks | truth) & valid).sum(axis=(1, 2))
    return _ratio_or_one(intersection, union)


def iou_at_thresholds(
    heatmaps: Float[np.ndarray, "pairs height width"],
    truth: Bool[np.ndarray, "pairs height width"],
    valid: Bool[np.ndarray, "pairs height width"],
    thresholds: Float[np.ndarray, " thresholds"],
) -> Float[np.ndarray, "pairs thresholds"]:
    """Foreground IoU of ``heatmap > threshold`` for every threshold, from one histogram a map.

    Args:
        heatmaps: maps on the scale of the thresholds.
        truth: pixels of the object.
        valid: pixels that count.
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
    """The one threshold with the highest mean IoU over the whole set, and its column.

    It is chosen on the very pairs it is reported for, so its IoU is an upper bound of what a threshold fixed
    beforehand would reach. Ties go to the lowest threshold.
    """
    column = int(iou.mean(axis=0).argmax())
    return float(thresholds[column]), column


def average_precision(
    heatmap: Float[np.ndarray, "height width"],
    truth: Bool[np.ndarray, "height width"],
    valid: Bool[np.ndarray, "height width"],
) -> float:
    """Average precision of the map as a ranking of all valid pixels; no pixel is subsampled.

    Only the order of the values matters, so a map and its min-max normalisation have the same one. The
    definition is scikit-learn's: precision at every distinct value, weighted by the recall it adds.

    Raises:
        ValueError: no valid pixel belongs to the object, and the figure is undefined.
    """
    labels = truth[valid]
    if not labels.any():
        raise ValueError(
            f"expected at least one valid pixel of the object, received {valid.sum()} without any"
        )
    return _average_precision(labels, heatmap[valid])


def own_object_preference(
    heatmaps: Float[np.ndarray, "2 height width"],
    truth: Bool[np.ndarray, "2 height width"],
    valid: Bool[np.ndarray, "2 height width"],
) -> Float[np.ndarray, " 2"]:
    """Whether each of two prompts' maps is, on average, hotter on its own object than on the other's.

    Args:
        heatmaps: normalised maps of the two prompts of one image.
        truth: the two objects, in the same order.
        valid: pixels that count.

    Returns:
        1 own object, 0 the other's, 0.5 where both are equally hot. Maps that ignore the prompt average 0.5.

    Raises:
        ValueError: an object without any valid pixel.
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
    """Whether the highest-scoring class is in the image; ties go to the lower class index."""
    hits: NDArray[np.bool_] = present[np.arange(len(scores)), scores.argmax(axis=1)]
    return hits


def recall_at_present_count(
    scores: Float[np.ndarray, "images classes"], present: Bool[np.ndarray, "images classes"]
) -> Float[np.ndarray, " images"]:
    """R@n: the share of an image's n present classes that are among its n highest-scoring ones.

    Ties go to the lower class index.

    Raises:
        ValueError: an image in which no class is present.
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
    """mAP: average precision of ranking the images by a class's score, averaged over the classes that occur.

    Raises:
        ValueError: no class occurs in any image.
    """
    occurring = present.any(axis=0)
    if not occurring.any():
        raise ValueError(
            f"expected a class that occurs, received {present.shape[1]} classes without any image"
        )
    columns = np.flatnonzero(occurring)
    return float(np.mean([_average_precision(present[:, column], scores[:, column]) for column in columns]))


def presence_auroc(
    scores: Float[np.ndarray, "images classes"], present: Bool[np.ndarray, "images classes"]
) -> float:
    """AUROC of telling present from absent classes, over all (image, class) scores pooled.

    Raises:
        ValueError: nothing is present, or nothing is absent.
    """
    if present.all() or not present.any():
        raise ValueError("expected present and absent classes, received one kind alone")
    return float(roc_auc_score(present.ravel(), scores.ravel()))


def bootstrap_mean(
    values: Float[np.ndarray, " pairs"],
    image_index: Int[np.ndarray, " pairs"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """The mean over pairs; whole images are resampled, since an image's pairs are not independent.

    Args:
        values: one figure a pair.
        image_index: the image of each pair; any integers.
        resamples: how many bootstrap samples.
        seed: of numpy's default generator; the same seed gives the same interval.

    Raises:
        ValueError: no pair at all.
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
    """Any statistic of a set of images, with its interval over resampled sets.

    A resample on which the statistic is undefined (it raises ValueError) is left out.

    Args:
        statistic: takes the row numbers of a set of images, repeats included; gives the figure.
        image_count: how many images there are.
        resamples: how many bootstrap samples.
        seed: of numpy's default generator.

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
    """How often each image stands in each resample; each resample has as many images as the set."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(image_count, np.full(image_count, 1.0 / image_count), size=resamples)


def _average_precision(labels: Bool[np.ndarray, " items"], scores: Float[np.ndarray, " items"]) -> float:
    """Average precision of a ranking with a positive label at least; equal scores stand or fall together."""
    # scikit-learn's own function takes several times as long, most of it for checks.
    positives, negatives = np.sort(scores[labels]), np.sort(scores[~labels])
    true_alarms = len(positives) - np.searchsorted(positives, positives, side="left")
    false_alarms = len(negatives) - np.searchsorted(negatives, positives, side="left")
    return float(np.mean(true_alarms / (true_alarms + false_alarms)))


def _pixels_above(
    bins: Int[np.ndarray, "pairs height width"], counted: Bool[np.ndarray, "pairs height width"], count: int
) -> Int[np.ndarray, "pairs thresholds"]:
    """For every pair and threshold, how many of the counted pixels lie above it (bin number > its column)."""
    pair_of_pixel = np.arange(len(bins))[:, None, None] * (count + 1)
    histogram = np.bincount((pair_of_pixel + bins)[counted], minlength=len(bins) * (count + 1))
    at_least = histogram.reshape(len(bins), count + 1)[:, ::-1].cumsum(axis=1)[:, ::-1]
    return at_least[:, 1:]


def _ratio_or_one(
    intersection: Int[np.ndarray, "*shape"], union: Int[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Intersection over union; two empty sets agree entirely."""
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)
