"""Make masks from the maps that an output folder stores, without a model."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from legrad.canvases import Views, canvas_bytes
from pipeline import storage
from pipeline.annotate.annotator_parts import AnnotatorParts, fields_bytes, samples_work
from pipeline.annotate.attempt import Attempt
from pipeline.annotate.batch_size import CPU_BATCH_SIZE
from pipeline.annotate.cutting import device_cut_of
from pipeline.annotate.device_clock import device_clock
from pipeline.annotate.device_memory import sent
from pipeline.annotate.grid_steps import GridTexts, grid_steps_of
from pipeline.annotate.maps import MapSettings, refinement_of, sample_maps
from pipeline.annotate.model import transform_of_facts
from pipeline.annotate.processes import SampleProcesses
from pipeline.annotate.rows import SampleRows
from pipeline.annotate.sample_states import ExplainedSample, SampleMaps
from pipeline.annotate.sample_work import WorkSettings
from pipeline.annotate.stored_samples import ROW_COLUMNS, StoredItem, StoredSample
from pipeline.annotate.texts import ImageMaps
from pipeline.config.schema import JobConfig
from pipeline.errors import DamagedFileError, ShardError, UserError
from pipeline.output.folder import ANNOTATIONS, ERRORS, OutputFolder
from pipeline.output.image_shards import require_annotated_version
from pipeline.output.records import FooterRecord, JobRecord, ModelFacts
from pipeline.output.schema import ERROR_SCHEMA, TEXT_DISTANCES
from pipeline.output.tables import ShardTable
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage import ShardSource
from pipeline.text import printable

# grids alone take little; heat maps that are refined take as much as those of a batch of images
BATCH_SIZE, REFINED_BATCH_SIZE = 32, CPU_BATCH_SIZE


def facts_of(folder: OutputFolder, job: JobRecord) -> ModelFacts:
    """Return what job.json says of the model whose maps a folder stores.

    Raises:
        UserError: the folder stores no maps, or those of an earlier version, which do not suffice.
    """
    where = storage.shown_url(folder.url)
    output = job.config.get("output")
    if not (isinstance(output, dict) and output.get("heatmap", True)):
        raise UserError(f"{where}: stores no maps (output.heatmap is false); annotate again with it true")
    if job.model_facts is None:
        raise UserError(
            f"{where}: its maps are of an earlier version of this program, with 8 bits a value and without "
            "those of background texts, which is too little to make the same masks; annotate again"
        )
    return job.model_facts


def parts_from_maps(
    config: JobConfig, maps_hash: str, device: torch.device, processes: SampleProcesses | None
) -> AnnotatorParts:
    """Return the parts of an annotator that takes the maps stored in the folder `input.maps`.

    Args:
        config: the job's configuration.
        maps_hash: hash of the configuration by which that folder was made.
        device: where maps are filtered, contrasted and refined.
        processes: for the work on samples; None: threads do it.

    Raises:
        UserError: the folder holds other results now, or stores no maps.
    """
    folder = OutputFolder(str(config.input.maps))
    job = folder.job()
    if job.config_hash != maps_hash:
        raise UserError(
            f"{storage.shown_url(folder.url)}: holds results of another configuration than when this job "
            f"started ({job.config_hash}, {maps_hash} then)"
        )
    facts = facts_of(folder, job)
    views = Views(tile=config.model.fit == "tile", **config.views.model_dump())
    transform = transform_of_facts(facts)
    settings = WorkSettings(config, transform, views, None)
    canvases = canvas_bytes(views, transform) if reads_images(config) else 0
    return AnnotatorParts(
        _StoredReader(config, folder, maps_hash).samples,
        lambda item: _item_bytes(item) + canvases,
        samples_work(settings, processes),
        StoredMaps(config, facts, device),
    )


def reads_images(config: JobConfig) -> bool:
    """Return whether masks need the pixels of images: only refinement does."""
    return config.masks.refine != "none"


def _item_bytes(item: StoredItem | SampleError | SampleRows) -> int:
    if not isinstance(item, StoredItem):
        return 0
    context = [entry for row in item.rows for entry in row["context_heatmaps"] or () if entry]
    levels = sum(len(entry["heatmap"] or b"") for entry in (*item.rows, *context))
    # a grid is read in 16 bits and restored in 32, and a distance is stored once, of two in the matrix
    distances = sum(len(row["text_distances"] or b"") for row in item.rows)
    return 3 * (levels + distances) + (0 if item.image is None else fields_bytes(item.image))


class StoredMaps:
    """Takes the steps from stored grids to the maps that masks are cut from, on one device.

    Args:
        config: the job's configuration.
        facts: of the model whose maps these are.
        device: where the steps are taken.

    Attributes:
        settings: the steps; jobs with equal ones have equal maps, and differ only in how these are cut.
        batch_size: most samples in a batch.
        clock: measures how long the device was busy.
    """

    def __init__(self, config: JobConfig, facts: ModelFacts, device: torch.device) -> None:
        prompts, masks = config.prompts, config.masks
        usual = REFINED_BATCH_SIZE if reads_images(config) else BATCH_SIZE
        self.batch_size = usual if config.run.batch_size == "auto" else config.run.batch_size
        self.clock = device_clock(device)
        self._device = device
        self.settings = MapSettings(
            facts.normalisation,
            None if prompts.neutral is None else prompts.neutral_threshold,
            grid_steps_of(masks, config.contrast_share, stores_maps=config.output.heatmap),
            refinement_of(masks, facts.patch_size),
            cut=device_cut_of(masks, device),
        )

    def batch_limit(self, _shape: Hashable) -> int:
        """Return the most samples in one batch."""
        return self.batch_size

    def explain(self, samples: Sequence[StoredSample]) -> list[ExplainedSample]:
        """Return the samples, all of one shape, with their maps."""
        with self.clock.work():
            maps = self._maps(samples)
        return [
            ExplainedSample(
                index=sample.index,
                key=sample.key,
                image_height=sample.image_height,
                image_width=sample.image_width,
                prompts=sample.prompts,
                maps=own_maps,
                errors=sample.errors,
                context=sample.context,
            )
            for sample, own_maps in zip(samples, maps, strict=True)
        ]

    def _maps(self, samples: Sequence[StoredSample]) -> list[SampleMaps]:
        chosen = [
            ImageMaps(
                np.arange(len(sample.prompts)),
                sample.map_of_prompt,
                np.arange(len(sample.grids)),
                sample.backgrounds,
            )
            for sample in samples
        ]
        distances = np.concatenate([sample.distances.ravel() for sample in samples])
        texts = GridTexts(
            None,
            np.concatenate([sample.similarities for sample in samples]),
            torch.from_numpy(distances).to(self._device),
        )
        has_images = bool(samples[0].canvases)
        return sample_maps(
            torch.from_numpy(np.concatenate([sample.grids for sample in samples])).to(self._device),
            chosen,
            texts,
            self.settings,
            pixels=sent([sample.canvases[0] for sample in samples], self._device) if has_images else None,
            image_sizes=[(sample.image_height, sample.image_width) for sample in samples],
        )


@dataclass
class _ReadSoFar:
    """Counts rows in place of the bytes of a shard, which need not be read.

    Attributes:
        rows: read so far.
        footer: of the annotations.
        size_bytes: of the shard.
    """

    footer: FooterRecord
    size_bytes: int
    rows: int = 0

    @property
    def bytes_read(self) -> int:
        """As large a part of the shard's bytes as rows were read."""
        return self.size_bytes * self.rows // max(1, self.footer.rows)

    def digest(self) -> str:
        """Return the digest of the shard that was annotated."""
        return self.footer.content_digest


