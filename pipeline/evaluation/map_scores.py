"""Heat maps against the ground truth of their scenes: metrics of each map, and means with intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from legrad.heatmaps import Normalisation, heatmaps_of
from legrad.masks.thresholds import otsu_threshold
from legrad.quality import metrics
from legrad.quality.label_metrics import bootstrap_sums, mean_iou, point_overlap, tabulate_counts
from legrad.quality.metrics import Estimate
from pipeline.evaluation.result import MapScores
from pipeline.shards.ground_truth import PointLabel, Scene

THRESHOLDS = np.arange(1, 20) / 20
# Columns of `MapMetrics.values`; the IoU at every threshold comes after them.
POINTING, IOU_OTSU, AVERAGE_PRECISION, OWN_OBJECT, FIRST_IOU = range(5)
IOU_AT_HALF = FIRST_IOU + 9  # threshold 0.5
METRICS = FIRST_IOU + len(THRESHOLDS)
# Rows of `MapMetrics.counts`: pixels, cut by Otsu's rule; points, cut at 0.5; points, cut by Otsu's rule.
PIXELS_OTSU, POINTS_AT_HALF, POINTS_OTSU = range(3)
MAX_PIXELS_AT_ONCE = 2**23  # bounds the heat maps that are held at a time


@dataclass(frozen=True)
class DecodedScene:
    """A scene ready for the model.

    Attributes:
        scene: the ground truth.
        objects: ordinals of the objects that are scored, at least one.
        pixels: the image at the model's size.
        image_height: rows of the image as it is.
        image_width: columns of the image as it is.
    """

    scene: Scene
    objects: list[int]
    pixels: UInt8[np.ndarray, "height width 3"]
    image_height: int
    image_width: int


@dataclass(frozen=True)
class MapMetrics:
    """Metrics of every map, before any mean is taken.

    Attributes:
        values: one row for each (method, pair), one column for each metric; NaN where a metric is undefined.
        counts: truth, prediction and intersection for the class of the pair: in pixels of the map cut by
            Otsu's rule, where the hottest map of a scene takes a pixel; in points of the map cut at 0.5;
            and in points of the map cut by Otsu's rule. NaN without such ground truth.
    """

    values: Float[np.ndarray, "methods pairs metrics"]
    counts: Float[np.ndarray, "methods pairs kinds 3"]


def measure_maps(
    batch: Sequence[DecodedScene],
    grids: Float[Tensor, "methods pairs grid_height grid_width"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    normalisation: Normalisation,
) -> MapMetrics:
    """Measure every map at the size of its scene's label map, or image.

    Args:
        batch: the scenes.
        grids: raw relevance for each scored object, in the order of scenes and objects.
        scene_of_pair: number of the scene of each map.
        normalisation: see `legrad.heatmaps_of`.
    """
    pairs = grids.shape[1]
    found = MapMetrics(
        np.full((len(grids), pairs, METRICS), np.nan), np.full((len(grids), pairs, 3, 3), np.nan)
    )
    _measure_label_maps(batch, grids, scene_of_pair, normalisation, found)
    for row, decoded in enumerate(batch):
        if decoded.scene.points:
            of_scene = np.flatnonzero(scene_of_pair == row)
            found.counts[:, of_scene, POINTS_AT_HALF:] = _point_counts(
                decoded, grids[:, of_scene], normalisation
            )
    return found


def _measure_label_maps(
    batch: Sequence[DecodedScene],
    grids: Float[Tensor, "methods pairs grid_height grid_width"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    normalisation: Normalisation,
    found: MapMetrics,
) -> None:
    """Fill in the metrics that follow from label maps."""
    truth = {
        pair: decoded.scene.object_mask(index)
        for pair, (decoded, index) in enumerate((decoded, i) for decoded in batch for i in decoded.objects)
        if decoded.scene.label_map is not None
    }
    for pairs in _chunks_of_one_size(truth, scene_of_pair):
        chunk_truth = np.stack([truth[pair] for pair in pairs])
        chunk_valid = np.stack([batch[scene_of_pair[pair]].scene.valid for pair in pairs])
        for method, maps in enumerate(grids):
            values, counts = _measure_chunk(
                maps[pairs], chunk_truth, chunk_valid, scene_of_pair[pairs], normalisation
            )
            found.values[method, pairs] = values
            found.counts[method, pairs, PIXELS_OTSU] = counts


def _chunks_of_one_size(
    truth: dict[int, Bool[np.ndarray, "height width"]], scene_of_pair: Int[np.ndarray, " pairs"]
) -> Iterator[list[int]]:
    """Yield pairs whose label maps have one size, few enough to upsample together; scenes stay whole."""
    by_scene = [list(group) for _, group in itertools.groupby(truth, key=scene_of_pair.__getitem__)]
    by_scene.sort(key=lambda pairs: truth[pairs[0]].shape)
    for shape, scenes in itertools.groupby(by_scene, key=lambda pairs: truth[pairs[0]].shape):
        chunk: list[int] = []
        for pairs in scenes:
            if chunk and (len(chunk) + len(pairs)) * math.prod(shape) > MAX_PIXELS_AT_ONCE:
                yield chunk
                chunk = []
            chunk = chunk + pairs
        yield chunk


def _measure_chunk(
    grids: Float[Tensor, "pairs grid_height grid_width"],
    truth: Bool[np.ndarray, "pairs height width"],
    valid: Bool[np.ndarray, "pairs height width"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    normalisation: Normalisation,
) -> tuple[Float[np.ndarray, "pairs metrics"], Float[np.ndarray, "pairs 3"]]:
    height, width = truth.shape[1:]
    heat = heatmaps_of(grids, height, width, normalisation)
    otsu_masks = (heat > otsu_threshold(heat)[:, None, None]).numpy()
    heatmaps = heat.contiguous().numpy()
    values = np.full((len(truth), METRICS), np.nan)
    values[:, POINTING] = metrics.pointing_hits(heatmaps, truth, valid)
    values[:, IOU_OTSU] = metrics.foreground_iou(otsu_masks, truth, valid)
    values[:, FIRST_IOU:] = metrics.iou_at_thresholds(heatmaps, truth, valid, THRESHOLDS)
    values[:, AVERAGE_PRECISION] = [
        metrics.average_precision(*pair) for pair in zip(heatmaps, truth, valid, strict=True)
    ]
    for scene in np.unique(scene_of_pair):
        of_scene = np.flatnonzero(scene_of_pair == scene)
        if len(of_scene) == 2:
            values[of_scene, OWN_OBJECT] = metrics.own_object_preference(
                heatmaps[of_scene], truth[of_scene], valid[of_scene]
            )
        if len(of_scene) > 1:
            otsu_masks[of_scene] = _hottest_wins(heatmaps[of_scene], otsu_masks[of_scene])
    counted = [truth & valid, otsu_masks & valid, otsu_masks & truth & valid]
    return values, np.stack([part.sum(axis=(1, 2)) for part in counted], axis=1).astype(np.float64)


def _hottest_wins(
    heatmaps: Float[np.ndarray, "pairs height width"], masks: Bool[np.ndarray, "pairs height width"]
) -> Bool[np.ndarray, "pairs height width"]:
    """Return disjoint masks: a pixel of several goes to the hottest map, among equal ones to the first."""
    winner = np.where(masks, heatmaps, -np.inf).argmax(axis=0)
    own_pixels: np.ndarray = masks & (winner == np.arange(len(masks))[:, None, None])
    return own_pixels


def _point_counts(
    decoded: DecodedScene,
    grids: Float[Tensor, "methods pairs grid_height grid_width"],
    normalisation: Normalisation,
) -> Float[np.ndarray, "methods pairs 2 3"]:
    """Count truth, prediction and intersection in points of the own class, cut at 0.5 and by Otsu's rule."""
    counts = np.zeros((*grids.shape[:2], 2, 3))
    for pair, index in enumerate(decoded.objects):
        class_id = decoded.scene.class_ids[index]
        points = [point for point in decoded.scene.points if point.class_id == class_id]
        heat = heatmaps_of(
            grids[:, pair].contiguous(), decoded.image_height, decoded.image_width, normalisation
        )
        for rule, cuts in enumerate((torch.full((len(heat),), 0.5), otsu_threshold(heat))):
            for method, (heatmap, cut) in enumerate(zip(heat.numpy(), cuts.tolist(), strict=True)):
                counts[method, pair, rule] = count_points(points, heatmap > cut)
    return counts


