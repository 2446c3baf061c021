"""Join a job's image shards with its annotations, sample by sample; neither file is ever held whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np

from pipeline import storage
from pipeline.errors import DamagedFileError, MismatchError, ShardError, UserError
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.output.image_shards import locate_shards, require_annotated_version
from pipeline.output.schema import INSTANCES, ShardRow
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage import ShardSource

ROW_COLUMNS = (
    *("key", "sample_index", "prompt_index", "prompt", "class_id", "status"),
    *("image_height", "image_width", "similarity", "threshold", "mask", "ignore"),
)

Row = Mapping[str, Any]
RowGroup = tuple[int, Sequence[Row]]
Shard = TypeVar("Shard")
# takes a name of JoinCounts' fields, and how many to add
Count = Callable[[str, int], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JoinCounts:
    """Outcomes of the samples of an epoch on one rank; the last four fields count no samples.

    Attributes:
        joined: samples returned.
        without_rows: samples without annotation rows: failed, or no prompt applied.
        without_mask: samples whose prompts were all rejected or won no pixel, or have no class where classes
            are needed.
        damaged: samples that cannot be read from the shard.
        mispaired: samples whose rows have another key, or were made of an image of another size.
        undecodable: samples whose image, mask or label map cannot be decoded.
        rows_without_class: rows skipped because their prompt mentions no class.
        rows_several_classes: rows skipped because their prompt mentions several classes.
        rows_without_sample: rows whose ordinal the shard does not have.
        shards_omitted: shards skipped because their two files are of different attempts, or unreadable.
    """

    joined: int = 0
    without_rows: int = 0
    without_mask: int = 0
    damaged: int = 0
    mispaired: int = 0
    undecodable: int = 0
    rows_without_class: int = 0
    rows_several_classes: int = 0
    rows_without_sample: int = 0
    shards_omitted: int = 0

    @property
    def samples(self) -> int:
        """Samples that were read."""
        outcomes = (self.joined, self.without_rows, self.without_mask, self.damaged)
        return sum(outcomes) + self.mispaired + self.undecodable


@dataclass(frozen=True)
class ShardPair:
    """An image shard, and what its files in the job's output folder must be.

    Attributes:
        shard: the images.
        annotations_id: names its files.
        listed: its row in the job's list of shards.
        config_hash: of the job.
    """

    shard: ShardSource
    annotations_id: str
    listed: ShardRow
    config_hash: str


@dataclass(frozen=True)
class Pairing:
    """Shards that can be trained on, and the job's other shards with the reason.

    Attributes:
        pairs: in the order of their ids.
        omitted: by shard id, why a shard is skipped: no annotations, or unknown place of its images.
    """

    pairs: tuple[ShardPair, ...]
    omitted: Mapping[str, str]


def pair_shards(out_dir: str, given: Sequence[str] = ()) -> Pairing:
    """Find annotations and images of a job's shards.

    Args:
        out_dir: output folder of the job.
        given: see `pipeline.output.image_shards.locate_shards`.

    Raises:
        UserError: as `locate_shards` raises; the folder has no list of shards; no shard can be used.
    """
    folder = OutputFolder(out_dir)
    listed = {row["shard_id"]: row for row in folder.shard_rows()}
    located = locate_shards(list(listed.values()), given)
    unannotated = set(listed) - folder.ids(ANNOTATIONS)
    omitted = dict.fromkeys(unannotated, "has no annotations") | dict(located.missing)
    usable = sorted(set(located.sources) - set(omitted))
    if not usable:
        reasons = "; ".join(sorted(set(omitted.values())))
        raise UserError(
            f"{storage.shown_url(out_dir)}: none of the {len(listed)} shards can be used: {reasons}"
        )
    config_hash = folder.job().config_hash
    pairs = tuple(ShardPair(located.sources[name], name, listed[name], config_hash) for name in usable)
    return Pairing(pairs, omitted)


@dataclass(frozen=True)
class Share(Generic[Shard]):
    """A shard of which every `parts`-th sample, from ordinal `part` on, is read."""

    shard: Shard
    part: int = 0
    parts: int = 1

    def has(self, sample_index: int) -> bool:
        """Return whether the sample belongs to this share."""
        return sample_index % self.parts == self.part


def shares_of(
    shards: Sequence[Shard], reader: int, readers: int, *, epoch: int, seed: int, shuffle: bool
) -> list[Share[Shard]]:
    """Return what one of several readers reads in an epoch; together they read every sample once.

    Whole shards are dealt out, as many to every reader; the readers divide the samples of the rest. So all
    readers have work if there are fewer shards than readers, and none has much more than another.

    Args:
        shards: all shards, in the same order for every reader.
        reader: number of this reader, from 0.
        readers: workers of all ranks together.
        epoch: with the seed decides the order of the shards.
        seed: the same for every reader.
        shuffle: whether the shards are shuffled.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(shards)) if shuffle else range(len(shards))
    dealt = len(shards) - len(shards) % readers
    whole = [Share(shards[index]) for index in order[reader:dealt:readers]]
    rest = order[dealt:]
    if len(rest) == 0:
        return whole
    # readers 0, n, 2n, ... divide the first of the n remaining shards
    mine, part = reader % len(rest), reader // len(rest)
    parts = len(range(mine, readers, len(rest)))
    return [*whole, Share(shards[rest[mine]], part, parts)]


