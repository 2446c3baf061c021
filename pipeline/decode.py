"""From a sample's untrusted bytes to pixels at model size, and to captions.

Content is told by its first bytes and by nothing else: a field's name is only where to look. The formats
opened are JPEG, PNG, WebP, BMP and GIF, with a single frame; TIFF is left out for the size of its decoders.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import regex
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from legrad.images import ImageTransform
from legrad.views import Views, canvas_pixels
from pipeline.errors import SampleFailure
from pipeline.image_files.bmp import check_bmp
from pipeline.image_files.jpeg import CheckedJpeg
from pipeline.image_files.png import check_png, png_without_texts
from pipeline.image_files.webp import check_webp, check_webp_length
from pipeline.shards import SampleFields
from pipeline.text import printable

# Pillow reads the parts of a file (segments, chunks, blocks) one by one in Python, metadata included
MAX_READS = 2**18
# the longest side of a JPEG; Pillow keeps a pointer and a step of resizing for each row
MAX_IMAGE_SIDE = 2**16 - 1
# Pillow joins the segments one by one, in quadratic time; a picture has one, and so has each further picture
MAX_EXIF_SEGMENTS = 64

MAX_JSON_BYTES = 4 * 2**20
MAX_CAPTION_CHARACTERS = 2**14
# byte-pair encoding takes quadratic time on a run of letters, and no language has such words
MAX_LETTERS_IN_A_ROW = 400
# bringing marks into their order takes quadratic time too; one letter has a few
MAX_MARKS_IN_A_ROW = 400
# of fields and JSON keys that a message names
MAX_NAMES_TOLD = 12
MAX_NAME_CHARACTERS_TOLD = 30
# all of a sample's captions are embedded, if only to find the most similar ones
MAX_CAPTIONS = 1024

_EXIF_ORIENTATION_TAG = 0x0112
_EXIF_SHORT = 3
_TRANSPOSE_BY_EXIF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LETTERS = re.compile(r"[^\W\d_]+")
_MARKS = regex.compile(rf"\p{{M}}{{{MAX_MARKS_IN_A_ROW + 1}}}")
_MODES_WITH_A_WAY_TO_RGB = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")


@dataclass(frozen=True)
class DecodedImage:
    """An image as the model takes it, and the size it came in.

    Attributes:
        pixels: RGB, uint8 [height, width, 3] at the model's input size.
        image_height: rows of the original, after EXIF orientation.
        image_width: columns of the original, after EXIF orientation.
        further_pixels: the same for each further canvas of `legrad.views`.
    """

    pixels: np.ndarray
    image_height: int
    image_width: int
    further_pixels: tuple[np.ndarray, ...] = ()

    @property
    def canvases(self) -> tuple[np.ndarray, ...]:
        """All pixels, those of the first canvas first."""
        return (self.pixels, *self.further_pixels)

    @property
    def shapes(self) -> Hashable:
        """What images have in common that may share a batch."""
        return tuple(pixels.shape for pixels in self.canvases)


WHOLE_IMAGE = Views()


def decode_image(
    data: bytes, transform: ImageTransform, *, max_image_pixels: int, views: Views = WHOLE_IMAGE
) -> DecodedImage:
    """Decode an image and stretch it to the model's size, bit for bit as open_clip's own transform does.

    Args:
        data: a file's content.
        transform: the model's own.
        max_image_pixels: larger images are refused before any pixel is decoded.
        views: which views are wanted of it.

    Raises:
        SampleFailure: as `open_image`.
    """
    image = open_image(data, max_image_pixels=max_image_pixels)
    with _faults_as_failures():
        pixels, *further_pixels = canvas_pixels(views, transform, image)
        return DecodedImage(pixels, image.height, image.width, tuple(further_pixels))


def open_image(data: bytes, *, max_image_pixels: int) -> Image.Image:
    """Decode an image completely, upright, in a mode that Pillow converts to RGB.

    Palette, alpha and CMYK images stay what they are, since open_clip resamples before it converts. Grey of
    16 bits becomes grey of 8 by its high byte, which is also how Pillow reads colour of 16 bits.

    Args:
        data: a file's content.
        max_image_pixels: larger images are refused before any pixel is decoded.

    Raises:
        SampleFailure: stage `decode`; kind `empty`, `format_not_allowed`, `too_many_pixels`, `side_too_long`,
            `too_many_parts`, `animated`, `unsupported_mode`, `truncated`, `corrupt` (the file shows that it
            is damaged) or `unreadable` (its decoder gives up).
    """
    with _faults_as_failures():
        header = _read_header(data)
        _check_size(header, max_image_pixels)
        if getattr(header, "is_animated", False):
            raise SampleFailure("decode", "animated", "the image has several frames, expected is one")
        _check_soundness(header, data)
        orientation = _exif_orientation(header.info.get("exif", b""))
        # Not simplejpeg: into a PIL image, which resizing needs, it is no faster and for large images slower.
        header.load()
        image = _as_convertible(header)
        transpose = _TRANSPOSE_BY_EXIF_ORIENTATION.get(orientation)
        return image if transpose is None else image.transpose(transpose)


def upright_transpose(data: bytes) -> Image.Transpose | None:
    """How an image as stored turns upright, told from its EXIF data; None where it stands so already.

    Raises:
        SampleFailure: as `open_image`.
    """
    with _faults_as_failures():
        orientation = _exif_orientation(_read_header(data).info.get("exif", b""))
        return _TRANSPOSE_BY_EXIF_ORIENTATION.get(orientation)


class _BoundedReader(io.BytesIO):
    """A file of an untrusted number of parts, each of which costs its decoder at least one call."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise SampleFailure("decode", "too_many_parts", f"the image is in more than {MAX_READS} parts")
        return super().read(size)


