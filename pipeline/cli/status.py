"""The `status` command."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from pipeline.cli.common import INCOMPLETE, OutputDir, open_console

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from pipeline.output.counts import ShardCounts
    from pipeline.output.runs import RunRecord
    from pipeline.output.status import OutputStatus


def status(out: OutputDir) -> None:
    """Count shards done, failed and left, samples and errors. Exit code 0: complete; 3: incomplete."""
    from pipeline.output.status import read_status

    found = read_status(out)
    open_console().print(render_status(found))
    raise typer.Exit(0 if found.complete else INCOMPLETE)


def render_status(status: OutputStatus) -> RenderableType:
    """Return the status as text for a terminal of 80 columns or more."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text("complete" if status.complete else "incomplete", style="bold")]
    if status.shortfall:
        parts.append(Text(f"  {status.shortfall}", overflow="fold"))
    parts.append(_pairs(_totals(status)))
    if status.run is not None and status.run.left_alone:
        parts.append(_heading("places left alone: they get no further shards in the last run"))
        parts += [Text(f"  {place}", overflow="fold") for place in status.run.left_alone]
    if status.counts.errors_by_kind:
        parts += [_heading("errors by kind"), _pairs(_kinds(status.counts))]
    if status.damaged:
        parts.append(_heading("damaged shards: the rows of their intact samples are here"))
        parts += [_shard_text(url, reason) for url, reason in status.damaged]
    if status.failed:
        parts.append(_heading("shards given up"))
        parts += [_shard_text(url, message) for url, message in status.failed]
    if status.mismatched:
        parts.append(_heading("files that do not belong together; run the same command again to redo them"))
        parts += [
            Text(f"  {shard_id}\n    {problem}", overflow="fold") for shard_id, problem in status.mismatched
        ]
    return Group(*parts)


def _kinds(counts: ShardCounts) -> list[tuple[str, str]]:
    from pipeline.storage import with_plain_paths

    kinds = sorted(counts.errors_by_kind.items(), key=lambda item: (-item[1], item[0]))
    return [
        (
            kind,
            f"{rows:,}"
            + (
                f", for example {with_plain_paths(counts.error_examples[kind])}"
                if kind in counts.error_examples
                else ""
            ),
        )
        for kind, rows in kinds
    ]


def _totals(status: OutputStatus) -> list[tuple[str, str]]:
    counts = status.counts
    totals = [
        (
            "shards",
            f"{status.shards_total:,}: {len(status.done):,} done, {len(status.damaged):,} damaged, "
            f"{len(status.failed):,} failed, {len(status.left):,} left",
        ),
        (
            "samples",
            f"{counts.samples_in:,}: {counts.annotated:,} annotated, {counts.empty:,} empty, "
            f"{counts.failed:,} failed",
        ),
        ("rows", f"{counts.rows:,}; {counts.dropped_prompts:,} prompts dropped"),
    ]
    return totals if status.run is None else [*totals, *_run_lines(status.run)]


def _run_lines(run: RunRecord) -> list[tuple[str, str]]:
    from pipeline.output.measures import pace_text
    from pipeline.output.runs import RUNNING, workers_text
    from pipeline.text import as_duration

    updated = f", last update at {run.updated}" if run.ended == RUNNING else ""
    return [
        ("last run", f"{run.started}: {run.ended}{updated}; {as_duration(run.elapsed_s)}"),
        ("", f"{run.shards_done:,} shards, {run.samples:,} samples ({run.samples_per_s:,.1f}/s)"),
        ("", f"{run.measures.images_decoded:,} images decoded"),
        ("", f"workers {workers_text(run.workers, run.workers_wanted, run.workers_lost)}"),
        ("", pace_text(run.measures, run.workers)),
    ]


def _shard_text(url: str, reason: str) -> Text:
    from rich.text import Text

    from pipeline.storage import with_plain_paths

    return Text(with_plain_paths(f"  {url}\n    {reason}"), overflow="fold")


def _heading(text: str) -> Text:
    from rich.text import Text

    return Text(text, style="bold")


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(f"  {name}"), Text(value))
    return table
