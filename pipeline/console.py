"""Consoles that make untrusted text printable before it reaches a terminal or a log.

A command writes to a `PrintableConsole`; everything else that reaches stdout or stderr (log lines, warnings,
tracebacks, output that Ray forwards from its workers) passes through `pipeline.text.printable_streams`.
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
    """A console on which neither escape sequences nor rich's markup in a text take effect.

    Args:
        options: as `rich.console.Console` takes them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    @property
    def file(self) -> IO[str]:
        """The stream written to; bypasses `printable_streams`, since colours are escape sequences."""
        file = super().file
        return file.stream if isinstance(file, PrintableStream) else file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text of a string, escaped first because rich drops some control characters silently."""
        return super().render_str(on_screen(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render and escape; every console method calls this."""
        # escaped before layout, so that column widths fit the escaped text
        if isinstance(renderable, Text) and (shown := on_screen(renderable.plain)) != renderable.plain:
            text = renderable
            renderable = Text(
                shown, text.style, justify=text.justify, overflow=text.overflow, no_wrap=text.no_wrap
            )
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(on_screen(segment.text), segment.style)


class PatientConsole(PrintableConsole):
    """A console that falls silent when its reader closes the pipe; rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Discard all further output."""
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