def count_points(points: Sequence[PointLabel], mask: Bool[np.ndarray, "height width"]) -> list[int]:
    """Count positive points, points in the mask, and points that are both; the points are of one class."""
    if not points:
        return [0, 0, 0]
    found = point_overlap(
        np.zeros(len(points), dtype=np.intp),
        np.array([point.is_object for point in points]),
        np.array([bool(point.value_in(mask)) for point in points]),
    )
    return [int(found.truth[0]), int(found.predicted[0]), int(found.both[0])]


def score_maps(
    methods: Sequence[str],
    found: MapMetrics,
    class_of_pair: Int[np.ndarray, " pairs"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    *,
    configured_name: str | None,
    seed: int,
) -> tuple[MapScores, ...]:
    """Return the means of every method with 95 % intervals; whole scenes are resampled.

    Args:
        methods: names of the kinds of map.
        found: metrics of all maps.
        class_of_pair: the class of each prompt.
        scene_of_pair: number of the scene of each prompt.
        configured_name: name of the method that a job used, if any.
        seed: of the bootstrap.
    """
    return tuple(
        _map_scores(
            method,
            found.values[row],
            found.counts[row],
            class_of_pair,
            scene_of_pair,
            configured=method == configured_name,
            seed=seed,
        )
        for row, method in enumerate(methods)
    )


def _map_scores(
    method: str,
    values: Float[np.ndarray, "pairs metrics"],
    counts: Float[np.ndarray, "pairs kinds 3"],
    class_of_pair: Int[np.ndarray, " pairs"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    *,
    configured: bool,
    seed: int,
) -> MapScores:
    def estimate(column: int) -> Estimate | None:
        return _mean_of_defined(values[:, column], scene_of_pair, seed)

    def class_mean(kind: int) -> Estimate | None:
        return _class_mean(counts[:, kind], class_of_pair, scene_of_pair, seed)

    curves = values[~np.isnan(values[:, FIRST_IOU]), FIRST_IOU:]
    threshold, best_column = metrics.best_threshold(curves, THRESHOLDS) if len(curves) else (None, 0)
    return MapScores(
        method=method,
        configured=configured,
        pointing=estimate(POINTING),
        iou_at_half=estimate(IOU_AT_HALF),
        iou_otsu=estimate(IOU_OTSU),
        iou_best=estimate(FIRST_IOU + best_column),
        best_threshold=threshold,
        average_precision=estimate(AVERAGE_PRECISION),
        mean_iou=class_mean(PIXELS_OTSU),
        point_mean_iou_at_half=class_mean(POINTS_AT_HALF),
        point_mean_iou_otsu=class_mean(POINTS_OTSU),
        own_object=estimate(OWN_OBJECT),
        iou_curve=tuple(curves.mean(axis=0).tolist()) if len(curves) else (),
    )


def _mean_of_defined(
    values: Float[np.ndarray, " pairs"], scene_of_pair: Int[np.ndarray, " pairs"], seed: int
) -> Estimate | None:
    defined = ~np.isnan(values)
    if not defined.any():
        return None
    return metrics.bootstrap_mean(values[defined], scene_of_pair[defined], seed=seed)


def _class_mean(
    counts: Float[np.ndarray, "pairs 3"],
    class_of_pair: Int[np.ndarray, " pairs"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    seed: int,
) -> Estimate | None:
    defined = ~np.isnan(counts[:, 0])
    scenes, image = np.unique(scene_of_pair[defined], return_inverse=True)
    table = tabulate_counts(counts[defined], class_of_pair[defined], image, len(scenes))
    return bootstrap_sums(table.counts, mean_iou(table, background=False), seed=seed)
