"""What earlier runs left in an output folder: whether it may stay, and how it is deleted on request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from pipeline import storage
from pipeline.config.row_keys import describe_differences
from pipeline.config.schema import JobConfig
from pipeline.errors import DamagedFileError, UserError
from pipeline.output.folder import (
    ANNOTATIONS,
    DAMAGED,
    ERRORS,
    FAILED,
    JOB_FILE,
    LAYOUT,
    SUCCESS_FILE,
    SUFFIXES,
    OutputFolder,
    stray_annotations,
)
from pipeline.output.footers import FOOTER_READERS
from pipeline.output.job_record import JobStamp
from pipeline.output.reading import JobRecord, read_damage, read_failure, read_footer_record, read_job_record
from pipeline.output.survey import FolderIds, Row
from pipeline.text import first_few

NAMED_FILES = 5


@dataclass(frozen=True)
class Former:
    """What became of earlier results: what the user should know of it, and whether they were deleted."""

    warnings: tuple[str, ...] = ()
    deleted: bool = False


def agreed_with_former(
    folder: OutputFolder, ids: FolderIds, config: JobConfig, stamp: JobStamp, listed: Sequence[Row]
) -> Former:
    """Make sure that what is in a folder belongs to this configuration, or delete it where that is asked for.

    Args:
        folder: the output folder.
        ids: the shards that have files in it.
        config: the configuration.
        stamp: identifies its results.
        listed: rows of the folder's list of shards.

    Raises:
        UserError: the folder holds results of another configuration, or it is not known of which.
        OutputError: files cannot be deleted.
    """
    former = former_job(folder, ids)
    if former is None:
        return Former()
    if not is_to_be_deleted(folder, former, config, stamp):
        return Former(_changed_versions(former.versions, stamp.versions))
    folder.remove(SUCCESS_FILE)
    removed = _delete_results(folder, [row["shard_id"] for row in listed])
    return Former((f"removed {removed} files of another configuration",), deleted=True)


def former_job(folder: OutputFolder, ids: FolderIds) -> JobRecord | None:
    """The job that a folder holds results of; None where it holds none.

    Raises:
        UserError: it is not known of which job they are.
    """
    if JOB_FILE not in storage.list_names(folder.url):
        _refuse_results_without_job(folder, ids)
        return None
    if not (ids.annotations or ids.errors or ids.failed or ids.damaged):
        return None
    return read_job_record(folder.url)


def is_to_be_deleted(folder: OutputFolder, former: JobRecord, config: JobConfig, stamp: JobStamp) -> bool:
    """Whether the results of a former job are of another configuration, and may go.

    Raises:
        UserError: they are, and `output.on_mismatch` says no.
    """
    if former.config_hash == stamp.config_hash:
        return False
    if config.output.on_mismatch == "refuse":
        raise UserError(
            f"{storage.shown_url(folder.url)}: holds results of another configuration "
            f"({former.config_hash}, now {stamp.config_hash}).\n"
            f"  changed: {describe_differences(former.model_dump(), config, stamp.weights_digest)}\n"
            f"  choose another output.dir, or set output.on_mismatch=overwrite to delete what is there"
        )
    return True


def _refuse_results_without_job(folder: OutputFolder, ids: FolderIds) -> None:
    names = sorted(f"{shard_id}.parquet" for shard_id in ids.annotations)
    if not names:
        return
    hashes = {_config_hash(storage.join_url(folder.url, ANNOTATIONS, name)) for name in names[:NAMED_FILES]}
    known = ", ".join(sorted(filter(None, hashes)))
    origin = f"made with the configuration {known}" if known else "not written by this program"
    raise UserError(
        f"{storage.shown_url(folder.url)}: holds annotations ({first_few(names)}; {origin}) but no "
        f"{JOB_FILE}, so it is not known what they are: restore {JOB_FILE}, or choose another output.dir"
    )


def _config_hash(url: str) -> str | None:
    try:
        return read_footer_record(url, "annotations").config_hash
    except DamagedFileError:
        return None


def _changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    changed = [
        f"{package} {before.get(package)} -> {installed}"
        for package, installed in now.items()
        if before.get(package) != installed
    ]
    return (f"other versions than in the earlier run: {', '.join(changed)}",) if changed else ()


def _delete_results(folder: OutputFolder, listed_ids: Iterable[str]) -> int:
    """Delete the files of listed shards that this program wrote, and nothing else."""
    ours = [
        (name, f"{shard_id}{suffix}")
        for name, suffix in SUFFIXES.items()
        for shard_id in sorted(folder.ids(name) & set(listed_ids))
    ]
    _refuse_links(folder.url, ours)
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        is_ours = list(pool.map(lambda file: _was_written_here(folder.url, *file), ours))
    deleted = [file for file, known in zip(ours, is_ours, strict=True) if known]
    for name, file_name in deleted:
        folder.remove(file_name, name)
    folder.set_aside({file_name.removesuffix(SUFFIXES[name]) for name, file_name in set(ours) - set(deleted)})
    if others := sorted(folder.ids(ANNOTATIONS)):
        where = storage.shown_url(storage.join_url(folder.url, ANNOTATIONS))
        raise UserError(
            f"{where}: holds files of shards that this job never listed "
            f"({first_few([f'{name}.parquet' for name in others])}); they are not deleted: choose another "
            "output.dir"
        )
    return len(deleted)


def _refuse_links(url: str, files: Iterable[tuple[str, str]]) -> None:
    filesystem, path = storage.resolve(url)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return
    places = {Path(path) / name for name in SUFFIXES} | {Path(path) / name / file for name, file in files}
    links = sorted(str(place) for place in places if place.is_symlink())
    if links:
        raise UserError(
            f"{first_few(links)}: a symbolic link; nothing is deleted through links: choose another "
            "output.dir, or delete what is there yourself"
        )


def _was_written_here(url: str, folder: str, name: str) -> bool:
    where, shard_id = storage.join_url(url, folder, name), name.removesuffix(SUFFIXES[folder])
    try:
        if folder == FAILED:
            return read_failure(url, shard_id).shard_id == shard_id
        if folder == DAMAGED:
            return read_damage(url, shard_id).shard_id == shard_id
        return bool(read_footer_record(where, "errors" if folder == ERRORS else "annotations").attempt)
    except DamagedFileError:
        return False


def rows_of_unlisted_files(
    folder: OutputFolder, ids: FolderIds, listed: Sequence[Row]
) -> list[dict[str, Any]]:
    """Rows, as in the list of shards, of files in `annotations/` that are missing in that list.

    Such files are left by another job on the same folder, or where the list was lost. Their footers say which
    shard they belong to, and which version of it.

    Raises:
        UserError: one of them was not written by this program.
    """
    unlisted = sorted(ids.annotations - {row["shard_id"] for row in listed})
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        rows = list(pool.map(lambda shard_id: _row_of(folder.url, shard_id), unlisted))
    foreign = [f"{shard_id}.parquet" for shard_id, row in zip(unlisted, rows, strict=True) if row is None]
    foreign += stray_annotations(folder.url, ids.annotations)
    if foreign:
        where = storage.shown_url(storage.join_url(folder.url, ANNOTATIONS))
        raise UserError(
            f"{where}: holds files that this program did not write, which every reader of the folder would "
            f"take for annotations ({first_few(foreign)}): move them away, or choose another output.dir"
        )
    return [row for row in rows if row is not None]


def _row_of(url: str, shard_id: str) -> dict[str, Any] | None:
    try:
        footer = read_footer_record(storage.join_url(url, ANNOTATIONS, f"{shard_id}.parquet"), "annotations")
    except DamagedFileError:
        return None
    if footer.layout != LAYOUT:
        return None
    version = footer.version
    return {
        "shard_id": shard_id,
        "shard": footer.shard,
        "size_bytes": version.size_bytes,
        "mtime_ns": version.mtime_ns,
        "etag": version.etag,
        "moved_from": None,
    }
