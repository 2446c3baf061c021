"""Prepare the output folder of a job: find out what is done, and record the job, failures and success."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline import storage
from pipeline.annotate.model import check_model, model_facts, resolved, weights_digest
from pipeline.annotate.segmenting import digest_of_segmenter, resolved_segmenter
from pipeline.config.load import config_hash
from pipeline.config.marks import require_marked_shards
from pipeline.config.schema import JobConfig
from pipeline.errors import DamagedFileError, PipelineError, UserError
from pipeline.output.counts import ShardCounts
from pipeline.output.folder import (
    FAILED,
    JOB_FILE,
    SHARDS_FILE,
    SUCCESS_FILE,
    FolderIds,
    OutputFolder,
)
from pipeline.output.former_results import agreed_with_former, former_job, rows_of_unlisted_files
from pipeline.output.image_shards import content_digest, lies_in, moved_url, parse_move
from pipeline.output.records import (
    JobRecord,
    JobStamp,
    ModelFacts,
    as_json,
    counts_as_metadata,
    installed_versions,
    job_document,
    utc_now,
)
from pipeline.output.schema import ShardRow
from pipeline.output.survey import Survey, survey
from pipeline.output.tables import shard_list_bytes
from pipeline.prompts.sample_prompts import with_files_read
from pipeline.run.destination import check_destination, files_beside
from pipeline.run.precision import precision_of_workers
from pipeline.storage import ShardSource
from pipeline.text import first_few


@dataclass(frozen=True)
class Job:
    """A job whose output folder is ready.

    Attributes:
        config: the configuration.
        stamp: identifies the results.
        folder: the output folder.
        shards: every shard of the job.
        rows: rows of OUT/shards.parquet, one per shard.
        done: ids of shards that need no work.
        damaged: ids of published shards whose archive is damaged and that are not retried.
        given_up: ids of shards that an earlier run gave up on and that are not retried.
        warnings: messages to show before the run starts.
        failed: ids of all shards that an earlier run gave up on.
        precision_is_auto: whether `model.precision` was auto before it was resolved.
        model_facts: what of the model is needed to make masks again from stored maps.
        unavailable: ids of shards that cannot be worked on in this run, and stay left.
    """

    config: JobConfig
    stamp: JobStamp
    folder: OutputFolder
    shards: tuple[ShardSource, ...]
    rows: tuple[ShardRow, ...]
    done: frozenset[str]
    damaged: frozenset[str]
    given_up: frozenset[str]
    warnings: tuple[str, ...] = ()
    failed: frozenset[str] = frozenset()
    precision_is_auto: bool = False
    model_facts: ModelFacts | None = None
    unavailable: frozenset[str] = frozenset()

    @property
    def todo(self) -> list[ShardSource]:
        """The shards to be worked on, in order."""
        finished = self.done | self.damaged | self.given_up | self.unavailable
        return [shard for shard in self.shards if shard.shard_id not in finished]

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata for the footers of the Parquet files that this run writes."""
        return {**self.stamp.as_metadata(), "run": self.folder.run_id}

    @property
    def listed(self) -> dict[str, ShardRow]:
        """Rows of OUT/shards.parquet by shard id."""
        return {row["shard_id"]: row for row in self.rows}


def prepare_job(config: JobConfig, moves: Sequence[str] = ()) -> Job:
    """List the shards, check that the output folder belongs to this configuration, and find what is left.

    Args:
        config: the job's configuration.
        moves: OLD=NEW for each folder or file of shards that has moved.

    Raises:
        UserError: no shard matches, the classes cannot be read, the output folder would not outlive a
            submitted job, or has results of another configuration or files that this package did not write,
            or no listed shard is in an OLD.
        OutputError: the folder cannot be written.
    """
    if config.input.maps is not None:
        raise UserError(
            "input.maps names a folder with stored maps, for which no model is run: use `legrad remask`"
        )
    check_destination(config.output.dir, os.environ)
    config = as_run(config)
    listing = storage.find_shards(
        config.input.shards,
        allow_commands=config.input.allow_commands,
        check_inputs=config.run.check_inputs,
    )
    if isinstance(config.prompts.marks, tuple):
        require_marked_shards(config.prompts.marks, {shard.canonical_url for shard in listing.shards})
    check_model(config.model, config.views.scales)
    former = opened_folder(config.output.dir)
    is_auto = config.model.precision == "auto"
    config, stamp = _resolved(config, former.record)
    facts = model_facts(config.model)
    job = opened_job(config, stamp, former, listing.shards, moves, is_auto=is_auto, facts=facts)
    return replace(job, warnings=(*job.warnings, *listing.warnings))


