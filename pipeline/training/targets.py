"""Training targets of a sample: a label map, or a mask for each prompt, and their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torchvision import tv_tensors

from pipeline.output.label_map import BACKGROUND_LABEL, IGNORED_LABEL, label_map, mask_at_size
from pipeline.output.schema import has_pixels

LABELS = 256
NO_CLASS = -1

Row = Mapping[str, Any]
SimilarityRange = tuple[float, float]


def similarity_weight(similarity: float, similarity_range: SimilarityRange | None) -> float:
    """Return the weight of a mask: 0 at the lower end of the range and below, 1 at the upper end and above.

    Cosines of image and text have another range with each model, so the range is the user's choice: the 10 %
    and 90 % quantiles of the column, for example.

    Args:
        similarity: cosine of the image and the mask's text.
        similarity_range: lower and upper end, in between weights are linear; None: every mask counts 1.
    """
    if similarity_range is None:
        return 1.0
    low, high = similarity_range
    return min(1.0, max(0.0, (similarity - low) / (high - low)))


def label_map_target(
    rows: Sequence[Row], height: int, width: int, similarity_range: SimilarityRange | None
) -> dict[str, Any]:
    """Return a sample's label map, and a weight for each label.

    Args:
        rows: of one sample, with classes; at least one has pixels.
        height: of the image, in pixels.
        width: of the image, in pixels.
        similarity_range: see `similarity_weight`.

    Returns:
        `label_map`, uint8 [height, width]: 0 background, class ids, 255 ignored; `label_weights`, float32
        [256]: a class's weight is that of its most similar row, the background's the mean of the classes',
        since a background is as sure as the masks that it surrounds; 0 for labels that do not occur.
    """
    # first, since it refuses rows without a class
    labels = label_map(rows, height, width)
    weights = torch.zeros(LABELS)
    masked = [row for row in rows if has_pixels(row)]
    for row in masked:
        weight = similarity_weight(row["similarity"], similarity_range)
        weights[row["class_id"]] = max(weight, float(weights[row["class_id"]]))
    weights[BACKGROUND_LABEL] = weights[sorted({row["class_id"] for row in masked})].mean()
    return {"label_map": tv_tensors.Mask(torch.from_numpy(labels)), "label_weights": weights}


def prompt_target(
    rows: Sequence[Row], height: int, width: int, similarity_range: SimilarityRange | None
) -> dict[str, Any]:
    """Return a sample's accepted prompts, each with its mask.

    Args:
        rows: of one sample; those without pixels are omitted.
        height: of the image, in pixels.
        width: of the image, in pixels.
        similarity_range: see `similarity_weight`.

    Returns:
        `masks`, uint8 [prompts, height, width]: 1 foreground, 0 background, 255 ignored; aligned with it
        `prompts` (texts), `class_ids` (int64, -1 without), `similarities` and `weights` (float32).
    """
    accepted = [row for row in rows if has_pixels(row)]
    similarities = [row["similarity"] for row in accepted]
    classes = [NO_CLASS if row["class_id"] is None else row["class_id"] for row in accepted]
    return {
        "masks": tv_tensors.Mask(torch.from_numpy(_prompt_masks(accepted, height, width))),
        "prompts": [row["prompt"] for row in accepted],
        "class_ids": torch.tensor(classes, dtype=torch.int64),
        "similarities": torch.tensor(similarities, dtype=torch.float32),
        "weights": torch.tensor([similarity_weight(value, similarity_range) for value in similarities]),
    }


def _prompt_masks(rows: Sequence[Row], height: int, width: int) -> UInt8[np.ndarray, "prompts height width"]:
    masks = np.empty((len(rows), height, width), dtype=np.uint8)
    encoded, ignored = None, None
    for pixels, row in zip(masks, rows, strict=True):
        # run lengths go down the columns: what is done there and in one piece is several times as fast
        foreground = mask_at_size(row["mask"], height, width).T
        columns_first = foreground.astype(np.uint8)
        if row["ignore"] is not None:
            # rows of one image often share their ignore mask
            if ignored is None or row["ignore"] != encoded:
                encoded, ignored = row["ignore"], mask_at_size(row["ignore"], height, width).T
            np.putmask(columns_first, ignored > foreground, IGNORED_LABEL)
        cv2.transpose(columns_first, pixels)
    return masks


def pixel_weights(
    label_maps: UInt8[Tensor, "batch height width"], label_weights: Float32[Tensor, "batch labels"]
) -> Float32[Tensor, "batch height width"]:
    """Return the weight of every pixel's label, for a loss that was not reduced; 0 for ignored pixels."""
    weights = label_weights.clone()
    weights[:, IGNORED_LABEL] = 0
    return weights.gather(1, label_maps.flatten(1).long()).reshape(label_maps.shape)
