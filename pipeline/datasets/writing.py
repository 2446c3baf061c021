"""Write datasets with ground truth as shards: the image, its classes as JSON, and its label map as PNG."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import UInt16
from PIL import Image

from pipeline.config.classes import class_lines
from pipeline.datasets.conversion import (
    DEFAULT_LIMITS,
    Conversion,
    Item,
    Members,
    SampleSource,
    ShardLimits,
    write_samples,
)
from pipeline.datasets.truth_dataset import IGNORED, TruthDataset
from pipeline.errors import SampleFailure, UserError
from pipeline.shards.ground_truth import IGNORED_LABEL, IGNORED_LABEL_16_BIT, LABEL_MAP_FIELD

CLASSES_FILE = "classes.txt"
MAX_KEY_CHARACTERS = 80


def write_shards(
    dataset: TruthDataset,
    dest: str,
    limits: ShardLimits = DEFAULT_LIMITS,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Write a dataset's samples as tars, and ``classes.txt``; see `write_samples`."""
    return write_samples(truth_source(dataset), dest, limits, resume=resume, overwrite=overwrite)


def truth_source(dataset: TruthDataset) -> SampleSource:
    """Return the samples of a dataset with ground truth, and ``classes.txt``, whose line i names class id i.

    Raises:
        UserError: the name of a class is not one line.
    """
    try:
        class_file = class_lines(dict(enumerate(dataset.class_names, 1))).encode()
    except ValueError as error:
        raise UserError(f"{dataset.name}: {error}") from None
    what = [dataset.name, list(dataset.image_names), list(dataset.class_names)]
    return SampleSource(
        dataset.name,
        hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16],
        len(dataset.image_names),
        partial(_items, dataset),
        {CLASSES_FILE: class_file},
        dataset.skipped,
    )


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


def _items(dataset: TruthDataset, start: int) -> Iterator[Item]:
    keys = {sample_key(name) for name in dataset.image_names[:start]}
    for name in dataset.image_names[start:]:
        key = sample_key(name)
        yield Item(name, key, partial(_members, dataset, name, is_duplicate=key in keys))
        keys.add(key)


def _members(dataset: TruthDataset, name: str, *, is_duplicate: bool) -> Members:
    if is_duplicate:
        raise SampleFailure("read", "duplicate", "the dataset lists the image twice")
    sample = dataset.read(name)
    members = {"jpg": sample.image, "json": json.dumps(sample.document).encode()}
    if sample.label_map is not None:
        members[LABEL_MAP_FIELD] = _png(sample.label_map, len(dataset.class_names))
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
