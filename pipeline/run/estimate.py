"""What a whole job will take, from a look into a few of its shards or from those that are done."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline import storage
from pipeline.annotate.annotator import wanted_fields
from pipeline.config.schema import JobConfig
from pipeline.errors import OutputError, PipelineError, SampleFailure
from pipeline.output.folder import OutputFolder, new_run_id
from pipeline.output.former_results import former_job, is_to_be_deleted, rows_of_unlisted_files
from pipeline.output.run_state import RunState
from pipeline.output.survey import FolderIds, spread_evenly
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
    """What a look into the beginning of a few shards found; its sums are over what was read.

    Attributes:
        shards: how many were looked into.
        samples: found there.
        prompts: of those samples.
        bytes_read: of the tars, up to the last sample found.
        unreadable: why a shard could not be looked into, by canonical URL.
    """

    shards: int = 0
    samples: int = 0
    prompts: int = 0
    bytes_read: int = 0
    unreadable: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DryRun:
    """A job as it would be, nothing of it started.

    Attributes:
        shards: every shard of the job.
        done: ids of those that need no work, damaged ones that are left alone included.
        damaged: ids of those of them whose archive was not read to a sound end.
        probe: what a few of them hold.
        output_bytes: published so far, by shard id.
    """

    shards: Sequence[ShardSource]
    done: frozenset[str]
    damaged: frozenset[str]
    probe: Probe
    output_bytes: dict[str, int] = field(default_factory=dict)


class _CountedStream(io.RawIOBase):
    """A stream that knows how much of it was read."""

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
    """List a job's shards and look into a few; nothing is written or started.

    Args:
        config: the job's configuration.
        moves: OLD=NEW for each folder or file of shards that lies elsewhere now.

    Raises:
        UserError: no shard matches, one of the patterns is refused, the classes cannot be read, or the folder
            holds results of another configuration.
    """
    listing = storage.list_shards(config.input.shards, allow_commands=config.input.allow_commands)
    out = storage.absolute(config.output.dir)
    folder = OutputFolder(out, new_run_id())
    ids, listed = _held(folder, config)
    found = jobs.look_into(
        folder, ids, [*listed, *rows_of_unlisted_files(folder, ids, listed)], listing, moves
    )
    shards, done = found.shards, found.done if config.run.retry_damaged else found.done | found.damaged
    # of unknown size: missing, or made by a command that is not to be run now
    sized = [shard for shard in shards if shard.size_bytes is not None]
    probe = _probe(config, spread_evenly(sized, PROBED_SHARDS))
    return DryRun(shards, done, found.damaged, probe, published_bytes(out, sorted(done)))


def _held(folder: OutputFolder, config: JobConfig) -> tuple[FolderIds, list[dict[str, Any]]]:
    """What a folder holds that the job would keep, which is nothing where it would overwrite."""
    ids = jobs.ids_of(folder)
    former = former_job(folder, ids)
    if former is not None:
        config = jobs.as_run(config)
        if is_to_be_deleted(folder, former, config, jobs.stamp_of(config)):
            return FolderIds(*[frozenset[str]()] * 4), []
    return ids, jobs.listed_earlier(folder)


def _probe(config: JobConfig, shards: Sequence[ShardSource]) -> Probe:
    found = Probe()
    sample_prompts = SamplePrompts(config)
    for shard in shards:
        try:
            samples, prompts, bytes_read = _looked_into(config, sample_prompts, shard)
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


def _looked_into(
    config: JobConfig, sample_prompts: SamplePrompts, shard: ShardSource
) -> tuple[int, int, int]:
    """Samples, prompts and bytes of a shard's beginning, at most PROBED_SAMPLES samples."""
    with storage.open_shard(shard) as stream:
        counted = _CountedStream(stream)
        items = read_samples(
            cast("BinaryIO", counted),
            max_member_bytes=config.input.max_member_bytes,
            wanted_fields=wanted_fields(config.input, sample_prompts),
        )
        samples = list(islice((item for item in items if isinstance(item, RawSample)), PROBED_SAMPLES))
        most = config.prompts.max_per_sample
        prompts = sum(min(_prompts(sample_prompts, sample), most) for sample in samples)
        return len(samples), prompts, counted.bytes_read


def _prompts(sample_prompts: SamplePrompts, sample: RawSample) -> int:
    try:
        return len(sample_prompts.of(sample.fields).prompts)
    except SampleFailure:
        return 0


