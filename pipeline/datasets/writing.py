"""Write the samples of a dataset as shards, in a fixed order; resume a conversion that was interrupted."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import numpy as np
import webdataset
from jaxtyping import UInt16
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from pipeline import storage
from pipeline.config.classes import class_lines
from pipeline.datasets.truth_dataset import IGNORED, TruthDataset, TruthSample
from pipeline.errors import SampleFailure, UserError
from pipeline.shards.ground_truth import IGNORED_LABEL, IGNORED_LABEL_16_BIT, LABEL_MAP_FIELD
from pipeline.text import printable

CLASSES_FILE = "classes.txt"
CONVERSION_FILE = "conversion.json"
# limits the size of conversion.json, however many images are skipped
NAMES_PER_REASON = 1000
MAX_KEY_CHARACTERS = 80
TAR_BLOCK_BYTES, TAR_RECORD_BYTES = 512, 10240


@dataclass(frozen=True)
class ShardLimits:
    """When a shard is full.

    Attributes:
        max_samples: largest number of samples in a shard.
        max_bytes: largest size of a tar; a larger sample gets a shard of its own.
    """

    max_samples: int = 1000
    max_bytes: int = 1 << 30


@dataclass
class Conversion:
    """The progress of a conversion; kept in the folder as JSON, which is renewed after each shard.

    Attributes:
        dataset: stem of the names of the shards.
        fingerprint: digest of the images' names, the classes and the limits; must be the same to resume.
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
            names.append([name, failure.message])


def write_shards(
    dataset: TruthDataset,
    dest: str,
    limits: ShardLimits = ShardLimits(),
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_shard: Callable[[str, int, int], None] = lambda _name, _samples, _bytes: None,
) -> Conversion:
    """Write a dataset's samples as tars, and ``classes.txt``, whose line i names class id i.

    Args:
        dataset: the samples.
        dest: folder for the shards, which holds nothing else: local path, s3:// or gs://.
        limits: when a shard is full.
        resume: continue after the last shard that a conversion of the same dataset published there.
        overwrite: first remove what a conversion of the same dataset wrote there.
        on_shard: called with name, samples and bytes of each shard when it is published.

    Returns:
        The counts; every image of the dataset is either written or counted as skipped, by reason.

    Raises:
        UserError: the folder holds other files, the name of a class is not one line, or no image could be
            written.
        OutputError: the folder cannot be written.
    """
    class_file = _class_file(dataset)
    conversion = _start(dataset, dest, limits, resume=resume, overwrite=overwrite)
    keys: set[str] = {sample_key(name) for name in dataset.image_names[: conversion.images_read]}
    while conversion.images_read < conversion.images:
        with storage.Spool() as spool:
            samples = _fill_shard(dataset, conversion, keys, spool, limits)
            conversion.omitted = dict(+dataset.skipped.counts)
            conversion.omitted_names = dict(dataset.skipped.names)
            if samples:
                name = _shard_name(dataset, len(conversion.shards))
                size_bytes = spool.seek(0, io.SEEK_END)
                if not conversion.shards:
                    storage.publish(dest, CLASSES_FILE, class_file)
                storage.publish(dest, name, spool)
                conversion.shards.append(name)
                conversion.written += samples
                on_shard(name, samples, size_bytes)
        if not conversion.written:
            raise UserError(f"{dataset.name}: no sample could be written; {_reasons(conversion)}")
        storage.publish(dest, CONVERSION_FILE, json.dumps(asdict(conversion), indent=1).encode())
    return conversion


def _class_file(dataset: TruthDataset) -> bytes:
    try:
        return class_lines(dict(enumerate(dataset.class_names, 1))).encode()
    except ValueError as error:
        raise UserError(f"{dataset.name}: {error}") from None


