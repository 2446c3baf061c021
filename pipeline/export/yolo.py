"""YOLO's format for segmentation: a text file of polygons beside each image, and data.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import yaml
from jaxtyping import Bool

from pipeline import storage
from pipeline.config.classes import class_lines
from pipeline.export.coco import WITHOUT_CLASS_NAME
from pipeline.export.export_samples import ExportSample
from pipeline.export.parts import Parts
from pipeline.export.polygons import AT_CENTRES, Polygon, iou, joined_polygon, part_polygons
from pipeline.export.shard_files import PolygonFit, ShardFiles, joined_lists

DATA_FILE = "data.yaml"
# a reader takes a line with two points for a box
MIN_POINTS = 3


@dataclass(frozen=True)
class YoloExport:
    """DEST/images/SPLIT/SHARD/NAME.jpg, DEST/labels/SPLIT/SHARD/NAME.txt, SPLIT.txt and data.yaml.

    A line of a label file is an object: class, counted from 0, and x y of each point as a share of width and
    height. It is one polygon: seams without width connect it to holes, and the parts of a mask to its
    largest. It runs through the centres of the outermost pixels, since readers fill these too. Ignored pixels
    have no place in this format: they are background.

    Attributes:
        split: name of the subfolders and of the list.
        parts: which parts of masks are objects.
    """

    split: str
    parts: Parts

    def export_shard(self, number: int, samples: Iterable[ExportSample], files: ShardFiles) -> int:
        """Write a shard's images and label files; return how many objects.

        Args:
            number: of the shard in the job; plays no part.
            samples: read one at a time.
            files: writes them.

        Raises:
            RleError: a mask is no run-length encoding of its size, or not of its image.
            OutputError: something cannot be written.
        """
        del number
        below = f"{self.split}/{files.shard_id}"
        objects, names = 0, []
        for sample in samples:
            lines = list(self._lines(sample, files))
            content = "".join(f"{line}\n" for line in lines).encode()
            files.publish(f"labels/{below}", f"{sample.name}.txt", content)
            files.publish(f"images/{below}", f"{sample.name}.{sample.suffix}", sample.image)
            names.append(f"./images/{below}/{sample.name}.{sample.suffix}")
            objects += len(lines)
        files.publish_list(names)
        return objects

    def finish(self, dest: str, shard_ids: Iterable[str], class_names: Mapping[int, str]) -> None:
        """Write the list of all images, and data.yaml, which names it and the classes."""
        joined_lists(dest, shard_ids, "", f"{self.split}.txt")
        names = class_lines(class_names).splitlines() or [WITHOUT_CLASS_NAME]
        data = {
            "train": f"{self.split}.txt",
            "val": f"{self.split}.txt",
            "names": dict(enumerate(names)),
        }
        # without `path`, readers look beside this file
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        comment = "# val: replace it by images that are not trained on\n"
        storage.publish(dest, DATA_FILE, (comment + text).encode())

    def _lines(self, sample: ExportSample, files: ShardFiles) -> Iterator[str]:
        for row in sample.rows:
            for part, _ in self.parts.of(row, sample.height, sample.width, files.counts):
                shares = joined_polygon(part_polygons(part, AT_CENTRES)) / (sample.width, sample.height)
                if len(shares) < MIN_POINTS:
                    shares = np.resize(shares, (MIN_POINTS, 2))
                numbers = [f"{share:.6f}" for share in shares.ravel()]
                agreement = iou(filled(np.array(numbers, dtype=np.float64).reshape(-1, 2), part.shape), part)
                files.fit += PolygonFit(1, agreement, agreement)
                yield " ".join([str((row["class_id"] or 1) - 1), *numbers])


def filled(shares: Polygon, shape: tuple[int, ...]) -> Bool[np.ndarray, "height width"]:
    """Return the pixels of a polygon as ultralytics reads it at the image's own size.

    Args:
        shares: points x, y as shares of width and height.
        shape: height and width of the image, in pixels.
    """
    height, width = shape
    pixels = np.zeros((height, width), dtype=np.uint8)
    cv2.fillPoly(pixels, [(shares * (width, height)).astype(np.int32)], 1)
    return pixels.astype(bool)
