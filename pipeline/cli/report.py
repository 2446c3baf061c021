"""The `report` command."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.common import INCOMPLETE, OutputDir, open_console


def report(
    out: OutputDir,
    shards: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SHARDS...]",
            help="Where the shards are now, if not where the job read them: paths, URLs, patterns; or "
            "OLD=NEW for a folder that moved.",
        ),
    ] = None,
    *,
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="The page to write; default: OUT/report.html.")
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=0, max=300, help="Number of rows in the gallery.")
    ] = 60,
    classes: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Names of the classes: .txt or .yaml; default: the job's own."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the random sample of rows.")] = 0,
) -> None:
    """Write one self-contained HTML page: pictures, distributions, errors, runs, provenance."""
    from pipeline.report import render_report, write_report

    written = write_report(out, shards or (), to=to, samples=samples, classes_file=classes, seed=seed)
    open_console().print(render_report(written), soft_wrap=True)
    raise typer.Exit(INCOMPLETE if written.damaged else 0)
