"""PASCAL VOC 2012: images, label maps of classes and of objects, and lists of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from pipeline import storage
from pipeline.config.classes import class_lines
from pipeline.export.export_samples import ExportSample, index_png
from pipeline.export.parts import Parts
from pipeline.export.shard_files import ShardFiles, joined_lists
from pipeline.output.label_map import IGNORED_LABEL

FOLDER, CLASSES_FILE = "VOCdevkit/VOC2012", "classes.txt"
MAX_OBJECTS = 254
# name of a count
TOO_MANY_OBJECTS = "objects_beyond_254"

LabelMap = UInt8[np.ndarray, "height width"]


@dataclass(frozen=True)
class VocExport:
    """DEST/VOCdevkit/VOC2012 with JPEGImages, SegmentationClass, ImageSets/Segmentation/SPLIT.txt.

    Names are SHARD-NAME. A label map is a palette PNG: 0 background, class ids, 255 void. With instances
    there is SegmentationObject too, where pixels have the number of their object in the image. `classes.txt`
    in the same folder names the classes, which the format itself leaves to its readers.

    Attributes:
        split: name of the list.
        parts: with kind instances, which parts of masks are objects; pixels of parts that are skipped are
            void in both label maps.
    """

    split: str
    parts: Parts

    def export_shard(self, number: int, samples: Iterable[ExportSample], files: ShardFiles) -> int:
        """Write a shard's images and label maps; return how many label maps of classes.

        Args:
            number: of the shard in the job; plays no part.
            samples: read one at a time.
            files: writes them.

        Raises:
            UserError: a row has no class, or one beyond 254.
            OutputError: something cannot be written.
        """
        del number
        names = []
        for sample in samples:
            name = f"{files.shard_id}-{sample.name}"
            labels = sample.label_map()
            if self.parts.kind == "instances":
                labels, objects = with_objects(sample, labels, self.parts, files.counts)
                files.publish(f"{FOLDER}/SegmentationObject", f"{name}.png", index_png(objects))
            files.publish(f"{FOLDER}/SegmentationClass", f"{name}.png", index_png(labels))
            files.publish(f"{FOLDER}/JPEGImages", f"{name}.jpg", sample.as_jpeg())
            names.append(name)
        files.publish_list(names)
        return len(names)

    def finish(self, dest: str, shard_ids: Iterable[str], class_names: Mapping[int, str]) -> None:
        """Write the list of all names, and the names of the classes."""
        joined_lists(dest, shard_ids, f"{FOLDER}/ImageSets/Segmentation", f"{self.split}.txt")
        storage.publish(storage.join_url(dest, FOLDER), CLASSES_FILE, class_lines(class_names).encode())


def with_objects(
    sample: ExportSample, labels: LabelMap, parts: Parts, counts: Counter[str]
) -> tuple[LabelMap, LabelMap]:
    """Return the label maps of classes and of objects; they agree in background and void.

    Of overlapping objects, that of the more similar prompt is in front, as in the label map of classes.
    Beyond 254 objects, the smallest are void.

    Args:
        sample: image and rows.
        labels: its label map of classes.
        parts: which parts of masks are objects.
        counts: takes `objects_beyond_254`, and the parts that `parts` skips.
    """
    numbers = np.zeros(labels.shape, dtype=np.int32)
    painted = 0
    # in the order of the label map, so that each pixel's object is one of its class
    for row in sorted(sample.rows, key=lambda row: (row["similarity"], -row["class_id"])):
        for part, _ in parts.of(row, sample.height, sample.width, counts):
            painted += 1
            numbers[part & (labels == row["class_id"])] = painted
    areas = np.bincount(numbers.ravel(), minlength=painted + 1)
    visible = [number for number in range(1, painted + 1) if areas[number]]
    largest = sorted(visible, key=lambda number: -areas[number])[:MAX_OBJECTS]
    counts[TOO_MANY_OBJECTS] += len(visible) - len(largest)
    new_numbers = np.full(painted + 1, IGNORED_LABEL, dtype=np.uint8)
    new_numbers[sorted(largest)] = np.arange(1, len(largest) + 1)
    objects = np.where(labels == 0, 0, new_numbers[numbers]).astype(np.uint8)
    return np.where(objects == IGNORED_LABEL, objects, labels), objects