def _check_size(header: ImageFile, max_image_pixels: int) -> None:
    size = f"the image has {header.width} x {header.height} pixels"
    if header.width * header.height > max_image_pixels:
        raise SampleFailure("decode", "too_many_pixels", f"{size}, allowed are {max_image_pixels}")
    if max(header.size) > MAX_IMAGE_SIDE:
        raise SampleFailure("decode", "side_too_long", f"{size}, a side may have {MAX_IMAGE_SIDE}")


def _check_exif_segments(data: bytes) -> None:
    if data.count(b"Exif\0\0") > MAX_EXIF_SEGMENTS:
        message = f"the JPEG has more than {MAX_EXIF_SEGMENTS} segments of EXIF data"
        raise SampleFailure("decode", "too_many_parts", message)


def _check_soundness(header: ImageFile, data: bytes) -> None:
    """Refuse a file that shows damage; a JPEG does so itself, as it is decoded."""
    if isinstance(header, PngImageFile):
        check_png(data)
    elif isinstance(header, WebPImageFile):
        check_webp(data, header.width * header.height)
    elif isinstance(header, BmpImageFile):
        check_bmp(data)


def _read_header(data: bytes) -> ImageFile:
    # The formats' own classes rather than Image.open, whose limit on pixels is global and speaks in warnings.
    if not data:
        raise SampleFailure("decode", "empty", "the image has no bytes")
    reader = _reader_of(data)
    if reader is None:
        message = f"expected a JPEG, PNG, WebP, BMP or GIF, received bytes that begin with {data[:12]!r}"
        raise SampleFailure("decode", "format_not_allowed", message)
    if reader is CheckedJpeg:
        _check_exif_segments(data)
    if reader is WebPImageFile:
        check_webp_length(data)
    return reader(_BoundedReader(png_without_texts(data) if reader is PngImageFile else data))


def _reader_of(data: bytes) -> Callable[[io.BytesIO], ImageFile] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return CheckedJpeg
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    if data.startswith(b"BM"):
        return BmpImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile
    return None


def _as_convertible(image: Image.Image) -> Image.Image:
    # Transparency never reaches RGB, but Pillow would warn of it there.
    image.info.pop("transparency", None)
    if image.mode in _MODES_WITH_A_WAY_TO_RGB:
        return image
    # of the formats opened, only PNG has grey of more than 8 bits, and never more than 16
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    raise SampleFailure("decode", "unsupported_mode", f"no defined way from mode {image.mode} to RGB")


