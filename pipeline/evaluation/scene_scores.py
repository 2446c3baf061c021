"""The rows of one scene against its ground truth: right and wrong by pixel and by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from legrad.masks.rle import decode_rle
from legrad.quality.label_metrics import Overlap, boundary_f, label_overlap, pixel_tally, point_overlap
from legrad.quality.metrics import foreground_iou
from pipeline.output.label_map import BACKGROUND_LABEL, IGNORED_LABEL, label_map, mask_at_size
from pipeline.shards.ground_truth import Scene

FOREGROUND_CLASS = 1  # of what a whole caption is about

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SceneScores:
    """What was counted in one scene.

    Attributes:
        ious: foreground IoU of every row that has a mask and an object.
        boundary_fs: boundary F of the same rows.
        overlap: the label map as written against the truth; ignored pixels count as background. None where
            the truth has no label map, as for the next two.
        kept_overlap: the same, over the pixels alone that the rows do not ignore.
        pixels: the tally of `legrad.quality.label_metrics.pixel_tally`.
        points: rows against point labels; None where there are none.
        similarities: cosine of every row whose object is known to be there or not.
        present: whether it is there.
        counts: what became of rows and objects.
    """

    ious: tuple[float, ...]
    boundary_fs: tuple[float, ...]
    overlap: Overlap | None
    kept_overlap: Overlap | None
    pixels: Float[np.ndarray, " columns"] | None
    points: Overlap | None
    similarities: tuple[float, ...]
    present: tuple[bool, ...]
    counts: Mapping[str, int]


def score_scene(scene: Scene, rows: Sequence[Row], prompt_source: str) -> SceneScores:
    """Hold the rows of one sample against its ground truth.

    Args:
        scene: the ground truth.
        rows: with ``prompt_index``, ``class_id``, ``similarity``, ``mask`` and ``ignore``.
        prompt_source: the job's ``prompts.source``.

    Raises:
        RleError: a mask is no run-length encoding of its size, or not of this image.
    """
    ious: list[float] = []
    boundaries: list[float] = []
    presence: list[tuple[float, bool]] = []
    counts: Counter[str] = Counter(objects_without_row=_objects_without_row(scene, rows, prompt_source))
    for row in rows:
        present = _is_present(scene, row, prompt_source)
        counts[_fate(row, present)] += 1
        if present is not None:
            presence.append((row["similarity"], present))
        truth = row_target(scene, row, prompt_source)
        if row["mask"] is not None and truth is not None:
            mask = mask_at_size(row["mask"], *truth.shape)
            ious.append(float(foreground_iou(mask[None], truth[None], scene.valid[None])[0]))
            boundaries.append(boundary_f(mask, truth, scene.valid))
    overlap, kept_overlap, pixels = _label_scores(scene, rows, prompt_source)
    return SceneScores(
        ious=tuple(ious),
        boundary_fs=tuple(boundaries),
        overlap=overlap,
        kept_overlap=kept_overlap,
        pixels=pixels,
        points=_point_scores(scene, rows, prompt_source),
        similarities=tuple(similarity for similarity, _ in presence),
        present=tuple(present for _, present in presence),
        counts=counts,
    )


def row_class(scene: Scene, row: Row, prompt_source: str) -> int | None:
    """The class that a row is about, None where the scene does not tell.

    Rows of prompt source ``classes`` carry it; row i of ``captions`` is about the scene's object i; a whole
    ``caption`` is about all of the objects, which then are one class.
    """
    if prompt_source == "classes":
        class_id: int | None = row["class_id"]
        return class_id
    if prompt_source == "caption":
        return FOREGROUND_CLASS
    index = row["prompt_index"]
    return scene.class_ids[index] if index < len(scene.class_ids) else None


def row_target(scene: Scene, row: Row, prompt_source: str) -> Bool[np.ndarray, "height width"] | None:
    """The pixels that a row is about; None where none of them is visible, or the truth has no label map."""
    if scene.label_map is None:
        return None
    class_id = row_class(scene, row, prompt_source)
    if class_id is None:
        return None
    mask = _truth_labels(scene, prompt_source) == class_id
    return mask if mask.any() else None


def _truth_labels(scene: Scene, prompt_source: str) -> Int[np.ndarray, "height width"]:
    """Label map in the classes of `row_class`."""
    return scene.foreground().astype(np.uint8) if prompt_source == "caption" else scene.labels


def _is_present(scene: Scene, row: Row, prompt_source: str) -> bool | None:
    """Whether what a row is about is in the scene; None where the truth does not say."""
    if scene.label_map is not None:
        return row_target(scene, row, prompt_source) is not None
    if prompt_source == "caption":
        return None
    class_id = row_class(scene, row, prompt_source)
    answers = [point.is_object for point in scene.points if point.class_id == class_id]
    return any(answers) if answers else None


def _fate(row: Row, present: bool | None) -> str:
    accepted = row["mask"] is not None
    if present is None:
        return "unjudged"
    if present:
        return "accepted" if accepted else "rejected_present"
    return "accepted_absent" if accepted else "rejected_absent"


def _objects_without_row(scene: Scene, rows: Sequence[Row], prompt_source: str) -> int:
    if prompt_source == "caption":
        return int(bool(scene.visible_objects()) and not rows)
    if prompt_source == "captions":
        found = scene.visible_objects() if scene.label_map is not None else scene.pointed_objects()
        return len(set(found) - {row["prompt_index"] for row in rows})
    if scene.label_map is not None:
        wanted = set(scene.visible_classes().tolist())
    else:
        wanted = {point.class_id for point in scene.points if point.is_object}
    return len(wanted - {row["class_id"] for row in rows})


def _label_scores(
    scene: Scene, rows: Sequence[Row], prompt_source: str
) -> tuple[Overlap | None, Overlap | None, Float[np.ndarray, " columns"] | None]:
    if scene.label_map is None:
        return None, None, None
    truth = _truth_labels(scene, prompt_source)
    labels, kept = _written_labels(scene, rows, prompt_source, truth.shape)
    overlap = label_overlap(labels, truth, scene.valid)
    kept_overlap = overlap if kept.all() else label_overlap(labels, truth, scene.valid & kept)
    return overlap, kept_overlap, pixel_tally(labels, truth, scene.valid, kept)


def _written_labels(
    scene: Scene, rows: Sequence[Row], prompt_source: str, shape: tuple[int, ...]
) -> tuple[Int[np.ndarray, "height width"], Bool[np.ndarray, "height width"]]:
    """Class of each pixel by the rows, 0 where they ignore it; and where they do not."""
    height, width = shape
    known = [(row, row_class(scene, row, prompt_source)) for row in rows]
    classes = sorted(
        {class_id for row, class_id in known if row["mask"] is not None and class_id is not None}
    )
    # a label map has one byte a pixel, and datasets have more classes, though not in one image
    local = {class_id: number for number, class_id in enumerate(classes, start=1)}
    local_rows = [
        {
            **row,
            "class_id": None if class_id is None else local.get(class_id),
            "mask": None if class_id is None else row["mask"],
        }
        for row, class_id in known
    ]
    labels = label_map(local_rows, height, width)
    kept = labels != IGNORED_LABEL
    lookup = np.array([BACKGROUND_LABEL, *classes], dtype=np.int64)
    return lookup[np.where(kept, labels, BACKGROUND_LABEL)], kept


def _point_scores(scene: Scene, rows: Sequence[Row], prompt_source: str) -> Overlap | None:
    """Each point against the masks of its own class; a class without a mask is nowhere."""
    if not scene.points or prompt_source == "caption":
        return None
    said = [False] * len(scene.points)
    for row in rows:
        class_id = row_class(scene, row, prompt_source)
        own = [number for number, point in enumerate(scene.points) if point.class_id == class_id]
        if row["mask"] is not None and own:
            # one mask after the other: a row may be anybody's, and its mask as large as a mask can be
            mask = decode_rle(row["mask"])
            for number in own:
                said[number] |= bool(scene.points[number].value_in(mask))
    return point_overlap(
        np.array([point.class_id for point in scene.points]),
        np.array([point.is_object for point in scene.points]),
        np.array(said),
    )
