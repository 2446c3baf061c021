"""A torch dataset of images and the masks that were written for them."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import cv2
import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from torchvision import tv_tensors

from legrad.errors import LeGradError, RleError
from pipeline import storage
from pipeline.config.classes import ClassEntry, class_entries, read_class_list
from pipeline.config.schema import InputConfig
from pipeline.errors import SampleFailure, UserError
from pipeline.output.folder import OutputFolder
from pipeline.output.joining import JoinCounts, JoinedSample, Source, pair_shards, shares_of
from pipeline.output.row_classes import RowClasses
from pipeline.output.schema import has_pixels
from pipeline.shards.fields import find_field
from pipeline.shards.ground_truth import LABEL_MAP_FIELD, read_label_map
from pipeline.shards.images import open_image
from pipeline.storage.urls import OBJECT_SCHEMES, split_url
from pipeline.training.shared_counts import SharedCounts, WorkerCounts
from pipeline.training.targets import SimilarityRange, label_map_target, prompt_target

Target = Literal["label_map", "masks", "ground_truth"]
Sample = dict[str, Any]

_log = logging.getLogger(__name__)


class MaskDataset(IterableDataset[Sample]):
    """Images with their masks, joined by shard, ordinal and key, in bounded memory.

    Over all ranks and their workers every sample is read once an epoch, without a sampler: whole shards are
    dealt out, and each of the rest is read by several workers, each taking its part. Ranks may differ by some
    samples, so training with DistributedDataParallel needs `torch.distributed.algorithms.join.Join`, or a
    fixed number of steps. There is no length. Samples that cannot be used are counted: see `counts`.

    A sample is a dictionary: `image` (tv_tensors.Image, uint8 [3, height, width], upright), `key`,
    `sample_index`, `shard`, and with target

    - `label_map`: `label_map` (tv_tensors.Mask, uint8 [height, width]: 0 background, class ids, 255 ignored)
      and `label_weights` (float32 [256], see `pixel_weights`);
    - `masks`: `masks` (tv_tensors.Mask, uint8 [prompts, height, width]: 1, 0, 255 ignored), `prompts`,
      `class_ids` (-1 without), `similarities`, `weights`;
    - `ground_truth`: `label_map` from the sample's own field seg.png, for samples with annotation rows; from
      16 bits, int32 with 65535 ignored.

    Transforms of torchvision.transforms.v2 take the whole dictionary. One that uncovers new pixels, such as a
    rotation, must fill masks with 255: `fill={tv_tensors.Image: 0, tv_tensors.Mask: 255}`.

    Args:
        out_dir: output folder of a job: local path, s3:// or gs://.
        shards: where the images are: patterns as `input.shards` takes them, joined by canonical URL, else by
            stem where that leaves no doubt; or OLD=NEW: what lay in OLD lies in NEW. None: the job's own
            URLs hold.
        target: the training target.
        classes: for annotations without class ids, as of captions: a classes file, or a list of names, or of
            mappings as in such a file. A prompt belongs to the class that it mentions alone, by name, synonym
            or plural, as for `prompts.mentioned_in`; other rows are skipped in label maps, and have class id
            -1 in `masks`.
        similarity_range: makes weights of similarities, see `similarity_weight`; None: all weigh 1.
        transform: called with each sample, in the worker.
        seed: of the order.
        shuffle: whether shards are shuffled by epoch, and samples in a buffer.
        shuffle_buffer: samples, undecoded, among which each worker chooses the next one.
        rank: of this process; None: torch.distributed's, or 0.
        world_size: processes in all; None: torch.distributed's, or 1.
        skip_unreadable: skip shards that cannot be read, instead of ending with a ShardError, or a
            DamagedFileError of their annotations.

    Attributes:
        omitted: by shard id, why a shard of the job is not read.

    Raises:
        UserError: as `pair_shards`; no job is in the folder; an argument is out of its range.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        shards: str | Sequence[str] = (),
        *,
        target: Target = "label_map",
        classes: str | os.PathLike[str] | Sequence[str | Mapping[str, Any] | ClassEntry] | None = None,
        similarity_range: SimilarityRange | None = None,
        transform: Callable[[Sample], Sample] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_buffer: int = 1000,
        rank: int | None = None,
        world_size: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        _check(target, similarity_range, rank, world_size)
        out = storage.absolute(os.fspath(out_dir))
        pairing = pair_shards(out, [shards] if isinstance(shards, str) else shards)
        folder = OutputFolder(out)
        self._settings = folder.config().input
        self._pairs = pairing.pairs
        self.omitted = pairing.omitted
        self._source = Source(
            folder, _fields(self._settings, target), self._settings.max_member_bytes, skip_unreadable
        )
        self._target, self._similarity_range = target, similarity_range
        self._classes = None if classes is None else RowClasses(_class_list(classes))
        self._transform = transform
        self._seed, self._shuffle, self._shuffle_buffer = seed, shuffle, shuffle_buffer
        self._rank, self._world_size = rank, world_size
        self._made_by = os.getpid()
        # in shared memory: workers that outlive an epoch see it too
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._counts = SharedCounts()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; before the loader is iterated, the same on all ranks."""
        self._epoch.fill_(epoch)

    def counts(self) -> JoinCounts:
        """Return the outcomes of the samples of this rank since its workers last began."""
        return self._counts.read()

    def __len__(self) -> NoReturn:
        raise TypeError(
            "MaskDataset has no length: it is a stream, and which samples have a usable mask is known "
            "only when they have been read. Give schedulers a fixed number of steps. Use no sampler, such as "
            "DistributedSampler: ranks and DataLoader workers read different samples as it is, and "
            "set_epoch(epoch) of the dataset changes their order"
        )

    def __iter__(self) -> Iterator[Sample]:
        reader, readers, worker = self._reader()
        counts = self._counts.of_worker(worker)
        for joined in self._joined(reader, readers, counts):
            sample = self._sample(joined, counts)
            if sample is not None:
                counts.add("joined")
                yield sample if self._transform is None else self._transform(sample)

    def __getstate__(self) -> dict[str, Any]:
        # a worker that is started anew knows nothing of torch.distributed
        rank, world_size = self._place()
        return {**self.__dict__, "_rank": rank, "_world_size": world_size, "_made_by": None}

    def _place(self) -> tuple[int, int]:
        """Return rank and world size."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world_size = self._rank, self._world_size
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        if world_size is None:
            world_size = torch.distributed.get_world_size() if distributed else 1
        return rank, world_size

    def _reader(self) -> tuple[int, int, int]:
        """Return this reader's number, the number of readers, and its number among its rank's workers."""
        rank, world_size = self._place()
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        self._refuse_fork()
        return worker * world_size + rank, workers * world_size, worker

    def _refuse_fork(self) -> None:
        urls = (self._source.folder.url, *(pair.shard.url for pair in self._pairs))
        is_forked = self._made_by not in (None, os.getpid())
        if is_forked and any(split_url(url).scheme in OBJECT_SCHEMES for url in urls):
            raise UserError(
                "the connections to an object store do not survive a fork: give the DataLoader "
                "multiprocessing_context='forkserver' (or 'spawn')"
            )

    def _joined(self, reader: int, readers: int, counts: WorkerCounts) -> Iterator[JoinedSample]:
        epoch = int(self._epoch)
        shares = shares_of(self._pairs, reader, readers, epoch=epoch, seed=self._seed, shuffle=self._shuffle)
        samples = (sample for share in shares for sample in self._source.read(share, counts.add))
        if not self._shuffle or self._shuffle_buffer < 2:
            return samples
        seed = np.random.SeedSequence((self._seed, epoch, reader)).generate_state(1)[0]
        size = self._shuffle_buffer
        shuffled: Iterator[JoinedSample] = wds.shuffle(
            size,
            initial=size,
            rng=random.Random(int(seed)),  # noqa: S311 (no secret)
        )(samples)
        return shuffled

    def _sample(self, joined: JoinedSample, counts: WorkerCounts) -> Sample | None:
        """Return the sample before transforms; None, and counted, if it cannot be used."""
        rows = self._classified(joined.rows, counts)
        if not any(has_pixels(row) for row in rows) and self._target != "ground_truth":
            counts.add("without_mask")
            return None
        try:
            image = self._image(joined)
            height, width = image.shape[-2:]
            first = joined.rows[0]
            if (height, width) != (first["image_height"], first["image_width"]):
                counts.add("mispaired")
                return None
            target = self._target_of(joined, rows, height, width)
        except (SampleFailure, LeGradError) as error:
            if isinstance(error, RleError):
                _log.warning("%s: sample %s skipped: %s", joined.shard, joined.raw.key, error)
            counts.add("undecodable")
            return None
        named = {"key": joined.raw.key, "sample_index": joined.raw.index, "shard": joined.shard}
        return {"image": image, **target, **named}

    def _classified(
        self, rows: Sequence[Mapping[str, Any]], counts: WorkerCounts
    ) -> Sequence[Mapping[str, Any]]:
        if self._classes is None or self._target == "ground_truth":
            return rows
        if self._target == "masks":
            return [self._classes.classified(row) or row for row in rows]
        masked = (self._classes.classified(row, counts.add) for row in rows if has_pixels(row))
        return [row for row in masked if row is not None]

    def _image(self, joined: JoinedSample) -> tv_tensors.Image:
        data = find_field(joined.raw.fields, self._settings.image)
        image = open_image(data, max_image_pixels=self._settings.max_image_pixels)
        pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        planes = np.empty((3, image.height, image.width), dtype=np.uint8)
        for channel, plane in enumerate(planes):
            # half the time of a transposed copy
            cv2.extractChannel(pixels, channel, plane)
        return tv_tensors.Image(torch.from_numpy(planes))

    def _target_of(
        self, joined: JoinedSample, rows: Sequence[Mapping[str, Any]], height: int, width: int
    ) -> Sample:
        if self._target == "masks":
            return prompt_target(rows, height, width, self._similarity_range)
        if self._target == "label_map":
            return label_map_target(rows, height, width, self._similarity_range)
        labels = read_label_map(find_field(joined.raw.fields, LABEL_MAP_FIELD))
        if labels.shape != (height, width):
            message = f"the label map is {labels.shape}, the image {(height, width)}"
            raise SampleFailure("read", "bad_ground_truth", message)
        # torch has little arithmetic for unsigned 16 bits
        as_known = labels if labels.dtype == np.uint8 else labels.astype(np.int32)
        return {"label_map": tv_tensors.Mask(torch.from_numpy(as_known))}


def _check(
    target: str, similarity_range: SimilarityRange | None, rank: int | None, world_size: int | None
) -> None:
    known = ("label_map", "masks", "ground_truth")
    if target not in known:
        raise UserError(f"target: expected one of {', '.join(known)}, got {target!r}")
    if similarity_range is not None and not similarity_range[0] < similarity_range[1]:
        raise UserError(f"similarity_range: expected a lower and an upper end, got {similarity_range}")
    if (rank is None) != (world_size is None):
        raise UserError(f"expected rank and world_size together, got rank {rank} and world_size {world_size}")
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise UserError(f"rank: expected 0 to {world_size - 1}, got {rank}")


def _class_list(
    given: str | os.PathLike[str] | Sequence[str | Mapping[str, Any] | ClassEntry],
) -> tuple[ClassEntry, ...]:
    if isinstance(given, str | os.PathLike):
        return read_class_list(os.fspath(given))
    try:
        return class_entries(given)
    except ValueError as error:
        raise UserError(f"classes: {error}") from None


def _fields(settings: InputConfig, target: Target) -> frozenset[str]:
    fields: Collection[str] = settings.image.lower().split(";")
    return frozenset([*fields, LABEL_MAP_FIELD] if target == "ground_truth" else fields)
