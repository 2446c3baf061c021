"""Compare the rows of one scene with its ground truth: counts of pixels, points and rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from legrad.masks.rle import decode_rle
from legrad.quality.label_metrics import Overlap, boundary_f, label_overlap, pixel_tally, point_overlap
from legrad.quality.metrics import foreground_iou
from pipeline.evaluation.instance_scores import SceneInstances, scene_instances
from pipeline.output.label_map import BACKGROUND_LABEL, IGNORED_LABEL, label_map, mask_at_size
from pipeline.shards.ground_truth import Scene

FOREGROUND_CLASS = 1  # the class of all objects of a whole caption

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SceneScores:
    """Counts of one scene.

    Attributes:
        ious: foreground IoU of every row that has a mask and an object.
        boundary_fs: boundary F of the same rows.
        overlap: the written label map against the ground truth; ignored pixels count as background. None,
            like the next two, where the ground truth has no label map.
        kept_overlap: the same over the pixels that the rows do not ignore.
        pixels: the tally of `legrad.quality.label_metrics.pixel_tally`.
        points: rows against point labels; None where there are none.
        similarities: cosine of every row whose object is known to be present or absent.
        present: whether it is present.
        counts: number of rows by outcome, and of objects without a row.
        instances: of the truth and of the rows; None where the truth has none.
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
    instances: SceneInstances | None = None


def score_scene(scene: Scene, rows: Sequence[Row], prompt_source: str) -> SceneScores:
    """Compare the rows of one sample with its ground truth.

    Args:
        scene: the ground truth.
        rows: with ``prompt_index``, ``class_id``, ``similarity``, ``mask`` and ``ignore``.
        prompt_source: the job's ``prompts.source``.

    Raises:
        RleError: a mask is not a run-length encoding of its size, or does not fit this image.
    """
    ious: list[float] = []
    boundaries: list[float] = []
    presence: list[tuple[float, bool]] = []
    counts: Counter[str] = Counter(objects_without_row=_objects_without_row(scene, rows, prompt_source))
    for row in rows:
        present = _is_present(scene, row, prompt_source)
        counts[_outcome(row, present)] += 1
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
        instances=None
        if scene.instance_map is None
        else scene_instances(
            scene,
            rows,
            partial(row_class, scene, prompt_source=prompt_source),
            _truth_labels(scene, prompt_source),
        ),
    )


def row_class(scene: Scene, row: Row, prompt_source: str) -> int | None:
    """Return the class of a row; None where the ground truth does not name it.

    Rows of prompt source ``classes`` contain it; row i of ``captions`` belongs to object i of the scene; a
    whole ``caption`` belongs to all objects, which then are one class.
    """
    if prompt_source == "classes":
        class_id: int | None = row["class_id"]
        return class_id
    if prompt_source == "caption":
        return FOREGROUND_CLASS
    index = row["prompt_index"]
    return scene.class_ids[index] if index < len(scene.class_ids) else None


def row_target(scene: Scene, row: Row, prompt_source: str) -> Bool[np.ndarray, "height width"] | None:
    """Return the pixels of the object of a row; None if none is visible or there is no label map."""
    if scene.label_map is None:
        return None
    class_id = row_class(scene, row, prompt_source)
    if class_id is None:
        return None
    mask = _truth_labels(scene, prompt_source) == class_id
    return mask if mask.any() else None


def _truth_labels(scene: Scene, prompt_source: str) -> Int[np.ndarray, "height width"]:
    """Return the label map in the classes of `row_class`."""
    return scene.foreground().astype(np.uint8) if prompt_source == "caption" else scene.labels


def _is_present(scene: Scene, row: Row, prompt_source: str) -> bool | None:
    """Return whether the object of a row is in the scene; None where the ground truth does not say."""
    if scene.label_map is not None:
        return row_target(scene, row, prompt_source) is not None
    if prompt_source == "caption":
        return None
    class_id = row_class(scene, row, prompt_source)
    answers = [point.is_object for point in scene.points if point.class_id == class_id]
    return any(answers) if answers else None


def _outcome(row: Row, present: bool | None) -> str:
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
    """Return the class of each pixel by the rows, and which pixels they do not ignore."""
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
    """Compare each point with the masks of its class; a class without a mask has no pixels."""
    if not scene.points or prompt_source == "caption":
        return None
    predicted = [False] * len(scene.points)
    for row in rows:
        class_id = row_class(scene, row, prompt_source)
        own = [number for number, point in enumerate(scene.points) if point.class_id == class_id]
        if row["mask"] is not None and own:
            # one mask at a time: rows are untrusted, and a mask may be as large as a mask can be
            mask = decode_rle(row["mask"])
            for number in own:
                predicted[number] |= bool(scene.points[number].value_in(mask))
    return point_overlap(
        np.array([point.class_id for point in scene.points]),
        np.array([point.is_object for point in scene.points]),
        np.array(predicted),
    )
