"""What damage is reported as."""

from __future__ import annotations

from pipeline.errors import SampleFailure


def truncated(message: str) -> SampleFailure:
    """The file ends before what it says it holds."""
    return SampleFailure("decode", "truncated", message)


def corrupt(message: str) -> SampleFailure:
    """The file holds what no encoder writes."""
    return SampleFailure("decode", "corrupt", message)


def too_many_parts(message: str) -> SampleFailure:
    """Looking at all parts of the file would take too long."""
    return SampleFailure("decode", "too_many_parts", message)
