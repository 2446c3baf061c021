"""Failures of damaged image files, one function for each kind."""

from __future__ import annotations

from pipeline.errors import SampleFailure


def truncated(message: str) -> SampleFailure:
    """Return the failure of a file that ends before the data that it declares."""
    return SampleFailure("decode", "truncated", message)


def corrupt(message: str) -> SampleFailure:
    """Return the failure of a file with content that no encoder writes."""
    return SampleFailure("decode", "corrupt", message)


def too_many_parts(message: str) -> SampleFailure:
    """Return the failure of a file whose parts are too many to check."""
    return SampleFailure("decode", "too_many_parts", message)
