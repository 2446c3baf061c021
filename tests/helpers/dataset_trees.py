"""Tiny datasets laid out as the owners of VOC 2012, COCO, ImageNet-S and Open Images ship theirs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EXIF_ORIENTATION_TAG = 0x0112


def jpeg(height: int = 12, width: int = 20, *, seed: int = 0, orientation: int | None = None) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded_jpeg(pixels, orientation)


def encoded_jpeg(pixels: np.ndarray, orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[EXIF_ORIENTATION_TAG] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def voc_palette() -> np.ndarray:
    """VOC's colours, [256, 3]: the bits of an index, from the lowest, fill R, G and B from the highest."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        for bit in range(8):
            colours[index, bit % 3] |= ((index >> bit) & 1) << (7 - bit // 3)
    return colours


def palette_png(indices: np.ndarray) -> bytes:
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(voc_palette().ravel().tolist())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def voc_indices(seed: int, height: int = 12, width: int = 20) -> np.ndarray:
    """Two objects with a void border between them."""
    indices = np.zeros((height, width), np.uint8)
    first, second = np.random.default_rng(seed).choice(np.arange(1, 21), 2, replace=False)
    indices[2:9, 1:8] = first
    indices[4:11, 8:18] = second
    indices[2:11, 8] = 255
    return indices


def write_voc(root: Path, names: Sequence[str], split: str = "val") -> dict[str, np.ndarray]:
    """``VOCdevkit/VOC2012`` under the root; returns the indices of each image."""
    folder = root / "VOCdevkit" / "VOC2012"
    truth = {name: voc_indices(seed) for seed, name in enumerate(names)}
    for seed, (name, indices) in enumerate(truth.items()):
        write(folder / "JPEGImages" / f"{name}.jpg", jpeg(*indices.shape, seed=seed))
        write(folder / "SegmentationClass" / f"{name}.png", palette_png(indices))
    write(folder / "ImageSets" / "Segmentation" / f"{split}.txt", "".join(f"{name}\n" for name in names))
    return truth


def write_coco(
    root: Path,
    annotations: Sequence[Mapping[str, Any]],
    *,
    images: Mapping[int, tuple[int, int]],
    categories: Mapping[int, str] | None = None,
    captions: Sequence[Mapping[str, Any]] | None = None,
    split: str = "val2017",
) -> Path:
    """``annotations`` and the images' folder under the root; image id to height and width."""
    categories = categories or {1: "person", 2: "bicycle", 18: "dog", 67: "dining table", 90: "toothbrush"}
    listed = [
        {"id": image_id, "file_name": f"{image_id:012d}.jpg", "height": height, "width": width}
        for image_id, (height, width) in images.items()
    ]
    document = {
        "info": {"year": 2017},
        "images": listed,
        "annotations": list(annotations),
        "categories": [
            {"id": identity, "name": name, "supercategory": "thing"} for identity, name in categories.items()
        ],
    }
    for image in listed:
        content = jpeg(image["height"], image["width"], seed=image["id"])
        write(root / split / str(image["file_name"]), content)
    if captions is not None:
        content = json.dumps({"images": listed, "annotations": list(captions)})
        write(root / "annotations" / f"captions_{split}.json", content)
    return write(root / "annotations" / f"instances_{split}.json", json.dumps(document))


def coco_object(identity: int, image_id: int, category_id: int, segmentation: Any, iscrowd: int = 0) -> dict:
    return {
        "id": identity,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        "iscrowd": iscrowd,
        "area": 0.0,
        "bbox": [0, 0, 1, 1],
    }


def box_polygon(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def write_imagenet_s(
    folder: Path, class_folders: Sequence[str], images: Mapping[str, np.ndarray], split: str = "validation"
) -> None:
    """The class folders and, by ``class folder/stem``, images with their label maps of ids."""
    for name in class_folders:
        (folder / split / name).mkdir(parents=True, exist_ok=True)
    for seed, (name, ids) in enumerate(images.items()):
        write(folder / split / f"{name}.JPEG", jpeg(*ids.shape, seed=seed))
        colours = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1).astype(np.uint8)
        write(folder / f"{split}-segmentation" / f"{name}.png", png(colours))


POINT_COLUMNS = [
    "ImageId",
    "X",
    "Y",
    "Label",
    "EstimatedYesNo",
    "Source",
    "YesVotes",
    "NoVotes",
    "UnsureVotes",
    "TextLabel",
]


def write_openimages(
    root: Path,
    points: Sequence[tuple[str, float | str, float | str, str, str]],
    *,
    classes: Mapping[str, str],
    images: Sequence[str],
) -> Path:
    """The two tables and ``validation``; points are image, x, y, MID and answer."""
    for seed, name in enumerate(images):
        write(root / "validation" / f"{name}.jpg", jpeg(seed=seed))
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["LabelName", "DisplayName"])
    table.writerows(classes.items())
    write(root / "oidv7-class-descriptions.csv", text.getvalue())
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(POINT_COLUMNS)
    table.writerows([*point, "verification", 1, 0, 0, ""] for point in points)
    return write(root / "oidv7-val-annotations-point-labels.csv", text.getvalue())
