"""The `status` command."""

from __future__ import annotations

import typer

from pipeline.cli.common import INCOMPLETE, OutputDir, open_console


def status(out: OutputDir) -> None:
    """Count shards done, failed and left, samples and errors. Exit code 0: complete; 3: incomplete."""
    from pipeline.output.status import read_status, render_status

    found = read_status(out)
    open_console().print(render_status(found))
    raise typer.Exit(0 if found.complete else INCOMPLETE)