@dataclass(frozen=True)
class JoinedSample:
    """A sample's bytes and its annotation rows; nothing is decoded.

    Attributes:
        shard: canonical URL of the shard.
        raw: ordinal, key and fields, as in the tar.
        rows: in the order of the prompts, rejected ones included; never empty.
    """

    shard: str
    raw: RawSample
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Source:
    """Reads the joined samples of a job.

    Attributes:
        folder: output folder of the job.
        fields: the fields of a sample that are kept.
        max_member_bytes: samples with a larger field count as damaged.
        skip_unreadable: whether a shard that cannot be read is skipped, instead of an error.
        with_instances: whether rows have the column `instances`, where their file has it.
        refuse_mismatches: whether a shard whose files do not belong together is an error, instead of skipped.
    """

    folder: OutputFolder
    fields: frozenset[str]
    max_member_bytes: int
    skip_unreadable: bool = False
    refuse_mismatches: bool = False
    with_instances: bool = False

    def read(self, share: Share[ShardPair], count: Count) -> Iterator[JoinedSample]:
        """Iterate over the samples of a shard that have annotation rows, joined by ordinal and key.

        Args:
            share: the shard, and which of its samples.
            count: called for every other outcome.

        Raises:
            ShardError: the tar cannot be opened or read, unless such shards are skipped.
            DamagedFileError: the annotations cannot be opened or read, unless such shards are skipped.
        """
        try:
            yield from self._read(share, count)
        except (ShardError, DamagedFileError) as error:
            if not self.skip_unreadable:
                raise
            count("shards_omitted", 1)
            _log.warning("skipping the unreadable rest of a shard: %s", error)

    def _read(self, share: Share[ShardPair], count: Count) -> Iterator[JoinedSample]:
        pair, folder = share.shard, self.folder
        try:
            footer = folder.checked_footer(pair.listed, pair.config_hash)
            require_annotated_version(pair.shard, footer)
        except MismatchError as error:
            if self.refuse_mismatches:
                raise
            count("shards_omitted", 1)
            _log.warning("skipping a shard that must be annotated again: %s", error)
            return
        with folder.open(ANNOTATIONS, pair.annotations_id) as table, storage.open_shard(pair.shard) as stream:
            has_instances = self.with_instances and INSTANCES in table.column_names
            columns = [*ROW_COLUMNS, *([INSTANCES] if has_instances else [])]
            rows = groupby(table.rows(columns), lambda row: int(row["sample_index"]))
            groups = ((index, tuple(group)) for index, group in rows)
            yield from join(pair.shard.canonical_url, self._samples(stream), groups, share, count)

    def _samples(self, stream: BinaryIO) -> Iterator[RawSample | SampleError]:
        # not webdataset's reader: it skips damaged samples silently, and the ordinals after them shift
        return read_samples(stream, max_member_bytes=self.max_member_bytes, wanted_fields=self.fields)


def join(
    shard_url: str,
    samples: Iterator[RawSample | SampleError],
    row_groups: Iterator[RowGroup],
    share: Share[ShardPair],
    count: Count,
) -> Iterator[JoinedSample]:
    """Merge samples and rows, both in the order of their ordinals; a pair must agree in ordinal and key.

    Args:
        shard_url: canonical URL of the shard.
        samples: as read from the tar.
        row_groups: ordinal of a sample, and its rows.
        share: which samples are wanted; others are neither returned nor counted.
        count: called for every sample or row that is not returned.
    """
    waiting = next(row_groups, None)
    for sample in samples:
        index = sample.sample_index if isinstance(sample, SampleError) else sample.index
        if index is None:
            continue
        waiting = _without_earlier(waiting, row_groups, index, share, count)
        rows: Sequence[Row] = ()
        if waiting is not None and waiting[0] == index:
            rows, waiting = waiting[1], next(row_groups, None)
        if not share.has(index):
            continue
        if isinstance(sample, SampleError):
            count("damaged", 1)
        elif not rows:
            count("without_rows", 1)
        elif any(row["key"] != sample.key for row in rows):
            count("mispaired", 1)
        else:
            yield JoinedSample(shard_url, sample, tuple(rows))
    _without_earlier(waiting, row_groups, None, share, count)


def _without_earlier(
    waiting: RowGroup | None,
    row_groups: Iterator[RowGroup],
    index: int | None,
    share: Share[ShardPair],
    count: Count,
) -> RowGroup | None:
    """Skip and count row groups before an ordinal, or all if it is None; return the next one."""
    while waiting is not None and (index is None or waiting[0] < index):
        if share.has(waiting[0]):
            count("rows_without_sample", len(waiting[1]))
        waiting = next(row_groups, None)
    return waiting
