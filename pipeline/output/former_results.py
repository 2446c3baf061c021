"""Results of earlier runs in an output folder: decide whether they may stay, and delete them on request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from pipeline import storage
from pipeline.config.row_keys import describe_differences
from pipeline.config.schema import JobConfig
from pipeline.errors import DamagedFileError, UserError
from pipeline.output.compacted import COMPACTION_FILE
from pipeline.output.folder import (
    ANNOTATIONS,
    DAMAGED,
    FAILED,
    JOB_FILE,
    SUCCESS_FILE,
    SUFFIXES,
    FolderIds,
    OutputFolder,
    Subfolder,
)
from pipeline.output.records import LAYOUT, JobRecord, JobStamp
from pipeline.output.schema import ShardRow
from pipeline.output.shard_files import FOOTER_READERS
from pipeline.text import first_few

NAMED_FILES = 5


@dataclass(frozen=True)
class Former:
    """What was decided about earlier results: warnings for the user, and whether they were deleted."""

    warnings: tuple[str, ...] = ()
    deleted: bool = False


def agreed_with_former(
    folder: OutputFolder,
    former: JobRecord | None,
    config: JobConfig,
    stamp: JobStamp,
    listed: Sequence[ShardRow],
) -> Former:
    """Check that the results in a folder belong to this configuration, or delete them on request.

    Args:
        folder: the output folder.
        former: the job whose results it holds, see `former_job`.
        config: the configuration.
        stamp: identifies its results.
        listed: rows of the folder's list of shards.

    Raises:
        UserError: the folder holds results of another configuration.
        OutputError: files cannot be deleted.
    """
    if former is None:
        return Former()
    if not is_to_be_deleted(folder, former, config, stamp):
        return Former(_changed_versions(former.versions, stamp.versions))
    folder.remove(SUCCESS_FILE)
    removed = _delete_results(folder, [row["shard_id"] for row in listed])
    return Former((f"removed {removed} files of another configuration",), deleted=True)


def former_job(folder: OutputFolder, ids: FolderIds) -> JobRecord | None:
    """Return the record of the job whose results a folder holds; None if it holds none.

    Raises:
        UserError: it is unknown which job made them.
    """
    names = storage.list_names(folder.url)
    if COMPACTION_FILE in names:
        raise UserError(
            f"{storage.shown_url(folder.url)}: holds a compacted copy of a job, in which no job can be "
            "resumed: set output.dir to the folder that was compacted"
        )
    if JOB_FILE not in names:
        _refuse_results_without_job(folder, ids)
        return None
    return folder.job() if ids.all else None


def is_to_be_deleted(folder: OutputFolder, former: JobRecord, config: JobConfig, stamp: JobStamp) -> bool:
    """Return whether results are of another configuration and may be deleted.

    Raises:
        UserError: they are of another configuration, and `output.on_mismatch` is refuse.
    """
    if former.config_hash == stamp.config_hash:
        return False
    if config.output.on_mismatch == "refuse":
        digests = (stamp.weights_digest, stamp.segmenter_digest, stamp.maps_hash)
        changes = describe_differences(former.model_dump(), config, *digests)
        raise UserError(
            f"{storage.shown_url(folder.url)}: holds results of another configuration "
            f"({former.config_hash}, now {stamp.config_hash}).\n"
            f"  changed: {changes}\n"
            f"  choose another output.dir, or set output.on_mismatch=overwrite to delete what is there"
        )
    return True


def _refuse_results_without_job(folder: OutputFolder, ids: FolderIds) -> None:
    names = sorted(f"{shard_id}.parquet" for shard_id in ids.annotations)
    if not names:
        return
    hashes = {_config_hash(folder, shard_id) for shard_id in sorted(ids.annotations)[:NAMED_FILES]}
    known = ", ".join(sorted(filter(None, hashes)))
    origin = f"made with the configuration {known}" if known else "not written by this program"
    raise UserError(
        f"{storage.shown_url(folder.url)}: holds annotations ({first_few(names)}; {origin}) but no "
        f"{JOB_FILE}, so it is unknown which job made them: restore {JOB_FILE}, or choose another output.dir"
    )


def _config_hash(folder: OutputFolder, shard_id: str) -> str | None:
    try:
        return folder.footer(shard_id).config_hash
    except DamagedFileError:
        return None


def _changed_versions(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    changed = [
        f"{package} {before.get(package)} -> {installed}"
        for package, installed in now.items()
        if before.get(package) != installed
    ]
    return (f"package versions changed since the earlier run: {', '.join(changed)}",) if changed else ()


def _delete_results(folder: OutputFolder, listed_ids: Iterable[str]) -> int:
    """Delete the files of listed shards that this program wrote, and no other files."""
    ours = [
        (name, f"{shard_id}{suffix}")
        for name, suffix in SUFFIXES.items()
        for shard_id in sorted(folder.ids(name) & set(listed_ids))
    ]
    _refuse_links(folder.url, ours)
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        is_ours = list(pool.map(lambda file: _was_written_here(folder, *file), ours))
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


def _was_written_here(folder: OutputFolder, subfolder: Subfolder, name: str) -> bool:
    shard_id = name.removesuffix(SUFFIXES[subfolder])
    try:
        if subfolder == FAILED:
            return folder.failure(shard_id).shard_id == shard_id
        if subfolder == DAMAGED:
            return folder.damage(shard_id).shard_id == shard_id
        return bool(folder.footer(shard_id, subfolder).attempt)
    except DamagedFileError:
        return False


def rows_of_unlisted_files(
    folder: OutputFolder, ids: FolderIds, listed: Sequence[ShardRow]
) -> list[ShardRow]:
    """Return rows for the list of shards, for files in `annotations/` that are missing in that list.

    Such files come from another job on the same folder, or from a lost list. Their footers name the shard and
    its version.

    Raises:
        UserError: one of them was not written by this program.
    """
    unlisted = sorted(ids.annotations - {row["shard_id"] for row in listed})
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        rows = list(pool.map(lambda shard_id: _row_of(folder, shard_id), unlisted))
    foreign = [f"{shard_id}.parquet" for shard_id, row in zip(unlisted, rows, strict=True) if row is None]
    foreign += folder.stray_annotations(ids.annotations)
    if foreign:
        where = storage.shown_url(storage.join_url(folder.url, ANNOTATIONS))
        raise UserError(
            f"{where}: holds files that this program did not write, which readers would take for "
            f"annotations ({first_few(foreign)}): move them away, or choose another output.dir"
        )
    return [row for row in rows if row is not None]


def _row_of(folder: OutputFolder, shard_id: str) -> ShardRow | None:
    try:
        footer = folder.footer(shard_id)
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
