"""A job's output folder: what it belongs to, what is done in it, and when it is complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline import storage
from pipeline.annotate.model import check_model, resolved, weights_digest
from pipeline.config.load import config_hash
from pipeline.config.schema import JobConfig
from pipeline.errors import DamagedFileError, PipelineError, UserError
from pipeline.output.counts import ShardCounts
from pipeline.output.folder import (
    ANNOTATIONS,
    DAMAGED,
    ERRORS,
    FAILED,
    JOB_FILE,
    SHARDS_FILE,
    SUCCESS_FILE,
    OutputFolder,
    new_run_id,
)
from pipeline.output.footers import counts_as_metadata
from pipeline.output.former_results import agreed_with_former, rows_of_unlisted_files
from pipeline.output.image_shards import content_digest, lies_in, moved_url, parse_move
from pipeline.output.job_record import JobStamp, as_json, installed_versions, job_document, utc_now
from pipeline.output.reading import read_footer_record, read_shard_rows, read_success
from pipeline.output.shard_list import shard_list_bytes
from pipeline.output.survey import FolderIds, Row, Survey, survey
from pipeline.prompts.sample_prompts import with_files_read
from pipeline.storage import ShardSource
from pipeline.text import first_few


@dataclass(frozen=True)
class Job:
    """A job whose output folder is ready.

    Attributes:
        config: the configuration.
        stamp: identifies the results.
        folder: the output folder, as this run writes into it.
        shards: every shard of the job.
        rows: what the folder's list of shards says of them.
        done: ids of shards that need no work.
        damaged: ids of published shards whose archive is damaged and that are left alone.
        given_up: ids of shards that an earlier run gave up on and that are left alone.
        warnings: what the user should know before the work starts.
        failed: ids of all shards that an earlier run gave up on.
    """

    config: JobConfig
    stamp: JobStamp
    folder: OutputFolder
    shards: tuple[ShardSource, ...]
    rows: tuple[Row, ...]
    done: frozenset[str]
    damaged: frozenset[str]
    given_up: frozenset[str]
    warnings: tuple[str, ...] = ()
    failed: frozenset[str] = frozenset()

    @property
    def todo(self) -> list[ShardSource]:
        """The shards that are left, in order."""
        settled = self.done | self.damaged | self.given_up
        return [shard for shard in self.shards if shard.shard_id not in settled]

    @property
    def metadata(self) -> dict[str, Any]:
        """For the footers of the Parquet files that this run writes."""
        return {**self.stamp.as_metadata(), "run": self.folder.run_id}

    @property
    def listed(self) -> dict[str, Row]:
        """What the folder's list of shards says of them, by id."""
        return {row["shard_id"]: row for row in self.rows}


def prepare_job(config: JobConfig, moves: Sequence[str] = ()) -> Job:
    """Expand the shard list, check that the output folder is this configuration's, and see what is left.

    Args:
        config: the job's configuration.
        moves: OLD=NEW for each folder or file of shards that lies elsewhere now.

    Raises:
        UserError: no shard matches, the classes cannot be read, the folder holds results of another
            configuration or files that are not ours, or no shard of the job lies in an OLD.
        OutputError: the folder cannot be written.
    """
    config = as_run(config)
    listing = storage.find_shards(
        config.input.shards,
        allow_commands=config.input.allow_commands,
        check_inputs=config.run.check_inputs,
    )
    check_model(config.model, config.views.scales)
    stamp = stamp_of(config)
    folder = OutputFolder(config.output.dir, new_run_id())
    listed, ids = listed_earlier(folder), ids_of(folder)
    former = agreed_with_former(folder, ids, config, stamp, listed)
    ids = ids_of(folder) if former.deleted else ids
    listed += rows_of_unlisted_files(folder, ids, listed)
    folder.sweep()
    found = look_into(folder, ids, listed, listing.shards, moves)
    job = _job_from(config, stamp, folder, found, tuple(found.list_rows(listed)))
    _settle(job, found)
    return replace(job, warnings=(*former.warnings, *listing.warnings, *_told(found)))


def as_run(config: JobConfig) -> JobConfig:
    """The configuration as it is run: paths absolute, files read; raises UserError where one cannot be."""
    config = _with_absolute_paths(config)
    return config.model_copy(update={"prompts": with_files_read(config.prompts)})


def stamp_of(config: JobConfig) -> JobStamp:
    """What identifies the results of a configuration as it is run; raises UserError without its weights."""
    digest = weights_digest(config.model)
    return JobStamp(config_hash(config, digest), digest, installed_versions())


def listed_earlier(folder: OutputFolder) -> list[dict[str, Any]]:
    """The list of shards that a folder has from earlier runs; empty where it has none."""
    return read_shard_rows(folder.url) if storage.exists(folder.url, SHARDS_FILE) else []


def ids_of(folder: OutputFolder) -> FolderIds:
    """Ids of the shards that have files in a folder; raises OutputError where it cannot be listed."""
    return FolderIds(folder.ids(ANNOTATIONS), folder.ids(ERRORS), folder.ids(FAILED), folder.ids(DAMAGED))


