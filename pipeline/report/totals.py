"""Totals of an output folder: shards, samples, errors with examples, runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipeline.errors import DamagedFileError
from pipeline.output.counts import ShardCounts, total_counts
from pipeline.output.folder import ERRORS, OutputFolder
from pipeline.output.records import JobRecord
from pipeline.output.runs import RunRecord, latest_runs
from pipeline.output.schema import ShardRow
from pipeline.output.status import read_state, shortfall

MAX_FOOTERS = 2000
MAX_FAILED_SHOWN = 20
MAX_ERROR_FILES = 64
MAX_ERROR_ROWS = 1000
EXAMPLES_PER_KIND = 3
KEYS_PER_KIND = 100
# of all kinds together
MAX_KEYS = 1000
MAX_KINDS = 40
RUNS_SHOWN = 6
UNREADABLE_RECORD = "(the record cannot be read)"
EXAMPLE_COLUMNS = ("key", "shard", "stage", "kind", "message")


@dataclass(frozen=True)
class ErrorKind:
    """Error rows of one kind.

    Attributes:
        name: ``stage/kind``.
        rows: their number, where it is known, else 0.
        examples: a few of them as dictionaries.
        samples: key and shard of the first ones that name a sample.
    """

    name: str
    rows: int
    examples: tuple[Mapping[str, Any], ...]
    samples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Totals:
    """Totals of an output folder.

    Attributes:
        listed: rows of OUT/shards.parquet.
        done: ids of shards with annotations, damaged ones included, in order.
        damaged: URL and reason of the first few shards with a damaged archive.
        damaged_count: number of damaged shards.
        failed: canonical URL and last error of the first few failed shards.
        failed_count: number of failed shards.
        mismatched: number of shards whose files do not belong together.
        shortfall: why the job is not complete although no shard is left or failed; empty otherwise.
        counts: outcomes of samples; None where there are too many shards to count without OUT/_SUCCESS.
        errors: by kind, most frequent first.
        runs: the newest runs, oldest first.
        broken_files: a line for each file that cannot be read.
    """

    listed: tuple[ShardRow, ...]
    done: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...]
    damaged_count: int
    failed: tuple[tuple[str, str], ...]
    failed_count: int
    mismatched: int
    shortfall: str
    counts: ShardCounts | None
    errors: tuple[ErrorKind, ...]
    runs: tuple[RunRecord, ...]
    broken_files: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every shard is done and the job is within its limits."""
        return len(self.done) == len(self.listed) and not self.shortfall


def read_totals(folder: OutputFolder, job: JobRecord) -> Totals:
    """Read the totals of an output folder; the number of files that are read is limited.

    Args:
        folder: the output folder.
        job: its OUT/job.json.

    Raises:
        UserError: the folder has no list of shards.
        DamagedFileError: its list of shards is damaged or foreign.
        OutputError: the folder cannot be listed.
    """
    state = read_state(folder, folder.shard_rows(), job.config_hash, max_footers=MAX_FOOTERS)
    broken = list(state.mismatched.values())
    counts: ShardCounts | None
    if state.counts is None:
        counts, with_errors = _success_counts(folder, broken), sorted([*state.done, *state.damaged])
    else:
        counts = total_counts(state.counts.values())
        with_errors = sorted(name for name, found in state.counts.items() if found.error_rows)
    runs, unread_runs = latest_runs(folder, RUNS_SHOWN)
    failed = [
        (state.listed[name]["shard"], _last_error(folder, name, broken)) for name in _shown(state.failed)
    ]
    damaged = [(state.listed[name]["shard"], _damage(folder, name, broken)) for name in _shown(state.damaged)]
    run_settings = folder.config(job).run
    return Totals(
        listed=tuple(state.listed.values()),
        done=tuple(sorted([*state.done, *state.damaged])),
        damaged=tuple(damaged),
        damaged_count=len(state.damaged),
        failed=tuple(failed),
        failed_count=len(state.failed),
        mismatched=len(state.mismatched),
        shortfall=shortfall(run_settings, counts, state),
        counts=counts,
        errors=_error_kinds(folder, counts, with_errors, broken),
        runs=tuple(runs),
        broken_files=tuple(dict.fromkeys([*broken, *unread_runs])),
    )


def _shown(shard_ids: Sequence[str]) -> Sequence[str]:
    return sorted(shard_ids)[:MAX_FAILED_SHOWN]


def _success_counts(folder: OutputFolder, broken: list[str]) -> ShardCounts | None:
    if not folder.has_success():
        return None
    try:
        return folder.success().counts()
    except DamagedFileError as error:
        broken.append(str(error))
        return None


def _last_error(folder: OutputFolder, shard_id: str, broken: list[str]) -> str:
    try:
        return folder.failure(shard_id).last_error
    except DamagedFileError as error:
        broken.append(str(error))
        return UNREADABLE_RECORD


def _damage(folder: OutputFolder, shard_id: str, broken: list[str]) -> str:
    try:
        return folder.damage(shard_id).reason
    except DamagedFileError as error:
        broken.append(str(error))
        return UNREADABLE_RECORD


def _error_kinds(
    folder: OutputFolder, counts: ShardCounts | None, shard_ids: Sequence[str], damaged: list[str]
) -> tuple[ErrorKind, ...]:
    """Return the kinds with counts, where known, and examples from the first files with errors."""
    counted = dict(counts.errors_by_kind) if counts is not None else {}
    found: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in counted}
    if counts is None or counted:
        for shard_id in shard_ids[:MAX_ERROR_FILES]:
            if counted and all(
                len(rows) >= min(counted[kind], KEYS_PER_KIND) for kind, rows in found.items()
            ):
                break
            for row in _some_errors(folder, shard_id, damaged):
                rows = found.setdefault(f"{row['stage']}/{row['kind']}", [])
                if len(rows) < KEYS_PER_KIND:
                    rows.append(row)
    kinds = sorted(found, key=lambda kind: (-counted.get(kind, 0), kind))[:MAX_KINDS]
    most = MAX_KEYS // max(1, len(kinds))
    return tuple(_error_kind(kind, counted.get(kind, 0), found[kind], most) for kind in kinds)


def _error_kind(kind: str, count: int, rows: Sequence[Mapping[str, Any]], most_keys: int) -> ErrorKind:
    samples = dict.fromkeys((row["key"], row["shard"]) for row in rows if row["key"] is not None)
    return ErrorKind(kind, count, tuple(rows[:EXAMPLES_PER_KIND]), tuple(samples)[:most_keys])


def _some_errors(folder: OutputFolder, shard_id: str, damaged: list[str]) -> list[dict[str, Any]]:
    try:
        with folder.open(ERRORS, shard_id) as table:
            return list(islice(table.rows(EXAMPLE_COLUMNS), MAX_ERROR_ROWS))
    except DamagedFileError as error:
        damaged.append(str(error))
        return []
