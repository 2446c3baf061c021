"""One shard from tar to Parquet: read, decode, explain, mask, publish. Runs without ray."""

from __future__ import annotations

import time
import uuid
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import legrad
from legrad.views import canvas_bytes
from pipeline import storage
from pipeline.annotate.batch_size import find_batch_size
from pipeline.annotate.engine import Engine, ExplainedSample, PreparedSample
from pipeline.annotate.meter import Meter
from pipeline.annotate.model import views_wanted
from pipeline.annotate.refinement import map_bytes, refinement_of
from pipeline.annotate.rows import annotation_rows, finite_prompts
from pipeline.annotate.stages import Stages, StreamLimits
from pipeline.annotate.stream import BatchStream
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
class SampleOutcome:
    """What became of a sample: rows, error rows, or neither where no prompt applies.

    Attributes:
        rows: of the annotations file.
        errors: of the errors file.
        dropped_prompts: prompts left out because the sample had too many.
        is_sample: False for an error of the shard that belongs to no sample.
    """

    rows: tuple[dict[str, Any], ...] = ()
    errors: tuple[SampleError, ...] = ()
    dropped_prompts: int = 0
    is_sample: bool = True

    def add_to(self, writer: ShardWriter) -> None:
        """Record it."""
        if self.is_sample:
            writer.add_sample(self.rows, self.errors, self.dropped_prompts)
        else:
            for error in self.errors:
                writer.add_error(error)


@dataclass(frozen=True)
class _Prepared:
    """A sample to be explained, or one already at its end; errors of single prompts stay with it."""

    sample: PreparedSample | None
    errors: tuple[SampleError, ...]
    is_sample: bool = True


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
        decode_threads: threads that decode images and encode masks, shared by all shards in hand.
        metadata: written into every file beside the counts, such as the config hash and versions.
        batches_at_once: on the device; with two, one computes while the other is put together.
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
        self._views = views_wanted(config, explainer)
        companions = companions_of(config.prompts)
        refinement = refinement_of(config.masks, explainer.patch_size)
        usual_maps = self._sample_prompts.usual_number + companions.most_maps
        self._refined_bytes = 0 if refinement is None else usual_maps * map_bytes(explainer.transform)
        self._engine = Engine(
            explainer,
            config.prompts.max_per_sample,
            self._batch_size(usual_maps),
            self._meter,
            batches_at_once=batches_at_once,
            companions=companions,
            views=self._views,
            refinement=refinement,
        )
        self._metadata = metadata
        self._wanted_fields = wanted_fields(config.input, self._sample_prompts)
        self._in_hand: set[ShardWriter] = set()
        self._stream = BatchStream(
            Stages(self._size_bytes, self._prepare, _shapes, self._explain, self._finish),
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
        """Return when another shard would be begun at once; until then it is better off elsewhere."""
        self._stream.wait_for_room()

    def live_counts(self) -> ShardCounts:
        """Outcomes so far of the shards in hand."""
        return total_counts(writer.counts() for writer in tuple(self._in_hand))

    def measures(self) -> Measures:
        """Images decoded and time on the device, since the model was loaded."""
        return self._meter.read()

    def _batch_size(self, maps_per_sample: int) -> int:
        if self._config.run.batch_size != "auto":
            return self._config.run.batch_size
        return find_batch_size(self._explainer, maps_per_sample, self._views)

    @contextmanager
    def _listed(self, writer: ShardWriter) -> Iterator[None]:
        self._in_hand.add(writer)
        try:
            yield
        finally:
            self._in_hand.discard(writer)

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
        """What a sample takes at most, as read and as decoded; the stream's limit counts it ahead."""
        if isinstance(item, SampleError):
            return 0
        read_bytes = sum(map(len, item.fields.values()))
        return read_bytes + canvas_bytes(self._views, self._explainer.transform) + self._refined_bytes

    def _prepare(self, item: RawSample | SampleError) -> _Prepared:
        if isinstance(item, SampleError):
            return _Prepared(None, (item,), is_sample=item.sample_index is not None)
        try:
            found = self._sample_prompts.of(item.fields)
            errors = tuple(
                _error_row(failure, item.key, item.index, index) for index, failure in found.failures
            )
            if not found.prompts:
                return _Prepared(None, errors)
            image = decode_image(
                find_field(item.fields, self._config.input.image),
                self._explainer.transform,
                max_image_pixels=self._config.input.max_image_pixels,
                views=self._views,
            )
            self._meter.image_decoded()
        except SampleFailure as failure:
            return _Prepared(None, (_error_row(failure, item.key, item.index),))
        return _Prepared(PreparedSample(item.index, item.key, image, found.prompts), errors)

    def _explain(self, batch: Sequence[_Prepared]) -> list[ExplainedSample]:
        return self._engine.explain([item.sample for item in batch if item.sample is not None])

    def _finish(self, item: _Prepared, explained: ExplainedSample | None) -> SampleOutcome:
        if explained is None:
            return SampleOutcome(errors=item.errors, is_sample=item.is_sample)
        sample = explained.sample
        errors = [
            SampleError(
                "model",
                "non_finite",
                "the relevance map is not finite",
                sample.key,
                sample.index,
                kept.prompt.index,
            )
            for kept, is_finite in zip(explained.prompts, finite_prompts(explained).tolist(), strict=True)
            if not is_finite
        ]
        rows = annotation_rows(explained, self._config, self._explainer.tower.normalisation)
        return SampleOutcome(tuple(rows), (*item.errors, *errors), explained.dropped_prompts)


def wanted_fields(settings: InputConfig, prompts: SamplePrompts) -> frozenset[str]:
    """The fields of a sample that are read at all."""
    prompt_fields = prompts.field.lower().split(":")[0].split(";") if prompts.field else []
    return frozenset([*settings.image.lower().split(";"), *prompt_fields])


def _error_row(failure: SampleFailure, key: str, index: int, prompt_index: int | None = None) -> SampleError:
    return SampleError(failure.stage, failure.kind, failure.message, key, index, prompt_index)


def _shapes(item: _Prepared) -> Hashable | None:
    return None if item.sample is None else item.sample.image.shapes