def look_into(
    folder: OutputFolder,
    ids: FolderIds,
    listed: Sequence[Row],
    listing: Sequence[ShardSource],
    moves: Sequence[str] = (),
) -> Survey:
    """Compare a folder with the shards that are listed now; nothing is changed.

    Args:
        folder: the output folder.
        ids: the shards that have files in it.
        listed: rows of its list of shards.
        listing: the shards as they are now.
        moves: OLD=NEW for what lies elsewhere now.

    Raises:
        UserError: one of `moves` names nothing that was listed.
    """
    return survey(ids, listed, listing, _told_moves(moves, listed), partial(_is_same_content, folder))


def _told_moves(moves: Sequence[str], listed: Sequence[Row]) -> dict[str, Row]:
    told: dict[str, Row] = {}
    for text in moves:
        move = parse_move(text, listed)
        if move is None:
            raise UserError(f"--moved: expected OLD=NEW, got {storage.shown_url(text)!r}")
        old, new = move
        moved = {
            storage.shard_name(moved_url(row["shard"], old, new)): row
            for row in listed
            if lies_in(row["shard"], old)
        }
        told |= moved
    return told


def _is_same_content(folder: OutputFolder, shard: ShardSource, shard_id: str) -> bool:
    try:
        url = storage.join_url(folder.url, ANNOTATIONS, f"{shard_id}.parquet")
        recorded = read_footer_record(url, "annotations").content_digest
        return bool(recorded == content_digest(shard))
    except PipelineError:
        return False


def _job_from(
    config: JobConfig, stamp: JobStamp, folder: OutputFolder, found: Survey, rows: tuple[Row, ...]
) -> Job:
    return Job(
        config=config,
        stamp=stamp,
        folder=folder,
        shards=found.shards,
        rows=rows,
        done=found.done,
        damaged=frozenset() if config.run.retry_damaged else found.damaged,
        given_up=frozenset() if config.run.retry_failed else found.failed,
        failed=found.failed,
    )


def _settle(job: Job, found: Survey) -> None:
    """Take away what does not hold any more, then publish what the folder is from now on."""
    superseded = {shard.shard_id for shard in found.changed} | (found.damaged - job.damaged)
    if job.todo or found.unlisted or superseded:
        # first of all: a crash in between must not leave a success that was never reached
        job.folder.remove(SUCCESS_FILE)
    job.folder.set_aside(sorted(found.unlisted | superseded))
    job.folder.publish(JOB_FILE, job_document(job.config, job.stamp))
    job.folder.publish(SHARDS_FILE, shard_list_bytes(job.rows))


def _told(found: Survey) -> tuple[str, ...]:
    told = []
    if found.moved:
        moves = [f"{old} is now {shard.canonical_url}" for old, shard in found.moved]
        told.append(f"{len(moves):,} shard(s) moved and are not done again: {first_few(moves)}")
    if found.changed:
        urls = [shard.canonical_url for shard in found.changed]
        told.append(
            f"{len(urls):,} shard(s) changed since they were annotated and are done again: {first_few(urls)}"
        )
    if found.unlisted:
        told.append(
            f"the files of {len(found.unlisted):,} shard(s) that are not listed any more were moved to "
            f"unlisted/: {first_few(sorted(found.unlisted))}"
        )
    return tuple(told)


def looked_at_again(job: Job) -> Job:
    """The same job with what is done in its folder by now; raises OutputError where that cannot be told."""
    listed = frozenset(shard.shard_id for shard in job.shards)
    published, damaged = job.folder.ids(ANNOTATIONS) & listed, job.folder.ids(DAMAGED)
    return replace(job, done=published - damaged, damaged=published & damaged)


def _with_absolute_paths(config: JobConfig) -> JobConfig:
    # workers on a cluster have another working directory than the driver
    output = config.output.model_copy(update={"dir": storage.absolute(config.output.dir)})
    return config.model_copy(update={"output": output, "model": resolved(config.model)})


def record_failure(folder: OutputFolder, shard: ShardSource, attempts: int, last_error: str) -> None:
    """Write OUT/failed/<shard-id>.json for a shard that is given up."""
    document = {
        "shard_id": shard.shard_id,
        "shard": shard.canonical_url,
        "attempts": attempts,
        "last_error": last_error,
        "when": utc_now(),
    }
    folder.publish(f"{shard.shard_id}.json", as_json(document), FAILED)


def forget_failure(folder: OutputFolder, shard_id: str) -> None:
    """Remove the failure record of a shard that is done after all."""
    folder.remove(f"{shard_id}.json", FAILED)


def record_success(folder: OutputFolder, shards: int, damaged: int, counts: ShardCounts) -> None:
    """Write OUT/_SUCCESS with the totals, unless it says the same already."""
    if _success_of(folder) != (shards, damaged, counts):
        document = {"shards": shards, "damaged": damaged, **counts_as_metadata(counts), "when": utc_now()}
        folder.publish(SUCCESS_FILE, as_json(document))


def _success_of(folder: OutputFolder) -> tuple[int, int, ShardCounts] | None:
    try:
        found = read_success(folder.url)
    except DamagedFileError:
        return None
    return found.shards, found.damaged, found.counts()
