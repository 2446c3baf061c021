"""Write samples as shards, in a fixed order; resume a conversion that was interrupted."""

from __future__ import annotations

import io
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import IO, NamedTuple

import webdataset
from pydantic import TypeAdapter, ValidationError

from pipeline import storage
from pipeline.datasets.truth_dataset import SkippedRecords
from pipeline.errors import SampleFailure, UserError
from pipeline.text import printable

CONVERSION_FILE = "conversion.json"
# limits the size of conversion.json, however many images are skipped
NAMES_PER_REASON = 1000
TAR_BLOCK_BYTES, TAR_RECORD_BYTES = 512, 10240

Members = Mapping[str, bytes]


class Item(NamedTuple):
    """An image that is to become a sample.

    Attributes:
        name: the owner's name of the image, for reports.
        key: key of the sample, different for each item that is written.
        read: returns the members of the sample by field; raises SampleFailure, whose kind is the reason to
            skip the image. Called once, by any thread.
    """

    name: str
    key: str
    read: Callable[[], Members]


@dataclass(frozen=True)
class SampleSource:
    """Images in a fixed order, which become the samples of shards.

    Attributes:
        name: stem of the names of the shards.
        fingerprint: digest of what must be the same to resume: names, their order, classes.
        images: number of items.
        items: returns the items from an ordinal on.
        files: further files for the folder of the shards, by name.
        skipped: records that belong to no item.
    """

    name: str
    fingerprint: str
    images: int
    items: Callable[[int], Iterator[Item]]
    files: Mapping[str, bytes] = field(default_factory=dict)
    skipped: SkippedRecords = field(default_factory=SkippedRecords)


@dataclass(frozen=True)
class ShardLimits:
    """When a shard is full.

    Attributes:
        max_samples: largest number of samples in a shard.
        max_bytes: largest size of a tar; a larger sample gets a shard of its own.
    """

    max_samples: int = 1000
    max_bytes: int = 1 << 30


DEFAULT_LIMITS = ShardLimits()


@dataclass
class Conversion:
    """The progress of a conversion; kept in the folder as JSON, which is renewed after each shard.

    Attributes:
        dataset: stem of the names of the shards.
        fingerprint: digest of the items and the limits; must be the same to resume.
        images: number of images that the dataset lists.
        images_read: number of images that are done, from the first on.
        written: number of samples in the shards.
        shards: names of the tars, in order.
        skipped: number of skipped images by reason.
        skipped_names: the first skipped images by reason, with what is wrong with them.
        omitted: number of records that are in no sample, by kind.
        omitted_names: the first of these records by kind, with what is wrong with them if it is known.
    """

    dataset: str
    fingerprint: str
    images: int
    images_read: int = 0
    written: int = 0
    shards: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_names: dict[str, list[list[str]]] = field(default_factory=dict)
    omitted: dict[str, int] = field(default_factory=dict)
    omitted_names: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, name: str, failure: SampleFailure) -> None:
        """Count a skipped image."""
        self.skipped[failure.kind] = self.skipped.get(failure.kind, 0) + 1
        names = self.skipped_names.setdefault(failure.kind, [])
        if len(names) < NAMES_PER_REASON:
            names.append([printable(name), printable(failure.message)])


def write_samples(
    source: SampleSource,
    dest: str,
    limits: ShardLimits = DEFAULT_LIMITS,
    *,
    resume: bool = False,
    overwrite: bool = False,
    threads: int = 1,
    on_shard: Callable[[str, int, int], None] = lambda _name, _samples, _bytes: None,
) -> Conversion:
    """Write samples as tars; memory is bounded by a few samples for each thread, not by the source.

    Args:
        source: the samples.
        dest: folder for the shards, which holds nothing else: local path, s3:// or gs://.
        limits: when a shard is full.
        resume: continue after the last shard that a conversion of the same source published there.
        overwrite: first remove what a conversion of the same source wrote there.
        threads: number of items that are read at a time; the order of the samples does not depend on it.
        on_shard: called with name, samples and bytes of each shard when it is published.

    Returns:
        The counts; every item of the source is either written or counted as skipped, by reason.

    Raises:
        UserError: the folder holds other files, no image could be written, or the source has changed.
        OutputError: the folder cannot be written.
    """
    conversion = _start(source, dest, limits, resume=resume, overwrite=overwrite)
    with closing(_outcomes(source.items(conversion.images_read), threads)) as outcomes:
        waiting = _Waiting(outcomes)
        while waiting.first is not None:
            _write_shard(source, conversion, waiting, dest, limits=limits, on_shard=on_shard)
    if conversion.images_read != conversion.images:
        raise UserError(
            f"{source.name}: {conversion.images} images were listed at the start, {conversion.images_read} "
            "when they were read: what is converted has changed meanwhile; start again with --overwrite"
        )
    return conversion


def _write_shard(
    source: SampleSource,
    conversion: Conversion,
    waiting: _Waiting,
    dest: str,
    *,
    limits: ShardLimits,
    on_shard: Callable[[str, int, int], None],
) -> None:
    with storage.Spool() as spool:
        samples = _fill_shard(waiting, conversion, spool, limits)
        conversion.omitted = dict(+source.skipped.counts)
        conversion.omitted_names = dict(source.skipped.names)
        if samples:
            name = _shard_name(source, len(conversion.shards))
            size_bytes = spool.seek(0, io.SEEK_END)
            if not conversion.shards:
                for file_name, content in source.files.items():
                    storage.publish(dest, file_name, content)
            storage.publish(dest, name, spool)
            conversion.shards.append(name)
            conversion.written += samples
            on_shard(name, samples, size_bytes)
    if not conversion.written:
        raise UserError(f"{source.name}: no sample could be written; {_reasons(conversion)}")
    storage.publish(dest, CONVERSION_FILE, json.dumps(asdict(conversion), indent=1).encode())


