"""What an output folder holds: shards done, failed and left, samples, errors by kind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline import job as jobs
from pipeline import storage
from pipeline.progress import as_duration, as_share
from pipeline.records import ShardCounts, total_counts
from pipeline.run_record import RUNNING, RunRecord, latest_run
from pipeline.writer import checked_counts


@dataclass(frozen=True)
class OutputStatus:
    """Where an output folder stands.

    Attributes:
        shards_total: shards of the job.
        done: ids of shards whose two files are there and belong together.
        failed: canonical URL and last error of shards given up.
        left: ids of shards still to do.
        mismatched: ids of shards whose two files differ in their attempt, or are unreadable: to be redone.
        counts: outcomes of the samples of done shards.
        succeeded: whether OUT/_SUCCESS is there.
        run: what the newest run recorded of itself; None where none did.
    """

    shards_total: int
    done: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    left: tuple[str, ...]
    mismatched: tuple[str, ...]
    counts: ShardCounts
    succeeded: bool
    run: RunRecord | None = None

    @property
    def complete(self) -> bool:
        """Whether every shard is done."""
        return len(self.done) == self.shards_total


def read_status(output_dir: str) -> OutputStatus:
    """Look at an output folder; footers are read concurrently, nothing is changed.

    Raises:
        UserError: the folder is not the output of a job.
    """
    config_hash = str(jobs.read_job(output_dir).get("config_hash"))
    listed = {row["shard_id"]: row["shard"] for row in jobs.read_shard_list(output_dir)}
    published = sorted(jobs.shard_ids_in(output_dir, "annotations", ".parquet") & set(listed))
    counts = checked_counts(output_dir, published, config_hash)
    done = {shard: found for shard, found in counts.items() if found is not None}
    failed = sorted((jobs.shard_ids_in(output_dir, "failed", ".json") & set(listed)) - set(done))
    return OutputStatus(
        shards_total=len(listed),
        done=tuple(done),
        failed=tuple((listed[shard], _last_error(output_dir, shard)) for shard in failed),
        left=tuple(sorted(set(listed) - set(done) - set(failed))),
        mismatched=tuple(shard for shard, found in counts.items() if found is None),
        counts=total_counts(done.values()),
        succeeded=storage.exists(output_dir, jobs.SUCCESS_FILE),
        run=latest_run(output_dir),
    )


def _last_error(output_dir: str, shard_id: str) -> str:
    url = storage.join_url(output_dir, "failed", f"{shard_id}.json")
    try:
        return str(json.loads(storage.read_bytes(url))["last_error"])
    except (OSError, ValueError, KeyError) as error:
        return f"({storage.without_credentials(url)} cannot be read: {error})"


def render_status(status: OutputStatus) -> RenderableType:
    """The status as a person reads it, also in 80 columns."""
    parts: list[RenderableType] = [Text("complete" if status.complete else "incomplete", style="bold")]
    parts.append(_pairs(_totals(status)))
    if status.counts.errors_by_kind:
        kinds = sorted(status.counts.errors_by_kind.items(), key=lambda item: (-item[1], item[0]))
        parts += [_heading("errors by kind"), _pairs([(kind, f"{rows:,}") for kind, rows in kinds])]
    if status.failed:
        parts.append(_heading("shards given up"))
        parts += [Text(f"  {url}\n    {message}", overflow="fold") for url, message in status.failed]
    if status.mismatched:
        parts.append(_heading("files that do not belong together; rerun the job to redo them"))
        parts += [Text(f"  {shard_id}", overflow="fold") for shard_id in status.mismatched]
    return Group(*parts)


def _totals(status: OutputStatus) -> list[tuple[str, str]]:
    counts = status.counts
    totals = [
        (
            "shards",
            f"{status.shards_total:,}: {len(status.done):,} done, {len(status.failed):,} failed, "
            f"{len(status.left):,} left",
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
    heard = f", last heard of at {run.updated}" if run.ended == RUNNING else ""
    return [
        ("last run", f"{run.started}: {run.ended}{heard}; {as_duration(run.elapsed_s)}"),
        ("", f"{run.shards_done:,} shards, {run.samples:,} samples ({run.samples_per_s:,.1f}/s)"),
        (
            "",
            f"{run.measures.images_decoded:,} images decoded; "
            f"device busy {as_share(run.measures.device_busy_share)} on {run.workers} worker(s)",
        ),
    ]


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _pairs(pairs: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(f"  {name}"), Text(value))
    return table
