"""What an output folder holds as a whole: shards, samples, errors with examples, runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from pipeline import storage
from pipeline.errors import DamagedFileError
from pipeline.output.counts import ShardCounts, total_counts
from pipeline.output.folder import ANNOTATIONS, DAMAGED, FAILED, SUCCESS_FILE, ids_in, stray_annotations
from pipeline.output.footers import checked_footers
from pipeline.output.reading import (
    FooterRecord,
    JobRecord,
    iter_rows,
    open_table,
    read_damage,
    read_failure,
    read_shard_rows,
    read_success,
)
from pipeline.output.runs import RunRecord, latest_runs
from pipeline.output.status import run_settings, shortfall

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
        broken_files: a line for each file that is none of this package's.
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
    broken_files: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every shard is done and nothing speaks against it."""
        return len(self.done) == len(self.listed) and not self.shortfall


def read_totals(out_dir: str, job: JobRecord) -> Totals:
    """Look at an output folder; what is read is bounded whatever its size.

    Args:
        out_dir: the folder.
        job: the content of its job.json.

    Raises:
        UserError: the folder has no list of shards.
        DamagedFileError: its list of shards is none.
        OutputError: it cannot be listed.
    """
    listed = {row["shard_id"]: row for row in read_shard_rows(out_dir)}
    present = ids_in(out_dir, ANNOTATIONS)
    published = sorted(present & set(listed))
    damaged = sorted(ids_in(out_dir, DAMAGED) & set(published))
    failed = sorted((ids_in(out_dir, FAILED) & set(listed)) - set(published))
    broken: list[str] = []
    mismatched: set[str] = set()
    counts: ShardCounts | None
    if len(published) <= MAX_FOOTERS:
        by_shard = checked_footers(
            out_dir, {shard_id: listed[shard_id] for shard_id in published}, job.config_hash
        )
        sound = {name: found.counts() for name, found in by_shard.items() if isinstance(found, FooterRecord)}
        broken += [str(found) for found in by_shard.values() if isinstance(found, DamagedFileError)]
        mismatched = set(by_shard) - set(sound)
        counts = total_counts(sound.values())
        with_errors = [shard_id for shard_id, found in sound.items() if found.error_rows]
    else:
        counts, with_errors = _success_counts(out_dir, broken), published
    strays = stray_annotations(out_dir, listed)
    runs, unread_runs = latest_runs(out_dir, RUNS_SHOWN)
    failures = tuple(
        (listed[shard_id]["shard"], _told(partial(_last_error, out_dir, shard_id), broken))
        for shard_id in failed[:MAX_FAILED_SHOWN]
    )
    damages = tuple(
        (listed[shard_id]["shard"], _told(partial(_damage, out_dir, shard_id), broken))
        for shard_id in damaged[:MAX_FAILED_SHOWN]
    )
    errors = _error_kinds(out_dir, counts, with_errors, broken)
    return Totals(
        listed=tuple(listed.values()),
        done=tuple(shard_id for shard_id in published if shard_id not in mismatched),
        damaged=damages,
        damaged_count=len(damaged),
        failed=failures,
        failed_count=len(failed),
        mismatched=len(mismatched),
        shortfall=shortfall(run_settings(out_dir, job), counts or ShardCounts(), len(damaged), strays),
        counts=counts,
        errors=errors,
        runs=tuple(runs),
        broken_files=tuple(dict.fromkeys([*broken, *unread_runs])),
    )


def _success_counts(out_dir: str, damaged: list[str]) -> ShardCounts | None:
    if not storage.exists(out_dir, SUCCESS_FILE):
        return None
    try:
        return read_success(out_dir).counts()
    except DamagedFileError as error:
        damaged.append(str(error))
        return None


def _last_error(out_dir: str, shard_id: str) -> str:
    return read_failure(out_dir, shard_id).last_error


def _damage(out_dir: str, shard_id: str) -> str:
    return read_damage(out_dir, shard_id).reason


def _told(read: Callable[[], str], broken: list[str]) -> str:
    try:
        return read()
    except DamagedFileError as error:
        broken.append(str(error))
        return "(its record cannot be read)"


def _error_kinds(
    out_dir: str, counts: ShardCounts | None, shard_ids: Sequence[str], damaged: list[str]
) -> tuple[ErrorKind, ...]:
    """Kinds with their counts, where they were counted, and examples from the first files that have some."""
    counted = dict(counts.errors_by_kind) if counts is not None else {}
    examples: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in counted}
    if counts is None or counted:
        for shard_id in shard_ids[:MAX_ERROR_FILES]:
            if counted and all(len(found) >= EXAMPLES_PER_KIND for found in examples.values()):
                break
            for row in _some_errors(out_dir, shard_id, damaged):
                found = examples.setdefault(f"{row['stage']}/{row['kind']}", [])
                if len(found) < EXAMPLES_PER_KIND:
                    found.append(row)
    kinds = sorted(examples, key=lambda kind: (-counted.get(kind, 0), kind))[:MAX_KINDS]
    return tuple(ErrorKind(kind, counted.get(kind, 0), tuple(examples[kind])) for kind in kinds)


def _some_errors(out_dir: str, shard_id: str, damaged: list[str]) -> list[dict[str, Any]]:
    url = storage.join_url(out_dir, "errors", f"{shard_id}.parquet")
    try:
        with open_table(url, "errors") as file:
            return list(islice(iter_rows(file, url, "errors", EXAMPLE_COLUMNS), MAX_ERROR_ROWS))
    except DamagedFileError as error:
        damaged.append(str(error))
        return []
