"""Maps of one method against the ground truth of their scenes: one table row a map."""

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
from legrad.quality.label_metrics import point_overlap
from pipeline.shards.ground_truth import PointLabel, Scene

THRESHOLDS = np.arange(1, 20) / 20
# Columns of a figures table; the IoU at every threshold comes after them.
POINTING, IOU_OTSU, AVERAGE_PRECISION, OWN_OBJECT, FIRST_IOU = range(5)
IOU_AT_HALF = FIRST_IOU + 9  # threshold 0.5
FIGURES = FIRST_IOU + len(THRESHOLDS)
# Rows of counts: pixels of the map cut by Otsu's rule, points of the map cut at 0.5 and by Otsu's rule.
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
class MapMeasures:
    """What was measured on the maps of a batch of scenes.

    Attributes:
        figures: a table row for each (method, pair); NaN where a figure is undefined.
        counts: truth, predicted and both of the pair's class: in pixels of the map cut by Otsu's rule, where
            the hotter of a scene's maps takes a pixel, and in points of the map cut at 0.5 and by Otsu's
            rule. NaN where there is no such truth.
    """

    figures: Float[np.ndarray, "methods pairs figures"]
    counts: Float[np.ndarray, "methods pairs kinds 3"]


def measure_maps(
    batch: Sequence[DecodedScene],
    grids: Float[Tensor, "methods pairs grid_height grid_width"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    normalisation: Normalisation,
) -> MapMeasures:
    """Measure every map at the size of its scene's label map, or image.

    Args:
        batch: the scenes.
        grids: raw relevance for each scored object, in the order of scenes and objects.
        scene_of_pair: row of the scene that each map belongs to.
        normalisation: see `legrad.heatmaps_of`.
    """
    pairs = grids.shape[1]
    measures = MapMeasures(
        np.full((len(grids), pairs, FIGURES), np.nan), np.full((len(grids), pairs, 3, 3), np.nan)
    )
    _measure_label_maps(batch, grids, scene_of_pair, normalisation, measures)
    for row, decoded in enumerate(batch):
        if decoded.scene.points:
            of_scene = np.flatnonzero(scene_of_pair == row)
            measures.counts[:, of_scene, POINTS_AT_HALF:] = _point_counts(
                decoded, grids[:, of_scene], normalisation
            )
    return measures


def _measure_label_maps(
    batch: Sequence[DecodedScene],
    grids: Float[Tensor, "methods pairs grid_height grid_width"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    normalisation: Normalisation,
    measures: MapMeasures,
) -> None:
    """Fill in what label maps decide."""
    truth = {
        pair: decoded.scene.object_mask(index)
        for pair, (decoded, index) in enumerate((decoded, i) for decoded in batch for i in decoded.objects)
        if decoded.scene.label_map is not None
    }
    for pairs in _chunks_of_one_size(truth, scene_of_pair):
        chunk_truth = np.stack([truth[pair] for pair in pairs])
        chunk_valid = np.stack([batch[scene_of_pair[pair]].scene.valid for pair in pairs])
        for method, maps in enumerate(grids):
            figures, counts = _measure_chunk(
                maps[pairs], chunk_truth, chunk_valid, scene_of_pair[pairs], normalisation
            )
            measures.figures[method, pairs] = figures
            measures.counts[method, pairs, PIXELS_OTSU] = counts


def _chunks_of_one_size(
    truth: dict[int, Bool[np.ndarray, "height width"]], scene_of_pair: Int[np.ndarray, " pairs"]
) -> Iterator[list[int]]:
    """Pairs whose label maps have one size, few enough to be upsampled together; scenes stay whole."""
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
) -> tuple[Float[np.ndarray, "pairs figures"], Float[np.ndarray, "pairs 3"]]:
    height, width = truth.shape[1:]
    heat = heatmaps_of(grids, height, width, normalisation)
    otsu_masks = (heat > otsu_threshold(heat)[:, None, None]).numpy()
    heatmaps = heat.contiguous().numpy()
    figures = np.full((len(truth), FIGURES), np.nan)
    figures[:, POINTING] = metrics.pointing_hits(heatmaps, truth, valid)
    figures[:, IOU_OTSU] = metrics.foreground_iou(otsu_masks, truth, valid)
    figures[:, FIRST_IOU:] = metrics.iou_at_thresholds(heatmaps, truth, valid, THRESHOLDS)
    figures[:, AVERAGE_PRECISION] = [
        metrics.average_precision(*pair) for pair in zip(heatmaps, truth, valid, strict=True)
    ]
    for scene in np.unique(scene_of_pair):
        of_scene = np.flatnonzero(scene_of_pair == scene)
        if len(of_scene) == 2:
            figures[of_scene, OWN_OBJECT] = metrics.own_object_preference(
                heatmaps[of_scene], truth[of_scene], valid[of_scene]
            )
        if len(of_scene) > 1:
            otsu_masks[of_scene] = _hottest_wins(heatmaps[of_scene], otsu_masks[of_scene])
    counted = [truth & valid, otsu_masks & valid, otsu_masks & truth & valid]
    return figures, np.stack([part.sum(axis=(1, 2)) for part in counted], axis=1).astype(np.float64)


def _hottest_wins(
    heatmaps: Float[np.ndarray, "pairs height width"], masks: Bool[np.ndarray, "pairs height width"]
) -> Bool[np.ndarray, "pairs height width"]:
    """Masks of which no two share a pixel: of several the hottest map has it, of equal ones the first."""
    winner = np.where(masks, heatmaps, -np.inf).argmax(axis=0)
    own_pixels: np.ndarray = masks & (winner == np.arange(len(masks))[:, None, None])
    return own_pixels


def _point_counts(
    decoded: DecodedScene,
    grids: Float[Tensor, "methods pairs grid_height grid_width"],
    normalisation: Normalisation,
) -> Float[np.ndarray, "methods pairs 2 3"]:
    """Truth, predicted and both of every map's own class in points, cut at 0.5 and by Otsu's rule."""
    counts = np.zeros((*grids.shape[:2], 2, 3))
    for pair, index in enumerate(decoded.objects):
        class_id = decoded.scene.class_ids[index]
        points = [point for point in decoded.scene.points if point.class_id == class_id]
        heat = heatmaps_of(
            grids[:, pair].contiguous(), decoded.image_height, decoded.image_width, normalisation
        )
        for rule, cuts in enumerate((torch.full((len(heat),), 0.5), otsu_threshold(heat))):
            for method, (heatmap, cut) in enumerate(zip(heat.numpy(), cuts.tolist(), strict=True)):
                counts[method, pair, rule] = _count_points(points, heatmap > cut)
    return counts


def _count_points(points: Sequence[PointLabel], mask: Bool[np.ndarray, "height width"]) -> list[int]:
    if not points:
        return [0, 0, 0]
    found = point_overlap(
        np.zeros(len(points), dtype=np.intp),
        np.array([point.is_object for point in points]),
        np.array([bool(point.value_in(mask)) for point in points]),
    )
    return [int(found.truth[0]), int(found.predicted[0]), int(found.both[0])]
