"""Every map of every method on a batch of scenes, measured against ground truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

import legrad
from legrad import metrics
from legrad.baselines import baseline_grids
from legrad.masks import Normalisation, heatmaps_of, otsu_threshold
from legrad.trace import Trace, trace_images
from pipeline.errors import UserError
from pipeline.ground_truth import Scene

THRESHOLDS = np.arange(1, 20) / 20
# Columns of a figures table; the IoU at every threshold comes after them.
POINTING, IOU_OTSU, AVERAGE_PRECISION, OWN_OBJECT, FIRST_IOU = range(5)
IOU_AT_HALF = FIRST_IOU + 9  # threshold 0.5
MAX_PIXELS_AT_ONCE = 2**23  # bounds the heat maps that are held at a time


@dataclass(frozen=True)
class DecodedScene:
    """A scene ready for the model.

    Attributes:
        scene: the ground truth.
        objects: ordinals of the objects that are scored, at least one.
        pixels: the image at the model's size.
    """

    scene: Scene
    objects: list[int]
    pixels: UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class ExaminedBatch:
    """What was measured on a batch of scenes.

    Attributes:
        methods: names of the kinds of map.
        figures: a table row for each (method, prompt); NaN where a figure is undefined.
        scene_of_pair: row of the scene that each prompt belongs to.
        class_scores: cosine of every scene with every class; no columns without a class list.
        present: which classes the captions of a scene name.
    """

    methods: tuple[str, ...]
    figures: Float[np.ndarray, "methods pairs figures"]
    scene_of_pair: Int[np.ndarray, " pairs"]
    class_scores: Float[np.ndarray, "scenes classes"]
    present: Bool[np.ndarray, "scenes classes"]


def legrad_name(layers: int, depth: int) -> str:
    """What LeGrad's maps over the last `layers` of `depth` blocks are called."""
    return f"LeGrad, all {depth}" if layers == depth else f"LeGrad, last {layers}"


class Examiner:
    """Runs one model on batches of scenes and measures the maps of every method.

    Args:
        explainer: the model.
        class_texts: a text for class id 1, 2, ...; none: recognition is not measured.
        layer_counts: numbers of last blocks for which LeGrad is measured.
        seed: of the random maps.
    """

    def __init__(
        self, explainer: legrad.LeGrad, class_texts: Sequence[str], layer_counts: Sequence[int], seed: int
    ) -> None:
        self._explainer = explainer
        self._class_embeddings = explainer.embed_text(class_texts)
        self._layer_counts = layer_counts
        self._generator = torch.Generator().manual_seed(seed)

    def examine(self, batch: Sequence[DecodedScene]) -> ExaminedBatch:
        """Encode the batch once, draw every map, measure each; all scenes have one input size.

        Raises:
            UserError: a class id that the class list does not have.
        """
        explainer = self._explainer
        present = np.stack([_present(decoded.scene, len(self._class_embeddings)) for decoded in batch])
        pixels = torch.from_numpy(np.stack([decoded.pixels for decoded in batch])).to(explainer.device)
        images = explainer.transform.normalise(pixels, explainer.dtype)
        trace = trace_images(explainer.tower, images, len(explainer.tower.blocks), explainer.scoring)
        scene_of_pair = np.repeat(np.arange(len(batch)), [len(decoded.objects) for decoded in batch])
        grids = self._grids(trace, batch, torch.from_numpy(scene_of_pair).to(explainer.device))
        class_scores = trace.image_features.float() @ self._class_embeddings.float().T
        return ExaminedBatch(
            methods=tuple(grids),
            figures=_measure(
                batch,
                torch.stack(list(grids.values())).float().cpu(),
                scene_of_pair,
                explainer.tower.normalisation,
            ),
            scene_of_pair=scene_of_pair,
            class_scores=class_scores.cpu().numpy(),
            present=present,
        )

    def _grids(
        self, trace: Trace, batch: Sequence[DecodedScene], image_index: Int[Tensor, " pairs"]
    ) -> dict[str, Float[Tensor, "pairs grid_height grid_width"]]:
        explainer = self._explainer
        texts = explainer.embed_text(
            [decoded.scene.captions[index] for decoded in batch for index in decoded.objects]
        )
        per_layer = explainer.relevance(trace, texts, image_index, per_layer=True)
        from_last = per_layer.flip(0).cumsum(dim=0)
        maps = {legrad_name(count, len(per_layer)): from_last[count - 1] for count in self._layer_counts}
        return maps | baseline_grids(explainer.tower, trace, texts, image_index, generator=self._generator)


