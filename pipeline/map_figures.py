"""Every map of every method on a batch of scenes, measured against ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

import legrad
from legrad import metrics
from legrad.baselines import baseline_grids
from legrad.masks import minmax_normalise, otsu_threshold, upsample_grid
from legrad.trace import Trace, trace_images
from pipeline.errors import UserError
from pipeline.ground_truth import Scene

THRESHOLDS = np.arange(1, 20) / 20
# Columns of a figures table; the IoU at every threshold comes after them.
POINTING, IOU_OTSU, AVERAGE_PRECISION, OWN_OBJECT, FIRST_IOU = range(5)
IOU_AT_HALF = FIRST_IOU + 9  # threshold 0.5
# Below this torch stays in one thread; on small maps its thread pool costs several times the work.
MAX_PIXELS_AT_ONCE = 2**15


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
        """Encode the batch once, draw every map, measure each.

        Raises:
            UserError: a class id that the class list does not have.
        """
        explainer = self._explainer
        present = np.stack([_present(decoded.scene, len(self._class_embeddings)) for decoded in batch])
        pixels = torch.from_numpy(np.stack([decoded.pixels for decoded in batch])).to(explainer.device)
        images = explainer.transform.normalise(pixels, explainer.dtype)
        trace = trace_images(explainer.tower, images, len(explainer.tower.blocks))
        prompt_counts = [len(decoded.objects) for decoded in batch]
        scene_of_pair = np.repeat(np.arange(len(batch)), prompt_counts)
        grids = self._grids(trace, batch, torch.from_numpy(scene_of_pair).to(explainer.device))
        grids_by_scene = torch.split(torch.stack(list(grids.values()), dim=1).float().cpu(), prompt_counts)
        figures = [_measure(*scene) for scene in zip(batch, grids_by_scene, strict=True)]
        class_scores = trace.image_features.float() @ self._class_embeddings.float().T
        return ExaminedBatch(
            methods=tuple(grids),
            figures=np.concatenate(figures, axis=1),
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
    decoded: DecodedScene, grids: Float[Tensor, "prompts methods grid_height grid_width"]
) -> Float[np.ndarray, "methods prompts figures"]:
    """Figures of every map of a scene, at the size of its label map."""
    scene = decoded.scene
    truth = np.stack([scene.object_mask(index) for index in decoded.objects])
    methods_at_once = max(1, MAX_PIXELS_AT_ONCE // truth.size)
    chunks = torch.split(grids.transpose(0, 1).contiguous(), methods_at_once)
    return np.concatenate([_measure_methods(chunk, truth, scene.valid) for chunk in chunks])


def _measure_methods(
    grids: Float[Tensor, "methods prompts grid_height grid_width"],
    truth: Bool[np.ndarray, "prompts height width"],
    valid: Bool[np.ndarray, "height width"],
) -> Float[np.ndarray, "methods prompts figures"]:
    heat = minmax_normalise(upsample_grid(grids, *valid.shape))
    otsu_masks = (heat > otsu_threshold(heat)[..., None, None]).numpy()
    heatmaps = heat.contiguous().numpy()
    everywhere = np.broadcast_to(valid, truth.shape)
    figures = np.full((*heatmaps.shape[:2], FIRST_IOU + len(THRESHOLDS)), np.nan)
    for method, (maps, masks) in enumerate(zip(heatmaps, otsu_masks, strict=True)):
        rows = figures[method]
        rows[:, POINTING] = metrics.pointing_hits(maps, truth, everywhere)
        rows[:, IOU_OTSU] = metrics.foreground_iou(masks, truth, everywhere)
        rows[:, FIRST_IOU:] = metrics.iou_at_thresholds(maps, truth, everywhere, THRESHOLDS)
        rows[:, AVERAGE_PRECISION] = [
            metrics.average_precision(heatmap, mask, valid) for heatmap, mask in zip(maps, truth, strict=True)
        ]
        if len(truth) == 2:
            rows[:, OWN_OBJECT] = metrics.own_object_preference(maps, truth, everywhere)
    return figures