@dataclass(frozen=True)
class _StoredReader:
    """Reads the samples of a shard from an output folder, and their images where these are needed."""

    config: JobConfig
    folder: OutputFolder
    maps_hash: str

    def samples(
        self, shard: ShardSource, attempt: Attempt
    ) -> Iterator[StoredItem | SampleError | SampleRows]:
        """Yield the samples of a shard, those that failed and those without prompts included.

        Raises:
            ShardError: the folder's files of the shard are damaged; or its images have changed since, or
                cannot be read.
        """
        with _as_shard_error():
            footer = self.folder.own_footer(shard.shard_id, self.maps_hash)
            so_far = _ReadSoFar(footer, shard.size_bytes or 0)
            yield from attempt.counted(self._items(shard, so_far), so_far)

    def _items(
        self, shard: ShardSource, so_far: _ReadSoFar
    ) -> Iterator[StoredItem | SampleError | SampleRows]:
        footer, annotated = so_far.footer, 0
        with ExitStack() as opened:
            errors = self._errors(shard.shard_id, footer)
            table = opened.enter_context(self.folder.open(ANNOTATIONS, shard.shard_id))
            images = opened.enter_context(self._images(shard, footer))
            for item in stored_items(table, errors):
                so_far.rows += len(item.rows)
                annotated += 1
                yield item if images is None else replace(item, image=images.take(item))
        of_shard = errors.pop(None, [])
        failed = [
            StoredItem(own[0].key, index, errors=tuple(own))
            for index, own in sorted(errors.items(), key=lambda sample: sample[0] or 0)
            if index is not None
        ]
        if (annotated, len(failed)) != (footer.annotated, footer.failed):
            raise ShardError(
                f"{shard.canonical_url}: {annotated} annotated and {len(failed)} failed samples in "
                f"{storage.shown_url(self.folder.url)}; the footer counts {footer.annotated} and "
                f"{footer.failed}"
            )
        yield from failed
        yield from of_shard
        for _ in range(footer.empty):
            yield SampleRows()
        yield SampleRows(dropped_prompts=footer.dropped_prompts, is_sample=False)

    def _errors(self, shard_id: str, footer: FooterRecord) -> dict[int | None, list[SampleError]]:
        """Return the error rows of a shard by the ordinal of their sample."""
        with self.folder.open(ERRORS, shard_id) as table:
            found = [_error_of(row) for row in table.rows(ERROR_SCHEMA.names)]
        if footer.state == "damaged":
            found = _with_damage(found, self.folder.damage_reason(shard_id))
        by_sample: dict[int | None, list[SampleError]] = {}
        for error in found:
            by_sample.setdefault(error.sample_index, []).append(error)
        return by_sample

    @contextmanager
    def _images(self, shard: ShardSource, footer: FooterRecord) -> Iterator[_Images | None]:
        if not reads_images(self.config):
            yield None
            return
        is_in_place = storage.shard_name(shard.url) == shard.canonical_url
        if is_in_place:
            require_annotated_version(shard, footer)
        # a copy may have been packed anew; its samples are compared one by one
        place = shard if is_in_place else replace(shard, size_bytes=None, mtime_ns=None, etag=None)
        limits = storage.ReadLimits(self.config.run.min_read_bytes_per_s)
        with storage.open_shard(place, limits) as stream:
            samples = read_samples(
                stream,
                max_member_bytes=self.config.input.max_member_bytes,
                wanted_fields=self.config.input.image.lower().split(";"),
            )
            yield _Images(samples, shard.canonical_url)


