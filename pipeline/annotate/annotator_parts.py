"""What an annotator does its work by: how it reads shards, prepares samples, makes maps, and makes rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import legrad
from legrad.canvases import canvas_bytes
from legrad.tokens import picklable_tokenizer
from pipeline import storage
from pipeline.annotate.attempt import Attempt
from pipeline.annotate.batch_size import CPU_BATCH_SIZE, find_batch_size
from pipeline.annotate.chunk_rows import ChunkRows
from pipeline.annotate.cutting import device_cut_of
from pipeline.annotate.device_clock import DeviceClock
from pipeline.annotate.engine import Engine
from pipeline.annotate.grid_steps import grid_steps_of
from pipeline.annotate.maps import refinement_of
from pipeline.annotate.model import views_wanted
from pipeline.annotate.processes import MemoryGate, SampleProcesses
from pipeline.annotate.rows import SampleRows
from pipeline.annotate.sample_states import ExplainedSample
from pipeline.annotate.sample_work import WorkSettings
from pipeline.annotate.segmenting import MapSharpener
from pipeline.annotate.trial import TrialSamples
from pipeline.annotate.work_in_processes import WorkInProcesses
from pipeline.annotate.work_in_threads import work_of
from pipeline.config.schema import InputConfig, JobConfig
from pipeline.prompts.sample_prompts import Prompt, SamplePrompts, job_companions
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage import ShardSource

WARM_UP_SAMPLES = 2


class Prepared(Protocol):
    """A sample that is ready for the step that makes its maps."""

    @property
    def shape(self) -> Hashable:
        """What samples that share a batch have in common."""

    @property
    def held_bytes(self) -> int:
        """Bytes of its arrays."""

    @property
    def decoded_images(self) -> int:
        """Number of images that were decoded for it."""


class MapMaker(Protocol):
    """Makes the maps of batches.

    Attributes:
        batch_size: most images in a batch.
        clock: measures how long its device was busy.
    """

    batch_size: int
    clock: DeviceClock

    def batch_limit(self, shape: Hashable) -> int:
        """Return the most images of a shape in one batch."""

    def explain(self, samples: Sequence[Any]) -> list[ExplainedSample]:
        """Return each sample with its maps; the samples are of one shape."""


class SamplesWork(Protocol):
    """Work on samples that needs no device; called by several threads."""

    def prepare(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return each sample ready for its maps, or its outcome where it needs none."""

    def finish(self, explained: Sequence[ExplainedSample]) -> ChunkRows:
        """Make masks from maps, and rows from masks."""

    def close(self) -> None:
        """End what the work has started."""


@dataclass(frozen=True)
class AnnotatorParts:
    """What differs between annotators that explain images and those that take stored maps.

    Attributes:
        read: yields the samples of a shard, and counts them for the attempt.
        size_bytes: most bytes that a sample takes, as read and as prepared.
        work: prepares samples, and makes their rows.
        maps: makes their maps.
    """

    read: Callable[[ShardSource, Attempt], Iterator[Any]]
    size_bytes: Callable[[Any], int]
    work: SamplesWork
    maps: MapMaker


