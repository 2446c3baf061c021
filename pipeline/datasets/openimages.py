"""Read the point labels of Open Images V7: the owners' two tables, and the folder of the images.

    oidv7-val-annotations-point-labels.csv   ImageId, X, Y, Label (a MID), EstimatedYesNo (yes, no, unsure)
                                             and further columns
    oidv7-class-descriptions.csv             LabelName (the MID), DisplayName
    validation/0001eeaf4aed83f9.jpg          as the archive validation.tar.gz unpacks

X and Y are shares of the width and height of the upright image. Points with the answer unsure are skipped. A
class id is the place of the class in the table of descriptions, so that it is the same in all splits. A
sample's ``captions`` are the classes with at least one yes; ``points`` has the other classes as well. If
classes share a name, ``class_names`` and ``classes.txt`` add the MIDs of the later ones, but ``captions``
does not.

Source: https://storage.googleapis.com/openimages/web/download_v7.html, "Point-labels" and "Class Names".
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
from jaxtyping import Bool, Float, Int

from pipeline.datasets.truth_dataset import (
    SkippedRecords,
    TruthDataset,
    TruthSample,
    class_fields,
    read_image,
    read_text,
    require_folder,
    unique_names,
)
from pipeline.errors import UserError

IMAGE_FOLDERS = {"train": "train", "val": "validation", "test": "test"}
COLUMNS: dict[str, pa.DataType] = {
    "ImageId": pa.string(),
    "X": pa.float64(),
    "Y": pa.float64(),
    "Label": pa.string(),
    "EstimatedYesNo": pa.string(),
}


@dataclass(frozen=True)
class _Points:
    """Point labels of all images, grouped by image, in the order of the table.

    Attributes:
        spans: image name to the range of its points.
        x: share of the width, in [0, 1].
        y: share of the height, in [0, 1].
        class_id: the class of the question.
        is_object: the answer.
    """

    spans: dict[str, slice]
    x: Float[np.ndarray, " points"]
    y: Float[np.ndarray, " points"]
    class_id: Int[np.ndarray, " points"]
    is_object: Bool[np.ndarray, " points"]


def open_openimages(root: str | Path, split: str = "val", images: str | Path | None = None) -> TruthDataset:
    """Open the images of a split that have point labels.

    The labels are kept in memory: 21 bytes a point, and about 125 while the table is read.

    Args:
        root: the folder of the two tables.
        split: train, val or test.
        images: folder of the images; None: ``train``, ``validation`` or ``test`` in the root.

    Raises:
        UserError: a file or folder is missing, or a table does not have the owners' layout.
    """
    folder = Path(root)
    if split not in IMAGE_FOLDERS:
        raise UserError(f"split: expected {', '.join(IMAGE_FOLDERS)}, got {split!r}")
    image_folder = require_folder(Path(images or folder / IMAGE_FOLDERS[split]), "images")
    skipped = SkippedRecords()
    mids, names = _read_classes(folder / "oidv7-class-descriptions.csv", skipped)
    class_names = unique_names(names, mids)
    class_of_mid = {mid: class_id for class_id, mid in enumerate(mids, 1)}
    table = folder / f"oidv7-{split}-annotations-point-labels.csv"
    points = _read_points(table, class_of_mid, skipped.counts)

    def read(name: str) -> TruthSample:
        stored = read_image(image_folder, f"{name}.jpg")
        return TruthSample(stored.data, _document(points, points.spans[name], class_names, names), None)

    return TruthDataset(f"openimages-v7-{split}", class_names, list(points.spans), read, skipped)


def _read_classes(path: Path, skipped: SkippedRecords) -> tuple[list[str], list[str]]:
    """Return the MIDs, and the names of their classes."""
    try:
        # rows end at the table's own line feeds only; otherwise the ids of all later classes would shift
        table = [row for row in csv.reader(io.StringIO(read_text(path), newline="")) if row]
    except csv.Error as error:
        raise UserError(f"{path}: is not a table of classes: {error}") from None
    # MIDs begin with a slash, the heading does not
    rows = [row for row in table if row[0].startswith("/")]
    if not rows or any(len(row) < 2 for row in rows):
        raise UserError(f"{path}: expected two columns, LabelName and DisplayName")
    for row in table[1:]:
        if not row[0].startswith("/"):
            skipped.add("classes_without_a_mid", f"{row[0]!r} does not begin with a slash")
    # class ids are places in the table, so none may be counted twice
    repeated = [mid for mid, count in Counter(row[0] for row in rows).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: expected each LabelName once, found {repeated[0]} more than once")
    return [row[0] for row in rows], [row[1].strip() or row[0] for row in rows]


def _read_points(path: Path, class_of_mid: Mapping[str, int], skipped: Counter[str]) -> _Points:
    code_of_image: dict[str, int] = {}
    parts = [_read_batch(batch, class_of_mid, code_of_image, skipped) for batch in _batches(path)]
    if not parts or not any(len(part[0]) for part in parts):
        raise UserError(f"{path}: has no point of a known class with the answer yes or no")
    codes, x, y, class_id, is_object = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    # images by name, and the points of an image in the table's order
    names = sorted(code_of_image)
    rank = np.empty(len(names), np.int64)
    rank[[code_of_image[name] for name in names]] = np.arange(len(names))
    order = np.argsort(rank[codes], kind="stable")
    ends = np.cumsum(np.bincount(rank[codes], minlength=len(names)))
    starts = [0, *ends[:-1].tolist()]
    spans = {
        name: slice(start, end)
        for name, start, end in zip(names, starts, ends.tolist(), strict=True)
        if end > start
    }
    skipped["images_without_a_point"] += len(names) - len(spans)
    return _Points(spans, x[order], y[order], class_id[order], is_object[order])


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the owners' page lists it under point labels")
    options = arrow_csv.ConvertOptions(include_columns=list(COLUMNS), column_types=COLUMNS)
    try:
        yield from arrow_csv.open_csv(path, convert_options=options)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise UserError(f"{path}: is not a table of point labels: {error}") from error


def _read_batch(
    batch: pa.RecordBatch,
    class_of_mid: Mapping[str, int],
    code_of_image: dict[str, int],
    skipped: Counter[str],
) -> tuple[np.ndarray, ...]:
    """Return image code, x, y, class id and answer of the points that are kept."""
    image, mid, answer = (_coded(batch.column(name)) for name in ("ImageId", "Label", "EstimatedYesNo"))
    x, y = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("X", "Y"))
    classes = np.array([class_of_mid.get(value, 0) for value in mid.values], np.int32)[mid.codes]
    answers = np.array([{"yes": 1, "no": 0}.get(value, -1) for value in answer.values], np.int8)[answer.codes]
    answered = np.array([value in ("yes", "no", "unsure") for value in answer.values], bool)[answer.codes]
    nameless = np.array([not name for name in image.values], bool)[image.codes]
    malformed = nameless | ~answered
    unsure, unknown = (answers < 0) & ~malformed, (classes == 0) & ~malformed
    outside = ~((x >= 0) & (x <= 1) & (y >= 0) & (y <= 1))
    skipped["points_malformed"] += int(malformed.sum())
    skipped["points_unsure"] += int(unsure.sum())
    skipped["points_of_unknown_class"] += int((unknown & ~unsure).sum())
    skipped["points_outside"] += int((outside & ~unknown & ~unsure & ~malformed).sum())
    kept = ~(malformed | unsure | unknown | outside)
    codes = np.array([code_of_image.setdefault(name, len(code_of_image)) for name in image.values], np.int32)[
        image.codes
    ]
    return codes[kept], x[kept], y[kept], classes[kept], answers[kept] == 1


@dataclass(frozen=True)
class _Coded:
    """A column of texts: its distinct values, and the index of the value in each row."""

    values: list[str]
    codes: Int[np.ndarray, " rows"]


def _coded(column: pa.Array) -> _Coded:
    encoded = column.fill_null("").dictionary_encode()
    return _Coded(encoded.dictionary.to_pylist(), encoded.indices.to_numpy())


def _document(
    points: _Points, span: slice, class_names: Sequence[str], prompts: Sequence[str]
) -> dict[str, Any]:
    class_ids, is_object = points.class_id[span].tolist(), points.is_object[span].tolist()
    columns = zip(points.x[span].tolist(), points.y[span].tolist(), class_ids, is_object, strict=True)
    present = sorted({class_id for class_id, yes in zip(class_ids, is_object, strict=True) if yes})
    listed = [
        {"x": x, "y": y, "class_id": class_id, "label": "yes" if yes else "no"}
        for x, y, class_id, yes in columns
    ]
    return {**class_fields(present, class_names, prompts), "points": listed}
