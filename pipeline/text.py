"""Make untrusted text printable, and format lists, shares and durations for people."""

from __future__ import annotations

import logging
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

# control characters, line and paragraph separators, bidirectional marks, lone surrogates
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# the same except line feeds and tabs, plus marks that file names in some languages contain
_NOT_FOR_SCREENS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Escape the characters that untrusted text must not bring into files, logs and terminals."""
    return _UNPRINTABLE.sub(_escaped, text)


def on_screen(text: str) -> str:
    """Escape the characters that must not reach a terminal; keep line feeds and tabs."""
    return _NOT_FOR_SCREENS.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    # Python's surrogateescape form of a byte that is not UTF-8
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class PrintableStream:
    """A text stream that escapes characters that must not reach a terminal.

    Args:
        stream: receives the escaped text, and all other calls.
        without_secrets: removes passwords and signatures from the URLs in a text.
    """

    def __init__(self, stream: TextIO, without_secrets: Callable[[str], str] | None = None) -> None:
        self.stream = stream
        self._without_secrets = without_secrets

    def write(self, text: str) -> int:
        """Write text, escaped."""
        # user info, queries and fragments can hold secrets; help texts with s3:// have none of these
        may_hold_secrets = "://" in text and any(mark in text for mark in "@?#")
        shown = self._without_secrets(text) if self._without_secrets and may_hold_secrets else text
        # progress bars of the model hub return to the start of their line
        bar = shown.startswith("\r") and self.stream.isatty()
        self.stream.write("\r" + on_screen(shown[1:]) if bar else on_screen(shown))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines, escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printable_streams(without_secrets: Callable[[str], str] | None = None) -> Iterator[None]:
    """Escape everything written to stdout and stderr inside the block.

    Args:
        without_secrets: removes passwords and signatures from the URLs in a text; None: they stay.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, PrintableStream(stream, without_secrets)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class PrintableFormatter(logging.Formatter):
    """Format each record as a single line, so that a message cannot imitate another log line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, without traceback."""
        return printable(super().formatMessage(record))


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names of a list, and how many more there are: ``a, b and 1,234 more``."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def received(value: object) -> str:
    """Return a value of any type and size as one short, printable line for an error message."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 80, 80
    try:
        return printable(short.repr(value))
    # Python refuses to convert integers of thousands of digits to text
    except ValueError:
        return f"a value of type {type(value).__name__} that is too large to show"


def as_share(share: float | None) -> str:
    """Return a share in [0, 1] as ``97 %``, and None as ``?``."""
    return "?" if share is None else f"{share:.0%}".replace("%", " %")


def as_duration(seconds: float) -> str:
    """Return seconds as ``1h02m``, ``3m20s`` or ``12s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
