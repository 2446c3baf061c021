"""COCO's JSON for instances and stuff: images, annotations with run-length masks, categories."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_masks

from legrad.masks.rle import Rle, encode_rle, mask_area, mask_bbox_xywh
from pipeline import storage
from pipeline.errors import UserError
from pipeline.export.export_samples import ExportSample
from pipeline.export.parts import Parts
from pipeline.export.polygons import AT_EDGES, iou, part_polygons
from pipeline.export.shard_files import PolygonFit, ShardFiles

PARTS_FOLDER, MERGED_FILE = "annotations", "annotations.json"
# a JSON number is exact up to 2**53, so there is room for 2**21 shards of 2**32 annotations
SAMPLE_BITS, ANNOTATION_BITS = 31, 32
WITHOUT_CLASS_ID, WITHOUT_CLASS_NAME = 1, "prompt"


@dataclass(frozen=True)
class CocoExport:
    """DEST/annotations/SHARD.json, each complete by itself, with ids that are unique over all of them.

    Ids begin at 1: evaluation by pycocotools takes annotation 0 for none. Every annotation also holds
    `prompt` and `score`: the cosine of image and text, times the instance's own score where it is one of the
    column `instances`. Rows without a class share one category, `prompt`. Ignored pixels have no place in
    this format: they are background.

    Attributes:
        parts: which parts of masks are annotations.
        images: whether the images are written too, as DEST/images/SHARD/NAME.jpg.
        polygons: whether `segmentation` is polygons, with the run-length mask beside it as `rle`.
        merged: whether all shards are joined in DEST/annotations.json as well.
    """

    parts: Parts
    images: bool
    polygons: bool
    merged: bool

    def export_shard(self, number: int, samples: Iterable[ExportSample], files: ShardFiles) -> int:
        """Write one shard's JSON; return how many annotations it holds.

        Args:
            number: of the shard in the job; makes ids unique.
            samples: read one at a time.
            files: writes them.

        Raises:
            RleError: a mask is no run-length encoding of its size, or not of its image.
            OutputError: something cannot be written.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        categories: dict[int, str] = {}
        for sample in samples:
            file_name = f"{sample.name}.{sample.suffix}"
            if self.images:
                files.publish(f"images/{files.shard_id}", file_name, sample.image)
            image_id = (number << SAMPLE_BITS) + sample.index + 1
            size = {"height": sample.height, "width": sample.width}
            images.append(
                {"id": image_id, "file_name": f"{files.shard_id}/{file_name}", **size, "key": sample.key}
            )
            for annotation in self._annotations(sample, files):
                annotation_id = (number << ANNOTATION_BITS) + len(annotations) + 1
                annotations.append({"id": annotation_id, "image_id": image_id, **annotation})
            categories |= dict(_category_of(row) for row in sample.rows)
        document = {
            "info": {"description": "LeGrad pseudo-masks", "shard": files.shard_id},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": _as_list(categories),
        }
        files.publish(PARTS_FOLDER, f"{files.shard_id}.json", json.dumps(document).encode())
        return len(annotations)

    def finish(self, dest: str, shard_ids: Iterable[str], class_names: Mapping[int, str]) -> None:
        """Join the shards' files into DEST/annotations.json; one of them is in memory at a time.

        Raises:
            UserError: a shard's file is damaged.
            OutputError: the file cannot be written.
        """
        if not self.merged:
            return
        names = list(shard_ids)
        categories = dict(class_names) or {WITHOUT_CLASS_ID: WITHOUT_CLASS_NAME}
        with storage.Spool() as spool:
            spool.write(b'{"info": {"description": "LeGrad pseudo-masks"}, "licenses": [], "images": [')
            _write_all(spool, dest, names, "images")
            spool.write(b'], "annotations": [')
            _write_all(spool, dest, names, "annotations")
            spool.write(b'], "categories": ' + json.dumps(_as_list(categories)).encode() + b"}")
            storage.publish(dest, MERGED_FILE, spool)

    def _annotations(self, sample: ExportSample, files: ShardFiles) -> Iterator[dict[str, Any]]:
        for row in sample.rows:
            for part, score in self.parts.of(row, sample.height, sample.width, files.counts):
                (rle,) = encode_rle(part[None])
                yield {
                    "category_id": _category_of(row)[0],
                    **(self._as_polygons(part, rle, files) if self.polygons else {"segmentation": rle}),
                    "area": int(mask_area([rle])[0]),
                    "bbox": mask_bbox_xywh([rle])[0].tolist(),
                    "iscrowd": 0,
                    "prompt": row["prompt"],
                    "score": score,
                }

    def _as_polygons(
        self, part: Bool[np.ndarray, "height width"], rle: Rle, files: ShardFiles
    ) -> dict[str, Any]:
        polygons = [polygon.ravel().tolist() for polygon in part_polygons(part, AT_EDGES)]
        read_back = coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(polygons, *part.shape)))
        agreement = iou(read_back.astype(bool), part)
        files.fit += PolygonFit(1, agreement, agreement)
        return {"segmentation": polygons, "rle": rle}


def _write_all(spool: IO[bytes], dest: str, shard_ids: Iterable[str], section: str) -> None:
    between = b""
    for shard_id in shard_ids:
        where = storage.join_url(dest, PARTS_FOLDER, f"{shard_id}.json")
        try:
            elements = list(json.loads(storage.read_text(where))[section])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{storage.shown_url(where)}: is no part of an export ({type(error).__name__}); remove the "
                "folder and export again"
            ) from error
        for element in elements:
            spool.write(between + json.dumps(element).encode())
            between = b",\n"


def _category_of(row: Mapping[str, Any]) -> tuple[int, str]:
    if row["class_id"] is None:
        return WITHOUT_CLASS_ID, WITHOUT_CLASS_NAME
    return row["class_id"], row["class_name"]


def _as_list(categories: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{"id": number, "name": name, "supercategory": ""} for number, name in sorted(categories.items())]
