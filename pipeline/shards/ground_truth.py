"""Read scenes with ground truth from the tars that are annotated.

A sample of such a tar holds an image, ``json`` with ``captions`` and, aligned with them, ``class_ids``, and
one or both of two forms of truth:

- ``seg.png``: a label map of one channel, 0 for background, class ids, and one value where nothing counts:
  255 in a map of 8 bits, 65535 in one of 16.
- ``points`` in the ``json``: a list of ``{"x": 0.25, "y": 0.5, "class_id": 7, "label": "yes"}``, each the
  answer to whether the pixel there belongs to the class, ``yes`` or ``no``. x and y are shares of the
  image's width and height, from 0 to 1. Open Images V7 has such labels; its third answer, "unsure", is
  omitted.

Beside a label map there may be ``inst.png``, of its size: a map of 8 bits, 0 for background, the number of an
instance, and 255 where nothing counts. The class of an instance is its most frequent one in the label map.

Class ids are from 1 on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt16
from PIL import Image

from legrad.errors import ImageFileError
from legrad.image_files.png import check_png, check_png_rows, png_without_texts
from pipeline.config.schema import InputConfig
from pipeline.errors import SampleFailure
from pipeline.shards.captions import MAX_CAPTIONS, check_caption
from pipeline.shards.fields import describe_fields, find_field
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage import ShardSource, list_shards, open_shard

LABEL_MAP_FIELD = "seg.png"
INSTANCE_MAP_FIELD = "inst.png"
IGNORED_LABEL = 255
IGNORED_LABEL_16_BIT = 65535
MAX_POINTS = 100_000
MAX_CLASS_ID = 2**31 - 1  # a column of int32 holds no larger one
GREY_16_BIT_MODES = ("I;16", "I;16B", "I")  # older releases of pillow read 16-bit PNG as I

LabelMap = UInt8[np.ndarray, "height width"] | UInt16[np.ndarray, "height width"]


@dataclass(frozen=True)
class PointLabel:
    """Whether the pixel at a place belongs to a class.

    Attributes:
        x: from the left, as a share of the image's width, 0 to 1.
        y: from the top, as a share of its height.
        class_id: the class in question.
        is_object: whether the pixel belongs to it.
    """

    x: float
    y: float
    class_id: int
    is_object: bool

    def value_in(self, pixels: np.ndarray) -> Any:
        """Return the value of an array of any size, [height, width], at this place."""
        height, width = pixels.shape
        return pixels[min(int(self.y * height), height - 1), min(int(self.x * width), width - 1)]


@dataclass(frozen=True)
class Scene:
    """One sample with its ground truth.

    Attributes:
        key: sample key.
        sample_index: ordinal of the sample in its shard.
        image: the encoded image.
        captions: one text an object.
        class_ids: the label of each object, in the captions' order.
        label_map: 0 background, class ids, and `ignored_label`; at the image's own size. None where the truth
            is points alone.
        points: point labels, if any.
        instance_map: 0 background, numbers of instances, 255 ignored; of the size of the label map. None
            where the truth has no instances.
    """

    key: str
    sample_index: int
    image: bytes
    captions: tuple[str, ...]
    class_ids: tuple[int, ...]
    label_map: LabelMap | None
    points: tuple[PointLabel, ...] = ()
    instance_map: UInt8[np.ndarray, "height width"] | None = None

    @property
    def labels(self) -> LabelMap:
        """Label map; raises ValueError where there is none."""
        if self.label_map is None:
            raise ValueError(f"{self.key}: expected a label map, found only point labels")
        return self.label_map

    @property
    def ignored_label(self) -> int:
        """Value of pixels that do not count."""
        return IGNORED_LABEL if self.labels.dtype == np.uint8 else IGNORED_LABEL_16_BIT

    @property
    def valid(self) -> Bool[np.ndarray, "height width"]:
        """Pixels that count."""
        counted: np.ndarray = self.labels != self.ignored_label
        return counted

    def class_mask(self, class_id: int) -> Bool[np.ndarray, "height width"]:
        """Return the pixels of one class."""
        mask: np.ndarray = self.labels == class_id
        return mask

    def object_mask(self, object_index: int) -> Bool[np.ndarray, "height width"]:
        """Return the pixels of one object."""
        return self.class_mask(self.class_ids[object_index])

    def foreground(self) -> Bool[np.ndarray, "height width"]:
        """Return the pixels of all objects that a caption names."""
        return np.isin(self.labels, self.class_ids)

    def visible_classes(self) -> Int[np.ndarray, " classes"]:
        """Return the ids of the classes that have a pixel, ascending."""
        found = np.flatnonzero(np.bincount(self.labels.ravel()))
        classes: np.ndarray = found[(found != 0) & (found != self.ignored_label)]
        return classes

    def visible_objects(self) -> list[int]:
        """Return the ordinals of the objects that have a pixel; the others have no mask in the truth."""
        visible = set() if self.label_map is None else set(self.visible_classes().tolist())
        return [index for index, class_id in enumerate(self.class_ids) if class_id in visible]

    def pointed_objects(self) -> list[int]:
        """Return the ordinals of the objects that at least one point label affirms."""
        affirmed = {point.class_id for point in self.points if point.is_object}
        return [index for index, class_id in enumerate(self.class_ids) if class_id in affirmed]


def list_truth_shards(patterns: str | Path | Sequence[str | Path]) -> list[ShardSource]:
    """Return the tars that one or several patterns match; raises UserError where a pattern matches none."""
    several = [patterns] if isinstance(patterns, str | Path) else patterns
    return list_shards([str(pattern) for pattern in several], named="SHARDS")


def read_scenes(shard: ShardSource, settings: InputConfig) -> Iterator[Scene | SampleError]:
    """Yield each sample of a tar, as a scene or as the reason why it cannot serve as ground truth.

    Args:
        shard: the tar.
        settings: which field is the image, and the size limits.

    Raises:
        ShardError: the tar cannot be opened or read.
    """
    with open_shard(shard) as stream:
        wanted = [*settings.image.split(";"), LABEL_MAP_FIELD, INSTANCE_MAP_FIELD, "json"]
        samples = read_samples(stream, max_member_bytes=settings.max_member_bytes, wanted_fields=wanted)
        for sample in samples:
            yield sample if isinstance(sample, SampleError) else scene_of(sample, settings.image)


def scene_of(sample: RawSample, image_fields: str) -> Scene | SampleError:
    """Return the scene that a sample contains, or the reason why it contains none.

    Args:
        sample: as read from the tar.
        image_fields: fields of the image, such as ``jpg;png``; the first one present counts.
    """
    try:
        document = _document(sample.fields)
        points = _points(document.get("points", []))
        if LABEL_MAP_FIELD not in sample.fields and not points:
            message = f"sample has no field `{LABEL_MAP_FIELD}`, and its JSON field has no points"
            raise SampleFailure("read", "no_ground_truth", f"{message}{describe_fields(sample.fields)}")
        captions, class_ids = _objects(document)
        data = sample.fields.get(LABEL_MAP_FIELD)
        label_map = None if data is None else read_label_map(data)
        return Scene(
            key=sample.key,
            sample_index=sample.index,
            image=find_field(sample.fields, image_fields),
            captions=captions,
            class_ids=class_ids,
            label_map=label_map,
            points=points,
            instance_map=_instance_map(sample.fields.get(INSTANCE_MAP_FIELD), label_map),
        )
    except SampleFailure as failure:
        return SampleError(failure.stage, failure.kind, failure.message, sample.key, sample.index)


def _instance_map(data: bytes | None, label_map: LabelMap | None) -> UInt8[np.ndarray, "height width"] | None:
    if data is None or label_map is None:
        return None
    instances = read_label_map(data, INSTANCE_MAP_FIELD)
    if instances.dtype != np.uint8 or instances.shape != label_map.shape:
        raise _bad_truth(
            f"{INSTANCE_MAP_FIELD}: expected 8 bits and the size of {LABEL_MAP_FIELD}, {label_map.shape}; "
            f"received {instances.dtype} and {instances.shape}"
        )
    return instances


def _document(fields: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the JSON field of a sample; a missing one counts as empty."""
    try:
        document = json.loads(fields.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise _bad_truth(
            f"expected a JSON document in the field `json`: {type(error).__name__} {error}"
        ) from error
    if not isinstance(document, dict):
        raise _bad_truth(f"expected a JSON object, received {type(document).__name__}")
    return document


def _objects(document: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the captions and class ids of the objects, checked to be of one length."""
    captions, class_ids = (_list_of(document, name) for name in ("captions", "class_ids"))
    # a fraction, a truth value or a text would become another class
    if not all(type(class_id) is int for class_id in class_ids):
        raise _bad_truth(f"class_ids: expected whole numbers, received {class_ids!r:.200}")
    if not all(0 < class_id <= MAX_CLASS_ID for class_id in class_ids):
        raise _bad_truth(f"expected class_ids from 1 to {MAX_CLASS_ID}, received {class_ids!r:.200}")
    if len(captions) != len(class_ids):
        raise _bad_truth(
            f"expected as many class_ids as captions, received {len(class_ids)} for {len(captions)}"
        )
    try:
        # as annotation takes them: what costs more than its length is refused
        return tuple(map(check_caption, captions)), tuple(class_ids)
    except SampleFailure as failure:
        raise _bad_truth(f"captions: {failure.message}") from failure


def _list_of(document: Mapping[str, Any], name: str) -> list[Any]:
    values = document.get(name)
    if not isinstance(values, list):
        message = f"expected a JSON field with captions and class_ids: {name} is "
        raise _bad_truth(message + ("missing" if values is None else f"no list but {type(values).__name__}"))
    if len(values) > MAX_CAPTIONS:
        raise _bad_truth(f"{name}: expected at most {MAX_CAPTIONS}, received {len(values)}")
    return values


def _points(listed: Any) -> tuple[PointLabel, ...]:
    if not isinstance(listed, list) or len(listed) > MAX_POINTS:
        raise _bad_truth(f"points: expected a list of at most {MAX_POINTS}, received {type(listed).__name__}")
    return tuple(_point(item) for item in listed)


def _point(item: Any) -> PointLabel:
    match item:
        case {"x": x, "y": y, "class_id": int(class_id), "label": "yes" | "no" as label} if (
            _is_share(x) and _is_share(y) and class_id is not True and 0 < class_id <= MAX_CLASS_ID
        ):
            return PointLabel(float(x), float(y), class_id, label == "yes")
    raise _bad_truth(
        "points: expected x and y from 0 to 1, a class_id above 0, and a label yes or no; "
        f"received {item!r:.200}"
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def read_label_map(data: bytes, field: str = LABEL_MAP_FIELD) -> LabelMap:
    """Decode a label map; raises SampleFailure, kind `bad_ground_truth`, for other bytes.

    Args:
        data: bytes of a PNG.
        field: name of the field, for the message.
    """
    try:
        check_png(data)
        with Image.open(io.BytesIO(png_without_texts(data)), formats=("PNG",)) as image:
            # only now: Pillow has refused sizes that would take too long
            check_png_rows(data)
            if image.mode in ("L", "P"):
                return np.array(image, dtype=np.uint8)
            if image.mode in GREY_16_BIT_MODES:
                return np.array(image).astype(np.uint16)
            mode = image.mode
    except ImageFileError as error:
        raise _bad_truth(f"{field}: {error}") from error
    # decoders raise about any type on crafted bytes
    except Exception as error:
        raise _bad_truth(f"{field} is unreadable: {error}") from error
    raise _bad_truth(f"expected a grey or palette PNG of 8 or 16 bits as label map, received {mode}")


def _bad_truth(message: str) -> SampleFailure:
    return SampleFailure("read", "bad_ground_truth", message)
