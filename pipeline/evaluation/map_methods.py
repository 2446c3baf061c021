"""Compute the heat maps of LeGrad and of every baseline from one forward pass, and measure them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import legrad
from legrad.inputs import as_ragged
from legrad.method.affinity import Affinity, spread_along_keys
from legrad.method.relevance import relevance_grids
from legrad.method.trace import Trace, trace_images
from legrad.quality.baselines import BASELINES, title_of
from pipeline.errors import UserError
from pipeline.evaluation.map_scores import DecodedScene, MapMetrics, measure_maps
from pipeline.evaluation.perturbation import PerturbedOutputs, joined_outputs, perturb
from pipeline.shards.ground_truth import Scene

# Not CheferCAM: it runs backward through every block, once for each text.
MEASURED_BASELINES = [name for name in BASELINES if name != "chefercam"]


@dataclass(frozen=True)
class MeasuredScenes:
    """Everything that was measured on some scenes.

    Attributes:
        methods: names of the kinds of map.
        metrics: of the maps against the ground truth.
        scene_of_pair: number of the scene of each prompt.
        class_of_pair: the class of each prompt.
        class_scores: cosine of every scene with every class; no columns without a class list.
        present: which classes the captions of a scene name.
        perturbed: outputs of the model for images with patches hidden; None where no scene was perturbed.
    """

    methods: tuple[str, ...]
    metrics: MapMetrics
    scene_of_pair: Int[np.ndarray, " pairs"]
    class_of_pair: Int[np.ndarray, " pairs"]
    class_scores: Float[np.ndarray, "scenes classes"]
    present: Bool[np.ndarray, "scenes classes"]
    perturbed: PerturbedOutputs | None


def legrad_name(layers: int, depth: int, affinity: Affinity = "none") -> str:
    """Return the name of LeGrad's maps over the last `layers` of `depth` blocks."""
    blocks = f"all {depth}" if layers == depth else f"last {layers}"
    return f"LeGrad, {blocks}" if affinity == "none" else f"LeGrad, {blocks}, {affinity}"


def legrad_grids(
    explainer: legrad.LeGrad,
    trace: Trace,
    texts: Float[Tensor, "pairs embed_dim"],
    image_index: Int[Tensor, " pairs"],
    layer_counts: Sequence[int],
    *,
    spread_layers: int,
) -> dict[str, Float[Tensor, "pairs grid_height grid_width"]]:
    """Compute raw relevance over several numbers of last blocks, whatever the explainer's own options.

    Args:
        explainer: the model.
        trace: the encoded images, with every block and with keys.
        texts: unit rows of the prompts.
        image_index: for each prompt the row of its image.
        layer_counts: numbers of last blocks.
        spread_layers: number of last blocks whose relevance is also spread along the keys.

    Returns:
        Grids by `legrad_name`.
    """
    prompts = as_ragged(trace.image_features, texts, image_index)
    per_layer = relevance_grids(
        explainer.tower,
        trace,
        prompts.unit_rows,
        prompts.image_index,
        scoring=explainer.scoring,
        one_by_one=prompts.one_by_one,
    )
    from_last, depth = per_layer.flip(0).cumsum(dim=0), len(per_layer)
    maps = {legrad_name(count, depth): from_last[count - 1] for count in layer_counts}
    if trace.unit_keys is not None:
        spread = spread_along_keys(from_last[spread_layers - 1], trace.unit_keys, prompts.image_index)
        maps[legrad_name(spread_layers, depth, "keys")] = spread
    return maps


def named_baselines(
    explainer: legrad.LeGrad,
    images: Float[Tensor, "batch 3 height width"],
    texts: Float[Tensor, "pairs embed_dim"],
    image_index: Int[Tensor, " pairs"],
    *,
    generator: torch.Generator,
) -> dict[str, Float[Tensor, "pairs grid_height grid_width"]]:
    """Compute the baselines that evaluations compare LeGrad with, by their titles."""
    grids = legrad.baseline_grids(
        explainer, images, texts, image_index, methods=MEASURED_BASELINES, generator=generator
    )
    return {title_of(name, explainer): maps for name, maps in grids.items()}


