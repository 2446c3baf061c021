"""The output folder of a job: what it holds, and how files are added and removed while others read it.

`annotations/*.parquet` holds the committed files of listed shards and nothing else, at every moment: files
under construction are in `.tmp/<run-id>/`, and superseded or no longer listed files are moved to `unlisted/`
under names that no pattern for Parquet files matches.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import IO, Literal, cast

from pipeline import storage
from pipeline.config.load import parse_config
from pipeline.config.schema import JobConfig
from pipeline.errors import DamagedFileError, MismatchError, UserError
from pipeline.output.compacted import COMPACTED_FILE, COMPACTION_FILE, CompactedFiles
from pipeline.output.records import (
    LAYOUT,
    DamageRecord,
    FailureRecord,
    FooterRecord,
    JobRecord,
    SuccessRecord,
)
from pipeline.output.schema import SHARDS_SCHEMA, ShardRow
from pipeline.output.shard_files import SeparateFiles, ShardFiles, ShardFooters, Tables
from pipeline.output.tables import ShardTable, damage, open_table, read_record
from pipeline.storage import InputVersion
from pipeline.storage.urls import is_local, local_path, split_url
from pipeline.text import printable

Subfolder = Literal["annotations", "errors", "failed", "damaged"]
ANNOTATIONS: Literal["annotations"] = "annotations"
ERRORS: Literal["errors"] = "errors"
FAILED: Literal["failed"] = "failed"
DAMAGED: Literal["damaged"] = "damaged"
RUNS, UNLISTED, STAGING = "runs", "unlisted", ".tmp"
SUFFIXES: dict[Subfolder, str] = {
    ANNOTATIONS: ".parquet",
    ERRORS: ".parquet",
    FAILED: ".json",
    DAMAGED: ".json",
}
JOB_FILE, SHARDS_FILE, SUCCESS_FILE = "job.json", "shards.parquet", "_SUCCESS"
IDLE_RUN_S = 3600.0
MAX_SHARDS = 10_000_000
SHARD_LIST_BATCH = 10_000
# characters of a shard id, so that it names a file and nothing else
SHARD_ID = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,200}")


def new_run_id() -> str:
    """Return a unique name for a run; names in alphabetical order are in the order of time."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


@dataclass(frozen=True)
class ShardStates:
    """Ids of shards by their state in an output folder; each shard has one state."""

    done: frozenset[str]
    damaged: frozenset[str]
    failed: frozenset[str]
    left: frozenset[str]


@dataclass(frozen=True)
class FolderIds:
    """Ids of the shards that have a file in each subfolder of an output folder."""

    annotations: frozenset[str] = frozenset()
    errors: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    damaged: frozenset[str] = frozenset()

    @property
    def all(self) -> frozenset[str]:
        """Ids of the shards that have any file."""
        return self.annotations | self.errors | self.failed | self.damaged

    def states_of(self, shard_ids: Collection[str]) -> ShardStates:
        """Return the states of shards whose files, where they exist, are valid."""
        ids = frozenset(shard_ids)
        published, failed = ids & self.annotations, (ids & self.failed) - self.annotations
        return ShardStates(
            done=published - self.damaged,
            damaged=published & self.damaged,
            failed=failed,
            left=ids - published - failed,
        )


