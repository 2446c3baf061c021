"""Label maps: one class id for each pixel, from the annotation rows of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from legrad.errors import RleError
from legrad.masks.rle import Rle, check_rles, decode_rle
from pipeline.errors import UserError

BACKGROUND_LABEL = 0
IGNORED_LABEL = 255

Row = Mapping[str, Any]


def label_map(rows: Sequence[Row], height: int, width: int) -> UInt8[np.ndarray, "height width"]:
    """Merge the rows of one sample: class ids in masks, 0 elsewhere, 255 for ignored pixels.

    Where masks overlap, the prompt with the higher similarity wins; at equal similarity, the lower class id.
    A pixel that one row ignores and another row's mask covers gets the class of the other row. Under argmax,
    the rows of a sample share one ignore mask. Rejected rows have no mask and do not count.

    Args:
        rows: annotation rows with ``class_id``, ``similarity``, ``mask`` and ``ignore``, in any order.
        height: of the image; masks that were scaled down are enlarged, nearest pixel.
        width: of the image.

    Raises:
        UserError: a mask's class id is not from 1 to 254.
        RleError: a mask is no run-length encoding of its size, or of another image size.
    """
    # run lengths go down the columns: what is done there and in one piece is several times as fast
    columns_first = np.zeros((width, height), dtype=np.uint8)
    ignores = {(str(rle["size"]), rle["counts"]): rle for row in rows if (rle := row["ignore"]) is not None}
    for ignore in ignores.values():
        np.putmask(columns_first, mask_at_size(ignore, height, width).T, IGNORED_LABEL)
    masked = [row for row in rows if row["mask"] is not None]
    for row in masked:
        _check_class_id(row)
    # painted last wins
    for row in sorted(masked, key=lambda row: (row["similarity"], -row["class_id"])):
        np.putmask(columns_first, mask_at_size(row["mask"], height, width).T, row["class_id"])
    return np.ascontiguousarray(columns_first.T)


def mask_of_image(rle: Rle, height: int, width: int) -> Bool[np.ndarray, "mask_height mask_width"]:
    """Decode a mask of an image, in the mask's own frame: the image's, or scaled down to a longest side.

    Args:
        rle: from a file of unknown origin.
        height: of the image.
        width: of the image.

    Raises:
        RleError: it is no run-length encoding of its size, or its size does not fit this image.
    """
    mask = decode_rle(rle, max_pixels=height * width)
    _require_frame(mask.shape, height, width)
    return mask


def check_masks_of_image(rles: Sequence[Rle], height: int, width: int) -> None:
    """Raise the errors that `mask_of_image` would raise, without allocating pixels."""
    check_rles(rles, max_pixels=height * width)
    for rle in rles:
        _require_frame(tuple(rle["size"]), height, width)


def _require_frame(size: tuple[int, ...], height: int, width: int) -> None:
    if size not in ((height, width), mask_frame(height, width, max(size))):
        raise RleError("frame", f"{size[0]} x {size[1]} pixels for an image of {height} x {width}")


def mask_at_size(rle: Rle, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """Decode a mask of an image at the image's size, nearest pixel; raises as `mask_of_image` does."""
    return in_frame(mask_of_image(rle, height, width), (height, width))


def mask_frame(image_height: int, image_width: int, max_side: int | None) -> tuple[int, int]:
    """Return height and width of masks: the image's own, or scaled down to a longest side of `max_side`."""
    longest = max(image_height, image_width)
    if max_side is None or longest <= max_side:
        return image_height, image_width
    return max(1, round(image_height * max_side / longest)), max(1, round(image_width * max_side / longest))


def in_frame(
    mask: Bool[np.ndarray, "height width"], shape: tuple[int, ...]
) -> Bool[np.ndarray, "rows columns"]:
    """Return a mask at another size (height, width), nearest pixel."""
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
            f"byte a pixel, and captions have a label only with a list of classes (--classes FILE)"
        )
