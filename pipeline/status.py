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
from pipeline.records import ShardCounts, total_counts
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
    """

    shards_total: int
    done: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    left: tuple[str, ...]
    mismatched: tuple[str, ...]
    counts: ShardCounts
    succeeded: bool

    @property
    def complete(self) -> bool:
        """Whether every shard is done."""
        return len(self.done) == self.shards_total


def read_status(output_dir: str) -> OutputStatus:
    """Look at an output folder; footers are read concurrently, nothing is changed.

    Raises:
        UserError: the folder is not the output of a job.
    """
    jobs.read_job(output_dir)
    listed = {row["shard_id"]: row["shard"] for row in jobs.read_shard_list(output_dir)}
    published = sorted(jobs.shard_ids_in(output_dir, "annotations", ".parquet") & set(listed))
    counts = checked_counts(output_dir, published)
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
    )


def _last_error(output_dir: str, shard_id: str) -> str:
    url = storage.join_url(output_dir, "failed", f"{shard_id}.json")
    try:
        return str(json.loads(storage.read_bytes(url))["last_error"])
    except (OSError, ValueError, KeyError) as error:
        return f"({storage.without_credentials(url)} cannot be read: {error})"


def render_status(status: OutputStatus) -> RenderableType:
    """The status as a person reads it."""
    parts: list[RenderableType] = [_counts_table(status)]
    if status.counts.errors_by_kind:
        parts.append(_pairs_table("errors by kind", "rows", sorted(status.counts.errors_by_kind.items())))
    if status.failed:
        parts.append(_pairs_table("shards given up", "last error", status.failed))
    if status.mismatched:
        names = ", ".join(status.mismatched)
        parts.append(Text(f"files that do not belong together; rerun the job to redo them: {names}"))
    return Group(*parts)


def _counts_table(status: OutputStatus) -> Table:
    counts = status.counts
    table = Table(title="complete" if status.complete else "incomplete", title_justify="left")
    for column in (
        "shards",
        "done",
        "failed",
        "left",
        "samples",
        "annotated",
        "empty",
        "failed samples",
        "rows",
    ):
        table.add_column(column, justify="right")
    shards = (status.shards_total, len(status.done), len(status.failed), len(status.left))
    samples = (counts.samples_in, counts.annotated, counts.empty, counts.failed, counts.rows)
    table.add_row(*(f"{number:,}" for number in (*shards, *samples)))
    return table


def _pairs_table(title: str, heading: str, pairs: Iterable[tuple[str, object]]) -> Table:
    table = Table("", heading, title=title, title_justify="left")
    for name, value in pairs:
        table.add_row(Text(name), Text(str(value)))
    return table