@dataclass(frozen=True)
class OutputFolder:
    """The output folder of a job.

    Attributes:
        url: local path or URL of an object store.
        run_id: names the temporary files of a run, and the files that it moves to `unlisted/`.
    """

    url: str
    run_id: str = field(default_factory=new_run_id)

    @cached_property
    def files(self) -> ShardFiles:
        """Where the rows of shards are; raises OutputError if the store cannot be asked."""
        is_compacted = storage.exists(self.url, COMPACTED_FILE)
        return CompactedFiles(self.url) if is_compacted else SeparateFiles(self.url)

    def job(self) -> JobRecord:
        """Read OUT/job.json.

        Raises:
            UserError: the folder has none, or one of another version of this program.
            DamagedFileError: it is damaged or foreign.
        """
        url = storage.join_url(self.url, JOB_FILE)
        names = storage.list_names(self.url)
        if JOB_FILE not in names:
            if _is_there(url):
                raise DamagedFileError(storage.shown_url(url), "is no regular file")
            if COMPACTION_FILE in names:
                raise UserError(
                    f"{storage.shown_url(self.url)}: holds an unfinished compaction; run the same "
                    "`legrad compact` command again to resume"
                )
            problem = (
                f"holds no {JOB_FILE}" if _is_there(self.url) or not is_local(self.url) else "does not exist"
            )
            raise UserError(
                f"{storage.shown_url(self.url)}: {problem}; expected the output folder of `legrad annotate`"
            )
        record = read_record(url, JobRecord)
        if record.layout != LAYOUT:
            raise UserError(
                f"{storage.shown_url(url)}: written by another version of this program (layout "
                f"{record.layout}; this one reads layout {LAYOUT}): choose another output.dir, or install "
                "that version"
            )
        return record

    def config(self, job: JobRecord | None = None) -> JobConfig:
        """Return the configuration in OUT/job.json, or in a record of it that was read before.

        Raises:
            UserError: it is no valid configuration, or as `job` raises.
            DamagedFileError: as `job` raises.
        """
        record = self.job() if job is None else job
        return parse_config(record.config, where=storage.join_url(self.url, JOB_FILE))

    def shard_rows(self) -> list[ShardRow]:
        """Read OUT/shards.parquet; ids are unique, and safe as names of files.

        Raises:
            UserError: the folder has none.
            DamagedFileError: it is damaged or foreign.
        """
        url = storage.join_url(self.url, SHARDS_FILE)
        if SHARDS_FILE not in storage.list_names(self.url) and not _is_there(url):
            raise UserError(f"{storage.shown_url(self.url)}: holds no {SHARDS_FILE}")
        with open_table(url, "shards") as table, damage(url):
            if table.row_count > MAX_SHARDS:
                raise ValueError(f"lists {table.row_count} shards; the limit is {MAX_SHARDS}")
            rows = cast("list[ShardRow]", list(table.rows(SHARDS_SCHEMA.names, SHARD_LIST_BATCH)))
            _require_safe_ids([row["shard_id"] for row in rows])
        return rows

    def has_success(self) -> bool:
        """Return whether OUT/_SUCCESS exists."""
        return storage.exists(self.url, SUCCESS_FILE)

    def success(self) -> SuccessRecord:
        """Read OUT/_SUCCESS; raises DamagedFileError if it is missing, damaged or foreign."""
        return read_record(storage.join_url(self.url, SUCCESS_FILE), SuccessRecord)

    def failure(self, shard_id: str) -> FailureRecord:
        """Read OUT/failed/SHARD.json; raises DamagedFileError if it is missing, damaged or foreign."""
        return read_record(self._record_url(FAILED, shard_id), FailureRecord)

    def damage(self, shard_id: str) -> DamageRecord:
        """Read OUT/damaged/SHARD.json; raises DamagedFileError if it is missing, damaged or foreign."""
        return read_record(self._record_url(DAMAGED, shard_id), DamageRecord)

    def failure_reason(self, shard_id: str) -> str:
        """Return the last error of a shard that was given up, or why its record cannot be read."""
        try:
            return self.failure(shard_id).last_error
        except DamagedFileError as error:
            return f"its record cannot be read: {error}"

    def damage_reason(self, shard_id: str) -> str:
        """Return why a shard is damaged, or why its record cannot be read."""
        try:
            return self.damage(shard_id).reason
        except DamagedFileError as error:
            return f"its record cannot be read: {error}"

    def ids(self, subfolder: Subfolder) -> frozenset[str]:
        """Return the ids of shards that have rows or a file in a subfolder.

        Raises:
            OutputError: the subfolder cannot be listed.
            DamagedFileError: the folder is compacted, and its index is damaged or foreign.
        """
        if subfolder in (ANNOTATIONS, ERRORS):
            return self.files.ids(subfolder)
        suffix = SUFFIXES[subfolder]
        names = storage.list_names(storage.join_url(self.url, subfolder))
        return frozenset(name.removesuffix(suffix) for name in names if name.endswith(suffix))

    def all_ids(self) -> FolderIds:
        """Return the ids of shards with a file in each subfolder; raises as `ids` does."""
        return FolderIds(self.ids(ANNOTATIONS), self.ids(ERRORS), self.ids(FAILED), self.ids(DAMAGED))

    def stray_annotations(self, listed_ids: Collection[str]) -> tuple[str, ...]:
        """Return files that readers of `annotations/` would read as annotations of no listed shard.

        Readers also search subfolders, and some take a file for Parquet whatever the case or the end of its
        name; they skip names that begin with a dot or an underscore, and fail at other files.

        Args:
            listed_ids: ids of the job's shards.

        Returns:
            Paths relative to `annotations/`, sorted.

        Raises:
            OutputError: the folder cannot be listed.
        """
        own = self.files.annotation_names(listed_ids)
        found = storage.list_paths(storage.join_url(self.url, ANNOTATIONS)) - own
        return tuple(
            path
            for path in sorted(found)
            if ".parquet" in path.lower() and not any(part.startswith((".", "_")) for part in path.split("/"))
        )

    def open(self, table: Tables, shard_id: str) -> AbstractContextManager[ShardTable]:
        """Open the annotations or errors of a shard; raises DamagedFileError as `open_table` does."""
        return self.files.open(table, shard_id)

    def footer(self, shard_id: str, table: Tables = ANNOTATIONS) -> FooterRecord:
        """Read the footer of a shard's annotations or errors; raises DamagedFileError."""
        with self.open(table, shard_id) as file:
            return file.footer()

    def own_footer(self, shard_id: str, config_hash: str) -> FooterRecord:
        """Read the footer of a shard's annotations, and check that both its files belong to the job.

        Args:
            shard_id: names the files.
            config_hash: of the job; two jobs that start together may each have found the folder empty.

        Raises:
            DamagedFileError: one of the files cannot be read, or has other rows than its footer counts.
            MismatchError: the files are of different attempts, or of another configuration.
        """
        (found,) = self.files.footers([shard_id])
        if isinstance(found, DamagedFileError):
            raise found
        return self._own(shard_id, found, config_hash)

    def checked_footer(self, row: ShardRow, config_hash: str) -> FooterRecord:
        """Read the footer of a shard's annotations, and check that both its files are of the listed shard.

        Args:
            row: the shard's row in OUT/shards.parquet.
            config_hash: of the job.

        Raises:
            DamagedFileError: as `own_footer` raises.
            MismatchError: as `own_footer` raises; or the files are of another shard, or of another version of
                the input than the one listed.
        """
        (found,) = self.files.footers([row["shard_id"]])
        return self.checked(row, found, config_hash).annotations

    def checked_footers(
        self, rows: Sequence[ShardRow], config_hash: str, *, is_cached: bool = False
    ) -> dict[str, FooterRecord | DamagedFileError]:
        """Read the footers of published shards concurrently.

        Args:
            rows: rows of OUT/shards.parquet.
            config_hash: of the job.
            is_cached: whether footers of unchanged files are kept in the user's cache folder between calls.

        Returns:
            By shard id the footer of its annotations, or why its two files are not what the job wrote.
        """
        checked: dict[str, FooterRecord | DamagedFileError] = {}
        footers = self.files.footers([row["shard_id"] for row in rows], is_cached=is_cached)
        for row, found in zip(rows, footers, strict=True):
            try:
                checked[row["shard_id"]] = self.checked(row, found, config_hash).annotations
            except DamagedFileError as error:
                checked[row["shard_id"]] = error
        return checked

    def checked(
        self, row: ShardRow, found: ShardFooters | DamagedFileError, config_hash: str
    ) -> ShardFooters:
        """Return footers that are of the listed shard and of the job; raises as `checked_footer` does."""
        if isinstance(found, DamagedFileError):
            raise found
        footer = self._own(row["shard_id"], found, config_hash)
        if footer.shard not in (row["shard"], row["moved_from"]):
            raise self._mismatch(row["shard_id"], f"holds the rows of another shard: {footer.shard}")
        if not _is_of_listed_version(footer, row):
            raise self._mismatch(row["shard_id"], "is of another version of its input than is listed")
        return found

    def _own(self, shard_id: str, found: ShardFooters, config_hash: str) -> FooterRecord:
        if found.annotations.attempt != found.errors.attempt:
            raise self._mismatch(shard_id, "is not of the same attempt as its errors file")
        if found.annotations.config_hash != config_hash:
            raise self._mismatch(shard_id, "is of another configuration than the job")
        return found.annotations

    def publish(self, name: str, content: IO[bytes] | bytes, subfolder: str = "") -> None:
        """Make a file appear whole, or not at all; raises OutputError if it cannot be written."""
        staging_url = storage.join_url(self.url, STAGING, self.run_id)
        storage.publish(self._subfolder_url(subfolder), name, content, staging_url=staging_url)

    def remove(self, name: str, subfolder: str = "") -> None:
        """Delete a file if it exists; raises OutputError if that is not allowed."""
        storage.remove(self._subfolder_url(subfolder), name)

    def set_aside(self, shard_ids: Iterable[str]) -> None:
        """Move all files of shards to `unlisted/`, the annotations first; nothing is deleted.

        Raises:
            OutputError: a file cannot be moved.
        """
        unlisted = storage.join_url(self.url, UNLISTED)
        for shard_id in shard_ids:
            for subfolder, suffix in SUFFIXES.items():
                moved_name = f"{shard_id}.{subfolder}.{self.run_id}-{uuid.uuid4().hex[:6]}{suffix}.moved"
                storage.move(self._subfolder_url(subfolder), f"{shard_id}{suffix}", unlisted, moved_name)

    def sweep(self) -> None:
        """Delete temporary files of runs that have written nothing for an hour."""
        storage.sweep_staging(storage.join_url(self.url, STAGING), idle_for_s=IDLE_RUN_S)

    def close(self) -> None:
        """Delete the temporary files of this run, whose workers have ended."""
        storage.remove_staging(storage.join_url(self.url, STAGING, self.run_id))

    def _mismatch(self, shard_id: str, problem: str) -> MismatchError:
        return MismatchError(storage.shown_url(self.files.file_url(ANNOTATIONS, shard_id)), problem)

    def _record_url(self, subfolder: Subfolder, shard_id: str) -> str:
        return storage.join_url(self.url, subfolder, f"{shard_id}{SUFFIXES[subfolder]}")

    def _subfolder_url(self, subfolder: str) -> str:
        return storage.join_url(self.url, subfolder) if subfolder else self.url


def _is_there(url: str) -> bool:
    return split_url(url).scheme in ("", "file") and os.path.lexists(local_path(url))


def _require_safe_ids(shard_ids: Sequence[str]) -> None:
    for shard_id in shard_ids:
        if not SHARD_ID.fullmatch(shard_id):
            raise ValueError(f"shard_id: {printable(shard_id)[:80]} cannot be the name of a file")
    if len(set(shard_ids)) != len(shard_ids):
        raise ValueError("shard_id: some shards are listed twice")


def _is_of_listed_version(footer: FooterRecord, row: ShardRow) -> bool:
    listed = version_in(row)
    if footer.shard == row["moved_from"]:
        return not listed.differs_in_size_from(footer.version)
    return not listed.differs_from(footer.version)


def version_in(row: ShardRow) -> InputVersion:
    """Return the version of a shard's input in a row of OUT/shards.parquet."""
    return InputVersion(row["size_bytes"], row["mtime_ns"], row["etag"])
