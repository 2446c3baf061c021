"""What reaches a terminal or a log: untrusted text made printable on its way out.

What a command shows goes through a `PrintableConsole`; everything else that reaches stdout or stderr (log
lines, warnings, tracebacks, what Ray passes on from its workers) goes through `printable_streams`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from pipeline.text import on_screen, printable


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


class PatientConsole(PrintableConsole):
    """A console whose reader may go away: the run goes on in silence, where rich would end it."""

    def on_broken_pipe(self) -> None:
        """Write the rest to nowhere."""
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
