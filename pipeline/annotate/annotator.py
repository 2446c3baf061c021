"""One shard from tar to Parquet: read, decode, explain, mask, publish. Runs without ray."""

from __future__ import annotations

import time
import uuid
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import legrad
from legrad.canvases import canvas_bytes
from legrad.tokens import picklable_tokenizer
from pipeline import storage
from pipeline.annotate.attempt import Attempt, AttemptsInFlight
from pipeline.annotate.batch_size import CPU_BATCH_SIZE, find_batch_size
from pipeline.annotate.chunk_rows import ChunkRows, add_chunk
from pipeline.annotate.cutting import device_cut_of
from pipeline.annotate.engine import Engine
from pipeline.annotate.grid_steps import grid_steps_of
from pipeline.annotate.maps import refinement_of
from pipeline.annotate.meter import Meter
from pipeline.annotate.model import views_wanted
from pipeline.annotate.processes import MemoryGate, SampleProcesses
from pipeline.annotate.rows import SampleRows
from pipeline.annotate.sample_states import ExplainedSample, PreparedSample
from pipeline.annotate.sample_work import SampleWork, WorkSettings
from pipeline.annotate.segmenting import MapSharpener
from pipeline.annotate.stream import BatchStream
from pipeline.annotate.stream_steps import SampleSteps, StreamLimits
from pipeline.annotate.trial import TrialSamples
from pipeline.annotate.work_in_processes import WorkInProcesses
from pipeline.config.schema import InputConfig, JobConfig, RunConfig
from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures
from pipeline.output.writer import ShardWriter
from pipeline.prompts.sample_prompts import Prompt, SamplePrompts, job_companions
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage import ShardSource

LOOKAHEAD_BATCHES = 8
CHUNK_SAMPLES = 32
WARM_UP_SAMPLES = 2


@dataclass(frozen=True)
class ShardReport:
    """A shard that was annotated and published.

    Attributes:
        counts: outcomes of its samples.
        duration_s: time taken, in seconds.
        damage: why its archive was not read to a sound end; empty where it was.
    """

    counts: ShardCounts
    duration_s: float
    damage: str = ""


@dataclass(frozen=True)
class ShardProgress:
    """How far a shard in flight is.

    Attributes:
        counts: outcomes of its samples so far.
        done_share: estimate of how much of it is finished, in [0, 1]: bytes read / size of the shard, times
            samples finished / samples read; 0 where the size is unknown.
    """

    counts: ShardCounts
    done_share: float = 0.0


