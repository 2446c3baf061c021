"""Recognise what a file is by its first bytes, and say how shards are made of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

# what `kind_of` looks at
HEAD_BYTES = 512

_FROM_IMAGES = "`legrad shards images ROOT DEST` makes shards of a folder of images"
_FROM_PARQUET = (
    "`legrad shards parquet FILES DEST --image IMAGE --caption CAPTION` makes shards of such files"
)
_EXTRACT = f"extract it, then {_FROM_IMAGES}"
_CONVERT = "write its images and captions to tars, one member for each"
_CHECK_URL = "the server sent an answer in place of the file: check the URL and the access to it"


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: with its article, such as ``a Parquet file``.
        is_image: whether it is a picture.
        is_read: whether it is a picture in one of the formats that `pipeline.shards.images` decodes.
        way_out: what to do where a tar was expected.
    """

    name: str
    is_image: bool = False
    is_read: bool = False
    way_out: str = _CONVERT


def _image(name: str, *, is_read: bool = False) -> FileKind:
    return FileKind(name, is_image=True, is_read=is_read, way_out=_FROM_IMAGES)


_KINDS: tuple[tuple[re.Pattern[bytes], FileKind], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE if is_text else re.DOTALL), kind)
    for pattern, is_text, kind in (
        (rb"\xff\xd8\xff", False, _image("a JPEG image", is_read=True)),
        (rb"\x89PNG\r\n\x1a\n", False, _image("a PNG image", is_read=True)),
        (rb"RIFF....WEBP", False, _image("a WebP image", is_read=True)),
        (rb"GIF8[79]a", False, _image("a GIF image", is_read=True)),
        (rb"BM.{4}\0{4}", False, _image("a BMP image", is_read=True)),
        (rb"II\*\0|MM\0\*", False, _image("a TIFF image")),
        (rb".{4}ftyp(?:avif|avis)", False, _image("an AVIF image")),
        (rb".{4}ftyp(?:heic|heix|hevc|mif1|msf1)", False, _image("a HEIC image")),
        (rb"\xff\x0a|\0{3}\x0cJXL ", False, _image("a JPEG XL image")),
        (rb"\0{3}\x0cjP  ", False, _image("a JPEG 2000 image")),
        (rb"PAR1", False, FileKind("a Parquet file", way_out=_FROM_PARQUET)),
        (rb"ARROW1\0\0", False, FileKind("an Arrow file", way_out=_CONVERT)),
        (rb"PK(?:\x03\x04|\x05\x06)", False, FileKind("a zip file", way_out=_EXTRACT)),
        (rb"7z\xbc\xaf\x27\x1c", False, FileKind("a 7z file", way_out=_EXTRACT)),
        (rb"Rar!\x1a\x07", False, FileKind("a RAR file", way_out=_EXTRACT)),
        (rb"\x89HDF\r\n\x1a\n", False, FileKind("an HDF5 file")),
        (rb"\x93NUMPY", False, FileKind("a NumPy array")),
        (rb"\x80[\x02-\x05]", False, FileKind("a Python pickle")),
        (rb"SQLite format 3\0", False, FileKind("an SQLite database")),
        (rb"%PDF-", False, FileKind("a PDF document")),
        (
            rb"version https://git-lfs\.github\.com/",
            False,
            FileKind("a Git LFS pointer", way_out="fetch the file itself: `git lfs pull`"),
        ),
        (
            rb"[^\n]{0,200}/annex/objects/",
            False,
            FileKind("a git-annex pointer", way_out="fetch the file itself: `git annex get`"),
        ),
        (rb"\s*<(?:!doctype html|html)", True, FileKind("an HTML page", way_out=_CHECK_URL)),
        (rb"\s*<\?xml.{0,200}<error>", True, FileKind("an error page of a store", way_out=_CHECK_URL)),
        (rb"\s*<\?xml", True, FileKind("an XML file")),
    )
)
_JSON = re.compile(rb"\s*(?:\{\s*(?:\"|\})|\[\s*[\[{\"\]])")


def kind_of(head: bytes) -> FileKind | None:
    """Return the kind of a file; None where it is not recognised.

    Args:
        head: the first bytes of the file, HEAD_BYTES of them where it has so many.
    """
    if not head:
        return FileKind("an empty file", way_out="the file was perhaps not written to its end")
    head = head[:HEAD_BYTES]
    found = next((kind for pattern, kind in _KINDS if pattern.match(head)), None)
    if found is not None:
        return found
    return FileKind("a JSON file") if _JSON.match(head) else None
