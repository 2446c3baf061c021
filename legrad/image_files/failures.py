"""Errors of damaged image files, one function for each kind."""

from __future__ import annotations

from legrad.errors import ImageFileError


def truncated(message: str) -> ImageFileError:
    """Return the error of a file that ends before the data that it declares."""
    return ImageFileError("truncated", message)


def corrupt(message: str) -> ImageFileError:
    """Return the error of a file with content that no encoder writes."""
    return ImageFileError("corrupt", message)


def too_many_parts(message: str) -> ImageFileError:
    """Return the error of a file with more parts than are read."""
    return ImageFileError("too_many_parts", message)
