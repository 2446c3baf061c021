"""One shard from tar to Parquet: read, decode, explain, mask, publish. Runs without ray."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import legrad
from pipeline.annotate.annotator_parts import (
    AnnotatorParts,
    decoded_images,
    explained_bytes,
    parts_with_model,
    shape_of,
)
from pipeline.annotate.attempt import AttemptsInFlight
from pipeline.annotate.chunk_rows import ChunkRows, add_chunk
from pipeline.annotate.meter import Meter
from pipeline.annotate.processes import SampleProcesses
from pipeline.annotate.sample_states import ExplainedSample
from pipeline.annotate.segmenting import MapSharpener
from pipeline.annotate.stream import BatchStream
from pipeline.annotate.stream_steps import SampleSteps, StreamLimits
from pipeline.config.schema import JobConfig, RunConfig
from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures
from pipeline.output.writer import ShardWriter
from pipeline.storage import ShardSource

LOOKAHEAD_BATCHES = 8
CHUNK_SAMPLES = 32


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
    """Annotates shards; several threads may call it at once and then share its batches.

    Args:
        config: the job's configuration.
        source: the loaded model; or the parts that take stored maps in its place, and then neither
            `sharpener` nor `processes`.
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
        source: legrad.LeGrad | AnnotatorParts,
        *,
        decode_threads: int,
        metadata: Mapping[str, Any],
        batches_at_once: int = 1,
        sharpener: MapSharpener | None = None,
        processes: SampleProcesses | None = None,
    ) -> None:
        self._config = config
        self._parts = (
            source
            if isinstance(source, AnnotatorParts)
            else parts_with_model(
                config,
                source,
                batches_at_once=batches_at_once,
                sharpener=sharpener,
                processes=processes,
            )
        )
        self._meter = Meter(self._parts.maps.clock, decode_threads)
        self._metadata = metadata
        self._in_flight = AttemptsInFlight(lambda attempt: self._stream.fail(attempt, attempt.error()))
        self._stream = BatchStream(
            SampleSteps(
                self._parts.size_bytes,
                self._prepare,
                shape_of,
                self._parts.maps.explain,
                self._finish,
                prepared_bytes=lambda sample: sample.held_bytes,
                explained_bytes=explained_bytes,
                was_reading_s=partial(self._meter.add, "reading_s"),
            ),
            stream_limits(config.run, decode_threads, batches_at_once, self._parts.maps.batch_size),
            batch_limit=self._parts.maps.batch_limit,
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
        started_s = time.monotonic()
        metadata = {**self._metadata, "attempt": uuid.uuid4().hex}
        with (
            ShardWriter(
                shard,
                metadata,
                with_instances=self._config.masks.has_instances,
                with_maps=self._config.output.heatmap,
            ) as writer,
            self._in_flight.begun(shard, writer.counts) as attempt,
        ):
            self._stream.run(self._parts.read(shard, attempt), partial(add_chunk, writer), attempt)
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
        self._parts.work.close()
        self._stream.close()

    def _prepare(self, items: Sequence[Any]) -> Sequence[Any]:
        with self._meter.timed("decoding_s"):
            prepared = self._parts.work.prepare(items)
        self._meter.images_decoded(decoded_images(prepared))
        return prepared

    def _finish(self, explained: Sequence[ExplainedSample]) -> ChunkRows:
        with self._meter.timed("masks_s"):
            return self._parts.work.finish(explained)


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
