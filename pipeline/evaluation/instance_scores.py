"""Compare instances with ground truth by COCO's average precision of masks."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage

from legrad.masks.cleaning import EIGHT_NEIGHBOURS
from legrad.masks.rle import Rle, encode_rle, measure_encoded
from legrad.quality.metrics import Estimate, draws_per_image
from pipeline.evaluation.result import InstanceScores
from pipeline.output.label_map import mask_at_size
from pipeline.output.schema import INSTANCES
from pipeline.shards.ground_truth import IGNORED_LABEL, Scene

COLUMN, PARTS = "instances", "connected parts"
RESAMPLES = 100
# COCO's limit of results for each image and class
MOST_RESULTS = 100

Row = Mapping[str, Any]
ClassOfRow = Callable[[Row], int | None]
ScoredPart = tuple[Bool[np.ndarray, "height width"], float]


@dataclass(frozen=True)
class ScoredMask:
    """An instance: its class, its mask, and how sure the job is of it; 1 in the ground truth."""

    class_id: int
    rle: Rle
    score: float = 1.0


@dataclass(frozen=True)
class SceneInstances:
    """Instances of one scene, without the pixels that do not count.

    Attributes:
        truth: of the ground truth.
        found: of the rows, by kind: `instances` only where all rows with masks have that column.
    """

    truth: tuple[ScoredMask, ...]
    found: Mapping[str, tuple[ScoredMask, ...]]


def scene_instances(
    scene: Scene,
    rows: Sequence[Row],
    class_of_row: ClassOfRow,
    truth_labels: Int[np.ndarray, "height width"],
) -> SceneInstances | None:
    """Return the instances of a scene's ground truth and of its rows; None where the truth has none.

    Results are ranked by similarity times, in the column `instances`, the instance's score, or of connected
    parts, their share of the mask.

    Args:
        scene: the ground truth.
        rows: annotation rows of the sample.
        class_of_row: the class of a row, None where the ground truth does not name it.
        truth_labels: the label map of the scene in the same classes.

    Raises:
        RleError: a mask is no run-length encoding of its size, or does not fit this image.
    """
    if scene.instance_map is None:
        return None
    counted = scene.valid & (scene.instance_map != IGNORED_LABEL)
    found: dict[str, list[ScoredMask]] = {COLUMN: []} if any(INSTANCES in row for row in rows) else {}
    found[PARTS] = []
    for row in rows:
        class_id = class_of_row(row)
        if row["mask"] is None or class_id is None:
            continue
        certainty = max(row["similarity"], 0.0)
        for kind, parts_of in (
            (COLUMN, _column(row, counted)),
            (PARTS, _connected(row, counted)),
        ):
            if kind in found:
                found[kind] += [
                    ScoredMask(class_id, encode_rle((mask & counted)[None])[0], certainty * share)
                    for mask, share in parts_of
                    if (mask & counted).any()
                ]
    return SceneInstances(
        tuple(_truth(scene.instance_map, counted, truth_labels)),
        {kind: tuple(masks) for kind, masks in found.items()},
    )


def _truth(
    instance_map: UInt8[np.ndarray, "height width"],
    counted: Bool[np.ndarray, "height width"],
    labels: Int[np.ndarray, "height width"],
) -> Iterator[ScoredMask]:
    for number in np.unique(instance_map[counted]).tolist():
        mask = counted & (instance_map == number)
        class_id = int(np.bincount(labels[mask]).argmax())
        if number and class_id:
            yield ScoredMask(class_id, encode_rle(mask[None])[0])


def _column(row: Row, counted: Bool[np.ndarray, "height width"]) -> Iterator[ScoredPart]:
    for instance in row.get(INSTANCES) or ():
        yield mask_at_size(instance["mask"], *counted.shape), float(instance["score"])


def _connected(row: Row, counted: Bool[np.ndarray, "height width"]) -> Iterator[ScoredPart]:
    mask = mask_at_size(row["mask"], *counted.shape)
    labels, count = ndimage.label(mask, EIGHT_NEIGHBOURS)
    for number in range(1, count + 1):
        part = labels == number
        yield part, float(part.sum() / mask.sum())


def score_instances(scenes: Sequence[SceneInstances | None], seed: int) -> tuple[InstanceScores, ...]:
    """Return the average precision of each kind of instances with 95 % intervals over scenes.

    Args:
        scenes: of all scenes; those without ground truth do not count.
        seed: of the bootstrap.
    """
    judged = [scene for scene in scenes if scene is not None]
    if not any(scene.truth for scene in judged):
        return ()
    kinds = [kind for kind in (COLUMN, PARTS) if any(kind in scene.found for scene in judged)]
    return tuple(_score(judged, kind, seed) for kind in kinds)


def _score(scenes: Sequence[SceneInstances], kind: str, seed: int) -> InstanceScores:
    found = [scene.found.get(kind, ()) for scene in scenes]
    with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluated = _evaluated([scene.truth for scene in scenes], found)
        draws = draws_per_image(len(scenes), RESAMPLES, seed)
        every = np.arange(len(scenes))
        values = np.array(
            [_precisions(evaluated, rows) for rows in (every, *(np.repeat(every, draw) for draw in draws))]
        )
    # a resample without any instance of the truth has no precision
    low, high = np.nanpercentile(values, [2.5, 97.5], axis=0)
    over_all, at_half = (
        Estimate(float(values[0, column]), float(low[column]), float(high[column]), len(scenes))
        for column in range(2)
    )
    return InstanceScores(
        kind, over_all, at_half, sum(len(scene.truth) for scene in scenes), sum(map(len, found))
    )


def _evaluated(truth: Sequence[Sequence[ScoredMask]], found: Sequence[Sequence[ScoredMask]]) -> Any:
    """Match results with the truth in every scene; return pycocotools' evaluation before accumulation."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = [COCO(), COCO()]
    classes = sorted({mask.class_id for masks in (*truth, *found) for mask in masks})
    for dataset, masks_of_scenes in zip(data, (truth, found), strict=True):
        dataset.dataset = {
            # every mask has its own size
            "images": [{"id": number, "height": 0, "width": 0} for number in range(len(truth))],
            "categories": [{"id": class_id} for class_id in classes],
            "annotations": _annotations(masks_of_scenes),
        }
        dataset.createIndex()
    evaluation = COCOeval(*data, iouType="segm")
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, float("inf")]], ["all"]
    evaluation.params.maxDets = [MOST_RESULTS]
    evaluation.evaluate()
    return evaluation


