"""Text from untrusted sources made printable, and figures as people read them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence

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
