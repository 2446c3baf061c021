"""Text from untrusted sources made printable, and figures as people read them."""

from __future__ import annotations

import logging
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

# controls, line and paragraph separators, marks that turn the direction of writing, halves of surrogate pairs
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# the same but for line feeds and tabs, and in addition marks that file names of some languages hold
_NOT_FOR_SCREENS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Escape what untrusted text must not carry into files, logs and terminals; all else stays as it is."""
    return _UNPRINTABLE.sub(_escaped, text)


def on_screen(text: str) -> str:
    """Escape what must not reach a terminal; line feeds and tabs stay."""
    return _NOT_FOR_SCREENS.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    # how Python keeps a byte that is not UTF-8
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class PrintableStream:
    """A text stream that escapes what must not reach a terminal.

    Args:
        stream: takes the escaped text; all but writing is left to it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write text, escaped."""
        # progress bars of the model hub go back to the start of their line
        bar = text.startswith("\r") and self.stream.isatty()
        self.stream.write("\r" + on_screen(text[1:]) if bar else on_screen(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines, escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Escape what is not printable on its way to stdout and stderr, until the end of the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, PrintableStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class PrintableFormatter(logging.Formatter):
    """Log lines of one line each: a message cannot pretend to be another."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, without traceback."""
        return printable(super().formatMessage(record))


def first_few(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are: ``a, b and 1,234 more``."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def received(value: object) -> str:
    """A value of any type and size as an error shows it: in one short, printable line."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 80, 80
    try:
        return printable(short.repr(value))
    # integers of thousands of digits have no text, by a limit of Python's own
    except ValueError:
        return f"a value of type {type(value).__name__} that is too large to be shown"


def as_share(share: float | None) -> str:
    """A share in [0, 1] as ``97 %``; ``?`` for None."""
    return "?" if share is None else f"{share:.0%}".replace("%", " %")


def as_duration(seconds: float) -> str:
    """Seconds as ``1h02m``, ``3m20s`` or ``12s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