class MapEvaluator:
    """Run one model on batches of scenes and measure the maps of every method.

    Args:
        explainer: the model.
        class_texts: prompts of class ids 1, 2, ...; without any, recognition is not measured.
        layer_counts: LeGrad is measured for each of these numbers of last blocks.
        seed: of the random maps.
        spread_layers: number of last blocks for which LeGrad is also measured with `affinity="keys"`.
    """

    def __init__(
        self,
        explainer: legrad.LeGrad,
        class_texts: Sequence[str],
        layer_counts: Sequence[int],
        seed: int,
        *,
        spread_layers: int,
    ) -> None:
        self._explainer = explainer
        self._class_embeddings = explainer.embed_text(class_texts)
        self._layer_counts = layer_counts
        self._spread_layers = spread_layers
        self._generator = torch.Generator().manual_seed(seed)

    def measure(self, batch: Sequence[DecodedScene], perturbed_scenes: int = 0) -> MeasuredScenes:
        """Encode the batch once, compute every map and measure each; all scenes have one input size.

        Args:
            batch: the scenes.
            perturbed_scenes: number of scenes, the first ones, for which the perturbation tests run.

        Raises:
            UserError: a class id is not in the class list.
        """
        explainer = self._explainer
        present = np.stack([_present(decoded.scene, len(self._class_embeddings)) for decoded in batch])
        pixels = torch.from_numpy(np.stack([decoded.pixels for decoded in batch])).to(explainer.device)
        images = explainer.transform.normalise(pixels, explainer.dtype)
        depth = len(explainer.tower.blocks)
        trace = trace_images(explainer.tower, images, depth, explainer.scoring, keep_keys=True)
        scene_of_pair = np.repeat(np.arange(len(batch)), [len(decoded.objects) for decoded in batch])
        texts = explainer.embed_text(
            [decoded.scene.captions[index] for decoded in batch for index in decoded.objects]
        )
        image_index = torch.from_numpy(scene_of_pair).to(explainer.device)
        grids = self._grids(trace, images, texts, image_index)
        stacked = torch.stack(list(grids.values())).float()
        class_scores = trace.image_features.float() @ self._class_embeddings.float().T
        class_of_pair = np.array(
            [decoded.scene.class_ids[index] for decoded in batch for index in decoded.objects], dtype=np.int64
        )
        chosen = np.flatnonzero(scene_of_pair < perturbed_scenes)
        return MeasuredScenes(
            methods=tuple(grids),
            metrics=measure_maps(batch, stacked.cpu(), scene_of_pair, explainer.tower.normalisation),
            scene_of_pair=scene_of_pair,
            class_of_pair=class_of_pair,
            class_scores=class_scores.cpu().numpy(),
            present=present,
            perturbed=perturb(
                explainer,
                images[image_index[chosen]],
                stacked[:, chosen],
                texts[chosen],
                class_embeddings=self._class_embeddings,
                class_of_pair=class_of_pair[chosen],
                scene_of_pair=scene_of_pair[chosen],
                present=present[scene_of_pair[chosen]],
            )
            if perturbed_scenes
            else None,
        )

    def _grids(
        self,
        trace: Trace,
        images: Float[Tensor, "batch 3 height width"],
        texts: Float[Tensor, "pairs embed_dim"],
        image_index: Int[Tensor, " pairs"],
    ) -> dict[str, Float[Tensor, "pairs grid_height grid_width"]]:
        explainer = self._explainer
        maps = legrad_grids(
            explainer, trace, texts, image_index, self._layer_counts, spread_layers=self._spread_layers
        )
        return maps | named_baselines(explainer, images, texts, image_index, generator=self._generator)


def _present(scene: Scene, class_count: int) -> Bool[np.ndarray, " classes"]:
    present = np.zeros(class_count, dtype=bool)
    for class_id in scene.class_ids if class_count else ():
        if not 1 <= class_id <= class_count:
            raise UserError(f"{scene.key}: class id {class_id}, but the class list has {class_count} lines")
        present[class_id - 1] = True
    return present


def joined(batches: Sequence[MeasuredScenes]) -> MeasuredScenes:
    """Join batches, at least one, and number their scenes consecutively."""
    offsets = np.cumsum([0, *(len(batch.present) for batch in batches[:-1])])
    perturbed = [
        replace(batch.perturbed, scene_of_pair=batch.perturbed.scene_of_pair + offset)
        for batch, offset in zip(batches, offsets, strict=True)
        if batch.perturbed is not None
    ]
    return MeasuredScenes(
        methods=batches[0].methods,
        metrics=MapMetrics(
            np.concatenate([batch.metrics.values for batch in batches], axis=1),
            np.concatenate([batch.metrics.counts for batch in batches], axis=1),
        ),
        scene_of_pair=np.concatenate(
            [batch.scene_of_pair + offset for batch, offset in zip(batches, offsets, strict=True)]
        ),
        class_of_pair=np.concatenate([batch.class_of_pair for batch in batches]),
        class_scores=np.concatenate([batch.class_scores for batch in batches]),
        present=np.concatenate([batch.present for batch in batches]),
        perturbed=joined_outputs(perturbed) if perturbed else None,
    )
