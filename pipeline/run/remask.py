"""Prepare a job that makes masks from the maps in an output folder, without the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline import storage
from pipeline.annotate.stored_maps import facts_of, reads_images
from pipeline.config.load import config_hash, parse_config, with_overrides
from pipeline.config.marks import Marks, marks_of
from pipeline.config.schema import JobConfig
from pipeline.errors import UserError
from pipeline.output.folder import JOB_FILE, OutputFolder
from pipeline.output.image_shards import LocatedShards, locate_shards, marks_of_job
from pipeline.output.records import JobRecord, JobStamp, installed_versions
from pipeline.output.schema import ShardRow
from pipeline.output.status import FolderState, read_state
from pipeline.prompts.sample_prompts import job_marks, with_files_read
from pipeline.run.destination import check_destination
from pipeline.run.job import Job, opened_folder, opened_job
from pipeline.storage import ShardSource
from pipeline.storage.urls import WEB_SCHEMES, split_url
from pipeline.text import first_few, received

SECTIONS = ("masks", "output", "run")
# that they are not of these sections does not matter: they omit rows, and need no model
FURTHER_KEYS = ("prompts.marks", "prompts.keep_marked")
# filters in the order in which they act, each with the value that rejects nothing, beside null
EARLY_FILTERS: Mapping[str, float] = {"min_similarity": -1, "min_peak": 0, "min_foreground_contrast": 0}
LEAD_FILTER: Mapping[str, float] = {"min_lead": -2}


@dataclass(frozen=True)
class StoredJob:
    """A finished or unfinished job whose maps are used.

    Attributes:
        folder: its output folder.
        record: its job.json.
        config: its configuration.
        state: of its shards.
    """

    folder: OutputFolder
    record: JobRecord
    config: JobConfig
    state: FolderState

    @property
    def published(self) -> frozenset[str]:
        """Ids of the shards whose maps can be used."""
        return frozenset((*self.state.done, *self.state.damaged))


def prepare_remask(out: str, new: str, overrides: Sequence[str] = (), shards: Sequence[str] = ()) -> Job:
    """Prepare a job whose masks are made from the maps in an output folder.

    Args:
        out: output folder of a job that stored its maps; compacted or not.
        new: output folder of the new job.
        overrides: ``section.key=value`` strings in place of the keys of the old job.
        shards: where the shards are now, see `pipeline.output.image_shards.locate_shards`; only needed where
            masks are refined.

    Returns:
        The job. Its shards are all those of the old job; those without maps stay left.

    Raises:
        UserError: the old job has no maps, or not those that the masks need; a key is not one of masks; the
            images that refinement needs cannot be found; or `new` holds other results.
        DamagedFileError: a record in the folder is damaged.
        OutputError: a folder cannot be listed or written.
    """
    source = stored_job(out)
    config = remask_config(source, new, overrides)
    check_destination(config.output.dir, os.environ)
    maps_hash, digest = source.record.config_hash, source.record.weights_digest
    stamp = JobStamp(
        config_hash(config, digest, maps_hash=maps_hash), digest, installed_versions(), maps_hash=maps_hash
    )
    opened = opened_folder(config.output.dir)
    listing = _located(source, config, shards)
    unavailable = frozenset(source.state.listed) - source.published
    facts = facts_of(source.folder, source.record)
    job = opened_job(config, stamp, opened, listing, facts=facts, unavailable=unavailable)
    return replace(job, warnings=(*job.warnings, *_warnings(source, unavailable)))


def stored_job(out: str) -> StoredJob:
    """Read the job whose maps are to be used; raises as `prepare_remask` does."""
    folder = OutputFolder(storage.absolute(out))
    record = folder.job()
    facts_of(folder, record)
    state = read_state(folder, folder.shard_rows(), record.config_hash, is_cached=True)
    return StoredJob(folder, record, folder.config(record), state)


def remask_config(source: StoredJob, new: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Return the configuration of the new job: that of the old one, with the keys that were set.

    Raises:
        UserError: a key is not one of masks, masks by it need what is not stored, or marks cannot be read or
            are about no shard of the job.
    """
    keys = [override.partition("=")[0] for override in overrides]
    _require_known_keys(keys)
    if storage.shard_name(storage.absolute(new)) == storage.shard_name(source.folder.url):
        raise UserError(
            f"{storage.shown_url(source.folder.url)}: the new masks need a folder of their own: name another "
            "one as NEW"
        )
    document = _document(source, new)
    config = parse_config(
        with_overrides(document, overrides),
        where=storage.join_url(source.folder.url, JOB_FILE),
        overrides=overrides,
    )
    prompts = with_files_read(config.prompts)
    if isinstance(prompts.marks, tuple):
        named = marks_of_job(prompts.marks, source.state.listed.values())
        prompts = prompts.model_copy(update={"marks": named})
    config = config.model_copy(update={"prompts": prompts})
    if problems := list(_problems(source.config, config)):
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(
            f"{storage.shown_url(source.folder.url)}: these masks cannot be made from its maps:\n{lines}"
        )
    return config


def _document(source: StoredJob, new: str) -> dict[str, Any]:
    document: dict[str, Any] = source.config.model_dump(mode="json")
    document["input"]["maps"] = source.folder.url
    document["output"] |= {"dir": storage.absolute(new), "on_mismatch": "refuse"}
    # there is no model that would need a GPU
    document["run"] |= {"gpus_per_worker": 0, "batch_size": "auto"}
    return document