@dataclass(frozen=True)
class OpenedFolder:
    """An output folder before a job writes to it.

    Attributes:
        folder: the folder.
        ids: ids of the shards with files in it.
        listed: rows of its list of shards.
        record: the job whose results it holds; None if it holds none.
    """

    folder: OutputFolder
    ids: FolderIds
    listed: list[ShardRow]
    record: JobRecord | None


def opened_folder(url: str) -> OpenedFolder:
    """Look into an output folder; raises UserError if it is unknown which job made what it holds."""
    folder = OutputFolder(url)
    listed, ids = listed_earlier(folder), folder.all_ids()
    return OpenedFolder(folder, ids, listed, former_job(folder, ids))


def opened_job(
    config: JobConfig,
    stamp: JobStamp,
    opened: OpenedFolder,
    listing: Sequence[ShardSource],
    moves: Sequence[str] = (),
    *,
    is_auto: bool = False,
    facts: ModelFacts | None = None,
    unavailable: frozenset[str] = frozenset(),
) -> Job:
    """Check that a folder belongs to a configuration, find what is left, and publish the job.

    Args:
        config: the job's configuration, as it is run.
        stamp: identifies its results.
        opened: its output folder.
        listing: its shards.
        moves: OLD=NEW for each folder or file of shards that has moved.
        is_auto: whether `model.precision` was auto.
        facts: what of the model is needed to make masks again.
        unavailable: ids of shards that cannot be worked on in this run.

    Raises:
        UserError: the folder has results of another configuration, or files that this package did not write.
        OutputError: it cannot be written.
    """
    folder, listed = opened.folder, opened.listed
    beside = files_beside(folder.url) if opened.record is None else []
    former = agreed_with_former(folder, opened.record, config, stamp, listed)
    ids = folder.all_ids() if former.deleted else opened.ids
    listed = [*listed, *rows_of_unlisted_files(folder, ids, listed)]
    folder.sweep()
    found = look_into(folder, ids, listed, listing, moves)
    job = _job_from(config, stamp, folder, found, tuple(found.list_rows(listed)))
    job = replace(job, precision_is_auto=is_auto, model_facts=facts, unavailable=unavailable)
    _update_folder(job, found)
    return replace(job, warnings=(*former.warnings, *beside, *_warnings(found)))


def as_run(config: JobConfig) -> JobConfig:
    """Return the configuration with absolute paths and files read; raises UserError if one cannot be read."""
    # workers on a cluster have another working directory than this process
    output = config.output.model_copy(update={"dir": storage.absolute(config.output.dir)})
    model, prompts = resolved(config.model), with_files_read(config.prompts)
    masks = resolved_segmenter(config.masks)
    return config.model_copy(update={"output": output, "model": model, "prompts": prompts, "masks": masks})


def _resolved(config: JobConfig, former: JobRecord | None) -> tuple[JobConfig, JobStamp]:
    """Return the configuration with its precision resolved, and what identifies its results."""
    if former is not None:
        kept = with_precision_of(former, config)
        stamp = stamp_of(kept)
        if former.config_hash == stamp.config_hash or config.output.on_mismatch == "refuse":
            return kept, stamp
    if config.model.precision == "auto":
        config = _with_precision(config, precision_of_workers(config.run))
    return config, stamp_of(config)


def with_precision_of(former: JobRecord, config: JobConfig) -> JobConfig:
    """Return the configuration with the precision of earlier results in place of auto.

    So a job that is resumed on another kind of device, or with a record of an explicit precision, goes on in
    the precision of its rows.
    """
    model = former.config.get("model")
    recorded = model.get("precision") if isinstance(model, dict) else None
    if config.model.precision == "auto" and recorded in ("fp32", "bf16", "fp16"):
        return _with_precision(config, recorded)
    return config


def _with_precision(config: JobConfig, precision: str) -> JobConfig:
    model = config.model.model_copy(update={"precision": precision})
    return config.model_copy(update={"model": model})