def parts_with_model(
    config: JobConfig,
    explainer: legrad.LeGrad,
    *,
    batches_at_once: int = 1,
    sharpener: MapSharpener | None = None,
    processes: SampleProcesses | None = None,
) -> AnnotatorParts:
    """Return the parts of an annotator that explains images by a model.

    Args:
        config: the job's configuration.
        explainer: the loaded model.
        batches_at_once: batches on the device.
        sharpener: makes masks anew with the segmenter that the configuration names.
        processes: for the work on samples; None: threads do it.
    """
    sample_prompts = SamplePrompts(config)
    views = views_wanted(config, explainer)
    tokenizer = picklable_tokenizer(explainer.tokenizer)
    settings = WorkSettings(config, explainer.transform, views, tokenizer)
    trial = TrialSamples(
        explainer.transform,
        views,
        sample_prompts.usual_number,
        texts_recur=sample_prompts.field is None,
    )
    engine = Engine(
        explainer,
        config.prompts.max_per_sample,
        CPU_BATCH_SIZE if config.run.batch_size == "auto" else config.run.batch_size,
        batches_at_once=batches_at_once,
        companions=job_companions(config),
        views=views,
        grid_steps=grid_steps_of(config.masks, config.contrast_share, stores_maps=config.output.heatmap),
        refinement=refinement_of(config.masks, explainer.patch_size),
        sharpener=sharpener,
        cut=device_cut_of(config.masks, explainer.device),
    )
    if explainer.device.type != "cpu":
        # kernels are compiled now, and a worker whose device cannot run them fails before it has a shard
        engine.warm_up(trial.batch(WARM_UP_SAMPLES))
    if config.run.batch_size == "auto":
        engine.batch_size = find_batch_size(engine, trial, explainer.device)
    canvases = canvas_bytes(views, explainer.transform)
    return AnnotatorParts(
        _ShardReader(config, wanted_fields(config.input, sample_prompts)).samples,
        lambda item: 0 if isinstance(item, SampleError) else fields_bytes(item) + canvases,
        samples_work(settings, processes, sample_prompts.every_class),
        engine,
    )


def wanted_fields(settings: InputConfig, prompts: SamplePrompts) -> frozenset[str]:
    """Return the names of the fields of a sample that are read at all."""
    prompt_fields = prompts.field.lower().split(":")[0].split(";") if prompts.field else []
    return frozenset([*settings.image.lower().split(";"), *prompt_fields])


def fields_bytes(sample: RawSample) -> int:
    """Return the bytes of a sample as read."""
    return sum(map(len, sample.fields.values()))


@dataclass(frozen=True)
class _ShardReader:
    """Reads the samples of shards; memory is bounded by what the caller holds of them."""

    config: JobConfig
    fields: frozenset[str]

    def samples(self, shard: ShardSource, attempt: Attempt) -> Iterator[RawSample | SampleError]:
        """Yield the samples of a shard; it is opened here, so that it counts as being read from then on.

        Raises:
            ShardError: the shard cannot be opened, or was cut or changed while it was read.
        """
        before = storage.version_now(shard)
        limits = storage.ReadLimits(self.config.run.min_read_bytes_per_s)
        with storage.open_shard(shard, limits) as opened:
            stream = storage.DigestingStream(opened)
            samples = read_samples(
                stream, max_member_bytes=self.config.input.max_member_bytes, wanted_fields=self.fields
            )
            for item in attempt.counted(samples, stream):
                # marks name a sample by its shard and key
                yield replace(item, shard=shard.canonical_url) if isinstance(item, RawSample) else item
        storage.require_unchanged(shard, before)


def samples_work(
    settings: WorkSettings, processes: SampleProcesses | None, every_class: tuple[Prompt, ...] = ()
) -> SamplesWork:
    """Return the work on samples, in processes or in the threads that call it."""
    if processes is None:
        return work_of(settings, MemoryGate(settings.config.run.decode_bytes).room)
    return WorkInProcesses(processes, settings, every_class)


def shape_of(sample: Prepared | SampleRows) -> Hashable | None:
    """Return what samples of one batch have in common; None for an outcome."""
    return None if isinstance(sample, SampleRows) else sample.shape


def decoded_images(samples: Sequence[Prepared | SampleRows]) -> int:
    """Return how many images were decoded for prepared samples."""
    return sum(sample.decoded_images for sample in samples if not isinstance(sample, SampleRows))


def explained_bytes(sample: ExplainedSample) -> int:
    """Return the bytes of a sample's maps."""
    maps = sample.maps
    arrays = (maps.relevance_grids, maps.mask_maps, maps.instance_labels, maps.context_grids, maps.distances)
    return sum(array.nbytes for array in arrays if array is not None)
