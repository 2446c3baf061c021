"""PNG: chunks against their checksums; chunks that no pixel depends on are removed.

Source: PNG specification, third edition, section 5, "Datastream structure".
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from legrad.image_files.failures import corrupt, too_many_parts, truncated

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# encoders write pixels in chunks of at least some kilobytes
MAX_CHUNKS = 2**16
_KEPT = frozenset((b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"acTL", b"fcTL", b"fdAT", b"IEND"))
_LENGTH_AND_KIND_BYTES, _SUM_BYTES = 8, 4
_PIECE_BYTES = 2**20
_INDEXED, _CHANNELS = 3, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# of each pass: first column and row, and steps between columns and between rows
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


@dataclass(frozen=True)
class _Chunk:
    kind: bytes
    start: int
    stop: int


def png_without_texts(data: bytes) -> bytes:
    """Skip texts, colour profiles and all else that no pixel depends on.

    They are never inflated then, and no limit on them fails an image. The EXIF data come first, so that they
    are known before the pixels are decoded.

    Raises:
        ImageFileError: kind `too_many_parts`.
    """
    chunks = list(_chunks(data))
    if all(chunk.kind in _KEPT and chunk.kind != b"eXIf" for chunk in chunks):
        return data
    kept = [chunk for chunk in chunks if chunk.kind in _KEPT]
    kept.sort(key=lambda chunk: chunk.kind not in (b"IHDR", b"eXIf"))
    view = memoryview(data)
    return b"".join([SIGNATURE, *(view[chunk.start : chunk.stop] for chunk in kept)])


def check_png(data: bytes) -> None:
    """Check every chunk up to the end chunk; what follows is of no interest.

    Raises:
        ImageFileError: kind `truncated`, `corrupt` or `too_many_parts`.
    """
    if not data.startswith(SIGNATURE):
        raise corrupt(f"expected a PNG, received bytes that begin with {data[:12]!r}")
    view = memoryview(data)
    for chunk in _chunks(data):
        if not chunk.kind.isalpha():
            raise corrupt(f"the PNG has no valid chunk at byte {chunk.start}")
        # a second header would give the pixels another size than the one that was checked
        if (chunk.kind == b"IHDR") != (chunk.start == len(SIGNATURE)):
            raise corrupt("the PNG's header (IHDR) is not its first chunk, or not its only one")
        if chunk.stop > len(data):
            break
        end = chunk.stop - _SUM_BYTES
        if zlib.crc32(view[chunk.start + 4 : end]) != int.from_bytes(view[end : chunk.stop], "big"):
            name = chunk.kind.decode("ascii")
            raise corrupt(f"the checksum of the PNG's chunk {name} at byte {chunk.start} is wrong")
        if chunk.kind == b"IEND":
            return
    raise truncated(f"the PNG has {len(data)} bytes and no end chunk (IEND)")


def check_png_palette(data: bytes) -> None:
    """Check that there is a palette where colours need one; colours beyond its end are not looked for.

    Raises:
        ImageFileError: kind `corrupt` or `too_many_parts`.
    """
    needs_palette = False
    for chunk in _chunks(data):
        if chunk.kind == b"IHDR":
            needs_palette = _content(data, chunk)[9] == _INDEXED
        elif chunk.kind == b"PLTE":
            return
    if needs_palette:
        raise corrupt("the PNG's pixels are of a palette, and it has none")


def check_png_rows(data: bytes) -> None:
    """Check that the compressed data hold every row; decoders make up those that are missing.

    Args:
        data: a file's content, of a size that was found small enough.

    Raises:
        ImageFileError: kind `truncated`, `corrupt` or `too_many_parts`.
    """
    inflater, left_bytes = zlib.decompressobj(), 0
    for chunk in _chunks(data):
        if chunk.kind == b"IHDR":
            left_bytes = _inflated_bytes(_content(data, chunk))
        elif chunk.kind == b"IDAT":
            left_bytes -= _count_inflated(inflater, _content(data, chunk), left_bytes)
    if left_bytes > 0:
        left_bytes -= len(inflater.flush())
    if left_bytes > 0:
        raise truncated(f"the PNG's compressed data end {left_bytes} bytes before its last row does")


def _content(data: bytes, chunk: _Chunk) -> memoryview:
    return memoryview(data)[chunk.start + _LENGTH_AND_KIND_BYTES : chunk.stop - _SUM_BYTES]


def _count_inflated(inflater: zlib._Decompress, content: memoryview, most_bytes: int) -> int:
    found, rest = 0, bytes(content)
    while rest and found < most_bytes and not inflater.eof:
        try:
            found += len(inflater.decompress(rest, _PIECE_BYTES))
        except zlib.error as error:
            raise corrupt(f"the PNG's compressed data are damaged: {error}") from error
        rest = inflater.unconsumed_tail
    return found


def _inflated_bytes(header: memoryview) -> int:
    """Bytes of all rows, with the one before each row that names its filter; of all passes if interlaced."""
    width, height = (int.from_bytes(header[start : start + 4], "big") for start in (0, 4))
    bits = header[8] * _CHANNELS.get(header[9], 1)
    passes = _ADAM7 if header[12] else ((0, 0, 1, 1),)
    sizes = ((-(-(width - left) // across), -(-(height - top) // down)) for left, top, across, down in passes)
    return sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """The chunks as announced, up to the end chunk; the last may reach behind the end of the data."""
    start = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        if start + _LENGTH_AND_KIND_BYTES > len(data):
            return
        kind = data[start + 4 : start + 8]
        content_bytes = int.from_bytes(data[start : start + 4], "big")
        stop = start + _LENGTH_AND_KIND_BYTES + content_bytes + _SUM_BYTES
        yield _Chunk(kind, start, stop)
        if kind == b"IEND":
            return
        start = stop
    raise too_many_parts(f"the PNG has more than {MAX_CHUNKS} chunks")