def sample_key(name: str) -> str:
    """Return a key for an image's name: letters, digits, hyphens and underscores, without extension.

    Names with other characters, and long ones, get a digest, so that their keys differ.

    Args:
        name: the owner's name of the image; one folder before it becomes part of the key.
    """
    stem = re.sub(r"\.(jpe?g|png|webp|bmp|gif)$", "", name, flags=re.IGNORECASE)
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", stem)
    if re.fullmatch(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?", stem) and len(safe) <= MAX_KEY_CHARACTERS:
        return safe
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return f"{safe[: MAX_KEY_CHARACTERS - len(digest) - 1]}-{digest}"


def _start(
    dataset: TruthDataset, dest: str, limits: ShardLimits, *, resume: bool, overwrite: bool
) -> Conversion:
    if not dataset.image_names:
        raise UserError(f"{dataset.name}: the dataset lists no image")
    fresh = Conversion(dataset.name, _fingerprint(dataset, limits), len(dataset.image_names))
    present = storage.list_names(dest)
    if not present:
        return fresh
    if resume and CONVERSION_FILE in present:
        return _earlier(dest, fresh, present)
    # interrupted before the first record was written
    if resume and present <= {CLASSES_FILE, _shard_name(dataset, 0)}:
        return fresh
    shard = re.compile(re.escape(dataset.name) + r"-\d{6,}\.tar")
    strange = {
        name
        for name in present - {CLASSES_FILE, CONVERSION_FILE}
        if not overwrite or shard.fullmatch(name) is None
    }
    if strange or not overwrite:
        raise UserError(
            f"{storage.shown_url(dest)}: expected an empty folder, found {len(present)} file(s) such as "
            f"{min(strange or present)}; choose another folder, continue with --resume, or start again with "
            f"--overwrite (which removes shards of {dataset.name} and nothing else)"
        )
    for name in sorted(present):
        storage.remove(dest, name)
    return fresh


def _shard_name(dataset: TruthDataset, index: int) -> str:
    return f"{dataset.name}-{index:06d}.tar"


def _earlier(dest: str, fresh: Conversion, present: set[str]) -> Conversion:
    where = storage.join_url(dest, CONVERSION_FILE)
    try:
        earlier = TypeAdapter(Conversion).validate_json(storage.read_text(where))
    except ValidationError as error:
        problem = printable(error.errors(include_url=False, include_input=False)[0]["msg"])
        raise UserError(f"{storage.shown_url(where)}: is not the record of a conversion: {problem}") from None
    if earlier.fingerprint != fresh.fingerprint:
        message = "the images, the classes or the limits of shards have changed"
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


def _fingerprint(dataset: TruthDataset, limits: ShardLimits) -> str:
    what = [dataset.name, list(dataset.image_names), list(dataset.class_names), asdict(limits)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _fill_shard(
    dataset: TruthDataset, conversion: Conversion, keys: set[str], spool: IO[bytes], limits: ShardLimits
) -> int:
    """Read images into a tar until it is full or none is left; return its number of samples."""
    samples, size_bytes = 0, TAR_RECORD_BYTES
    # no trace of the machine or the time, so that a second conversion writes the same bytes
    with webdataset.TarWriter(spool, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:
        while conversion.images_read < conversion.images and samples < limits.max_samples:
            name = dataset.image_names[conversion.images_read]
            try:
                members = _members(_read(dataset, name, keys), len(dataset.class_names))
            except SampleFailure as failure:
                conversion.skip(name, failure)
            else:
                size_bytes += _tar_bytes(members)
                # a sample that does not fit is read again for the next shard
                if samples and size_bytes > limits.max_bytes:
                    break
                tar.write({"__key__": sample_key(name), **members})
                samples += 1
            keys.add(sample_key(name))
            conversion.images_read += 1
    return samples


def _read(dataset: TruthDataset, name: str, keys: set[str]) -> TruthSample:
    if sample_key(name) in keys:
        raise SampleFailure("read", "duplicate", "the dataset lists the image twice")
    return dataset.read(name)


def _members(sample: TruthSample, class_count: int) -> dict[str, bytes]:
    members = {"jpg": sample.image, "json": json.dumps(sample.document).encode()}
    if sample.label_map is not None:
        members[LABEL_MAP_FIELD] = _png(sample.label_map, class_count)
    return members


def _png(label_map: UInt16[np.ndarray, "h w"], class_count: int) -> bytes:
    """Return a PNG of 8 bits if all class ids of the dataset are below 255, else of 16."""
    ignored = label_map == IGNORED
    if class_count < IGNORED_LABEL:
        values: Any = np.where(ignored, IGNORED_LABEL, label_map).astype(np.uint8)
    else:
        values = np.where(ignored, IGNORED_LABEL_16_BIT, label_map).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def _tar_bytes(members: dict[str, bytes]) -> int:
    """Return the bytes that members add to a tar: a header block each, and the content in whole blocks."""
    return TAR_BLOCK_BYTES * sum(1 + -(-len(content) // TAR_BLOCK_BYTES) for content in members.values())


def _reasons(conversion: Conversion) -> str:
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(conversion.skipped).most_common())
    first = next(iter(conversion.skipped_names.values()))[0]
    return f"{conversion.images} image(s): {counts}; the first, {first[0]}: {first[1]}"
