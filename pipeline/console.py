"""Consoles of rich that escape untrusted text on its way to a terminal.

What a command shows goes through a `PrintableConsole`; everything else that reaches stdout or stderr (log
lines, warnings, tracebacks, what Ray passes on from its workers) goes through
`pipeline.text.printable_streams`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from pipeline.text import PrintableStream, on_screen


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
        return file.stream if isinstance(file, PrintableStream) else file

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


class PatientConsole(PrintableConsole):
    """A console whose reader may go away: the run goes on in silence, where rich would end it."""

    def on_broken_pipe(self) -> None:
        """Write the rest to nowhere."""
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
