"""The `compact` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import INCOMPLETE, OutputDir, checked_folder, open_console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.output.compaction import Part
    from pipeline.output.compaction_plan import Plan


def compact(
    out: OutputDir,
    new: Annotated[
        str,
        typer.Argument(
            metavar="NEW",
            help="Folder for the compacted copy, which holds nothing else: local path, s3:// or gs://.",
            callback=checked_folder,
        ),
    ],
    *,
    target_mib: Annotated[
        int,
        typer.Option(
            metavar="MIB", min=1, max=1 << 20, help="Size of the files to write, in MiB of compressed rows."
        ),
    ] = 512,
    incomplete: Annotated[
        bool,
        typer.Option(
            "--incomplete", help="Also compact the output of a job that is not complete; exit code 3."
        ),
    ] = False,
) -> None:
    """Write a copy of OUT with the same rows in fewer, larger files. Exit code 3: the job is incomplete."""
    from pipeline.output.compaction import write_compaction
    from pipeline.output.compaction_plan import plan_compaction
    from pipeline.storage import shown_url

    console = open_console()
    console.print(f"reading the footers in {shown_url(out)}", soft_wrap=True)
    plan = plan_compaction(out, target_mib)
    if plan.shortfall and not incomplete:
        console.print(
            f"{shown_url(out)}: not compacted, because the job is not complete: {plan.shortfall}. Complete "
            "it with `legrad annotate`, or compact what is there with --incomplete",
            soft_wrap=True,
        )
        raise typer.Exit(INCOMPLETE)
    parts = write_compaction(
        plan,
        new,
        on_part=lambda part, done, total: console.print(
            f"{done} of {total}: {part.path}: {len(part.shards):,} shard(s), {part.rows:,} rows"
        ),
    )
    console.print(summary(plan, parts, new), soft_wrap=True)
    if plan.shortfall:
        console.print(f"incomplete: {plan.shortfall}", soft_wrap=True)
    raise typer.Exit(INCOMPLETE if plan.shortfall else 0)


def summary(plan: Plan, parts: Sequence[Part], new: str) -> str:
    """Return what was written, in a line."""
    from pipeline.storage import shown_url

    rows = {
        table: sum(part.rows for part in parts if part.table == table) for table in ("annotations", "errors")
    }
    return (
        f"{shown_url(new)}: {len(plan.shards):,} shard(s), {rows['annotations']:,} rows and "
        f"{rows['errors']:,} error rows in {len(parts):,} file(s) instead of {2 * len(plan.shards):,}"
    )
