"""Label maps of held-out scenes, predicted and annotated, against one ground truth and by one metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from legrad import Refinement, dilations_for_patch, refine_heatmaps
from legrad.quality.label_metrics import (
    OverlapTable,
    bootstrap_difference,
    bootstrap_sums,
    label_overlap,
    mean_iou,
    tabulate_overlaps,
)
from legrad.quality.metrics import Estimate
from pipeline.demo.making.segmenter import INPUT_SIDE, PATCH_SIDE, PixelScores, Segmenter
from pipeline.output.label_map import BACKGROUND_LABEL, IGNORED_LABEL
from pipeline.training import MaskDataset, collate

# images are also seen through windows of the input's size: smaller objects, finer outlines
WINDOWED_SIDE = 128

LabelMaps = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Scores:
    """mIoU of a set of label maps, of one confusion matrix over all scenes, with and without background.

    Attributes:
        with_background: mean over the classes and background.
        classes_only: mean over the classes.
        table: the counts behind them.
    """

    with_background: Estimate
    classes_only: Estimate
    table: OverlapTable

    def better_than(self, other: Scores) -> Estimate:
        """Return the difference of the mIoU over classes, paired by scenes."""
        found = bootstrap_difference(
            self.table.counts,
            other.table.counts,
            mean_iou(self.table, background=False),
            mean_iou(other.table, background=False),
        )
        return _defined(found)


def score(predicted: LabelMaps, truth: LabelMaps) -> Scores:
    """Compare label maps with the ground truth; a scene without a label map counts as all background."""
    overlaps = []
    for key, labels in truth.items():
        found = predicted.get(key, np.zeros_like(labels))
        # ignored pixels count as background
        committed = np.where(found == IGNORED_LABEL, BACKGROUND_LABEL, found)
        overlaps.append(label_overlap(committed, labels, labels != IGNORED_LABEL))
    table = tabulate_overlaps(overlaps)
    with_background, classes_only = (
        _defined(bootstrap_sums(table.counts, mean_iou(table, background=background)))
        for background in (True, False)
    )
    return Scores(with_background, classes_only, table)


def _defined(estimate: Estimate | None) -> Estimate:
    if estimate is None:
        raise ValueError("expected ground truth with at least one class, found none")
    return estimate


def read_label_maps(samples: Iterable[Mapping[str, object]]) -> dict[str, np.ndarray]:
    """Return label maps by sample key, as a MaskDataset yields them."""
    return {str(sample["key"]): np.asarray(sample["label_map"]) for sample in samples}


@torch.no_grad()
def predict(
    segmenter: Segmenter, images: MaskDataset, truth: LabelMaps, tags: Mapping[str, Sequence[int]]
) -> tuple[LabelMaps, LabelMaps]:
    """Return label maps of a segmenter by itself, and with the classes known; at the size of the truth.

    Args:
        segmenter: trained.
        images: what to segment, stretched to WINDOWED_SIDE.
        truth: ground truth, whose sizes the label maps get.
        tags: classes that each image is known to show, which only rules classes out.
    """
    segmenter.eval()
    every_class = range(1, 1 + len(segmenter.texts))
    alone, told = {}, {}
    for batch in DataLoader(images, batch_size=32, collate_fn=_images_and_keys):
        scores = windowed_scores(segmenter, batch["image"])
        shown = refined_foreground(batch["image"], scores.foreground)
        for key, foreground, classes in zip(batch["key"], shown, scores.classes, strict=True):
            size = truth[key].shape
            alone[key] = _label_map(foreground, classes, every_class, size)
            told[key] = _label_map(foreground, classes, tags[key], size)
    return alone, told


def refined_foreground(
    images: Float[Tensor, "batch 3 side side"], foreground: Float[Tensor, "batch 1 _ _"]
) -> Float[Tensor, "batch side side"]:
    """Return the probability of foreground, made to follow the edges of the images as pseudo-masks are."""
    likely = F.interpolate(foreground, size=images.shape[-2:], mode="bilinear", align_corners=False).sigmoid()
    refinement = Refinement(kernel="par", dilations=dilations_for_patch(PATCH_SIDE))
    return refine_heatmaps(images, likely[:, 0], refinement=refinement)


def windowed_scores(segmenter: Segmenter, images: Tensor) -> PixelScores:
    """Return the mean scores of the whole image, shrunk to the input, and of a window in each corner.

    Args:
        segmenter: trained.
        images: normalised [batch, 3, WINDOWED_SIDE, WINDOWED_SIDE].
    """
    corners = (0, WINDOWED_SIDE - INPUT_SIDE)
    whole = segmenter(F.interpolate(images, size=(INPUT_SIDE, INPUT_SIDE), mode="bilinear", antialias=True))
    windows = {
        (top, left): segmenter(images[..., top : top + INPUT_SIDE, left : left + INPUT_SIDE])
        for top in corners
        for left in corners
    }
    return PixelScores(
        *(
            (_enlarged(maps) + _stitched({place: scores[part] for place, scores in windows.items()})) / 2
            for part, maps in enumerate(whole)
        )
    )


def _enlarged(maps: Tensor) -> Tensor:
    side = maps.shape[-1] * WINDOWED_SIDE // INPUT_SIDE
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)


def _stitched(windows: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """Return the mean of the windows that cover a pixel; places are those in the image."""
    first = next(iter(windows.values()))
    side = first.shape[-1]
    total = first.new_zeros(*first.shape[:2], *[side * WINDOWED_SIDE // INPUT_SIDE] * 2)
    covered = torch.zeros_like(total[:1, :1])
    for place, maps in windows.items():
        row, column = (start * side // INPUT_SIDE for start in place)
        total[..., row : row + side, column : column + side] += maps
        covered[..., row : row + side, column : column + side] += 1
    return total / covered


def _label_map(
    foreground: Tensor, classes: Tensor, allowed: Sequence[int], size: tuple[int, ...]
) -> np.ndarray:
    """Return the most likely of the allowed classes where foreground is more likely than background."""
    labels = torch.tensor(allowed, dtype=torch.uint8)
    shown, scores = (
        F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
        for maps in (foreground[None], classes[labels.long() - 1])
    )
    return torch.where(shown[0] > 0.5, labels[scores.argmax(dim=0)], BACKGROUND_LABEL).numpy()


def _images_and_keys(samples: Sequence[dict[str, object]]) -> dict[str, object]:
    return collate([{"image": sample["image"], "key": sample["key"]} for sample in samples])