def _exif_orientation(exif: bytes) -> int:
    """Read the orientation, from 1 (upright) to 8; 1 where there is none or the EXIF data is corrupt.

    Pillow's own reader warns of corrupt data, which is no error here.

    Source: Exif 2.2, section 4.6.4, tag Orientation.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    byte_order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if byte_order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{byte_order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{byte_order}H", tiff, directory)
        for entry in range(entries):
            start = directory + 2 + 12 * entry
            tag, data_type, _, value = struct.unpack_from(f"{byte_order}HHIH", tiff, start)
            if tag == _EXIF_ORIENTATION_TAG:
                return int(value) if data_type == _EXIF_SHORT else 1
    except struct.error:
        return 1
    return 1


@contextmanager
def _faults_as_failures() -> Iterator[None]:
    try:
        yield
    except (SampleFailure, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise SampleFailure("decode", "too_many_pixels", str(error)) from error
    # Decoders raise about any type on crafted bytes, and none of it may end more than the sample.
    except Exception as error:
        is_cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        message = f"{type(error).__name__}: {error}"
        raise SampleFailure("decode", "truncated" if is_cut else "unreadable", message) from error


def find_field(fields: Mapping[str, bytes], spec: str, *, stage: str = "decode") -> bytes:
    """Find the first of several fields that a sample has.

    Args:
        fields: the sample's, by lower-cased extension; those that were skipped are named where none is found.
        spec: extensions by preference, separated by semicolons, such as `jpg;png;webp`.
        stage: what a missing field is reported under.

    Raises:
        SampleFailure: kind `missing_field`: the sample has none of them.
    """
    names = spec.lower().split(";")
    for name in names:
        if name in fields:
            return fields[name]
    raise SampleFailure(
        stage, "missing_field", f"sample has no field {_quoted(names)}{told_fields(fields, names)}"
    )


def told_fields(fields: Mapping[str, bytes], missed: Sequence[str] = ()) -> str:
    """The end of a message: which fields there are, and why none has a missed name where that can be told."""
    present = sorted({*fields, *(fields.skipped if isinstance(fields, SampleFields) else ())})
    told = f"; fields present: {listed_names(present)}"
    dotted = next((field for field in present if field.endswith(tuple(f".{name}" for name in missed))), None)
    if dotted is None:
        return told
    return f"{told} (a key ends at the first dot of the base name, and all that follows is the field)"


def _quoted(names: Sequence[str]) -> str:
    return " or ".join(f"`{printable(name)}`" for name in names)


def listed_names(names: Collection[str]) -> str:
    """Some of the names, fit to be shown: at most MAX_NAMES_TOLD, each cut to MAX_NAME_CHARACTERS_TOLD."""
    told = [printable(name[:MAX_NAME_CHARACTERS_TOLD]) for name in islice(names, MAX_NAMES_TOLD)]
    left = len(names) - len(told)
    return ", ".join(told) + (f" and {left} more" if left else "") if told else "none"


def read_captions(
    fields: Mapping[str, bytes], spec: str, *, several: bool | None
) -> list[str | SampleFailure]:
    """Read a sample's caption, or its list of captions.

    Args:
        fields: the sample's, by lower-cased extension.
        spec: `txt`, or `json:NAME` for a key of a JSON object.
        several: whether the value is a list of captions (JSON only) or one text; None: whichever it is.

    Returns:
        One caption without surrounding white space; of a list, for each element in order its caption, or the
        failure of that element alone, so that positions are prompt indices. An empty list stays empty.

    Raises:
        SampleFailure: stage `caption`; kind `missing_field`, `missing_key`, `empty`, `not_utf8`, `not_json`,
            `wrong_type`, `too_long` or `too_many`: the sample as a whole has no caption that can be used.
    """
    field_spec, _, name = spec.partition(":")
    content = find_field(fields, field_spec, stage="caption")
    value: Any = _json_value(content, name) if name else _text(content, MAX_CAPTION_CHARACTERS * 4)
    if not (isinstance(value, list) if several is None else several):
        if isinstance(value, list):
            remedy = "prompts.source=captions takes each text of a list"
            raise _failure("wrong_type", f"expected a text as caption in {spec}, received list; {remedy}")
        return [check_caption(value)]
    if not isinstance(value, list):
        remedy = "; prompts.source=caption takes one text" if isinstance(value, str) else ""
        message = f"expected a list of captions in {spec}, received {_type_name(value)}{remedy}"
        raise _failure("wrong_type", message)
    if len(value) > MAX_CAPTIONS:
        raise _failure("too_many", f"the sample has {len(value)} captions, allowed are {MAX_CAPTIONS}")
    return [_caption_or_failure(element) for element in value]


def _caption_or_failure(value: object) -> str | SampleFailure:
    try:
        return check_caption(value)
    except SampleFailure as failure:
        return failure


def check_caption(value: object) -> str:
    """A caption without surrounding white space.

    Raises:
        SampleFailure: stage `caption`; kind `wrong_type`, `empty`, `too_long` or `not_utf8`.
    """
    if not isinstance(value, str):
        raise _failure("wrong_type", f"expected a text as caption, received {_type_name(value)}")
    caption = value.strip()
    if not caption:
        raise _failure("empty", "the caption is empty")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise _failure(
            "too_long", f"the caption has {len(caption)} characters, allowed are {MAX_CAPTION_CHARACTERS}"
        )
    if any(len(letters) > MAX_LETTERS_IN_A_ROW for letters in _LETTERS.findall(caption)):
        raise _failure("too_long", f"the caption has more than {MAX_LETTERS_IN_A_ROW} letters in a row")
    if _MARKS.search(caption):
        raise _failure("too_long", f"the caption has more than {MAX_MARKS_IN_A_ROW} combining marks in a row")
    # JSON can spell half a surrogate pair, which no file could hold
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise _failure("not_utf8", "the caption holds half of a surrogate pair")
    return caption


def _json_value(content: bytes, name: str) -> object:
    try:
        # no caption is a number, and parsing long integers takes quadratic time
        document = json.loads(_text(content, MAX_JSON_BYTES), parse_int=float)
    except (ValueError, RecursionError) as error:
        raise _failure("not_json", f"{type(error).__name__}: {error}") from error
    if not isinstance(document, dict):
        raise _failure("wrong_type", f"expected a JSON object, received {_type_name(document)}")
    if name not in document:
        message = f"the JSON object has no key `{printable(name)}`; keys present: {listed_names(document)}"
        raise _failure("missing_key", message)
    return document[name]


def _text(content: bytes, max_bytes: int) -> str:
    if len(content) > max_bytes:
        raise _failure("too_long", f"the field has {len(content)} bytes, allowed are {max_bytes}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _failure("not_utf8", f"the field is not UTF-8: {error.reason} at byte {error.start}") from error


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _failure(kind: str, message: str) -> SampleFailure:
    return SampleFailure("caption", kind, message)