class ShardAnnotator:
    """Annotates shards with one model; several threads may call it at once and then share its batches.

    Args:
        config: the job's configuration.
        explainer: the loaded model.
        decode_threads: samples that are decoded or masked at a time, by one thread each.
        metadata: written into the footer of every file beside the counts: config hash, versions and so on.
        batches_at_once: batches on the device; with two, one computes while the other is put together.
        sharpener: makes masks anew with the segmenter that the configuration names.
        processes: one for each of these threads, so that Python does not make them take turns, and an image
            that kills its decoder costs one sample. They end with the annotator. None: threads are used.
    """

    def __init__(
        self,
        config: JobConfig,
        explainer: legrad.LeGrad,
        *,
        decode_threads: int,
        metadata: Mapping[str, Any],
        batches_at_once: int = 1,
        sharpener: MapSharpener | None = None,
        processes: SampleProcesses | None = None,
    ) -> None:
        self._config = config
        sample_prompts = SamplePrompts(config)
        views = views_wanted(config, explainer)
        tokenizer = picklable_tokenizer(explainer.tokenizer)
        settings = WorkSettings(config, explainer.transform, views, tokenizer)
        self._work = _work_of(settings, processes, sample_prompts.every_class)
        companions = job_companions(config)
        trial = TrialSamples(
            explainer.transform,
            views,
            sample_prompts.usual_number,
            texts_recur=sample_prompts.field is None,
        )
        self._engine = Engine(
            explainer,
            config.prompts.max_per_sample,
            CPU_BATCH_SIZE if config.run.batch_size == "auto" else config.run.batch_size,
            batches_at_once=batches_at_once,
            companions=companions,
            views=views,
            grid_steps=grid_steps_of(config.masks, config.contrast_share),
            refinement=refinement_of(config.masks, explainer.patch_size),
            sharpener=sharpener,
            cut=device_cut_of(config.masks, explainer.device),
        )
        if explainer.device.type != "cpu":
            # kernels are compiled now, and a worker whose device cannot run them fails before it has a shard
            self._engine.warm_up(trial.batch(WARM_UP_SAMPLES))
        if config.run.batch_size == "auto":
            self._engine.batch_size = find_batch_size(self._engine, trial, explainer.device)
        self._meter = Meter(self._engine.clock, decode_threads)
        self._metadata = metadata
        self._wanted_fields = wanted_fields(config.input, sample_prompts)
        self._canvas_bytes = canvas_bytes(views, explainer.transform)
        self._in_flight = AttemptsInFlight(lambda attempt: self._stream.fail(attempt, attempt.error()))
        self._stream = BatchStream(
            SampleSteps(
                self._size_bytes,
                self._prepare,
                _shape,
                self._engine.explain,
                self._finish,
                prepared_bytes=_prepared_bytes,
                explained_bytes=_explained_bytes,
                was_reading_s=partial(self._meter.add, "reading_s"),
            ),
            stream_limits(config.run, decode_threads, batches_at_once, self._engine.batch_size),
            batch_limit=self._engine.batch_limit,
        )

    def annotate(self, shard: ShardSource) -> ShardReport:
        """Read, explain and publish one shard; memory is bounded by batches, not by the shard.

        Returns:
            The counts as published, and the time taken.

        Raises:
            ShardError: the shard cannot be opened, or was cut or changed while it was read.
            OutputError: the result cannot be written.
            ShardAbandoned: `abandon` was called before the result was written.
        """
        started_s, before = time.monotonic(), storage.version_now(shard)
        metadata = {**self._metadata, "attempt": uuid.uuid4().hex}
        with (
            ShardWriter(shard, metadata, with_instances=self._config.masks.has_instances) as writer,
            self._in_flight.begun(shard, writer.counts) as attempt,
        ):
            self._stream.run(self._samples(shard, attempt), partial(add_chunk, writer), attempt)
            storage.require_unchanged(shard, before)
            attempt.begin_publishing()
            with self._meter.timed("publishing_s"):
                published = writer.publish(self._config.output.dir, attempt.content_digest())
        return ShardReport(published.counts, time.monotonic() - started_s, published.damage)

    def wait_for_room(self) -> None:
        """Wait until another shard would be read at once; until then another worker should take it."""
        self._stream.wait_for_room()

    def progress(self) -> dict[str, ShardProgress]:
        """Return the progress of the shards in flight by shard id, without those abandoned."""
        return {
            attempt.shard_id: ShardProgress(attempt.counts(), attempt.done_share())
            for attempt in self._in_flight
        }

    def abandon(self, shard_id: str) -> bool:
        """End the attempts at a shard unless they are being published; what they hold is free at once.

        Returns:
            True: the shard will certainly not be published by the calls of `annotate` in flight, which end
            with ShardAbandoned once their reading returns. False: it was published, is being published, or
            is not in flight.
        """
        return self._in_flight.abandon(shard_id)

    def measures(self) -> Measures:
        """Return the images decoded and the times of all stages since the model was loaded."""
        return self._meter.read()

    def close(self) -> None:
        """Stop the threads and processes; shards in flight fail."""
        # a thread may wait for a process, for ever where an image keeps it busy
        self._work.close()
        self._stream.close()

    def _samples(self, shard: ShardSource, attempt: Attempt) -> Iterator[RawSample | SampleError]:
        """Yield the samples of a shard; it is opened here, so that it counts as being read from then on."""
        limits = storage.ReadLimits(self._config.run.min_read_bytes_per_s)
        with storage.open_shard(shard, limits) as opened:
            stream = storage.DigestingStream(opened)
            samples = read_samples(
                stream,
                max_member_bytes=self._config.input.max_member_bytes,
                wanted_fields=self._wanted_fields,
            )
            for item in attempt.counted(samples, stream):
                # marks name a sample by its shard and key
                yield replace(item, shard=shard.canonical_url) if isinstance(item, RawSample) else item

    def _size_bytes(self, item: RawSample | SampleError) -> int:
        """Return the most bytes that a sample takes, as read and as prepared."""
        if isinstance(item, SampleError):
            return 0
        return sum(map(len, item.fields.values())) + self._canvas_bytes

    def _prepare(self, items: Sequence[RawSample | SampleError]) -> list[PreparedSample | SampleRows]:
        with self._meter.timed("decoding_s"):
            prepared = self._work.prepare(items)
        self._meter.images_decoded(sum(isinstance(sample, PreparedSample) for sample in prepared))
        return prepared

    def _finish(self, explained: Sequence[ExplainedSample]) -> ChunkRows:
        with self._meter.timed("masks_s"):
            return self._work.finish(explained)


def stream_limits(run: RunConfig, threads: int, batches_at_once: int, batch_size: int) -> StreamLimits:
    """Return how far a worker reads ahead.

    Args:
        run: section `run` of the configuration.
        threads: that prepare and finish samples.
        batches_at_once: on the device.
        batch_size: most images in a batch.
    """
    chunk_samples = min(CHUNK_SAMPLES, batch_size)
    return StreamLimits(
        threads=threads,
        device_threads=batches_at_once,
        max_samples=LOOKAHEAD_BATCHES * batch_size + 2 * threads * chunk_samples,
        max_bytes=run.lookahead_bytes,
        max_readers=run.shards_in_flight,
        chunk_samples=chunk_samples,
    )


def wanted_fields(settings: InputConfig, prompts: SamplePrompts) -> frozenset[str]:
    """Return the names of the fields of a sample that are read at all."""
    prompt_fields = prompts.field.lower().split(":")[0].split(";") if prompts.field else []
    return frozenset([*settings.image.lower().split(";"), *prompt_fields])


def _work_of(
    settings: WorkSettings, processes: SampleProcesses | None, every_class: tuple[Prompt, ...]
) -> SampleWork | WorkInProcesses:
    if processes is None:
        return SampleWork(settings, MemoryGate(settings.config.run.decode_bytes).room)
    return WorkInProcesses(processes, settings, every_class)


def _shape(sample: PreparedSample | SampleRows) -> Hashable | None:
    return sample.shape if isinstance(sample, PreparedSample) else None


def _prepared_bytes(sample: PreparedSample) -> int:
    return sum(canvas.nbytes for canvas in sample.canvases)


def _explained_bytes(sample: ExplainedSample) -> int:
    maps = sample.maps
    arrays = (maps.relevance_grids, maps.mask_maps, maps.instance_labels)
    return sum(array.nbytes for array in arrays if array is not None)
