"""Where label maps are wrong: at outlines, inside objects, in the background; on small and large objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8
from scipy.ndimage import distance_transform_edt

from pipeline.output.label_map import BACKGROUND_LABEL, IGNORED_LABEL

OUTLINE_PIXELS = 6
SMALL_SHARE = 0.06


@dataclass(frozen=True)
class ErrorProfile:
    """Shares of pixels that are wrong, and mean IoU by size of the objects; ignored pixels do not count.

    Attributes:
        at_outlines: of the pixels within OUTLINE_PIXELS of an outline of the truth.
        missed: of the other object pixels, those called background.
        confused: of the other object pixels, those called another class.
        invented: of the other background pixels, those called a class.
        small_iou: mean over the classes of scenes that cover less than SMALL_SHARE of theirs.
        large_iou: mean over the others.
    """

    at_outlines: float
    missed: float
    confused: float
    invented: float
    small_iou: float
    large_iou: float


def error_profile(
    predicted: Mapping[str, UInt8[np.ndarray, "_ _"]], truth: Mapping[str, UInt8[np.ndarray, "_ _"]]
) -> ErrorProfile:
    """Compare label maps with the truth; ignored pixels of a label map are background."""
    pairs = [(_committed(predicted.get(key), labels), labels) for key, labels in truth.items()]
    wrong, counted = (
        np.sum(counts, axis=0) for counts in zip(*(_errors(*pair) for pair in pairs), strict=True)
    )
    ious = [found for pair in pairs for found in _object_ious(*pair)]
    by_size = [
        float(np.mean([iou for share, iou in ious if (share < SMALL_SHARE) == is_small] or [np.nan]))
        for is_small in (True, False)
    ]
    return ErrorProfile(*(wrong / np.maximum(counted, 1)).tolist(), *by_size)


def _committed(found: np.ndarray | None, labels: np.ndarray) -> np.ndarray:
    if found is None:
        return np.zeros_like(labels)
    return np.where(found == IGNORED_LABEL, BACKGROUND_LABEL, found)


def _errors(found: np.ndarray, labels: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the numbers of wrong pixels and of all pixels: at outlines, missed, confused, invented."""
    counts, is_object = labels != IGNORED_LABEL, labels != BACKGROUND_LABEL
    at_outline, is_found = _near_outlines(labels), found != BACKGROUND_LABEL
    inside, outside = counts & ~at_outline & is_object, counts & ~at_outline & ~is_object
    cases = (
        (counts & at_outline, found != labels),
        (inside, ~is_found),
        (inside, is_found & (found != labels)),
        (outside, is_found),
    )
    return [int((place & error).sum()) for place, error in cases], [int(place.sum()) for place, _ in cases]


def _near_outlines(labels: UInt8[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    differs = [
        np.pad(np.diff(labels.astype(int), axis=axis) != 0, [(0, axis == 0), (0, axis == 1)])
        for axis in (0, 1)
    ]
    is_outline: np.ndarray = differs[0] | differs[1]
    if not is_outline.any():
        return is_outline
    distances: np.ndarray = distance_transform_edt(~is_outline)
    return distances < OUTLINE_PIXELS


def _object_ious(found: np.ndarray, labels: np.ndarray) -> Iterator[tuple[float, float]]:
    """Yield the share of the scene and the IoU of each class in it."""
    counts = labels != IGNORED_LABEL
    for label in np.setdiff1d(np.unique(labels), (BACKGROUND_LABEL, IGNORED_LABEL)):
        is_there, is_found = labels == label, (found == label) & counts
        yield float(is_there.mean()), float((is_there & is_found).sum() / (is_there | is_found).sum())