@dataclass(frozen=True)
class _Images:
    """The samples of a tar, taken in the order of their ordinals.

    Attributes:
        samples: as read.
        shard_url: for messages.
    """

    samples: Iterator[RawSample | SampleError]
    shard_url: str

    def take(self, item: StoredItem) -> RawSample:
        """Return the sample that an item was made from; raises ShardError if it is not there."""
        for sample in self.samples:
            index = sample.sample_index if isinstance(sample, SampleError) else sample.index
            if index != item.index:
                continue
            if isinstance(sample, RawSample) and sample.key == item.key:
                return sample
            found = "cannot be read" if isinstance(sample, SampleError) else f"is {printable(sample.key)}"
            raise self._changed(item, f"sample number {item.index} {found}")
        raise self._changed(item, f"it has no sample number {item.index}")

    def _changed(self, item: StoredItem, found: str) -> ShardError:
        return ShardError(
            f"{self.shard_url}: changed since it was annotated: {found}; expected "
            f"{printable(str(item.key))}: annotate it again"
        )


def stored_items(table: ShardTable, errors: dict[int | None, list[SampleError]]) -> Iterator[StoredItem]:
    """Yield the samples that have rows, each with its errors, which are taken out of `errors`."""
    if TEXT_DISTANCES not in table.column_names:
        raise ShardError(f"{storage.shown_url(table.url)}: has no column {TEXT_DISTANCES}; annotate again")
    for index, group in groupby(table.rows(ROW_COLUMNS), lambda row: int(row["sample_index"])):
        rows = tuple(group)
        yield StoredItem(rows[0]["key"], index, rows, tuple(errors.pop(index, ())))


def _error_of(row: dict[str, Any]) -> SampleError:
    return SampleError(
        row["stage"], row["kind"], row["message"], row["key"], row["sample_index"], row["prompt_index"]
    )


def _with_damage(errors: Sequence[SampleError], reason: str) -> list[SampleError]:
    """Return the errors with the one marked that damages the shard: its reason, or else the last one."""
    of_shard = [place for place, error in enumerate(errors) if error.sample_index is None]
    named = [
        place for place in of_shard if reason.startswith(f"{errors[place].stage}/{errors[place].kind}: ")
    ]
    if not of_shard:
        raise ShardError("the shard is damaged, and no error row says why; annotate it again")
    damaging = (named or of_shard)[-1]
    return [replace(error, damages_shard=place == damaging) for place, error in enumerate(errors)]


@contextmanager
def _as_shard_error() -> Iterator[None]:
    """Let another attempt at the shard be made, and the shard be given up, where its files are damaged."""
    try:
        yield
    except DamagedFileError as error:
        raise ShardError(str(error)) from error
