"""WebP: chunks must fill their container, and compressed data must have no long run of zeros.

Source: RFC 9649, section 2, "WebP Container Specification".
"""

from __future__ import annotations

from collections.abc import Iterator

from legrad.image_files.failures import corrupt, too_many_parts, truncated

MAX_CHUNKS = 2**12
_HEADER_BYTES, _FRAME_HEADER_BYTES = 8, 16
_MACROBLOCK_PIXELS = 16 * 16
# of plain images, libwebp's output has a zero byte for 40 macroblocks; this leaves a margin
_MACROBLOCKS_PER_ZERO_BYTE = 8
_ZEROS_LOSSY, _ZEROS_LOSSLESS = 16, 64


def check_webp(data: bytes, image_pixels: int) -> None:
    """Check that chunks fill the container, and hold nothing that cannot be compressed data.

    Args:
        data: a file's content.
        image_pixels: height times width.

    Raises:
        ImageFileError: kind `truncated`, `corrupt` or `too_many_parts`.
    """
    end = check_webp_length(data)
    lossy = _ZEROS_LOSSY + image_pixels // _MACROBLOCK_PIXELS // _MACROBLOCKS_PER_ZERO_BYTE
    longest_zeros = {b"VP8 ": lossy, b"VP8L": _ZEROS_LOSSLESS}
    for kind, start, stop in _chunks(data, 12, end):
        zeros = longest_zeros.get(kind)
        if zeros is not None and (found := data.find(bytes(zeros + 1), start, stop)) >= 0:
            raise corrupt(f"more than {zeros} zeros in the WebP's compressed data, at byte {found}")


def check_webp_length(data: bytes) -> int:
    """Where the container ends; raises ImageFileError, kind `truncated`, where that is behind the data."""
    end = _HEADER_BYTES + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise truncated(f"the WebP has {len(data)} bytes; its header says {end}")
    return end


def _chunks(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and stop of each chunk's content, also of those within a frame."""
    for _ in range(MAX_CHUNKS):
        # a last chunk of an odd size may lack the byte that would make it even
        if start >= end:
            return
        kind = data[start : start + 4]
        content = start + _HEADER_BYTES
        stop = content + int.from_bytes(data[start + 4 : content], "little")
        if not (kind.isascii() and kind.decode("ascii").isprintable()) or content > end or stop > end:
            raise corrupt(f"no valid chunk at byte {start} of the WebP")
        yield kind, content, stop
        if kind == b"ANMF":
            yield from _chunks(data, content + _FRAME_HEADER_BYTES, stop)
        start = stop + stop % 2
    raise too_many_parts(f"the WebP has more than {MAX_CHUNKS} chunks")
