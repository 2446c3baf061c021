"""BMP: the size of the file against the one in its header. BMP has no checksums; zeros are black pixels."""

from __future__ import annotations

from legrad.image_files.failures import truncated


def check_bmp(data: bytes) -> None:
    """Compare the file's size with the one in its header, where 0 means unknown.

    Raises:
        ImageFileError: kind `truncated`.
    """
    size_bytes = int.from_bytes(data[2:6], "little")
    if size_bytes > len(data):
        raise truncated(f"the BMP has {len(data)} bytes; its header says {size_bytes}")