def _annotations(masks_of_scenes: Sequence[Sequence[ScoredMask]]) -> list[dict[str, Any]]:
    numbered = [(scene, mask) for scene, masks in enumerate(masks_of_scenes) for mask in masks]
    areas, _ = measure_encoded([mask.rle for _, mask in numbered])
    return [
        {
            "id": number,
            "image_id": scene,
            "category_id": mask.class_id,
            "segmentation": mask.rle,
            "score": mask.score,
            "area": area,
            "iscrowd": 0,
        }
        for number, ((scene, mask), area) in enumerate(zip(numbered, areas.tolist(), strict=True), start=1)
    ]


def _precisions(evaluation: Any, rows: Int[np.ndarray, " rows"]) -> Float[np.ndarray, " 2"]:
    """Return AP and AP50 over some of the scenes, with repetitions; NaN where there is no truth."""
    resampled = copy(evaluation)
    resampled.params = deepcopy(evaluation.params)
    images = len(evaluation.params.imgIds)
    # one entry for each class and image, image by image within a class
    per_class = [
        evaluation.evalImgs[first : first + images] for first in range(0, len(evaluation.evalImgs), images)
    ]
    resampled.evalImgs = [entries[row] for entries in per_class for row in rows.tolist()]
    resampled.params.imgIds = list(range(len(rows)))
    resampled._paramsEval = deepcopy(resampled.params)
    resampled.accumulate()
    precision = resampled.eval["precision"][:, :, :, 0, 0]
    defined = np.where(precision < 0, np.nan, precision)
    if np.isnan(defined).all():
        return np.full(2, np.nan)
    return np.array([np.nanmean(defined), np.nanmean(defined[0])])