class _Outcome(NamedTuple):
    item: Item
    result: Members | SampleFailure


class _Waiting:
    """Outcomes of which the first can be looked at before it is taken.

    Attributes:
        first: the first outcome; None at the end.
    """

    def __init__(self, outcomes: Iterator[_Outcome]) -> None:
        self._outcomes = outcomes
        self.first = next(outcomes, None)

    def drop_first(self) -> None:
        """Go on to the next outcome."""
        self.first = next(self._outcomes, None)


def _outcomes(items: Iterator[Item], threads: int) -> Generator[_Outcome, None, None]:
    """Yield the outcomes of items in their order; threads read a few of them ahead."""
    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[_Outcome]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(_outcome, item))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(item: Item) -> _Outcome:
    try:
        return _Outcome(item, item.read())
    except SampleFailure as failure:
        return _Outcome(item, failure)


def _fill_shard(waiting: _Waiting, conversion: Conversion, spool: IO[bytes], limits: ShardLimits) -> int:
    """Write samples into a tar until it is full or none is left; return their number."""
    samples, size_bytes = 0, TAR_RECORD_BYTES
    # no trace of the machine or the time, so that a second conversion writes the same bytes
    with webdataset.TarWriter(spool, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:
        while waiting.first is not None and samples < limits.max_samples:
            item, result = waiting.first
            if isinstance(result, SampleFailure):
                conversion.skip(item.name, result)
            else:
                size_bytes += _tar_bytes(result)
                if samples and size_bytes > limits.max_bytes:
                    break
                tar.write({"__key__": item.key, **result})
                samples += 1
            conversion.images_read += 1
            waiting.drop_first()
    return samples


def _start(
    source: SampleSource, dest: str, limits: ShardLimits, *, resume: bool, overwrite: bool
) -> Conversion:
    if not source.images:
        raise UserError(f"{source.name}: the dataset lists no image")
    fingerprint = f"{source.fingerprint}-{limits.max_samples}-{limits.max_bytes}"
    fresh = Conversion(source.name, fingerprint, source.images)
    present = storage.list_names(dest)
    if not present:
        return fresh
    if resume and CONVERSION_FILE in present:
        return _earlier(dest, fresh, present)
    # interrupted before the first record was written
    if resume and present <= {*source.files, _shard_name(source, 0)}:
        return fresh
    shard = re.compile(re.escape(source.name) + r"-\d{6,}\.tar")
    others = {name for name in present - {*source.files, CONVERSION_FILE} if shard.fullmatch(name) is None}
    found = f"{storage.shown_url(dest)}: expected an empty folder, found"
    if others:
        raise UserError(
            f"{found} {len(others)} file(s) that are not of a conversion of {source.name}, such as "
            f"{min(others)}; choose another folder"
        )
    if not overwrite:
        resume_it = "continue with --resume, " if CONVERSION_FILE in present else ""
        raise UserError(
            f"{found} {len(present)} file(s) such as {min(present)}; choose another folder, {resume_it}or "
            f"start again with --overwrite (which removes shards of {source.name} and nothing else)"
        )
    for name in sorted(present):
        storage.remove(dest, name)
    return fresh


def _shard_name(source: SampleSource, index: int) -> str:
    return f"{source.name}-{index:06d}.tar"


def _earlier(dest: str, fresh: Conversion, present: set[str]) -> Conversion:
    where = storage.join_url(dest, CONVERSION_FILE)
    try:
        earlier = TypeAdapter(Conversion).validate_json(storage.read_text(where))
    except ValidationError as error:
        problem = printable(error.errors(include_url=False, include_input=False)[0]["msg"])
        raise UserError(f"{storage.shown_url(where)}: is not the record of a conversion: {problem}") from None
    if earlier.fingerprint != fresh.fingerprint:
        message = "the images, the captions, the classes or the limits of shards have changed"
        raise UserError(f"{storage.shown_url(where)}: cannot resume: {message}; start again with --overwrite")
    if not 0 <= earlier.images_read <= fresh.images:
        raise UserError(
            f"{storage.shown_url(where)}: is not the record of a conversion: it has {earlier.images_read} of "
            f"{fresh.images} images as read"
        )
    if missing := sorted(set(earlier.shards) - present):
        raise UserError(
            f"{storage.shown_url(where)}: cannot resume: {missing[0]} is missing; "
            "start again with --overwrite"
        )
    return earlier


def _tar_bytes(members: Members) -> int:
    """Return the bytes that members add to a tar: a header block each, and the content in whole blocks."""
    return TAR_BLOCK_BYTES * sum(1 + -(-len(content) // TAR_BLOCK_BYTES) for content in members.values())


def _reasons(conversion: Conversion) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(conversion.skipped).most_common())
    first = next(iter(conversion.skipped_names.values()))[0]
    return f"{conversion.images} image(s): {counts}; the first, {first[0]}: {first[1]}"
