"""Read COCO, objects and captions, as the archives of 2014 and 2017 unpack.

    annotations/instances_val2017.json      images, annotations (polygons; run lengths for crowds), categories
    annotations/captions_val2017.json       five sentences an image; optional
    val2017/000000000139.jpg

The owners number 80 categories from 1 to 90 with gaps; a class id is the rank of a category's id, from 1 to
80. Where objects overlap, the smaller one is in front, because the annotation of a table includes what is on
it. Crowds are ignored where there is no single object.

Source: https://cocodataset.org/#format-data, "Object Detection" and "Image Captioning".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt16
from pycocotools import mask as run_lengths

from legrad.errors import RleError
from legrad.masks.rle import Rle, decode_rle, decode_runs, encode_rle, mask_area
from pipeline.datasets.coco_records import CocoRecords, read_records, whole_number
from pipeline.datasets.truth_dataset import (
    IGNORED,
    SkippedRecords,
    TruthDataset,
    TruthSample,
    labelled_sample,
    plain_name,
    read_image,
    read_text,
    require_folder,
)
from pipeline.errors import SampleFailure, UserError

# the largest file, instances_train2017.json, has 450 MB
MAX_JSON_BYTES = 4 << 30
MIN_OUTLINE_PIXELS = 100_000


def open_coco(root: str | Path, split: str = "val2017") -> TruthDataset:
    """Open a split of COCO; its annotations are held in memory, several times the size of their files.

    Args:
        root: the folder of ``annotations`` and of the images' folder.
        split: val2017, train2017, val2014 or train2014.

    Raises:
        UserError: a file or folder is missing, or the annotations do not have COCO's layout.
    """
    folder = Path(root)
    try:
        images = require_folder(folder / plain_name(split), "images")
    except SampleFailure as failure:
        raise UserError(f"split: {failure.message}") from None
    instances = _read_json(folder / "annotations" / f"instances_{split}.json")
    captions_file = folder / "annotations" / f"captions_{split}.json"
    captions = _read_json(captions_file) if captions_file.is_file() else {"annotations": []}
    skipped = SkippedRecords()
    try:
        records = read_records(instances, captions, skipped)
    except (ValueError, OverflowError, RecursionError) as error:
        where = f"{folder / 'annotations'}: instances_{split}.json or captions_{split}.json"
        raise UserError(f"{where} does not have the layout of COCO: {error}") from error
    return TruthDataset(
        f"coco-{split}",
        records.class_names,
        list(records.images),
        lambda name: _read(images, name, records),
        skipped,
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, max_bytes=MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON: {error}") from None


def _read(images: Path, name: str, records: CocoRecords) -> TruthSample:
    image = records.images[name]
    if image.doubt:
        raise SampleFailure("read", "ambiguous_image", image.doubt)
    height, width = image.height, image.width
    stored = read_image(*_place(images, name))
    if sorted((height, width)) != sorted((stored.height, stored.width)):
        sizes = f"{width} x {height} pixels; the image has {stored.width} x {stored.height}"
        raise SampleFailure("read", "size_mismatch", f"according to the annotations, the image has {sizes}")
    label_map = _label_map(records.objects.get(image.image_id, []), records.class_ids, height, width)
    sentences = records.sentences.get(image.image_id, [])
    extra: dict[str, Any] = {"caption": sentences[0], "all_captions": sentences} if sentences else {}
    return labelled_sample(stored, label_map, records.class_names, extra)


def _place(images: Path, name: str) -> tuple[Path, str]:
    """Return folder and base name of an image; its name may include folders, even that of all images."""
    *folders, base_name = name.split("/")
    plain = [plain_name(folder) for folder in folders]
    if plain[:1] == [images.name] and not images.joinpath(*plain).is_dir():
        plain = plain[1:]
    return images.joinpath(*plain), base_name


def _label_map(
    objects: Iterable[Mapping[str, Any]], class_ids: Mapping[int, int], height: int, width: int
) -> UInt16[np.ndarray, "h w"]:
    label_map = np.zeros((height, width), np.uint16)
    masks = [_mask(each, class_ids, height, width) for each in objects]
    # crowds first, then from the largest object to the smallest: what is painted last is in front
    for label, _, rle in sorted(masks, key=lambda mask: (mask[0] != IGNORED, -mask[1])):
        label_map[decode_rle(rle, max_pixels=height * width)] = label
    return label_map


def _mask(
    annotation: Mapping[str, Any], class_ids: Mapping[int, int], height: int, width: int
) -> tuple[int, int, Rle]:
    """Return the label of an annotation, its number of pixels, and its mask."""
    try:
        label = IGNORED if annotation.get("iscrowd") else _class_id(annotation, class_ids)
        rle = _rle(annotation.get("segmentation"), height, width)
        return label, int(mask_area([rle], max_pixels=height * width)[0]), rle
    except RecursionError as error:
        raise _bad_annotation("an annotation is nested too deeply") from error
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RleError) as error:
        reason = f"has no {error} in its segmentation" if isinstance(error, KeyError) else str(error)
        raise _bad_annotation(f"annotation {annotation.get('id')!r:.40}: {reason}") from error


def _class_id(annotation: Mapping[str, Any], class_ids: Mapping[int, int]) -> int:
    category_id = whole_number(annotation, "category_id")
    if category_id not in class_ids:
        raise ValueError(f"category {category_id} is not one of the {len(class_ids)} categories")
    return class_ids[category_id]


def _rle(outline: Any, height: int, width: int) -> Rle:
    """Return the mask of polygons or run lengths (a text or a list of numbers) in the image's frame."""
    if isinstance(outline, list):
        polygons = [_polygon(corners, height, width) for corners in outline]
        if not polygons:
            raise ValueError("its segmentation has no polygon")
        _require_drawable(polygons, height, width)
        merged = run_lengths.merge(run_lengths.frPyObjects(polygons, height, width))
        return {"size": [height, width], "counts": merged["counts"].decode("ascii")}
    if not isinstance(outline, dict):
        found = "none" if outline is None else f"{outline!r:.40}"
        raise ValueError(f"expected polygons or run lengths as segmentation, found {found}")
    if outline["size"] != [height, width]:
        raise ValueError(
            f"its run lengths have the size {outline['size']!r:.60}, expected [{height}, {width}]"
        )
    if isinstance(outline["counts"], str):
        return {"size": [height, width], "counts": outline["counts"]}
    mask = decode_runs(outline["counts"], height, width, max_pixels=height * width)
    return encode_rle(mask[None])[0]


def _require_drawable(polygons: Sequence[Sequence[float]], height: int, width: int) -> None:
    """Refuse outlines longer than that of any object: tracing takes 160 bytes for each of their pixels."""
    limit = max(MIN_OUTLINE_PIXELS, 4 * height * width)
    outline = sum(
        float(np.abs(np.diff(np.reshape(corners, (-1, 2)), axis=0, append=[corners[:2]])).max(axis=1).sum())
        for corners in polygons
    )
    if outline > limit:
        raise ValueError(f"its outline has {outline:.0f} pixels; the limit is {limit}")


def _polygon(corners: Any, height: int, width: int) -> list[float]:
    """Return a polygon as x and y in turn."""
    if not isinstance(corners, list):
        raise ValueError(f"expected a list of numbers as polygon, found {corners!r:.40}")
    numbers = [float(corner) for corner in corners]
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"a polygon has {len(numbers)} numbers; expected an even number, at least 6")
    largest = 2 * max(height, width)
    if not all(math.isfinite(number) and abs(number) <= largest for number in numbers):
        raise ValueError("a polygon is far outside of the image")
    return numbers


def _bad_annotation(message: str) -> SampleFailure:
    return SampleFailure("read", "bad_annotation", message[:300])
