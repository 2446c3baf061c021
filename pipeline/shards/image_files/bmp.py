"""BMP: the size that the file says it has. Its pixels carry no sums, and zeros are black ones."""

from __future__ import annotations

from pipeline.shards.image_files.failures import truncated


def check_bmp(data: bytes) -> None:
    """Compare the file's size with what its header says; a zero there says nothing.

    Raises:
        SampleFailure: kind `truncated`.
    """
    size_bytes = int.from_bytes(data[2:6], "little")
    if size_bytes > len(data):
        raise truncated(f"the BMP says that it has {size_bytes} bytes, and has {len(data)}")
