"""One label a pixel, from the annotation rows of a sample: what trainers, exporters and scorers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from legrad.masks import decode_rle
from pipeline.errors import UserError

BACKGROUND_LABEL = 0
IGNORED_LABEL = 255

Row = Mapping[str, Any]


def label_map(rows: Sequence[Row], height: int, width: int) -> UInt8[np.ndarray, "height width"]:
    """Merge the rows of one sample: the class id where a mask lies, 0 elsewhere, 255 where nothing is known.

    Where masks overlap, the prompt of the higher similarity wins, of equal ones the lower class id. A pixel
    that one row ignores and another's mask covers is the other's. Under argmax the rows of a sample share one
    ignore mask. Rejected rows have no mask and no say.

    Args:
        rows: annotation rows with ``class_id``, ``similarity``, ``mask`` and ``ignore``, in any order.
        height: rows of the label map, usually the original image's; masks in another frame are resized to
            it, nearest pixel.
        width: columns of the label map.

    Raises:
        UserError: a mask's class id is not from 1 to 254.
        MaskError: a mask that is no run-length encoding of its size.
    """
    labels = np.zeros((height, width), dtype=np.uint8)
    ignores = {(*rle["size"], rle["counts"]): rle for row in rows if (rle := row["ignore"]) is not None}
    for ignore in ignores.values():
        labels[in_frame(decode_rle(ignore), labels.shape)] = IGNORED_LABEL
    masked = [row for row in rows if row["mask"] is not None]
    for row in masked:
        _check_class_id(row)
    # painted last wins
    for row in sorted(masked, key=lambda row: (row["similarity"], -row["class_id"])):
        labels[in_frame(decode_rle(row["mask"]), labels.shape)] = row["class_id"]
    return labels


def in_frame(
    mask: Bool[np.ndarray, "height width"], shape: tuple[int, ...]
) -> Bool[np.ndarray, "rows columns"]:
    """A mask at another size (height, width), nearest pixel."""
    if mask.shape == shape:
        return mask
    height, width = shape
    resized = Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.array(resized, dtype=bool)


def _check_class_id(row: Row) -> None:
    class_id = row["class_id"]
    if class_id is None or not BACKGROUND_LABEL < class_id < IGNORED_LABEL:
        where = f" (sample {row['key']!r}, prompt {row['prompt']!r})" if {"key", "prompt"} <= set(row) else ""
        raise UserError(
            f"label map: expected class ids from 1 to 254, received {class_id}{where}; a label map has one "
            f"byte a pixel, and captions without classes have no label"
        )
