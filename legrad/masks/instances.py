"""Split a mask into instances where its heat map has several peaks: watershed, seeded by the peaks.

Source: Vincent and Soille, "Watersheds in digital spaces" (1991); Vincent, "Morphological grayscale
    reconstruction in image analysis" (1993), for the peaks that are kept: extended maxima. Both by
    scikit-image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from legrad.errors import MaskError
from legrad.masks.cleaning import EIGHT_NEIGHBOURS
from legrad.masks.rle import Rle, encode_columns, measure_encoded

MOST_INSTANCES = 254  # labels are bytes
# Finer frames take longer and move only the line between two instances.
CELLS_PER_PATCH = 8

FrameSize = tuple[int, int]


@dataclass(frozen=True)
class Splitting:
    """Which peaks of a heat map are instances of their own.

    Attributes:
        min_peak_drop: share in (0, 1) of the highest peak by which a map must fall on the best way from a
            peak to any higher one; otherwise the two are one instance.
        smooth: standard deviation of the Gaussian that the map is smoothed with first, in patches; at least
            0. The texture of an object makes many small peaks, and specks of a mask have peaks, too.
        most: bound on the instances of a mask, from 1 to 254; the highest peaks are kept.

    Raises:
        MaskError: a value is out of range.
    """

    min_peak_drop: float = 0.05
    smooth: float = 0.5
    most: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.min_peak_drop < 1:
            raise MaskError(
                f"instances: expected min_peak_drop between 0 and 1, received {self.min_peak_drop!r}"
            )
        if not 0 <= self.smooth < float("inf"):
            raise MaskError(f"instances: expected smooth of at least 0 patches, received {self.smooth!r}")
        if not 1 <= self.most <= MOST_INSTANCES:
            raise MaskError(f"instances: expected most from 1 to {MOST_INSTANCES}, received {self.most!r}")


DEFAULT_SPLITTING = Splitting()


@dataclass(frozen=True)
class InstanceLabels:
    """Instances of one mask.

    Attributes:
        labels: 0 outside of the mask, i + 1 at the pixels of instance i.
        scores: maximum of the heat map in each instance, from 0 to 1, descending.
    """

    labels: UInt8[np.ndarray, "height width"]
    scores: Float32[np.ndarray, " instances"]


@dataclass(frozen=True)
class EncodedInstances:
    """Instances of one mask in COCO's run-length encoding, in the order of their scores.

    Attributes:
        rles: one disjoint mask for each instance, with at least one pixel.
        areas: number of pixels.
        bboxes_xywh: left, top, width and height in pixels.
        scores: see `InstanceLabels`.
    """

    rles: list[Rle]
    areas: Int64[np.ndarray, " instances"]
    bboxes_xywh: Float32[np.ndarray, "instances 4"]
    scores: Float32[np.ndarray, " instances"]


def split_mask(
    mask: Bool[np.ndarray, "height width"],
    heat: Float32[np.ndarray, "rows columns"],
    grid_size: FrameSize,
    splitting: Splitting = DEFAULT_SPLITTING,
) -> InstanceLabels:
    """Split a mask into instances: one for each peak of its heat map that a valley divides from the others.

    The map is set to zero outside of the mask and smoothed, so that narrow necks of the mask become valleys
    as well and specks have low peaks. Pixels that no flood reaches, such as those specks, go to the nearest
    instance. All of this happens on a frame of at most 8 cells a patch, and the labels are enlarged.

    Args:
        mask: the mask.
        heat: heat map of the same image in any frame, from 0 to 1.
        grid_size: patches of the model along height and width, which are the unit of `splitting.smooth`.
        splitting: which peaks count.

    Returns:
        Disjoint instances whose union is the mask; none for an empty mask.

    Raises:
        MaskError: scikit-image is not installed.
    """
    if not mask.any():
        return InstanceLabels(np.zeros(mask.shape, np.uint8), np.zeros(0, np.float32))
    frame = _working_frame((mask.shape[0], mask.shape[1]), grid_size)
    small_mask, small_heat = _shrunk(mask, frame), _resized(heat, frame)
    smooth = _smoothed(np.where(small_mask, small_heat, 0), grid_size, splitting.smooth)
    return instances_of_labels(_basins(smooth, small_mask, splitting), mask, heat)


def instances_of_labels(
    labels: UInt8[np.ndarray, "rows columns"],
    mask: Bool[np.ndarray, "height width"],
    heat: Float32[np.ndarray, "map_rows map_columns"],
) -> InstanceLabels:
    """Return the instances of a mask that labels in another frame show; see `split_mask`.

    Args:
        labels: 0 or the number of an instance; the mask's pixels without a label go to the nearest one.
        mask: the mask.
        heat: heat map in any frame, from 0 to 1.
    """
    if not mask.any():
        return InstanceLabels(np.zeros(mask.shape, np.uint8), np.zeros(0, np.float32))
    return _by_score(spread_labels(labels, mask), _resized(heat, (mask.shape[0], mask.shape[1])))


def spread_labels(
    labels: UInt8[np.ndarray, "rows columns"], mask: Bool[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width"]:
    """Bring labels to the frame of a mask; its pixels without a label get that of the nearest one.

    Args:
        labels: 0 or the number of an instance, in any frame.
        mask: the pixels that get labels; all others get 0.

    Returns:
        A label for each pixel of the mask: 1 where there are no labels at all.
    """
    import cv2
    from scipy import ndimage

    height, width = mask.shape
    enlarged: np.ndarray = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT) * mask
    is_missing = mask & (enlarged == 0)
    if not is_missing.any():
        return enlarged
    if not enlarged.any():
        return mask.astype(np.uint8)
    nearest = ndimage.distance_transform_edt(enlarged == 0, return_distances=False, return_indices=True)
    spread: np.ndarray = np.where(is_missing, enlarged[tuple(nearest)], enlarged)
    return spread


def encode_instances(instances: InstanceLabels) -> EncodedInstances:
    """Encode instances as masks."""
    columns = np.ascontiguousarray(instances.labels.T)
    rles = [encode_columns(columns == label) for label in range(1, len(instances.scores) + 1)]
    return EncodedInstances(rles, *measure_encoded(rles), instances.scores)


def require_scikit_image() -> None:
    """Raise MaskError where scikit-image, which `split_mask` needs, is not installed."""
    try:
        import skimage  # noqa: F401
    except ImportError as error:
        raise MaskError(
            "splitting masks into instances needs scikit-image, which is not installed: "
            "pip install 'legrad-pipeline[instances]'"
        ) from error


def _working_frame(frame: FrameSize, grid_size: FrameSize) -> FrameSize:
    height, width = (
        min(pixels, CELLS_PER_PATCH * patches) for pixels, patches in zip(frame, grid_size, strict=True)
    )
    return height, width


def _shrunk(mask: Bool[np.ndarray, "height width"], frame: FrameSize) -> Bool[np.ndarray, "rows columns"]:
    """Return the cells of a coarser frame of which at least half belongs to the mask."""
    import cv2

    share = cv2.resize(mask.astype(np.float32), frame[::-1], interpolation=cv2.INTER_AREA)
    # half but for rounding
    inside: np.ndarray = share >= 0.5 - 1e-4
    return inside


def _resized(
    heat: Float32[np.ndarray, "rows columns"], frame: FrameSize
) -> Float32[np.ndarray, "height width"]:
    import cv2

    resized: np.ndarray = cv2.resize(heat, frame[::-1], interpolation=cv2.INTER_LINEAR)
    return resized


def _smoothed(
    heat: Float32[np.ndarray, "rows columns"], grid_size: FrameSize, sigma_patches: float
) -> Float32[np.ndarray, "rows columns"]:
    """Smooth a map with a Gaussian; beyond its edges it is zero, as it is outside of the mask."""
    from scipy import ndimage

    sigmas = [sigma_patches * cells / patches for cells, patches in zip(heat.shape, grid_size, strict=True)]
    smooth: np.ndarray = ndimage.gaussian_filter(heat, sigmas, mode="constant")
    return smooth


def _basins(
    heat: Float32[np.ndarray, "rows columns"], mask: Bool[np.ndarray, "rows columns"], splitting: Splitting
) -> UInt8[np.ndarray, "rows columns"]:
    """Flood a map from its peaks; cells that no flood reaches within the mask stay 0."""
    highest = float(heat.max())
    if not highest > 0:
        return np.zeros(heat.shape, np.uint8)
    require_scikit_image()
    from scipy import ndimage
    from skimage.morphology import local_maxima, reconstruction
    from skimage.segmentation import watershed

    unit_heat = heat / np.float32(highest)
    # Peaks without a valley of this depth between them become one plateau. `h_maxima` finds the same ones,
    # but equal peaks twice.
    lowered = np.maximum(unit_heat - np.float32(splitting.min_peak_drop), 0)
    plateaus = reconstruction(lowered, unit_heat)  # type: ignore[no-untyped-call]
    is_peak = local_maxima(plateaus)  # type: ignore[no-untyped-call]
    seeds, _ = ndimage.label(is_peak, structure=EIGHT_NEIGHBOURS)
    seeds *= mask
    seeds = _highest(seeds, unit_heat, splitting.most)
    flood = partial(watershed, mask=mask, connectivity=2)
    basins: np.ndarray = flood(-unit_heat, seeds)
    return basins.astype(np.uint8)


def _highest(
    seeds: Int32[np.ndarray, "rows columns"], heat: Float32[np.ndarray, "rows columns"], most: int
) -> Int32[np.ndarray, "rows columns"]:
    """Keep the seeds with the highest peaks; of equal ones the first, row by row."""
    from scipy import ndimage

    count = int(seeds.max())
    if count <= most:
        return seeds
    peaks = ndimage.maximum(heat, seeds, np.arange(1, count + 1))
    return _renumbered(seeds, np.argsort(-peaks, kind="stable")[:most] + 1).astype(seeds.dtype)


def _by_score(
    labels: UInt8[np.ndarray, "height width"], heat: Float32[np.ndarray, "height width"]
) -> InstanceLabels:
    from scipy import ndimage

    found = np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1
    scores = ndimage.maximum(heat, labels, found).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    return InstanceLabels(_renumbered(labels, found[order]), scores[order])


def _renumbered(labels: np.ndarray, kept: Int64[np.ndarray, " kept"]) -> np.ndarray:
    """Number the kept labels 1, 2, ... in their order; others become 0."""
    numbers = np.zeros(int(labels.max()) + 1, labels.dtype)
    numbers[kept] = np.arange(1, len(kept) + 1)
    renumbered: np.ndarray = numbers[labels]
    return renumbered
