"""One shard from tar to Parquet: read, decode, explain, mask, publish. Runs without ray."""

from __future__ import annotations

import time
import uuid
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import legrad
from legrad.canvases import canvas_bytes
from legrad.tokens import picklable_tokenizer
from pipeline import storage
from pipeline.annotate.batch_size import CPU_BATCH_SIZE, find_batch_size
from pipeline.annotate.caption_tokens import caption_tokens
from pipeline.annotate.cutting import device_cut_of
from pipeline.annotate.engine import Engine
from pipeline.annotate.maps import map_bytes, refinement_of
from pipeline.annotate.meter import Meter
from pipeline.annotate.model import views_wanted
from pipeline.annotate.rows import SampleRows, sample_rows
from pipeline.annotate.sample_states import ExplainedSample, PreparedSample
from pipeline.annotate.stream import BatchStream, SampleSteps, StreamLimits
from pipeline.annotate.trial import TrialSamples
from pipeline.config.schema import InputConfig, JobConfig
from pipeline.errors import SampleFailure
from pipeline.output.counts import ShardCounts, total_counts
from pipeline.output.measures import Measures
from pipeline.output.writer import ShardWriter
from pipeline.prompts.sample_prompts import SamplePrompts, companions_of
from pipeline.shards.fields import find_field
from pipeline.shards.images import decode_image
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage import ShardSource

LOOKAHEAD_BATCHES = 8


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


