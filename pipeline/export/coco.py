"""COCO's JSON for instances and stuff: images, annotations with run-length masks, categories."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

from legrad.masks.cleaning import EIGHT_NEIGHBOURS
from legrad.masks.rle import Rle, encode_rle, mask_area, mask_bbox_xywh
from pipeline import storage
from pipeline.errors import UserError
from pipeline.export.export_samples import ExportSample
from pipeline.output.label_map import mask_at_size
from pipeline.output.schema import INSTANCES

PARTS_FOLDER, MERGED_FILE = "annotations", "annotations.json"
# a JSON number is exact up to 2**53, so there is room for 2**21 shards of 2**32 annotations
SAMPLE_BITS, ANNOTATION_BITS = 31, 32
WITHOUT_CLASS_ID, WITHOUT_CLASS_NAME = 1, "prompt"

Kind = Literal["stuff", "instances"]


@dataclass(frozen=True)
class CocoExport:
    """DEST/annotations/SHARD.json, each complete by itself, with ids that are unique over all of them.

    Every annotation also holds `prompt` and `score`: the cosine of image and text, times the instance's own
    score where it is one of the column `instances`. Rows without a class share one category, `prompt`.
    Ignored pixels have no place in this format: they are background.

    Attributes:
        dest: folder: local path, s3:// or gs://.
        kind: stuff: one annotation a mask; instances: one for each of its instances, or for each connected
            part of it where the job has not split masks.
        images: whether the images are written too, as DEST/images/SHARD/NAME.jpg.
    """

    dest: str
    kind: Kind
    images: bool

    def export_shard(self, number: int, shard_id: str, samples: Iterable[ExportSample]) -> int:
        """Write one shard's JSON; returns how many annotations it holds.

        Args:
            number: of the shard in the job; makes ids unique.
            shard_id: names the JSON and the folder of images.
            samples: read one at a time.

        Raises:
            RleError: a mask is no run-length encoding of its size, or not of its image.
            OutputError: something cannot be written.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        categories: dict[int, str] = {}
        for sample in samples:
            file_name = f"{shard_id}/{sample.name}.{sample.suffix}"
            if self.images:
                folder = storage.join_url(self.dest, "images", shard_id)
                storage.publish(folder, f"{sample.name}.{sample.suffix}", sample.image)
            image_id = (number << SAMPLE_BITS) + sample.index
            size = {"height": sample.height, "width": sample.width}
            images.append({"id": image_id, "file_name": file_name, **size, "key": sample.key})
            for annotation in self._annotations(sample):
                annotation_id = (number << ANNOTATION_BITS) + len(annotations) + 1
                annotations.append({"id": annotation_id, "image_id": image_id, **annotation})
            categories |= _categories(sample)
        document = {
            "info": {"description": "LeGrad pseudo-masks", "shard": shard_id},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": _as_list(categories),
        }
        content = json.dumps(document).encode()
        storage.publish(storage.join_url(self.dest, PARTS_FOLDER), f"{shard_id}.json", content)
        return len(annotations)

    def _annotations(self, sample: ExportSample) -> Iterator[dict[str, Any]]:
        for row in sample.rows:
            scores: list[float] = []
            rles: list[Rle] = []
            # one after the other: a ragged mask has thousands of parts
            for part, share in self._parts(row, sample.height, sample.width):
                rles.append(encode_rle(part[None])[0])
                scores.append(row["similarity"] * share)
            figures = zip(rles, mask_area(rles).tolist(), mask_bbox_xywh(rles).tolist(), scores, strict=True)
            for rle, area, bbox_xywh, score in figures:
                if area:
                    yield {
                        "category_id": _category_of(row)[0],
                        "segmentation": rle,
                        "area": area,
                        "bbox": bbox_xywh,
                        "iscrowd": 0,
                        "prompt": row["prompt"],
                        "score": score,
                    }

    def _parts(
        self, row: Mapping[str, Any], height: int, width: int
    ) -> Iterator[tuple[Bool[np.ndarray, "height width"], float]]:
        """Yield the masks of a row that get annotations, and what their score is multiplied by."""
        if self.kind == "instances" and row.get(INSTANCES) is not None:
            for instance in row[INSTANCES]:
                yield mask_at_size(instance["mask"], height, width), float(instance["score"])
            return
        mask = mask_at_size(row["mask"], height, width)
        for part in _connected(mask) if self.kind == "instances" else [mask]:
            yield part, 1.0


def merge_parts(dest: str, shard_ids: Iterable[str], class_names: Mapping[int, str]) -> None:
    """Join the shards' files into DEST/annotations.json; one of them is in memory at a time.

    Raises:
        OutputError: it cannot be written.
    """
    names = list(shard_ids)
    categories = dict(class_names) or {WITHOUT_CLASS_ID: WITHOUT_CLASS_NAME}
    with storage.Spool() as spool:
        spool.write(b'{"info": {"description": "LeGrad pseudo-masks"}, "licenses": [], "images": [')
        _write_all(spool, dest, names, "images")
        spool.write(b'], "annotations": [')
        _write_all(spool, dest, names, "annotations")
        spool.write(b'], "categories": ' + json.dumps(_as_list(categories)).encode() + b"}")
        storage.publish(dest, MERGED_FILE, spool)


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


def _connected(mask: Bool[np.ndarray, "height width"]) -> Iterator[Bool[np.ndarray, "height width"]]:
    labels, count = ndimage.label(mask, EIGHT_NEIGHBOURS)
    return (labels == part for part in range(1, count + 1))


def _category_of(row: Mapping[str, Any]) -> tuple[int, str]:
    if row["class_id"] is None:
        return WITHOUT_CLASS_ID, WITHOUT_CLASS_NAME
    return row["class_id"], row["prompt"]


def _categories(sample: ExportSample) -> dict[int, str]:
    return dict(_category_of(row) for row in sample.rows)


def _as_list(categories: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{"id": number, "name": name, "supercategory": ""} for number, name in sorted(categories.items())]
