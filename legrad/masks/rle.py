"""Encode and decode masks in COCO's compressed run-length encoding, and measure their areas and boxes.

The encoding lists the lengths of runs in column-major order: background, foreground, background and so on. A
number is written in digits of five bits, lowest first, as the characters from "0" to "o". A digit has 32
added if more digits follow, and the bit of value 16 in the last digit is the sign. From the fourth run on,
the number is the difference to the run two places before.

pycocotools does not validate such strings and writes out of bounds on invalid ones. It is therefore only used
to encode masks and to measure what was encoded in this process; strings from files are decoded here.

Source: https://github.com/cocodataset/cocoapi, common/maskApi.c, `rleToString` and `rleFrString`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64, Shaped, UInt8

from legrad.errors import RleError

MAX_MASK_PIXELS = 2**28
# A limit for every `max_pixels`, as pycocotools counts pixels in 32 bits.
MOST_PIXELS = 2**32 - 1
# Enough for a difference of two runs of up to 2**32 pixels, with its sign.
MAX_DIGITS = 7
FIRST_CHARACTER, LAST_CHARACTER, DIGIT_VALUES = ord("0"), "o", 64
BITS, VALUE, SIGN, MORE = 5, 0x1F, 0x10, 0x20


# With numpy 2, pycocotools fails to compute the areas of more masks in one call.
MOST_AT_ONCE = 255


class Rle(TypedDict):
    """One mask in COCO's compressed run-length encoding.

    Attributes:
        size: [height, width] in pixels.
        counts: run lengths in column-major order, as COCO's compressed string.

    Example:
        >>> rle: legrad.Rle = {"size": [2, 2], "counts": "13"}  # one background pixel, then three others
        >>> legrad.decode_rle(rle).tolist()
        [[False, True], [True, True]]
    """

    size: list[int]
    counts: str


def encode_rle(masks: Shaped[Any, "prompts height width"]) -> list[Rle]:
    """Encode masks in COCO's compressed RLE; fastest for masks stored column by column.

    Args:
        masks: boolean or integer tensor or array; every value except zero is foreground.

    Returns:
        One encoding for each mask, in order.

    Source: `encode` of pycocotools.

    Example:
        >>> legrad.encode_rle(np.ones((1, 2, 3), dtype=bool))
        [{'size': [2, 3], 'counts': '06'}]
    """
    # Imported here, as programs that only read masks do not need it.
    import torch

    columns = torch.as_tensor(masks).to(torch.bool).mT.contiguous().cpu().numpy()
    return [encode_columns(mask_columns) for mask_columns in columns]


def encode_columns(mask_columns: Bool[np.ndarray, "width height"]) -> Rle:
    """Encode one mask that is stored column by column, as `encode_rle` does."""
    # Imported here, as programs that only read masks do not need it.
    from pycocotools import mask as coco

    # [width, height] in C order is [height, width, 1] in Fortran order, as pycocotools wants.
    (rle,) = coco.encode(mask_columns.view(np.uint8).T[:, :, None])
    return {"size": list(mask_columns.shape[::-1]), "counts": rle["counts"].decode("ascii")}


def encode_changes(changes: Int[np.ndarray, " changes"], height: int, width: int) -> Rle:
    """Encode one mask from the positions where it changes.

    Args:
        changes: ascending positions in column-major order whose value differs from that of the pixel before;
            the pixel before the first one counts as background.
        height: height of the mask in pixels.
        width: width of the mask in pixels.
    """
    # Imported here, as programs that only read masks do not need it.
    from pycocotools import mask as coco

    lengths = np.diff(changes, prepend=0, append=height * width)
    rle = coco.frPyObjects({"size": [height, width], "counts": lengths}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def measure_encoded(
    rles: Sequence[Rle],
) -> tuple[Int64[np.ndarray, " prompts"], Float32[np.ndarray, "prompts 4"]]:
    """Return areas and boxes of masks without validation; fast, but only safe for the output of `encode_rle`.

    Args:
        rles: encodings that `encode_rle` made in this process.

    Returns:
        Foreground pixels of each mask, and its box as `mask_bbox_xywh` returns it.
    """
    from pycocotools import mask as coco

    chunks = [list(rles[first : first + MOST_AT_ONCE]) for first in range(0, len(rles), MOST_AT_ONCE)]
    areas = [np.asarray(coco.area(chunk), dtype=np.int64) for chunk in chunks]
    boxes = [np.asarray(coco.toBbox(chunk), dtype=np.float32) for chunk in chunks]
    return np.concatenate([np.zeros(0, np.int64), *areas]), np.concatenate(
        [np.zeros((0, 4), np.float32), *boxes]
    )


def decode_rle(rle: Rle, *, max_pixels: int = MAX_MASK_PIXELS) -> Bool[np.ndarray, "height width"]:
    """Decode one mask from COCO's compressed RLE; it is validated before memory for its pixels is allocated.

    Args:
        rle: encoding, possibly from an untrusted file.
        max_pixels: larger masks are refused.

    Returns:
        True for foreground.

    Raises:
        RleError: `rle` does not encode a mask of its size, or the mask is too large.

    Example:
        >>> legrad.decode_rle({"size": [2, 3], "counts": "24"}).tolist()
        [[False, True, True], [False, True, True]]
    """
    stack = _parsed([rle], max_pixels)
    return _pixels(stack.lengths, *stack.sizes[0].tolist())


def decode_runs(
    lengths: Any, height: int, width: int, *, max_pixels: int = MAX_MASK_PIXELS
) -> Bool[np.ndarray, "height width"]:
    """Decode one mask from COCO's uncompressed RLE, the list of run lengths that crowd annotations have.

    Args:
        lengths: number of pixels of each run, the first one background, possibly from an untrusted file.
        height: height of the mask in pixels.
        width: width of the mask in pixels.
        max_pixels: larger masks are refused.

    Returns:
        True for foreground.

    Raises:
        RleError: the runs do not fill a mask of this size, or the mask is too large.
    """
    pixels = _pixel_count([height, width], max_pixels)
    if not isinstance(lengths, list | tuple):
        raise RleError("counts", f"expected a list of run lengths, received {type(lengths).__name__}")
    if len(lengths) > pixels + 1:
        raise RleError("many_runs", f"{len(lengths)} runs in a mask of {height} x {width} pixels")
    for length in lengths:
        if not _is_whole(length):
            raise RleError("counts", f"expected whole numbers as run lengths, received {length!r:.40}")
        if length < 0:
            raise RleError("negative_run", f"a run of {_shown(length)} pixels")
    if sum(lengths) != pixels:
        raise RleError("sum", _not_filling(sum(lengths), height, width))
    return _pixels(np.array(lengths, dtype=np.int64), height, width)


def mask_area(rles: Sequence[Rle], *, max_pixels: int = MAX_MASK_PIXELS) -> Int64[np.ndarray, " prompts"]:
    """Count the foreground pixels of each mask without decoding it; fastest for many masks at once.

    Args:
        rles: encodings, possibly from an untrusted file.
        max_pixels: larger masks are refused.

    Raises:
        RleError: one of them does not encode a mask of its size, or the mask is too large.

    Example:
        >>> legrad.mask_area(legrad.encode_rle(np.eye(3)[None])).tolist()
        [3]
    """
    stack = _parsed(rles, max_pixels)
    return stack.sums(stack.lengths * stack.is_foreground)


def mask_bbox_xywh(
    rles: Sequence[Rle], *, max_pixels: int = MAX_MASK_PIXELS
) -> Float32[np.ndarray, "prompts 4"]:
    """Compute the smallest box around each mask without decoding it; fastest for many masks at once.

    Args:
        rles: see `mask_area`.
        max_pixels: see `mask_area`.

    Returns:
        Left, top, width and height in pixels; zeros for an empty mask.

    Raises:
        RleError: see `mask_area`.

    Example:
        >>> mask = np.zeros((1, 4, 6), dtype=bool)
        >>> mask[0, 1:3, 2:5] = True
        >>> legrad.mask_bbox_xywh(legrad.encode_rle(mask)).tolist()
        [[2.0, 1.0, 3.0, 2.0]]
    """
    return _parsed(rles, max_pixels).bboxes_xywh()


def check_rles(rles: Sequence[Rle], *, max_pixels: int = MAX_MASK_PIXELS) -> None:
    """Raise the RleError that `decode_rle` would raise for one of the masks, without decoding them."""
    _parsed(rles, max_pixels)


@dataclass(frozen=True)
class _RunStack:
    """Runs of several masks, one mask after the other.

    Attributes:
        lengths: length of each run in pixels.
        run_counts: number of runs of each mask.
        sizes: height and width of each mask.
    """

    lengths: Int64[np.ndarray, " runs"]
    run_counts: Int64[np.ndarray, " masks"]
    sizes: Int64[np.ndarray, "masks 2"]

    @property
    def pixels(self) -> Int64[np.ndarray, " masks"]:
        pixels: np.ndarray = self.sizes.prod(axis=1)
        return pixels

    @property
    def is_foreground(self) -> Bool[np.ndarray, " runs"]:
        """True for every other run of each mask, from the second one on."""
        is_odd: np.ndarray = np.zeros(len(self.lengths), dtype=bool)
        is_odd[1::2] = True
        begins_odd = (self.run_counts.cumsum() - self.run_counts) & 1 == 1
        return is_odd ^ np.repeat(begins_odd, self.run_counts) if begins_odd.any() else is_odd

    def sums(self, values: Int64[np.ndarray, " runs"]) -> Int64[np.ndarray, " masks"]:
        """Sum values of runs over each mask."""
        if len(self.run_counts) == 1:
            return np.array([values.sum()])
        totals = np.concatenate([[0], values.cumsum()])
        ends = self.run_counts.cumsum()
        summed: np.ndarray = totals[ends] - totals[ends - self.run_counts]
        return summed

    def bboxes_xywh(self) -> Float32[np.ndarray, "masks 4"]:
        """Compute the smallest box around each mask; zeros for an empty one."""
        boxes = np.zeros((len(self.run_counts), 4), dtype=np.float32)
        shown = np.flatnonzero(self.is_foreground & (self.lengths > 0))
        if not len(shown):
            return boxes
        mask_of_run = np.repeat(np.arange(len(self.run_counts)), self.run_counts)[shown]
        heights = self.sizes[mask_of_run, 0]
        # Runs fill their masks, so the pixels of all masks before give the start of a mask.
        starts = np.repeat(self.pixels.cumsum() - self.pixels, self.run_counts)
        ends = (self.lengths.cumsum() - starts)[shown]
        left, top = np.divmod(ends - self.lengths[shown], heights)
        right, bottom = np.divmod(ends - 1, heights)
        # A run that continues in the next column touches the bottom of one and the top of the other.
        crosses = left != right
        top[crosses], bottom[crosses] = 0, heights[crosses] - 1
        masks, first_runs = np.unique(mask_of_run, return_index=True)
        left, top = (np.minimum.reduceat(edge, first_runs) for edge in (left, top))
        right, bottom = (np.maximum.reduceat(edge, first_runs) for edge in (right, bottom))
        boxes[masks] = np.stack([left, top, right - left + 1, bottom - top + 1], axis=1)
        return boxes


def _parsed(rles: Sequence[Rle], max_pixels: int) -> _RunStack:
    pixels = [_pixel_count(_field(rle, "size"), max_pixels) for rle in rles]
    texts = [_characters(rle, most) for rle, most in zip(rles, pixels, strict=True)]
    sizes = np.array([rle["size"] for rle in rles], dtype=np.int64).reshape(-1, 2)
    digits = np.frombuffer(b"".join(texts), dtype=np.uint8) - np.uint8(FIRST_CHARACTER)
    if len(digits) and digits.max() >= DIGIT_VALUES:
        stray = chr((int(digits[digits >= DIGIT_VALUES][0]) + FIRST_CHARACTER) % 256)
        raise RleError("alphabet", f"expected counts in the characters from 0 to o, found {stray!r}")
    # Positions of the last digit of each number.
    ends = np.flatnonzero(digits < MORE)
    run_counts = np.diff(np.searchsorted(ends, np.cumsum([len(text) for text in texts])), prepend=0)
    stack = _RunStack(_summed_differences(_numbers(digits, ends), run_counts), run_counts, sizes)
    _require_filling_runs(stack)
    return stack


def _field(rle: Any, name: str) -> Any:
    if not isinstance(rle, Mapping) or name not in rle:
        raise RleError(name, f"expected a mask with size and counts, received {rle!r:.80}")
    return rle[name]


def _pixel_count(size: Any, max_pixels: int) -> int:
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(map(_is_whole, size)):
        raise RleError("size", f"expected a height and a width, received {size!r:.80}")
    height, width = size
    if height < 0 or width < 0:
        raise RleError("size", f"negative size: {_shown(height)} x {_shown(width)} pixels")
    if height * width > min(max_pixels, MOST_PIXELS) or max(height, width) > MOST_PIXELS:
        limit = f"the limit is {min(max_pixels, MOST_PIXELS):,} pixels"
        raise RleError("size", f"a mask of {_shown(height)} x {_shown(width)} pixels; {limit}")
    return int(height * width)


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _shown(number: int) -> str:
    # Converting a number to decimals takes time quadratic in its length.
    return str(number) if abs(number) < 10**20 else "10**20 or more"


def _characters(rle: Rle, pixels: int) -> bytes:
    counts = _field(rle, "counts")
    if not isinstance(counts, str):
        raise RleError("counts", f"expected counts as text, received {type(counts).__name__}")
    if len(counts) > MAX_DIGITS * (pixels + 1):
        raise RleError("many_runs", f"counts has {len(counts)} characters, too many for {pixels} pixels")
    if not counts.isascii():
        stray = next(character for character in counts if not character.isascii())
        raise RleError("not_ascii", f"expected counts in the characters from 0 to o, found {stray!a}")
    if counts and ord(counts[-1]) >= FIRST_CHARACTER + MORE and counts[-1] <= LAST_CHARACTER:
        raise RleError("truncated", f"counts end within a number, at {counts[-1]!r}")
    return counts.encode("ascii")


def _numbers(
    digits: UInt8[np.ndarray, " characters"], ends: Int64[np.ndarray, " runs"]
) -> Int64[np.ndarray, " runs"]:
    """Return the numbers whose last digits are at these positions; the last digit holds the sign."""
    values = digits & VALUE
    spelt = (values ^ SIGN).astype(np.int16) - SIGN
    # Nearly all numbers have one or two digits: combine all neighbouring digits, then pick the numbers.
    has_lower = digits[:-1] >= MORE
    np.copyto(spelt[1:], (spelt[1:] << BITS) | values[:-1], where=has_lower)
    numbers: np.ndarray = spelt[ends].astype(np.int64)
    if not (has_lower[1:] & has_lower[:-1]).any():
        return numbers
    digit_counts = np.diff(ends, prepend=-1)
    most = int(digit_counts.max())
    if most > MAX_DIGITS:
        raise RleError("overflow", f"a number of {most} digits; the limit is {MAX_DIGITS}, for 32 bits")
    for place in range(2, most):
        longer = np.flatnonzero(digit_counts > place)
        numbers[longer] = (numbers[longer] << BITS) | values[ends[longer] - place]
    return numbers


def _summed_differences(
    numbers: Int64[np.ndarray, " runs"], run_counts: Int64[np.ndarray, " masks"]
) -> Int64[np.ndarray, " runs"]:
    begin = 0
    for count in run_counts.tolist():
        own = numbers[begin : begin + count]
        for every_other in (own[1::2], own[2::2]):
            every_other.cumsum(out=every_other)
        begin += count
    return numbers


def _require_filling_runs(stack: _RunStack) -> None:
    lengths, pixels = stack.lengths, stack.pixels
    if not len(pixels):
        return
    in_range = lengths.min(initial=0) >= 0 and lengths.max(initial=0) <= pixels.max()
    if in_range and (stack.run_counts <= pixels + 1).all() and (stack.sums(lengths) == pixels).all():
        return
    begin = 0
    for (height, width), count in zip(stack.sizes.tolist(), stack.run_counts.tolist(), strict=True):
        _require_filling(lengths[begin : begin + count], height, width)
        begin += count


def _require_filling(lengths: Int64[np.ndarray, " runs"], height: int, width: int) -> None:
    pixels = height * width
    if len(lengths) > pixels + 1:
        raise RleError("many_runs", f"{len(lengths)} runs in a mask of {height} x {width} pixels")
    if (lengths < 0).any():
        raise RleError("negative_run", f"a run of {lengths[lengths < 0][0]} pixels")
    if (lengths > pixels).any():
        longest = lengths[lengths > pixels][0]
        raise RleError("long_run", f"a run of {longest} pixels in a mask of {height} x {width} pixels")
    if lengths.sum() != pixels:
        raise RleError("sum", _not_filling(int(lengths.sum()), height, width))


def _not_filling(total: int, height: int, width: int) -> str:
    return f"runs sum to {_shown(total)} pixels; a mask of {height} x {width} has {height * width}"


def _pixels(lengths: Int64[np.ndarray, " runs"], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    is_foreground = np.zeros(len(lengths), dtype=bool)
    is_foreground[1::2] = True
    columns_first = np.repeat(is_foreground, lengths)
    return columns_first.reshape(width, height).T
