"""What an output folder holds: shards done, failed and left, samples, errors by kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline import storage
from pipeline.config.load import parse_config
from pipeline.config.schema import RunConfig
from pipeline.errors import DamagedFileError
from pipeline.output.budget import reason_at_end
from pipeline.output.counts import ShardCounts, total_counts
from pipeline.output.folder import ANNOTATIONS, FAILED, JOB_FILE, SUCCESS_FILE, ids_in, stray_annotations
from pipeline.output.footers import checked_footers
from pipeline.output.reading import (
    FooterRecord,
    JobRecord,
    damage_of,
    read_failure,
    read_job_record,
    read_shard_rows,
)
from pipeline.output.runs import RUNNING, RunRecord, latest_run
from pipeline.text import as_duration, as_share, printable


@dataclass(frozen=True)
class OutputStatus:
    """Where an output folder stands.

    Attributes:
        shards_total: shards of the job.
        done: ids of shards whose two files are there and belong together.
        damaged: URL and reason of published shards whose archive was not read to a sound end.
        failed: URL and last error of shards given up.
        left: ids of shards still to do.
        mismatched: ids of shards whose two files do not hold, with the file and why: to be redone.
        counts: outcomes of the samples of done and damaged shards.
        shortfall: why the job is not complete though no shard is left or failed; empty otherwise.
        succeeded: whether OUT/_SUCCESS is there.
        run: what the newest run recorded of itself; None where none did.
    """

    shards_total: int
    done: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, str], ...]
    left: tuple[str, ...]
    mismatched: tuple[tuple[str, str], ...]
    counts: ShardCounts
    shortfall: str
    succeeded: bool
    run: RunRecord | None = None

    @property
    def complete(self) -> bool:
        """Whether `legrad annotate` would have nothing to do and nothing to complain about."""
        return not (self.failed or self.left or self.shortfall)


def read_status(output_dir: str) -> OutputStatus:
    """Look at an output folder; footers are read concurrently, nothing is changed.

    Raises:
        UserError: the folder is not the output of a job.
    """
    job = read_job_record(output_dir)
    listed = {row["shard_id"]: row for row in read_shard_rows(output_dir)}
    published = ids_in(output_dir, ANNOTATIONS)
    footers = checked_footers(
        output_dir,
        {shard_id: row for shard_id, row in listed.items() if shard_id in published},
        job.config_hash,
    )
    valid = {shard_id: footer for shard_id, footer in footers.items() if isinstance(footer, FooterRecord)}
    damaged = [shard_id for shard_id, footer in valid.items() if footer.state == "damaged"]
    failed = sorted((ids_in(output_dir, FAILED) & set(listed)) - set(valid))
    counts = total_counts(footer.counts() for footer in valid.values())
    strays = stray_annotations(output_dir, listed)
    return OutputStatus(
        shards_total=len(listed),
        done=tuple(shard_id for shard_id in valid if shard_id not in set(damaged)),
        damaged=tuple((listed[shard_id]["shard"], damage_of(output_dir, shard_id)) for shard_id in damaged),
        failed=tuple((listed[shard_id]["shard"], last_error(output_dir, shard_id)) for shard_id in failed),
        left=tuple(sorted(set(listed) - set(valid) - set(failed))),
        mismatched=tuple(
            (shard_id, str(found))
            for shard_id, found in footers.items()
            if isinstance(found, DamagedFileError)
        ),
        counts=counts,
        shortfall=shortfall(run_settings(output_dir, job), counts, len(damaged), strays),
        succeeded=storage.exists(output_dir, SUCCESS_FILE),
        run=latest_run(output_dir),
    )


def run_settings(output_dir: str, job: JobRecord) -> RunConfig:
    """The section `run` of a job's record; raises UserError where its configuration is none."""
    return parse_config(job.config, where=storage.join_url(output_dir, JOB_FILE)).run


def shortfall(run: RunConfig, counts: ShardCounts, damaged: int, strays: Sequence[str]) -> str:
    """Why a job is not complete though no shard of it is left or failed; empty where it is.

    Args:
        run: its settings.
        counts: outcomes of its samples.
        damaged: how many of its shards are damaged.
        strays: files among the annotations that are of no shard of the job.
    """
    if strays:
        return (
            f"{len(strays):,} file(s) in {ANNOTATIONS}/ are of no listed shard, such as "
            f"{printable(strays[0])}; whoever reads the folder counts their rows"
        )
    if damaged and not run.accept_damaged:
        return f"{damaged:,} shard(s) are damaged; run.accept_damaged is false"
    return reason_at_end(run, counts)


def last_error(output_dir: str, shard_id: str) -> str:
    """Why a shard was given up, as OUT/failed/<shard-id>.json says."""
    try:
        return read_failure(output_dir, shard_id).last_error
    except DamagedFileError as error:
        return f"its record cannot be read: {error}"


def render_status(status: OutputStatus) -> RenderableType:
    """The status as a person reads it, also in 80 columns."""
    parts: list[RenderableType] = [Text("complete" if status.complete else "incomplete", style="bold")]
    if status.shortfall:
        parts.append(Text(f"  {status.shortfall}", overflow="fold"))
    parts.append(_pairs(_totals(status)))
    if status.counts.errors_by_kind:
        parts += [_heading("errors by kind"), _pairs(_kinds(status.counts))]
    if status.damaged:
        parts.append(_heading("damaged shards: the rows of their intact samples are here"))
        parts += [Text(f"  {url}\n    {reason}", overflow="fold") for url, reason in status.damaged]
    if status.failed:
        parts.append(_heading("shards given up"))
        parts += [Text(f"  {url}\n    {message}", overflow="fold") for url, message in status.failed]
    if status.mismatched:
        parts.append(_heading("files that do not belong together; rerun the job to redo them"))
        parts += [
            Text(f"  {shard_id}\n    {problem}", overflow="fold") for shard_id, problem in status.mismatched
        ]
    return Group(*parts)


def _kinds(counts: ShardCounts) -> list[tuple[str, str]]:
    kinds = sorted(counts.errors_by_kind.items(), key=lambda item: (-item[1], item[0]))
    return [
        (
            kind,
            f"{rows:,}"
            + (f", for example {counts.error_examples[kind]}" if kind in counts.error_examples else ""),
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
