"""The samples of an export: an image with its masks and classes, the same for every format."""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from legrad.errors import RleError
from pipeline.config.schema import InputConfig
from pipeline.errors import SampleFailure
from pipeline.output.joining import JoinedSample
from pipeline.output.label_map import check_masks_of_image, label_map
from pipeline.output.row_classes import RowClasses
from pipeline.output.schema import INSTANCES, has_pixels
from pipeline.shards.fields import find_field
from pipeline.shards.images import open_image, upright_transpose

MAX_NAME_CHARACTERS = 80
PALETTE_BITS = 8
JPEG_QUALITY = 95
_KEPT_FORMATS = {b"\xff\xd8\xff": "jpg", b"\x89PN": "png"}

Row = Mapping[str, Any]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportSample:
    """A sample with at least one mask that has pixels.

    Attributes:
        name: unique within its shard, safe as the name of a file: ordinal, and what is safe of the key.
        key: as in the shard.
        index: ordinal in the shard.
        image: bytes of an upright JPEG or PNG.
        suffix: jpg or png.
        height: of the image, in pixels.
        width: of the image, in pixels.
        rows: annotation rows with pixels; `class_id` and `class_name` where the class is known, else both
            None.
    """

    name: str
    key: str
    index: int
    image: bytes
    suffix: str
    height: int
    width: int
    rows: tuple[Row, ...]

    def label_map(self) -> UInt8[np.ndarray, "height width"]:
        """Return class ids, 0 for background, 255 for ignored pixels; the more similar prompt is in front.

        Raises:
            UserError: a row has no class, or one beyond 254.
        """
        return label_map(self.rows, self.height, self.width)

    def as_jpeg(self) -> bytes:
        """Return the image for formats whose images are JPEG; another one is encoded anew, with some loss."""
        if self.suffix == "jpg":
            return self.image
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(self.image)) as image:
            image.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
        return buffer.getvalue()


def export_samples(
    joined: Iterable[JoinedSample],
    settings: InputConfig,
    classes: RowClasses | None,
    counts: Counter[str],
) -> Iterator[ExportSample]:
    """Yield the samples of a shard that have a mask; count the others by reason.

    Args:
        joined: samples and their rows.
        settings: which field is the image, and how large it may be.
        classes: finds the class of a row without one, and rows without any are skipped; None: rows stay as
            they are.
        counts: takes `exported` and the reasons to skip a sample or a row.
    """
    for sample in joined:
        rows = _with_masks(sample.rows, classes, counts)
        if not rows:
            counts[_why_without_rows(sample.rows)] += 1
            continue
        try:
            image, suffix, (height, width) = _portable(sample, settings)
        except SampleFailure:
            counts["undecodable"] += 1
            continue
        if (height, width) != (rows[0]["image_height"], rows[0]["image_width"]):
            counts["mispaired"] += 1
            continue
        try:
            masks = [row[column] for row in rows for column in ("mask", "ignore") if row[column] is not None]
            masks += [instance["mask"] for row in rows for instance in row.get(INSTANCES) or ()]
            check_masks_of_image(masks, height, width)
        except RleError as error:
            _log.warning("%s: sample %s skipped: %s", sample.shard, sample.raw.key, error)
            counts["damaged_mask"] += 1
            continue
        counts["exported"] += 1
        raw = sample.raw
        yield ExportSample(
            safe_name(raw.index, raw.key), raw.key, raw.index, image, suffix, height, width, tuple(rows)
        )


def safe_name(index: int, key: str) -> str:
    """Return a name for files: ordinal in the shard, then the key's letters, digits, hyphens, underscores."""
    kept = re.sub(r"[^A-Za-z0-9_-]+", "_", key).strip("_")[:MAX_NAME_CHARACTERS]
    return f"{index:08d}-{kept}" if kept else f"{index:08d}"


def _with_masks(
    rows: Sequence[Row], classes: RowClasses | None, counts: Counter[str]
) -> list[dict[str, Any]]:
    kept = []
    for row in rows:
        if not has_pixels(row):
            counts["rows_rejected" if row["mask"] is None else "rows_empty"] += 1
            continue
        known = row if classes is None else classes.classified(row, lambda reason: counts.update([reason]))
        if known is not None:
            own_name = None if known["class_id"] is None else known["prompt"]
            kept.append({"class_name": own_name, **known})
    return kept


def _why_without_rows(rows: Sequence[Row]) -> str:
    """Return the reason to skip a sample none of whose rows is exported."""
    if not rows:
        return "marked_out"
    return "without_class" if any(map(has_pixels, rows)) else "without_mask"


def _portable(sample: JoinedSample, settings: InputConfig) -> tuple[bytes, str, tuple[int, int]]:
    """Return an image that every reader shows upright: the file itself if it is one, else a PNG."""
    data = find_field(sample.raw.fields, settings.image)
    image = open_image(data, max_image_pixels=settings.max_image_pixels)
    size = (image.height, image.width)
    suffix = _KEPT_FORMATS.get(data[:3])
    if suffix is not None and upright_transpose(data) is None:
        return data, suffix, size
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue(), "png", size


def index_png(labels: UInt8[np.ndarray, "height width"]) -> bytes:
    """Return a label map as a palette PNG: pixel values are the labels, colours are VOC's.

    Source: the colour map of the PASCAL VOC development kit: bit i of a colour channel, from the highest
        down, is bit 3i + channel of the label.
    """
    image = Image.fromarray(labels).convert("P")
    image.putpalette(_voc_palette())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _voc_palette() -> list[int]:
    labels = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for channel in range(3):
        for place in range(PALETTE_BITS):
            bit = (labels >> (3 * place + channel)) & 1
            colours[:, channel] |= (bit << (PALETTE_BITS - 1 - place)).astype(np.uint8)
    return [int(value) for value in colours.ravel()]