def published_bytes(output_dir: str, shard_ids: Sequence[str]) -> dict[str, int]:
    """Bytes of both files of each published shard, by shard id."""
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


def told_dry_run(found: DryRun) -> list[str]:
    """The lines that `legrad annotate --dry-run` prints."""
    left = [shard for shard in found.shards if shard.shard_id not in found.done]
    size_bytes, unsized = _total_bytes(found.shards)
    lines = [f"{shard.canonical_url}  {_size_of(shard)}{_mark(shard, found)}" for shard in found.shards]
    lines = [*lines[:LISTED_SHARDS], *_and_more(len(lines) - LISTED_SHARDS)]
    lines.append(f"shards: {len(found.shards):,}, of which {len(left):,} are left; {as_bytes(size_bytes)}")
    lines += (
        [f"shards of unknown size, perhaps missing: {unsized:,}; not in the estimates"] if unsized else []
    )
    lines += [f"cannot be read: {url}: {message}" for url, message in found.probe.unreadable]
    probe = found.probe
    if probe.samples:
        factor = size_bytes / probe.bytes_read
        lines.append(
            f"samples: about {round(probe.samples * factor):,}, "
            f"prompts: about {round(probe.prompts * factor):,} "
            f"(from {probe.samples} samples in {probe.shards} shard(s))"
        )
    lines.append(_told_output_size(found))
    lines.append("nothing was started or written")
    return lines


def _mark(shard: ShardSource, found: DryRun) -> str:
    if shard.shard_id not in found.done:
        return ""
    return "  damaged" if shard.shard_id in found.damaged else "  done"


def _size_of(shard: ShardSource) -> str:
    return "? bytes" if shard.size_bytes is None else as_bytes(shard.size_bytes)


def _and_more(number: int) -> list[str]:
    return [f"... and {number:,} more"] if number > 0 else []


def _told_output_size(found: DryRun) -> str:
    done_bytes, _ = _total_bytes([shard for shard in found.shards if shard.shard_id in found.done])
    if not done_bytes:
        return "output: size and time are known once a few shards are done; --limit 3 measures them"
    written = sum(found.output_bytes.values())
    size_bytes, _ = _total_bytes(found.shards)
    return (
        f"output: about {as_bytes(round(written * size_bytes / done_bytes))} "
        f"(from {len(found.done):,} shard(s) that are done: {as_bytes(written)})"
    )


def _total_bytes(shards: Sequence[ShardSource]) -> tuple[int, int]:
    """The sum of the known sizes, and how many are unknown."""
    sizes = [shard.size_bytes for shard in shards]
    return sum(size for size in sizes if size is not None), sizes.count(None)


def told_extrapolation(job: Job, state: RunState, newly_done: Sequence[ShardSource]) -> list[str]:
    """The lines that follow `legrad annotate --limit N`: time and output size of the whole job.

    Args:
        job: the whole job.
        state: where the limited run ended.
        newly_done: the shards that it did.
    """
    if not newly_done:
        return ["no shard was done: nothing to extrapolate from"]
    settled = job.done | {shard.shard_id for shard in newly_done}
    left = [shard for shard in job.shards if shard.shard_id not in settled]
    shards_each = _ratio(left, newly_done)
    whole = _ratio(job.shards, newly_done)
    worker_s = state.measures.ready_s * shards_each
    written = sum(published_bytes(job.config.output.dir, [shard.shard_id for shard in newly_done]).values())
    workers = max(1, state.workers_ready)
    return [
        f"extrapolated from {len(newly_done):,} of {len(job.shards):,} shards:",
        f"  left: {len(left):,} shards, about {as_duration(worker_s)} of one worker; "
        f"{as_duration(worker_s / workers)} with {workers} worker(s) as here, loading not included",
        f"  the whole corpus: about {round(state.counts.samples_in * whole):,} samples, "
        f"{round(state.counts.rows * whole):,} rows, {as_bytes(round(written * whole))} of output",
    ]


def _ratio(shards: Sequence[ShardSource], measured: Sequence[ShardSource]) -> float:
    """How much larger some shards are than the measured ones: by bytes if all are known, else by number."""
    size_bytes, unsized = _total_bytes(shards)
    measured_bytes, measured_unsized = _total_bytes(measured)
    if unsized or measured_unsized or not measured_bytes:
        return len(shards) / len(measured)
    return size_bytes / measured_bytes


def as_bytes(number: int) -> str:
    """Bytes as ``512 B``, ``3.4 MB`` or ``1.2 TB``, powers of 1000."""
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"
