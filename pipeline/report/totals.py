"""What an output folder holds as a whole: shards, samples, errors with examples, runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline import job as jobs
from pipeline import storage
from pipeline.records import ShardCounts, total_counts
from pipeline.report.scores import open_parquet
from pipeline.run_record import RunRecord, latest_runs
from pipeline.writer import checked_counts, counts_from_metadata

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
        done: ids of shards with annotations, in order.
        failed: canonical URL and last error of shards given up, the first few of them.
        failed_count: how many were given up.
        mismatched: how many shards have files that do not belong together.
        counts: outcomes of samples; None where there are too many shards to count without OUT/_SUCCESS.
        errors: by kind, most frequent first.
        runs: the newest records, oldest first.
    """

    listed: tuple[Mapping[str, Any], ...]
    done: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    failed_count: int
    mismatched: int
    counts: ShardCounts | None
    errors: tuple[ErrorKind, ...]
    runs: tuple[RunRecord, ...]

    @property
    def complete(self) -> bool:
        """Whether every shard is done."""
        return len(self.done) == len(self.listed)


def read_totals(out_dir: str, config_hash: str) -> Totals:
    """Look at an output folder; what is read is bounded whatever its size.

    Raises:
        UserError: the folder has no list of shards.
        OutputError: it cannot be listed.
    """
    listed = {row["shard_id"]: row for row in jobs.read_shard_list(out_dir)}
    published = sorted(jobs.shard_ids_in(out_dir, "annotations", ".parquet") & set(listed))
    failed = sorted((jobs.shard_ids_in(out_dir, "failed", ".json") & set(listed)) - set(published))
    counts: ShardCounts | None
    if len(published) <= MAX_FOOTERS:
        by_shard = checked_counts(out_dir, published, config_hash)
        counts = total_counts(found for found in by_shard.values() if found is not None)
        with_errors = [shard_id for shard_id, found in by_shard.items() if found and found.error_rows]
    else:
        by_shard, counts, with_errors = {}, _success_counts(out_dir), published
    mismatched = {shard_id for shard_id, found in by_shard.items() if found is None}
    return Totals(
        listed=tuple(listed.values()),
        done=tuple(shard_id for shard_id in published if shard_id not in mismatched),
        failed=tuple(
            (listed[shard_id]["shard"], _last_error(out_dir, shard_id))
            for shard_id in failed[:MAX_FAILED_SHOWN]
        ),
        failed_count=len(failed),
        mismatched=len(mismatched),
        counts=counts,
        errors=_error_kinds(out_dir, counts, with_errors),
        runs=tuple(latest_runs(out_dir, RUNS_SHOWN)),
    )


def _success_counts(out_dir: str) -> ShardCounts | None:
    try:
        document = json.loads(storage.read_bytes(storage.join_url(out_dir, jobs.SUCCESS_FILE)))
        return counts_from_metadata(document)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _last_error(out_dir: str, shard_id: str) -> str:
    url = storage.join_url(out_dir, "failed", f"{shard_id}.json")
    try:
        return str(json.loads(storage.read_bytes(url))["last_error"])
    except (OSError, ValueError, KeyError, TypeError):
        return "(its record cannot be read)"


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
        with open_parquet(storage.join_url(out_dir, "errors"), shard_id) as file:
            if not file.metadata.num_rows:
                return []
            batch = next(file.iter_batches(MAX_ERROR_ROWS, row_groups=[0], columns=list(EXAMPLE_COLUMNS)))
            rows: list[dict[str, Any]] = batch.to_pylist()
            return rows
    except (OSError, KeyError, pa.ArrowException):
        return []
