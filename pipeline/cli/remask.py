"""The `remask` command: masks by other settings, from stored maps."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.annotate import run_shown
from pipeline.cli.common import OutputDir, checked_folder, open_console


def remask(
    out: OutputDir,
    new: Annotated[
        str,
        typer.Argument(
            metavar="NEW",
            help="Output folder for the new masks: local path, s3:// or gs://.",
            callback=checked_folder,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of masks to set in place of those of OUT, such as masks.value=0.4; also keys of "
            "output and run.",
        ),
    ] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARDS",
            help="Where the shards are now, if not where the job read them: paths, patterns; or OLD=NEW for "
            "a folder that moved. Only needed if masks are refined. Repeatable.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Make masks of only N shards, spread evenly."),
    ] = None,
) -> None:
    """Make masks anew by other settings, from the maps in OUT: no model is loaded, and no GPU is needed.

    Images are read again only if masks are refined. Exit code 3: shards are damaged, failed or left.
    """
    from pipeline.run.remask import prepare_remask

    job = prepare_remask(out, new, overrides or (), shards or ())
    raise typer.Exit(run_shown(job, open_console(), max_shards=limit))
