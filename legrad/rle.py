"""COCO's compressed run-length encoding of masks: to it, from it, areas and boxes."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, Shaped
from pycocotools import mask as coco
from torch import Tensor

from legrad.errors import MaskError


class Rle(TypedDict):
    """One mask in COCO's compressed run-length encoding: `size` is [height, width]."""

    size: list[int]
    counts: str


def encode_rle(
    masks: Shaped[Tensor, "prompts height width"] | Shaped[np.ndarray, "prompts height width"],
) -> list[Rle]:
    """Encode masks as COCO compressed RLE; fastest on masks stored column by column.

    Args:
        masks: boolean or integer; whatever is not zero is foreground.
    """
    foreground = torch.as_tensor(masks).to(torch.bool)
    # [prompts, width, height] in C order is [height, width, prompts] in Fortran order, as pycocotools wants.
    fortran = foreground.mT.contiguous().view(torch.uint8).cpu().numpy().T
    return [
        {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
        for rle in coco.encode(fortran)
    ]


def decode_rle(rle: Rle) -> Bool[np.ndarray, "height width"]:
    """Decode one mask of COCO compressed RLE.

    Raises:
        MaskError: the runs do not fill the size.
    """
    height, width = rle["size"]
    runs = _run_lengths(rle["counts"])
    if ((runs < 0) | (runs > height * width)).any() or runs.sum() != height * width:
        raise MaskError(f"decode_rle: expected runs that fill {height} x {width} pixels, received others")
    # not coco.decode, which warns under numpy 2 at every call
    columns_first = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return columns_first.reshape(width, height).T


def _run_lengths(counts: str) -> Int64[np.ndarray, " runs"]:
    # Digits of five bits, lowest first; bit 5 says that more follow, bit 4 of the last digit is the sign.
    # From the fourth run on, what stands there is the difference to the run before the previous one.
    digits = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if not len(digits):
        return digits
    is_last = digits & 0x20 == 0
    is_last[-1] = True
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    places = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    runs: np.ndarray = np.add.reduceat((digits & 0x1F) << places, starts)
    runs -= ((digits[ends] & 0x10) != 0).astype(np.int64) << (5 * lengths)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def mask_area(rles: Sequence[Rle]) -> Int64[np.ndarray, " prompts"]:
    """Count the foreground pixels of each mask."""
    return np.asarray(coco.area(list(rles)), dtype=np.int64).reshape(len(rles))


def mask_bbox_xywh(rles: Sequence[Rle]) -> Float32[np.ndarray, "prompts 4"]:
    """Find the smallest box around each mask: left, top, width, height in pixels; zeros for an empty mask."""
    return np.asarray(coco.toBbox(list(rles)), dtype=np.float32).reshape(len(rles), 4)
