"""Where untrusted text becomes printable: in files by `printable`, on screens on its way out.

Captions, keys, names of files and whatever a foreign output folder says may hold escape sequences that clear
a screen, marks that turn the direction of writing, or halves of characters. What a command shows goes through
a `PrintableConsole`, everything else that reaches stdout or stderr (log lines, warnings, tracebacks, what Ray
passes on from its workers) through `printable_streams`, so no command has to think of it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

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


class PrintableConsole(Console):
    """A console that shows text as text: neither escape sequences nor rich's markup in it take effect.

    Args:
        options: as `rich.console.Console` takes them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    @property
    def file(self) -> IO[str]:
        """Where this console writes; past `printable_streams`, since its own colours are escape sequences."""
        file = super().file
        return file.stream if isinstance(file, _PrintableStream) else file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render_str(self, text: str, **options: Any) -> Text:
        """Text of a string; escaped first, for rich drops some controls without a trace."""
        return super().render_str(on_screen(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render; everything that any console method shows comes by here."""
        # before it is laid out, so that columns are as wide as what is shown
        if isinstance(renderable, Text) and (shown := on_screen(renderable.plain)) != renderable.plain:
            renderable = _with_text(renderable, shown)
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(on_screen(segment.text), segment.style)


def _with_text(text: Text, shown: str) -> Text:
    return Text(shown, text.style, justify=text.justify, overflow=text.overflow, no_wrap=text.no_wrap)


class _PrintableStream:
    """A text stream that escapes what must not reach a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        # progress bars of the model hub go back to the start of their line
        bar = text.startswith("\r") and self.stream.isatty()
        self.stream.write("\r" + on_screen(text[1:]) if bar else on_screen(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Let through to stdout and stderr only what is printable, until the end of the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _PrintableStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class PrintableFormatter(logging.Formatter):
    """Log lines of one line each: a message cannot pretend to be another."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without traceback."""
        return printable(super().formatMessage(record))


def first_few(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are: ``a, b and 1,234 more``."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
