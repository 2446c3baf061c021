"""What an output folder holds as a whole: shards, samples, errors with examples, runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.footers import UNREADABLE, checked_footers, counts_from_metadata
from pipeline.output_folder import ANNOTATIONS, DAMAGED, ERRORS, FAILED, SUCCESS_FILE, ids_in
from pipeline.records import ShardCounts, total_counts
from pipeline.report.scores import open_parquet
from pipeline.result import damage_of
from pipeline.run_record import RunRecord, latest_runs
from pipeline.shard_list import read_shard_list
from pipeline.status import last_error, run_settings, shortfall

MAX_FOOTERS = 2000
MAX_FAILED_SHOWN = 20
MAX_ERROR_FILES = 64
MAX_ERROR_ROWS = 1000
EXAMPLES_PER_KIND = 3
MAX_KINDS = 40
RUNS_SHOWN = 6
EXAMPLE_COLUMNS = ("key", "shard", "stage", "kind", "message")


@dataclass(frozen=True)
class ErrorKind:
    """Error rows of one kind, ``stage/kind``, with a few of them as dictionaries."""

    name: str
    rows: int
    examples: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Totals:
    """Where an output folder stands.

    Attributes:
        listed: rows of OUT/shards.parquet.
        done: ids of shards with annotations, damaged ones included, in order.
        damaged: URL and reason of shards whose archive was not read to a sound end, the first few of them.
        damaged_count: how many are damaged.
        failed: canonical URL and last error of shards given up, the first few of them.
        failed_count: how many were given up.
        mismatched: how many shards have files that do not belong together.
        shortfall: why the job is not complete though no shard is left or failed; empty otherwise.
        counts: outcomes of samples; None where there are too many shards to count without OUT/_SUCCESS.
        errors: by kind, most frequent first.
        runs: the newest records, oldest first.
    """

    listed: tuple[Mapping[str, Any], ...]
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

    @property
    def complete(self) -> bool:
        """Whether every shard is done and nothing speaks against it."""
        return len(self.done) == len(self.listed) and not self.shortfall


def read_totals(out_dir: str, job: Mapping[str, Any]) -> Totals:
    """Look at an output folder; what is read is bounded whatever its size.

    Args:
        out_dir: the folder.
        job: the content of its job.json.

    Raises:
        UserError: the folder has no list of shards.
        OutputError: it cannot be listed.
    """
    listed = {row["shard_id"]: row for row in read_shard_list(out_dir)}
    published = sorted(ids_in(out_dir, ANNOTATIONS) & set(listed))
    damaged = sorted(ids_in(out_dir, DAMAGED) & set(published))
    failed = sorted((ids_in(out_dir, FAILED) & set(listed)) - set(published))
    counts: ShardCounts | None
    if len(published) <= MAX_FOOTERS:
        by_shard = checked_footers(
            out_dir, {shard_id: listed[shard_id] for shard_id in published}, str(job.get("config_hash"))
        )
        counts = total_counts(found.counts for found in by_shard.values() if found is not None)
        with_errors = [shard_id for shard_id, found in by_shard.items() if found and found.counts.error_rows]
    else:
        by_shard, counts, with_errors = {}, _success_counts(out_dir), published
    mismatched = {shard_id for shard_id, found in by_shard.items() if found is None}
    return Totals(
        listed=tuple(listed.values()),
        done=tuple(shard_id for shard_id in published if shard_id not in mismatched),
        damaged=tuple(
            (listed[shard_id]["shard"], damage_of(out_dir, shard_id))
            for shard_id in damaged[:MAX_FAILED_SHOWN]
        ),
        damaged_count=len(damaged),
        failed=tuple(
            (listed[shard_id]["shard"], last_error(out_dir, shard_id))
            for shard_id in failed[:MAX_FAILED_SHOWN]
        ),
        failed_count=len(failed),
        mismatched=len(mismatched),
        shortfall=shortfall(run_settings(job), counts or ShardCounts(), len(damaged)),
        counts=counts,
        errors=_error_kinds(out_dir, counts, with_errors),
        runs=tuple(latest_runs(out_dir, RUNS_SHOWN)),
    )


def _success_counts(out_dir: str) -> ShardCounts | None:
    try:
        document = json.loads(storage.read_bytes(storage.join_url(out_dir, SUCCESS_FILE)))
        return counts_from_metadata(document)
    except UNREADABLE:
        return None


def _error_kinds(out_dir: str, counts: ShardCounts | None, shard_ids: Sequence[str]) -> tuple[ErrorKind, ...]:
    """Kinds with their counts, where they were counted, and examples from the first files that have some."""
    counted = dict(counts.errors_by_kind) if counts is not None else {}
    examples: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in counted}
    if counts is None or counted:
        for shard_id in shard_ids[:MAX_ERROR_FILES]:
            if counted and all(len(found) >= EXAMPLES_PER_KIND for found in examples.values()):
                break
            for row in _some_errors(out_dir, shard_id):
                found = examples.setdefault(f"{row['stage']}/{row['kind']}", [])
                if len(found) < EXAMPLES_PER_KIND:
                    found.append(row)
    kinds = sorted(examples, key=lambda kind: (-counted.get(kind, 0), kind))[:MAX_KINDS]
    return tuple(ErrorKind(kind, counted.get(kind, 0), tuple(examples[kind])) for kind in kinds)


def _some_errors(out_dir: str, shard_id: str) -> list[dict[str, Any]]:
    try:
        with open_parquet(storage.join_url(out_dir, ERRORS), shard_id) as file:
            if not file.metadata.num_rows:
                return []
            batch = next(file.iter_batches(MAX_ERROR_ROWS, row_groups=[0], columns=list(EXAMPLE_COLUMNS)))
            rows: list[dict[str, Any]] = batch.to_pylist()
            return rows
    except (OSError, KeyError, pa.ArrowException):
        return []