def stamp_of(config: JobConfig) -> JobStamp:
    """Return what identifies the results of a configuration; raises UserError if weights are missing."""
    digest, segmenter = weights_digest(config.model), digest_of_segmenter(config.masks)
    return JobStamp(config_hash(config, digest, segmenter), digest, installed_versions(), segmenter)


def listed_earlier(folder: OutputFolder) -> list[ShardRow]:
    """Return the rows of OUT/shards.parquet from earlier runs; empty if there is no such file."""
    return folder.shard_rows() if storage.exists(folder.url, SHARDS_FILE) else []


def look_into(
    folder: OutputFolder,
    ids: FolderIds,
    listed: Sequence[ShardRow],
    listing: Sequence[ShardSource],
    moves: Sequence[str] = (),
) -> Survey:
    """Compare an output folder with the shards listed now; changes nothing.

    Args:
        folder: the output folder.
        ids: ids of the shards with files in it.
        listed: rows of OUT/shards.parquet.
        listing: the shards as listed now.
        moves: OLD=NEW for each folder or file of shards that has moved.

    Raises:
        UserError: one of `moves` is not OLD=NEW, or no listed shard is in an OLD.
    """
    return survey(ids, listed, listing, _moved_rows(moves, listed), partial(_is_same_content, folder))


def _moved_rows(moves: Sequence[str], listed: Sequence[ShardRow]) -> dict[str, ShardRow]:
    rows: dict[str, ShardRow] = {}
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
        rows |= moved
    return rows


def _is_same_content(folder: OutputFolder, shard: ShardSource, shard_id: str) -> bool:
    try:
        return folder.footer(shard_id).content_digest == content_digest(shard)
    except PipelineError:
        return False


def _job_from(
    config: JobConfig, stamp: JobStamp, folder: OutputFolder, found: Survey, rows: tuple[ShardRow, ...]
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


def _update_folder(job: Job, found: Survey) -> None:
    """Set aside files that are no longer valid, then publish the job and its list of shards."""
    superseded = {shard.shard_id for shard in found.changed} | (found.damaged - job.damaged)
    if job.todo or found.unlisted or superseded:
        # removed first: a crash after this must not leave a success that was never reached
        job.folder.remove(SUCCESS_FILE)
    job.folder.set_aside(sorted(found.unlisted | superseded))
    job.folder.publish(
        JOB_FILE,
        job_document(job.config, job.stamp, job.model_facts, precision_is_auto=job.precision_is_auto),
    )
    job.folder.publish(SHARDS_FILE, shard_list_bytes(job.rows))


def _warnings(found: Survey) -> tuple[str, ...]:
    warnings = []
    if found.moved:
        # the earlier name is from the folder's records, which others may have written
        moves = [f"{storage.shown_url(old)} is now {shard.canonical_url}" for old, shard in found.moved]
        warnings.append(f"{len(moves):,} shard(s) moved and are not annotated again: {first_few(moves)}")
    if found.changed:
        urls = [shard.canonical_url for shard in found.changed]
        warnings.append(
            f"{len(urls):,} shard(s) changed since they were annotated and are annotated again: "
            f"{first_few(urls)}"
        )
    if found.unlisted:
        warnings.append(
            f"{len(found.unlisted):,} shard(s) are no longer listed; their files were moved to unlisted/: "
            f"{first_few(sorted(found.unlisted))}"
        )
    return tuple(warnings)


def looked_at_again(job: Job) -> Job:
    """Return the job with what its folder contains now; raises OutputError if it cannot be listed."""
    states = job.folder.all_ids().states_of([shard.shard_id for shard in job.shards])
    return replace(job, done=states.done, damaged=states.damaged)


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
    """Remove the failure record of a shard that is now annotated."""
    folder.remove(f"{shard_id}.json", FAILED)


def record_success(folder: OutputFolder, shards: int, damaged: int, counts: ShardCounts) -> None:
    """Write OUT/_SUCCESS with the totals, unless it has them already."""
    if _success_of(folder) != (shards, damaged, counts):
        document = {"shards": shards, "damaged": damaged, **counts_as_metadata(counts), "when": utc_now()}
        folder.publish(SUCCESS_FILE, as_json(document))


def _success_of(folder: OutputFolder) -> tuple[int, int, ShardCounts] | None:
    try:
        found = folder.success()
    except DamagedFileError:
        return None
    return found.shards, found.damaged, found.counts()