class ShardAnnotator:
    """Annotates shards with one model; several threads may call it at once and then share its batches.

    Args:
        config: the job's configuration.
        explainer: the loaded model.
        decode_threads: threads that decode images and encode masks, shared by all shards in flight.
        metadata: written into the footer of every file beside the counts: config hash, versions and so on.
        batches_at_once: batches on the device; with two, one computes while the other is put together.
    """

    def __init__(
        self,
        config: JobConfig,
        explainer: legrad.LeGrad,
        *,
        decode_threads: int,
        metadata: Mapping[str, Any],
        batches_at_once: int = 1,
    ) -> None:
        self._config = config
        self._explainer = explainer
        self._meter = Meter()
        self._sample_prompts = SamplePrompts(config)
        self._tokenizer = picklable_tokenizer(explainer.tokenizer)
        self._views = views_wanted(config, explainer)
        companions = companions_of(config.prompts)
        refinement = refinement_of(config.masks, explainer.patch_size)
        usual_maps = self._sample_prompts.usual_number + companions.most_maps
        self._refined_bytes = 0 if refinement is None else usual_maps * map_bytes(explainer.transform)
        self._trial = TrialSamples(
            explainer.transform,
            self._views,
            self._sample_prompts.usual_number,
            texts_recur=self._sample_prompts.field is None,
        )
        self._engine = Engine(
            explainer,
            config.prompts.max_per_sample,
            CPU_BATCH_SIZE if config.run.batch_size == "auto" else config.run.batch_size,
            self._meter,
            batches_at_once=batches_at_once,
            companions=companions,
            views=self._views,
            refinement=refinement,
            cut=device_cut_of(config.masks, explainer.device),
        )
        if config.run.batch_size == "auto":
            self._engine.batch_size = find_batch_size(self._engine, self._trial, explainer.device)
        self._metadata = metadata
        self._wanted_fields = wanted_fields(config.input, self._sample_prompts)
        self._in_flight: set[ShardWriter] = set()
        self._stream = BatchStream(
            SampleSteps(self._size_bytes, self._prepare, _shape, self._engine.explain, self._finish),
            StreamLimits(
                threads=decode_threads,
                device_threads=batches_at_once,
                max_samples=LOOKAHEAD_BATCHES * self._engine.batch_size + decode_threads,
                max_bytes=config.run.lookahead_bytes,
            ),
            batch_limit=self._engine.batch_limit,
        )

    def annotate(self, shard: ShardSource) -> ShardReport:
        """Read, explain and publish one shard; memory is bounded by batches, not by the shard.

        Returns:
            The counts as published, and the time taken.

        Raises:
            ShardError: the shard cannot be opened, or was cut or changed while it was read.
            OutputError: the result cannot be written.
        """
        started_s, before = time.monotonic(), storage.version_now(shard)
        metadata = {**self._metadata, "attempt": uuid.uuid4().hex}
        with (
            ShardWriter(shard, metadata) as writer,
            self._listed(writer),
            storage.open_shard(shard) as stream,
        ):
            digested = storage.DigestingStream(stream)
            self._stream.run(self._samples(digested), lambda outcome: outcome.add_to(writer))
            storage.require_unchanged(shard, before)
            published = writer.publish(self._config.output.dir, digested.digest())
        return ShardReport(published.counts, time.monotonic() - started_s, published.damage)

    def wait_for_room(self) -> None:
        """Wait until another shard would be read at once; until then another worker should take it."""
        self._stream.wait_for_room()

    def live_counts(self) -> ShardCounts:
        """Return the outcomes so far of the shards in flight."""
        return total_counts(writer.counts() for writer in tuple(self._in_flight))

    def measures(self) -> Measures:
        """Return the images decoded and the time on the device since the model was loaded."""
        return self._meter.read()

    @contextmanager
    def _listed(self, writer: ShardWriter) -> Iterator[None]:
        self._in_flight.add(writer)
        try:
            yield
        finally:
            self._in_flight.discard(writer)

    def close(self) -> None:
        """Stop the threads."""
        self._stream.close()

    def _samples(self, stream: storage.DigestingStream) -> Iterator[RawSample | SampleError]:
        return read_samples(
            stream,
            max_member_bytes=self._config.input.max_member_bytes,
            wanted_fields=self._wanted_fields,
        )

    def _size_bytes(self, item: RawSample | SampleError) -> int:
        """Return the most bytes that a sample takes, as read, decoded and explained."""
        if isinstance(item, SampleError):
            return 0
        read_bytes = sum(map(len, item.fields.values()))
        return read_bytes + canvas_bytes(self._views, self._explainer.transform) + self._refined_bytes

    def _prepare(self, item: RawSample | SampleError) -> PreparedSample | SampleRows:
        if isinstance(item, SampleError):
            return SampleRows(errors=(item,), is_sample=item.sample_index is not None)
        try:
            found = self._sample_prompts.of(item.fields)
            errors = tuple(_error_of(failure, item, prompt_index) for prompt_index, failure in found.failures)
            if not found.prompts:
                return SampleRows(errors=errors)
            image = decode_image(
                find_field(item.fields, self._config.input.image),
                self._explainer.transform,
                max_image_pixels=self._config.input.max_image_pixels,
                views=self._views,
                resize=self._config.input.resize,
            )
        except SampleFailure as failure:
            return SampleRows(errors=(_error_of(failure, item),))
        self._meter.image_decoded()
        return PreparedSample(
            index=item.index,
            key=item.key,
            image_height=image.image_height,
            image_width=image.image_width,
            canvases=image.canvases,
            prompts=found.prompts,
            errors=errors,
            tokens=caption_tokens(found.prompts, self._tokenizer),
        )

    def _finish(self, explained: ExplainedSample) -> SampleRows:
        return sample_rows(explained, self._config)


def wanted_fields(settings: InputConfig, prompts: SamplePrompts) -> frozenset[str]:
    """Return the names of the fields of a sample that are read at all."""
    prompt_fields = prompts.field.lower().split(":")[0].split(";") if prompts.field else []
    return frozenset([*settings.image.lower().split(";"), *prompt_fields])


def _error_of(failure: SampleFailure, sample: RawSample, prompt_index: int | None = None) -> SampleError:
    return SampleError(failure.stage, failure.kind, failure.message, sample.key, sample.index, prompt_index)


def _shape(sample: PreparedSample | SampleRows) -> Hashable | None:
    return sample.shape if isinstance(sample, PreparedSample) else None