def _present(scene: Scene, class_count: int) -> Bool[np.ndarray, " classes"]:
    present = np.zeros(class_count, dtype=bool)
    for class_id in scene.class_ids if class_count else ():
        if not 1 <= class_id <= class_count:
            raise UserError(f"{scene.key}: class id {class_id}, but the class list has {class_count} lines")
        present[class_id - 1] = True
    return present


def _measure(
    batch: Sequence[DecodedScene],
    grids: Float[Tensor, "methods pairs grid_height grid_width"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    normalisation: Normalisation,
) -> Float[np.ndarray, "methods pairs figures"]:
    """Figures of every map, each at the size of its scene's label map."""
    truth = [decoded.scene.object_mask(index) for decoded in batch for index in decoded.objects]
    valid = [decoded.scene.valid for decoded in batch for _ in decoded.objects]
    figures = np.full((*grids.shape[:2], FIRST_IOU + len(THRESHOLDS)), np.nan)
    for pairs in _chunks_of_one_size(truth, scene_of_pair):
        chunk_truth, chunk_valid = (np.stack([masks[pair] for pair in pairs]) for masks in (truth, valid))
        for method, maps in enumerate(grids):
            figures[method, pairs] = _measure_maps(
                maps[pairs], chunk_truth, chunk_valid, scene_of_pair[pairs], normalisation
            )
    return figures


def _chunks_of_one_size(
    truth: Sequence[Bool[np.ndarray, "height width"]], scene_of_pair: Int[np.ndarray, " pairs"]
) -> Iterator[list[int]]:
    """Pairs whose label maps have one size, few enough to be upsampled together; scenes stay whole."""
    by_scene = [
        list(group) for _, group in itertools.groupby(range(len(truth)), key=scene_of_pair.__getitem__)
    ]
    by_scene.sort(key=lambda pairs: truth[pairs[0]].shape)
    for shape, scenes in itertools.groupby(by_scene, key=lambda pairs: truth[pairs[0]].shape):
        chunk: list[int] = []
        for pairs in scenes:
            if chunk and (len(chunk) + len(pairs)) * math.prod(shape) > MAX_PIXELS_AT_ONCE:
                yield chunk
                chunk = []
            chunk = chunk + pairs
        yield chunk


def _measure_maps(
    grids: Float[Tensor, "pairs grid_height grid_width"],
    truth: Bool[np.ndarray, "pairs height width"],
    valid: Bool[np.ndarray, "pairs height width"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    normalisation: Normalisation,
) -> Float[np.ndarray, "pairs figures"]:
    height, width = truth.shape[1:]
    heat = heatmaps_of(grids, height, width, normalisation)
    otsu_masks = (heat > otsu_threshold(heat)[:, None, None]).numpy()
    heatmaps = heat.contiguous().numpy()
    figures = np.full((len(truth), FIRST_IOU + len(THRESHOLDS)), np.nan)
    figures[:, POINTING] = metrics.pointing_hits(heatmaps, truth, valid)
    figures[:, IOU_OTSU] = metrics.foreground_iou(otsu_masks, truth, valid)
    figures[:, FIRST_IOU:] = metrics.iou_at_thresholds(heatmaps, truth, valid, THRESHOLDS)
    figures[:, AVERAGE_PRECISION] = [
        metrics.average_precision(*pair) for pair in zip(heatmaps, truth, valid, strict=True)
    ]
    scenes, prompt_counts = np.unique(scene_of_pair, return_counts=True)
    for scene in scenes[prompt_counts == 2]:
        both = scene_of_pair == scene
        figures[both, OWN_OBJECT] = metrics.own_object_preference(heatmaps[both], truth[both], valid[both])
    return figures
