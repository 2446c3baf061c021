"""COCO, objects and captions, as the archives of 2014 and 2017 unpack.

    annotations/instances_val2017.json      images, annotations (polygons; run lengths for crowds), categories
    annotations/captions_val2017.json       five sentences an image; may be missing
    val2017/000000000139.jpg

The owners number 80 categories from 1 to 90 with gaps: here a class id is a category's rank by its id, from
1 to 80. Where objects overlap, the smaller one is in front, for what lies on a table is annotated within the
table. Crowds are ignored where no single object lies.

Source: https://cocodataset.org/#format-data, "Object Detection" and "Image Captioning".
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt16
from pycocotools import mask as run_lengths

from legrad.errors import LeGradError
from legrad.masks import decode_rle
from pipeline.errors import SampleFailure, UserError
from pipeline.readers.dataset import (
    IGNORED,
    TruthDataset,
    TruthSample,
    labelled_sample,
    plain_name,
    read_image,
    read_text,
    require_folder,
    unique_names,
)

# the largest file, instances_train2017.json, has 450 MB
MAX_JSON_BYTES = 4 << 30


@dataclass(frozen=True)
class _Annotations:
    """What the two files say of the images, by image id.

    Attributes:
        sides: file name to image id, height and width.
        objects: annotations of an image.
        sentences: captions of an image, oldest first.
        class_ids: category id to class id.
    """

    sides: dict[str, tuple[int, int, int]]
    objects: dict[int, list[Mapping[str, Any]]]
    sentences: dict[int, list[str]]
    class_ids: dict[int, int]


def open_coco(root: str | Path, split: str = "val2017") -> TruthDataset:
    """Open a split of COCO; its annotations are held in memory, several times the size of their files.

    Args:
        root: the folder of ``annotations`` and of the images' folder.
        split: val2017, train2017, val2014 or train2014.

    Raises:
        UserError: a file or folder is missing, or the annotations are not COCO's.
    """
    folder = Path(root)
    try:
        images = require_folder(folder / plain_name(split), "images")
    except SampleFailure as failure:
        raise UserError(f"split: {failure.message}") from None
    instances = _read_json(folder / "annotations" / f"instances_{split}.json")
    captions_file = folder / "annotations" / f"captions_{split}.json"
    captions = _read_json(captions_file) if captions_file.is_file() else {"annotations": []}
    try:
        annotations, class_names = _index(instances, captions["annotations"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        where = f"{folder / 'annotations'}: instances_{split}.json or captions_{split}.json"
        raise UserError(f"{where} is not laid out as COCO's: {type(error).__name__} {error}") from error
    names = sorted(annotations.sides, key=lambda name: annotations.sides[name][0])
    return TruthDataset(
        f"coco-{split}", class_names, names, lambda name: _read(images, name, annotations, class_names)
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, max_bytes=MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from None


def _index(
    instances: Mapping[str, Any], captions: Iterable[Mapping[str, Any]]
) -> tuple[_Annotations, tuple[str, ...]]:
    categories = sorted(instances["categories"], key=lambda category: int(category["id"]))
    objects: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in instances["annotations"]:
        objects[int(annotation["image_id"])].append(annotation)
    sentences: dict[int, list[str]] = defaultdict(list)
    for caption in sorted(captions, key=lambda caption: int(caption["id"])):
        sentences[int(caption["image_id"])].append(str(caption["caption"]).strip())
    sides = {
        str(image["file_name"]): (int(image["id"]), int(image["height"]), int(image["width"]))
        for image in instances["images"]
    }
    class_ids = {int(category["id"]): rank for rank, category in enumerate(categories, 1)}
    names = unique_names([str(each["name"]) for each in categories], [str(each["id"]) for each in categories])
    return _Annotations(sides, objects, sentences, class_ids), names


def _read(images: Path, name: str, annotations: _Annotations, class_names: tuple[str, ...]) -> TruthSample:
    stored = read_image(images, name)
    image_id, height, width = annotations.sides[name]
    if sorted((height, width)) != sorted((stored.height, stored.width)):
        sizes = f"{width} x {height} pixels, the image has {stored.width} x {stored.height}"
        raise SampleFailure("read", "size_mismatch", f"the annotations say {sizes}")
    label_map = _label_map(annotations.objects.get(image_id, []), annotations.class_ids, height, width)
    sentences = annotations.sentences.get(image_id, [])
    extra: dict[str, Any] = {"caption": sentences[0], "all_captions": sentences} if sentences else {}
    return labelled_sample(stored, label_map, class_names, extra)


def _label_map(
    objects: Iterable[Mapping[str, Any]], class_ids: Mapping[int, int], height: int, width: int
) -> UInt16[np.ndarray, "h w"]:
    label_map = np.zeros((height, width), np.uint16)
    masks = [_run_lengths(each, class_ids, height, width) for each in objects]
    # crowds first, then from the largest object to the smallest: what is painted last is in front
    for label, mask in sorted(masks, key=lambda pair: (pair[0] != IGNORED, -int(run_lengths.area(pair[1])))):
        try:
            label_map[decode_rle({"size": [height, width], "counts": mask["counts"].decode("ascii")})] = label
        except (LeGradError, ValueError) as error:
            raise _bad_annotation(str(error)) from error
    return label_map


def _run_lengths(
    annotation: Mapping[str, Any], class_ids: Mapping[int, int], height: int, width: int
) -> tuple[int, Any]:
    """The value that an annotation's pixels get, and its mask as compressed run lengths."""
    try:
        label = IGNORED if annotation.get("iscrowd") else class_ids[int(annotation["category_id"])]
        outline = annotation["segmentation"]
        if isinstance(outline, list):
            polygons = [_polygon(corners, height, width) for corners in outline]
            if not polygons:
                raise ValueError("a segmentation without polygons")
            return label, run_lengths.merge(run_lengths.frPyObjects(polygons, height, width))
        if [int(side) for side in outline["size"]] != [height, width]:
            raise ValueError(f"run lengths of {outline['size']}, expected [{height}, {width}]")
        counts = outline["counts"]
        if isinstance(counts, str):
            return label, {"size": [height, width], "counts": counts.encode("ascii")}
        if any(count < 0 for count in counts) or sum(counts) != height * width:
            raise ValueError(f"run lengths of {sum(counts)} pixels, expected {height * width}")
        return label, run_lengths.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        identity = annotation.get("id")
        raise _bad_annotation(f"annotation {identity!r}: {type(error).__name__} {error}") from error


def _polygon(corners: Any, height: int, width: int) -> list[float]:
    """A polygon's x and y in turn; tracing it takes time and memory by its length, so it is bounded."""
    numbers = [float(corner) for corner in corners]
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"a polygon of {len(numbers)} numbers")
    largest = 2 * max(height, width)
    if not all(math.isfinite(number) and abs(number) <= largest for number in numbers):
        raise ValueError("a polygon that lies far outside of the image")
    return numbers


def _bad_annotation(message: str) -> SampleFailure:
    return SampleFailure("read", "bad_annotation", message[:300])
