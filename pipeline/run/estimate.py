"""Estimate the samples, time and output size of a job from a few of its shards."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs
from rich.filesize import decimal

from pipeline import storage
from pipeline.annotate.annotator import wanted_fields
from pipeline.config.schema import JobConfig
from pipeline.errors import OutputError, PipelineError, SampleFailure
from pipeline.output.folder import FolderIds, OutputFolder
from pipeline.output.former_results import former_job, is_to_be_deleted, rows_of_unlisted_files
from pipeline.output.runs import RunState
from pipeline.output.schema import ShardRow
from pipeline.output.survey import spread_evenly
from pipeline.prompts.sample_prompts import SamplePrompts
from pipeline.run import job as jobs
from pipeline.run.job import Job
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage import ShardSource
from pipeline.text import as_duration

PROBED_SHARDS = 3
PROBED_SAMPLES = 200
LISTED_SHARDS = 20


@dataclass(frozen=True)
class Probe:
    """Sums over the first samples of a few shards.

    Attributes:
        shards: number of shards read.
        samples: samples read.
        prompts: prompts of those samples.
        bytes_read: bytes of the tars, up to the last sample read.
        unreadable: canonical URL and error of each shard that could not be read.
    """

    shards: int = 0
    samples: int = 0
    prompts: int = 0
    bytes_read: int = 0
    unreadable: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DryRun:
    """The shards of a job and their state, without anything started.

    Attributes:
        shards: every shard of the job.
        done: ids of shards that need no work, including damaged ones that will not be retried.
        damaged: ids of shards whose archive could not be read to its end.
        probe: counts from the first samples of a few shards.
        output_bytes: bytes published so far, by shard id.
    """

    shards: Sequence[ShardSource]
    done: frozenset[str]
    damaged: frozenset[str]
    probe: Probe
    output_bytes: dict[str, int] = field(default_factory=dict)


class _CountedStream(io.RawIOBase):
    """A stream that counts the bytes read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.bytes_read = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.bytes_read += len(data)
        return data


def dry_run(config: JobConfig, moves: Sequence[str] = ()) -> DryRun:
    """List a job's shards and read the first samples of a few; write and start nothing.

    Args:
        config: the job's configuration.
        moves: OLD=NEW for each folder or file of shards that has moved.

    Raises:
        UserError: no shard matches, a pattern is invalid, the classes cannot be read, or the folder has
            results of another configuration.
    """
    listing = storage.list_shards(config.input.shards, allow_commands=config.input.allow_commands)
    out = storage.absolute(config.output.dir)
    folder = OutputFolder(out)
    ids, listed = _kept_results(folder, config)
    found = jobs.look_into(folder, ids, listed, listing, moves)
    shards, done = found.shards, found.done if config.run.retry_damaged else found.done | found.damaged
    # the size is unknown if the shard is missing, or comes from a command, which is not run here
    sized = [shard for shard in shards if shard.size_bytes is not None]
    probe = _probe_shards(config, spread_evenly(sized, PROBED_SHARDS))
    return DryRun(shards, done, found.damaged, probe, published_bytes(out, sorted(done)))


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


def _probe_shards(config: JobConfig, shards: Sequence[ShardSource]) -> Probe:
    found = Probe()
    sample_prompts = SamplePrompts(config)
    for shard in shards:
        try:
            samples, prompts, bytes_read = _probe_shard(config, sample_prompts, shard)
        except (PipelineError, OSError, pa.ArrowException) as error:
            unreadable = (*found.unreadable, (shard.canonical_url, str(error)))
            found = Probe(found.shards, found.samples, found.prompts, found.bytes_read, unreadable)
            continue
        found = Probe(
            found.shards + 1,
            found.samples + samples,
            found.prompts + prompts,
            found.bytes_read + bytes_read,
            found.unreadable,
        )
    return found


def _probe_shard(
    config: JobConfig, sample_prompts: SamplePrompts, shard: ShardSource
) -> tuple[int, int, int]:
    """Return samples, prompts and bytes read, for at most the first PROBED_SAMPLES samples of a shard."""
    with storage.open_shard(shard) as stream:
        counted = _CountedStream(stream)
        items = read_samples(
            cast("BinaryIO", counted),
            max_member_bytes=config.input.max_member_bytes,
            wanted_fields=wanted_fields(config.input, sample_prompts),
        )
        samples = list(islice((item for item in items if isinstance(item, RawSample)), PROBED_SAMPLES))
        most = config.prompts.max_per_sample
        prompts = sum(min(_prompts(sample_prompts, sample, shard), most) for sample in samples)
        return len(samples), prompts, counted.bytes_read


def _prompts(sample_prompts: SamplePrompts, sample: RawSample, shard: ShardSource) -> int:
    try:
        return len(sample_prompts.of(sample.fields, shard=shard.canonical_url, key=sample.key).prompts)
    except SampleFailure:
        return 0


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
        lines.append(f"{unsized:,} shard(s) of unknown size, perhaps missing, are not in the estimates")
    lines += [f"cannot be read: {url}: {message}" for url, message in found.probe.unreadable]
    probe = found.probe
    if probe.samples:
        factor = size_bytes / probe.bytes_read
        lines.append(
            f"samples: about {round(probe.samples * factor):,}, "
            f"prompts: about {round(probe.prompts * factor):,} "
            f"(estimated from {probe.samples} samples in {probe.shards} shard(s))"
        )
    lines.append(_output_size_line(found))
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