def _require_known_keys(keys: Sequence[str]) -> None:
    for key in keys:
        if key == "output.dir":
            raise UserError("output.dir: the folder of the new masks is the argument NEW")
        if key not in FURTHER_KEYS and key.partition(".")[0] not in SECTIONS:
            raise UserError(
                f"expected keys of {', '.join(SECTIONS)}, got {received(key)}: everything else is as in the "
                "job whose maps are used; for other prompts or another model, annotate again"
            )


def _problems(before: JobConfig, now: JobConfig) -> Iterator[str]:
    """Yield why the maps of a job do not suffice for other settings."""
    if now.masks.segmenter is not None:
        yield "masks.segmenter needs a model, which is not run: set masks.segmenter=null, or annotate again"
    earlier_marks, marks = _marks(before), _marks(now)
    if not marks.is_within(earlier_marks):
        yield (
            "prompts.marks: keeps prompts that the marks of the job did not keep, which have no maps; use "
            "stricter marks, or annotate again"
        )
    if before.rows_written == "all":
        return
    acting = list(_acting(before, {**EARLY_FILTERS, **LEAD_FILTER, "min_area": 0}))
    again = "annotate again, with output.rows=all to keep the rows of rejected prompts"
    if acting and now.rows_written == "all":
        named = ", ".join(f"masks.{key}" for key in acting)
        yield f"output.rows=all: the rows of prompts that {named} rejected were not written; {again}"
    if not earlier_marks.is_within(marks) and (deciding := {"min_lead", "min_area"}.intersection(acting)):
        # a prompt that is no longer there takes no pixels, and leads no other
        named = " and ".join(f"masks.{key}" for key in sorted(deciding))
        yield f"prompts.marks: which rows {named} omitted depends on the other prompts; {again}"
    if "min_area" in acting and before.masks != now.masks:
        yield (
            f"masks.min_area was {before.masks.min_area}, and rows of smaller masks were not written: by any "
            f"other masks.* they might be large enough; {again}"
        )
        return
    must_stay = {**EARLY_FILTERS, **LEAD_FILTER} if "min_lead" in acting else {}
    for key in must_stay:
        if _limit(before, key) != _limit(now, key):
            yield (
                f"masks.{key}: expected {_limit(before, key)} as before, got {_limit(now, key)}: which rows "
                f"masks.min_lead={before.masks.min_lead} omitted depends on it; {again}"
            )
    for key in set(_acting(before, EARLY_FILTERS)) - set(must_stay):
        limit, new_limit = _limit(before, key), _limit(now, key)
        if new_limit is None or new_limit < (limit or 0):
            yield (
                f"masks.{key}: expected at least {limit}, got {new_limit}: rows below {limit} were not "
                f"written; {again}"
            )


def _marks(config: JobConfig) -> Marks:
    return job_marks(config.prompts) or marks_of((), "not-bad")


def _acting(config: JobConfig, filters: Mapping[str, float]) -> Iterator[str]:
    """Yield the filters that can reject a prompt."""
    for key, rejects_nothing in filters.items():
        if getattr(config.masks, key) not in (None, rejects_nothing):
            yield key


def _limit(config: JobConfig, key: str) -> float | None:
    limit: float | None = getattr(config.masks, key)
    return limit


def _located(source: StoredJob, config: JobConfig, given: Sequence[str]) -> list[ShardSource]:
    """Return the shards of the old job, each with the place where its images are now.

    Raises:
        UserError: images are needed, and it is not known where those of some shards are.
    """
    rows = list(source.state.listed.values())
    if not reads_images(config):
        return [_shard(row, row["shard"]) for row in rows]
    located = locate_shards(rows, given)
    missing = {name: why for name, why in located.missing.items() if name in source.published}
    if missing:
        named = first_few([f"{name} {why}" for name, why in sorted(missing.items())])
        raise UserError(
            f"masks.refine {config.masks.refine} reads the images again, and those of {len(missing):,} "
            f"shard(s) cannot be found: {named}; name where they are with --shards, or set masks.refine=none"
        )
    _require_unchanged_on_servers(rows, located)
    places = {name: shard.url for name, shard in located.sources.items()}
    return [_shard(row, places.get(row["shard_id"], row["shard"])) for row in rows]


def _require_unchanged_on_servers(rows: Sequence[ShardRow], located: LocatedShards) -> None:
    """Check the versions that web servers have just announced: workers do not ask again."""
    changed = []
    for row in rows:
        found = located.sources.get(row["shard_id"])
        if found is None or found.canonical_url != row["shard"]:
            continue
        if split_url(found.url).scheme in WEB_SCHEMES:
            changed += [row["shard"]] * found.version.differs_from(_shard(row, found.url).version)
    if changed:
        raise UserError(
            f"{len(changed):,} shard(s) have changed since they were annotated: {first_few(changed)}; "
            "annotate them again, or set masks.refine=none, which reads no images"
        )


def _shard(row: ShardRow, url: str) -> ShardSource:
    return ShardSource(row["shard_id"], url, row["shard"], row["size_bytes"], row["mtime_ns"], row["etag"])


def _warnings(source: StoredJob, unavailable: frozenset[str]) -> Iterator[str]:
    if unavailable:
        urls = [source.state.listed[name]["shard"] for name in sorted(unavailable)]
        yield (
            f"{len(urls):,} shard(s) have no maps in {storage.shown_url(source.folder.url)} yet, and stay "
            f"left: {first_few(urls)}"
        )
