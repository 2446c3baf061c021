"""Scenes with ground truth, read from the same tars that are annotated.

A sample of such a tar holds an image, ``json`` with ``captions`` and, aligned with them, ``class_ids``, and
``seg.png``: a label map with 0 for background, class ids, and 255 where nothing counts.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from pipeline.config import InputConfig
from pipeline.decode import find_field
from pipeline.errors import SampleFailure
from pipeline.records import SampleError
from pipeline.shards import RawSample, read_samples
from pipeline.storage import ShardSource, list_shards, open_shard

LABEL_MAP_FIELD = "seg.png"
IGNORED_LABEL = 255


@dataclass(frozen=True)
class Scene:
    """One sample with its ground truth.

    Attributes:
        key: sample key.
        sample_index: ordinal of the sample in its shard.
        image: the encoded image.
        captions: one text an object.
        class_ids: the label of each object, in the captions' order.
        label_map: 0 background, class ids, 255 ignored; at the image's own size.
    """

    key: str
    sample_index: int
    image: bytes
    captions: tuple[str, ...]
    class_ids: tuple[int, ...]
    label_map: UInt8[np.ndarray, "height width"]

    @property
    def valid(self) -> Bool[np.ndarray, "height width"]:
        """Pixels that count."""
        counted: np.ndarray = self.label_map != IGNORED_LABEL
        return counted

    def object_mask(self, object_index: int) -> Bool[np.ndarray, "height width"]:
        """Pixels of one object."""
        mask: np.ndarray = self.label_map == self.class_ids[object_index]
        return mask

    def foreground(self) -> Bool[np.ndarray, "height width"]:
        """Pixels of any object that a caption names."""
        return np.isin(self.label_map, self.class_ids)

    def visible_objects(self) -> list[int]:
        """Ordinals of the objects that have at least one pixel; the others cannot be scored."""
        return [index for index in range(len(self.class_ids)) if self.object_mask(index).any()]


def list_truth_shards(patterns: str | Path | Sequence[str | Path]) -> list[ShardSource]:
    """The tars that one or several patterns name; raises UserError where one names nothing."""
    several = [patterns] if isinstance(patterns, str | Path) else patterns
    return list_shards([str(pattern) for pattern in several])


def read_scenes(shard: ShardSource, settings: InputConfig) -> Iterator[Scene | SampleError]:
    """Every sample of a tar, as a scene or as the reason why it cannot serve as ground truth.

    Args:
        shard: the tar.
        settings: which field is the image, and the size limits.

    Raises:
        ShardError: the tar cannot be opened or read.
    """
    with open_shard(shard) as stream:
        wanted = [*settings.image.split(";"), LABEL_MAP_FIELD, "json"]
        samples = read_samples(stream, max_member_bytes=settings.max_member_bytes, wanted_fields=wanted)
        for sample in samples:
            yield sample if isinstance(sample, SampleError) else scene_of(sample, settings.image)


def scene_of(sample: RawSample, image_fields: str) -> Scene | SampleError:
    """The scene that a sample holds, or the reason why it holds none.

    Args:
        sample: as read from the tar.
        image_fields: fields of the image, the first one present counts, such as ``jpg;png``.
    """
    try:
        if LABEL_MAP_FIELD not in sample.fields:
            raise SampleFailure("read", "no_ground_truth", f"expected a field {LABEL_MAP_FIELD}, found none")
        captions, class_ids = _objects(sample.fields)
        return Scene(
            key=sample.key,
            sample_index=sample.index,
            image=find_field(sample.fields, image_fields),
            captions=captions,
            class_ids=class_ids,
            label_map=_label_map(sample.fields[LABEL_MAP_FIELD]),
        )
    except SampleFailure as failure:
        return SampleError(failure.stage, failure.kind, failure.message, sample.key, sample.index)


def _objects(fields: Mapping[str, bytes]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Captions and class ids of the objects, checked to be of one length."""
    try:
        document = json.loads(fields["json"])
        captions = tuple(str(caption) for caption in document["captions"])
        class_ids = tuple(int(class_id) for class_id in document["class_ids"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        message = f"expected a JSON field with captions and class_ids: {type(error).__name__} {error}"
        raise SampleFailure("read", "bad_ground_truth", message) from error
    if len(captions) != len(class_ids):
        message = f"expected as many class_ids as captions, received {len(class_ids)} for {len(captions)}"
        raise SampleFailure("read", "bad_ground_truth", message)
    return captions, class_ids


def _label_map(data: bytes) -> UInt8[np.ndarray, "height width"]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in ("L", "P"):
                message = f"expected an 8-bit grey or palette PNG as label map, received mode {image.mode}"
                raise SampleFailure("read", "bad_ground_truth", message)
            return np.array(image, dtype=np.uint8)
    except SampleFailure:
        raise
    # decoders raise about any type on crafted bytes
    except Exception as error:
        raise SampleFailure(
            "read", "bad_ground_truth", f"{LABEL_MAP_FIELD} is unreadable: {error}"
        ) from error
