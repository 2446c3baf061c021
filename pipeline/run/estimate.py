"""Estimate the samples, time and output size of a job from a few of its shards, and find what would fail."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs as pafs
from rich.filesize import decimal

from pipeline import storage
from pipeline.annotate.annotator_parts import wanted_fields
from pipeline.annotate.model import check_model, check_model_files
from pipeline.config.marks import require_marked_shards
from pipeline.config.schema import JobConfig
from pipeline.corpus.contents import first_middle_last, look_at_contents
from pipeline.corpus.diagnosis import notes_of, problems_of
from pipeline.corpus.folders import is_named_tar
from pipeline.corpus.probe import Probe, probe_shards
from pipeline.errors import OutputError, UserError
from pipeline.output.folder import FolderIds, OutputFolder
from pipeline.output.former_results import former_job, is_to_be_deleted, rows_of_unlisted_files
from pipeline.output.runs import RunState
from pipeline.output.schema import ShardRow
from pipeline.prompts.sample_prompts import SamplePrompts, with_files_read
from pipeline.run import job as jobs
from pipeline.run.destination import check_destination, destination_problem, files_beside
from pipeline.run.job import Job
from pipeline.storage import ShardSource
from pipeline.text import as_duration, first_few

LISTED_SHARDS = 20
UNSIZED_SHOWN = 3


@dataclass(frozen=True)
class DryRun:
    """The shards of a job and their state, without anything started.

    Attributes:
        shards: every shard of the job.
        done: ids of shards that need no work, including damaged ones that will not be retried.
        damaged: ids of shards whose archive could not be read to its end.
        probe: the first samples of a few shards.
        output_bytes: bytes published so far, by shard id.
        problems: why the job would annotate nothing, each in one line; none where it may succeed.
        notes: what would fail in part, each in one line.
    """

    shards: Sequence[ShardSource]
    done: frozenset[str]
    damaged: frozenset[str]
    probe: Probe
    output_bytes: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def dry_run(config: JobConfig, moves: Sequence[str] = ()) -> DryRun:
    """List a job's shards, read the first samples of a few, and check names; write, load and start nothing.

    Args:
        config: the job's configuration.
        moves: OLD=NEW for each folder or file of shards that has moved.

    Raises:
        UserError: no shard matches, a pattern is invalid, the classes cannot be read, or the folder has
            results of another configuration.
    """
    listing = storage.list_shards(config.input.shards, allow_commands=config.input.allow_commands)
    problems = [
        *_message_of(partial(check_model, config.model, config.views.scales)),
        *_message_of(partial(check_model_files, config.model)),
        *_message_of(partial(check_destination, config.output.dir, os.environ)),
        *destination_problem(config.output.dir),
    ]
    out = storage.absolute(config.output.dir)
    folder = OutputFolder(out)
    # a folder or model with a problem has no results to compare with
    ids, listed = (FolderIds(), []) if problems else _kept_results(folder, config)
    found = jobs.look_into(folder, ids, listed, listing, moves)
    shards, done = found.shards, found.done if config.run.retry_damaged else found.done | found.damaged
    sample_prompts = SamplePrompts(config)
    probed = first_middle_last(shards)
    probe = probe_shards(config, sample_prompts, probed, wanted_fields(config.input, sample_prompts))
    contents = partial(look_at_contents, probed, max_member_bytes=config.input.max_member_bytes)
    of_samples = problems_of(config, sample_prompts, probe, contents) if probed else []
    of_samples += _message_of(partial(_check_marks, config, shards))
    notes = [*([] if of_samples else notes_of(config, probe)), *_notes_on_names(shards)]
    notes += [] if problems else files_beside(out)
    problems += of_samples
    output_bytes = {} if problems else published_bytes(out, sorted(done))
    return DryRun(shards, done, found.damaged, probe, output_bytes, tuple(problems), tuple(notes))


def _message_of(check: Callable[[], Any]) -> list[str]:
    """Return the message of a check that fails; none where it passes."""
    try:
        check()
    except (UserError, OutputError) as error:
        return [str(error)]
    return []


def _check_marks(config: JobConfig, shards: Sequence[ShardSource]) -> None:
    marks = with_files_read(config.prompts).marks
    if isinstance(marks, tuple):
        require_marked_shards(marks, {shard.canonical_url for shard in shards})


def _notes_on_names(shards: Sequence[ShardSource]) -> list[str]:
    """Return a note on listed files that are no tars by their names, where others are."""
    names = [PurePosixPath(shard.canonical_url.partition("?")[0]).name for shard in shards]
    others = Counter(PurePosixPath(name).suffix for name in names if not is_named_tar(name))
    if not others or others.total() == len(names):
        return []
    suffixes = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in others.most_common(4))
    return [
        f"{others.total():,} of {len(names):,} listed files are no tars by their names ({suffixes}): such "
        "files count as damaged shards; a pattern that ends in *.tar skips them"
    ]


def _kept_results(folder: OutputFolder, config: JobConfig) -> tuple[FolderIds, list[ShardRow]]:
    """Return the ids and listed shards that the job would keep; none if it would overwrite the folder."""
    ids = folder.all_ids()
    former = former_job(folder, ids)
    if former is not None:
        config = jobs.with_precision_of(former, jobs.as_run(config))
        if is_to_be_deleted(folder, former, config, jobs.stamp_of(config)):
            return FolderIds(), []
    listed = jobs.listed_earlier(folder)
    return ids, [*listed, *rows_of_unlisted_files(folder, ids, listed)]


def published_bytes(output_dir: str, shard_ids: Sequence[str]) -> dict[str, int]:
    """Return the bytes of both files of each published shard, by shard id."""
    wanted = set(shard_ids)
    sizes: dict[str, int] = dict.fromkeys(wanted, 0)
    for folder in ("annotations", "errors"):
        for name, size_bytes in _sizes_bytes(storage.join_url(output_dir, folder)).items():
            shard_id = name.removesuffix(".parquet")
            if shard_id in wanted:
                sizes[shard_id] += size_bytes
    return sizes


def _sizes_bytes(folder_url: str) -> dict[str, int]:
    filesystem, path = storage.resolve(folder_url)
    try:
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    except OSError as error:
        raise OutputError(f"{storage.shown_url(folder_url)}: cannot be listed") from error
    return {info.base_name: info.size for info in infos if info.is_file}


def dry_run_lines(found: DryRun) -> list[str]:
    """Return the lines that `legrad annotate --dry-run` prints."""
    left = [shard for shard in found.shards if shard.shard_id not in found.done]
    size_bytes, unsized = _total_bytes(found.shards)
    lines = [f"{shard.canonical_url}  {_size_of(shard)}{_mark(shard, found)}" for shard in found.shards]
    if len(lines) > LISTED_SHARDS:
        lines = [*lines[:LISTED_SHARDS], f"... and {len(lines) - LISTED_SHARDS:,} more"]
    lines.append(f"shards: {len(found.shards):,} in total, {len(left):,} left; {decimal(size_bytes)}")
    if unsized:
        names = [shard.canonical_url for shard in found.shards if shard.size_bytes is None]
        lines.append(
            f"not in the estimates: {unsized:,} shard(s) of unknown size, perhaps missing: "
            f"{first_few(names, UNSIZED_SHOWN)}"
        )
    probe = found.probe
    if probe.samples and size_bytes:
        factor = size_bytes / probe.bytes_read
        lines.append(
            f"samples: about {round(probe.samples * factor):,}, "
            f"prompts: about {round(probe.prompts * factor):,} "
            f"(estimated from {probe.samples} samples in {probe.shards} shard(s), "
            f"{probe.images_decoded} of whose images were decoded)"
        )
        lines += [] if probe.example is None else [f"first prompt: {probe.example!r}"]
    lines.append(_output_size_line(found))
    lines += [f"note: {note}" for note in found.notes]
    lines.append("dry run: nothing was started or written")
    return lines


def _mark(shard: ShardSource, found: DryRun) -> str:
    if shard.shard_id not in found.done:
        return ""
    return "  damaged" if shard.shard_id in found.damaged else "  done"


def _size_of(shard: ShardSource) -> str:
    return "? bytes" if shard.size_bytes is None else decimal(shard.size_bytes)


def _output_size_line(found: DryRun) -> str:
    done_bytes, _ = _total_bytes([shard for shard in found.shards if shard.shard_id in found.done])
    if not done_bytes:
        return "output: size and time are unknown until a few shards are done; measure them with --limit 3"
    written = sum(found.output_bytes.values())
    size_bytes, _ = _total_bytes(found.shards)
    return (
        f"output: about {decimal(round(written * size_bytes / done_bytes))} "
        f"(estimated from {len(found.done):,} finished shard(s) with {decimal(written)})"
    )


def _total_bytes(shards: Sequence[ShardSource]) -> tuple[int, int]:
    """Return the sum of the known sizes, and how many sizes are unknown."""
    sizes = [shard.size_bytes for shard in shards]
    return sum(size for size in sizes if size is not None), sizes.count(None)


def extrapolation_lines(job: Job, state: RunState, newly_done: Sequence[ShardSource]) -> list[str]:
    """Return the lines printed after `legrad annotate --limit N`: time and output size of the whole job.

    Args:
        job: the whole job.
        state: the last state of the limited run.
        newly_done: the shards that it annotated.
    """
    if not newly_done:
        return ["no estimate: no shard was annotated"]
    done = job.done | {shard.shard_id for shard in newly_done}
    left = [shard for shard in job.shards if shard.shard_id not in done]
    shards_each = _ratio(left, newly_done)
    whole = _ratio(job.shards, newly_done)
    worker_s = state.measures.ready_s * shards_each
    written = sum(published_bytes(job.config.output.dir, [shard.shard_id for shard in newly_done]).values())
    workers = max(1, state.workers_ready)
    return [
        f"estimate from {len(newly_done):,} of {len(job.shards):,} shards:",
        f"  {len(left):,} shard(s) left: about {as_duration(worker_s)} with one worker, "
        f"{as_duration(worker_s / workers)} with {workers} worker(s) as in this run; loading not included",
        f"  whole corpus: about {round(state.counts.samples_in * whole):,} samples, "
        f"{round(state.counts.rows * whole):,} rows, {decimal(round(written * whole))} of output",
    ]


def _ratio(shards: Sequence[ShardSource], measured: Sequence[ShardSource]) -> float:
    """Return how much larger shards are than the measured ones: by bytes if all are known, else by count."""
    size_bytes, unsized = _total_bytes(shards)
    measured_bytes, measured_unsized = _total_bytes(measured)
    if unsized or measured_unsized or not measured_bytes:
        return len(shards) / len(measured)
    return size_bytes / measured_bytes
