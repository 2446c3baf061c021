"""A tar and its annotations file, read in step: neither is ever held whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO

from pipeline import storage
from pipeline.errors import DamagedFileError, MismatchError, ShardError
from pipeline.output.folder import ANNOTATIONS
from pipeline.output.footers import checked_footer
from pipeline.output.image_shards import require_annotated_version
from pipeline.output.joining_counts import WorkerCounts
from pipeline.output.pairs import ShardPair
from pipeline.output.reading import iter_rows, open_table
from pipeline.output.shares import Share
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, read_samples

ROW_COLUMNS = (
    *("key", "sample_index", "prompt_index", "prompt", "class_id", "status"),
    *("image_height", "image_width", "similarity", "threshold", "mask", "ignore"),
)

Row = Mapping[str, Any]
_log = logging.getLogger(__name__)


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
    """Where the pairs of a job are read from, and how.

    Attributes:
        out_dir: output folder of the job.
        fields: the fields of a sample that are kept.
        max_member_bytes: samples with a larger field count as damaged.
        skip_unreadable: whether a shard that cannot be read is left out, instead of an error.
        refuse_mismatches: whether one whose files do not belong together is an error, instead of left out.
    """

    out_dir: str
    fields: frozenset[str]
    max_member_bytes: int
    skip_unreadable: bool = False
    refuse_mismatches: bool = False

    def read(self, share: Share[ShardPair], counts: WorkerCounts) -> Iterator[JoinedSample]:
        """The samples of a shard that have annotation rows, joined by ordinal and key.

        Args:
            share: the shard, and which of its samples.
            counts: takes what else becomes of a sample.

        Raises:
            ShardError: the tar cannot be opened or read, unless such shards are left out.
            DamagedFileError: the same of the annotations.
        """
        try:
            yield from self._read(share, counts)
        except (ShardError, DamagedFileError) as error:
            if not self.skip_unreadable:
                raise
            counts.add("shards_left_out")
            _log.warning("left out, or what is left of it: %s", error)

    def _read(self, share: Share[ShardPair], counts: WorkerCounts) -> Iterator[JoinedSample]:
        pair = share.shard
        try:
            footer = checked_footer(self.out_dir, pair.annotations_id, pair.listed, pair.config_hash)
            require_annotated_version(pair.shard, footer)
        except MismatchError as error:
            if self.refuse_mismatches:
                raise
            counts.add("shards_left_out")
            _log.warning("left out, to be annotated again: %s", error)
            return
        url = storage.join_url(self.out_dir, ANNOTATIONS, f"{pair.annotations_id}.parquet")
        with open_table(url, "annotations") as annotations, storage.open_shard(pair.shard) as stream:
            yield from join(
                pair.shard.canonical_url,
                self._samples(stream),
                _row_groups(iter_rows(annotations, url, "annotations", ROW_COLUMNS)),
                share,
                counts,
            )

    def _samples(self, stream: BinaryIO) -> Iterator[RawSample | SampleError]:
        # not webdataset's reader: it leaves damaged samples out in silence, and the ordinals behind shift
        return read_samples(stream, max_member_bytes=self.max_member_bytes, wanted_fields=self.fields)


def join(
    shard_url: str,
    samples: Iterator[RawSample | SampleError],
    row_groups: Iterator[tuple[int, Sequence[Row]]],
    share: Share[ShardPair],
    counts: WorkerCounts,
) -> Iterator[JoinedSample]:
    """Merge samples and rows, both in the order of their ordinals; a pair must agree in ordinal and key.

    Args:
        shard_url: canonical URL of the shard.
        samples: as read from the tar.
        row_groups: ordinal of a sample, and its rows.
        share: which samples are wanted; others are neither handed out nor counted.
        counts: takes what else becomes of a sample.
    """
    waiting = next(row_groups, None)
    for sample in samples:
        index = sample.sample_index if isinstance(sample, SampleError) else sample.index
        if index is None:
            continue
        while waiting is not None and waiting[0] < index:
            counts.add("rows_without_sample", len(waiting[1]) if share.has(waiting[0]) else 0)
            waiting = next(row_groups, None)
        rows: Sequence[Row] = ()
        if waiting is not None and waiting[0] == index:
            rows, waiting = waiting[1], next(row_groups, None)
        if not share.has(index):
            continue
        if isinstance(sample, SampleError):
            counts.add("damaged")
        elif not rows:
            counts.add("without_rows")
        elif any(row["key"] != sample.key for row in rows):
            counts.add("mispaired")
        else:
            yield JoinedSample(shard_url, sample, tuple(rows))
    while waiting is not None:
        counts.add("rows_without_sample", len(waiting[1]) if share.has(waiting[0]) else 0)
        waiting = next(row_groups, None)


def _row_groups(rows: Iterator[Row]) -> Iterator[tuple[int, list[Row]]]:
    for index, group in groupby(rows, lambda row: int(row["sample_index"])):
        yield index, list(group)
