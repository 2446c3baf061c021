"""Sharpen masks with a promptable segmenter: it gets points and a box, and offers masks to choose from.

The points are peaks of a heat map and the box is that of its own mask; the candidate that agrees best with
this mask replaces it, and one that disagrees does not.

Source: Kirillov et al., "Segment Anything" (arXiv:2304.02643), for segmenters of this kind; see
    `legrad.masks.sam` for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from legrad.errors import MaskError
from legrad.masks.instances import DEFAULT_SPLITTING, FrameSize, Splitting, split_mask


@dataclass(frozen=True)
class SegmenterPrompt:
    """What shows a segmenter one object, in pixels of the image from its top left corner.

    Attributes:
        points_xy: places, at least one.
        is_object: whether each place belongs to the object.
        box_xyxy: left, top, right and bottom edge of a box around the object.
    """

    points_xy: Float32[np.ndarray, "points 2"]
    is_object: Bool[np.ndarray, " points"]
    box_xyxy: Float32[np.ndarray, " 4"]


@dataclass(frozen=True)
class MaskCandidates:
    """What a segmenter offers for one prompt.

    Attributes:
        masks: at least one, in the frame of the image.
        scores: the segmenter's own estimate of the quality of each.
    """

    masks: Bool[np.ndarray, "candidates height width"]
    scores: Float32[np.ndarray, " candidates"]


@runtime_checkable
class PromptableSegmenter(Protocol):
    """Cuts out what points and boxes show."""

    def segment(
        self, image: UInt8[np.ndarray, "height width 3"], prompts: Sequence[SegmenterPrompt]
    ) -> list[MaskCandidates]:
        """Return the candidates of each prompt.

        Args:
            image: RGB.
            prompts: what is to be cut out; may be empty.
        """


@dataclass(frozen=True)
class Sharpening:
    """How masks are sharpened.

    Attributes:
        grid_size: patches of the model along height and width.
        min_iou: IoU in [0, 1] of a candidate and the map's own mask, below which the own mask stays.
        is_split: whether each instance of a mask is a prompt of its own; otherwise each mask is one, with a
            point for each instance.
        splitting: how masks are split into instances.

    Raises:
        MaskError: a value is out of range.
    """

    grid_size: FrameSize
    min_iou: float = 0.5
    is_split: bool = False
    splitting: Splitting = DEFAULT_SPLITTING

    def __post_init__(self) -> None:
        if not 0 <= self.min_iou <= 1:
            raise MaskError(f"sharpening: expected min_iou from 0 to 1, received {self.min_iou!r}")


def sharpened_labels(
    segmenter: PromptableSegmenter,
    image: UInt8[np.ndarray, "height width 3"],
    masks: Bool[np.ndarray, "masks height width"],
    heatmaps: Float32[np.ndarray, "masks height width"],
    sharpening: Sharpening,
) -> UInt8[np.ndarray, "masks height width"]:
    """Replace masks of an image, or each of their instances, by what a segmenter makes of them.

    Args:
        segmenter: called once, with the prompts of all masks.
        image: RGB.
        masks: masks of heat maps; empty ones stay empty.
        heatmaps: from 0 to 1.
        sharpening: how.

    Returns:
        For each mask 0 outside of it and i + 1 at its instance i, in descending order of their peaks; where
        candidates overlap, the instance with the higher peak is in front. Without splitting, a mask is a
        single instance.

    Raises:
        MaskError: scikit-image is not installed.
    """
    labels = [
        split_mask(mask, heat, sharpening.grid_size, sharpening.splitting).labels
        for mask, heat in zip(masks, heatmaps, strict=True)
    ]
    prompts, own_masks, owners = [], [], []
    for owner, (label_map, heat) in enumerate(zip(labels, heatmaps, strict=True)):
        for parts in _prompted(label_map, is_split=sharpening.is_split):
            own_masks.append(np.isin(label_map, parts))
            prompts.append(_prompt(label_map, heat, parts))
            owners.append(owner)
    chosen = [
        best_candidate(candidates, own, sharpening.min_iou)
        for candidates, own in zip(segmenter.segment(image, prompts), own_masks, strict=True)
    ]
    sharpened = np.zeros(masks.shape, np.uint8)
    for owner in range(len(masks)):
        own_chosen = [mask for mask, its_owner in zip(chosen, owners, strict=True) if its_owner == owner]
        # the highest peak last, in front
        for number, mask in reversed(list(enumerate(own_chosen, start=1))):
            sharpened[owner][mask] = number
    return sharpened


def best_candidate(
    candidates: MaskCandidates, own_mask: Bool[np.ndarray, "height width"], min_iou: float
) -> Bool[np.ndarray, "height width"]:
    """Return the candidate with the greatest IoU with a mask, or the mask itself if all are below a limit.

    Args:
        candidates: of equal ones the one with the higher score is chosen, then the first.
        own_mask: mask to agree with.
        min_iou: the limit, in [0, 1].
    """
    both = (candidates.masks & own_mask).sum(axis=(1, 2))
    either = (candidates.masks | own_mask).sum(axis=(1, 2))
    ious = both / np.maximum(either, 1)
    best = np.lexsort((-candidates.scores, -ious))[0]
    found: np.ndarray = candidates.masks[best] if both[best] and ious[best] >= min_iou else own_mask
    return found


def _prompted(label_map: UInt8[np.ndarray, "height width"], *, is_split: bool) -> list[list[int]]:
    """Return the numbers of the instances of each prompt."""
    numbers = list(range(1, int(label_map.max(initial=0)) + 1))
    if is_split:
        return [[number] for number in numbers]
    return [numbers] if numbers else []


def _prompt(
    label_map: UInt8[np.ndarray, "height width"],
    heat: Float32[np.ndarray, "height width"],
    parts: Sequence[int],
) -> SegmenterPrompt:
    """Return the prompt for some instances: the hottest pixel of each, and the box around all."""
    rows, columns = np.nonzero(np.isin(label_map, parts))
    peaks = [
        np.unravel_index(int(np.where(label_map == part, heat, -np.inf).argmax()), heat.shape)
        for part in parts
    ]
    # the centre of a pixel, and the outer edges of a box
    points_xy = np.array([(column + 0.5, row + 0.5) for row, column in peaks], np.float32)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
    return SegmenterPrompt(points_xy, np.ones(len(peaks), bool), box)
