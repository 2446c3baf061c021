"""Perturbation tests: the output of the model as patches are hidden in the order of each method's map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

import legrad
from legrad.method.trace import trace_images
from legrad.quality import metrics
from legrad.quality.perturbation import SHARES, Order, Test, area_under_curve, filling_of, perturbed_images
from pipeline.evaluation.result import PerturbationCurve, PerturbationScores

TESTS: tuple[tuple[Test, Order], ...] = (
    ("deletion", "positive"),
    ("deletion", "negative"),
    ("insertion", "positive"),
    ("insertion", "negative"),
)
IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class PerturbedOutputs:
    """The output of the model for images with a share of the patches hidden, or shown.

    Attributes:
        cosines: similarity of image and prompt.
        hits: 1 where the class of the prompt scores above every class that is absent from the scene; NaN
            without a class list.
        scene_of_pair: number of the scene of each prompt.
    """

    cosines: Float[np.ndarray, "methods tests shares pairs"]
    hits: Float[np.ndarray, "methods tests shares pairs"]
    scene_of_pair: Int[np.ndarray, " pairs"]


def perturb(
    explainer: legrad.LeGrad,
    images: Float[Tensor, "pairs 3 height width"],
    grids: Float[Tensor, "methods pairs grid_height grid_width"],
    texts: Float[Tensor, "pairs embed_dim"],
    *,
    class_embeddings: Float[Tensor, "classes embed_dim"],
    class_of_pair: Int[np.ndarray, " pairs"],
    scene_of_pair: Int[np.ndarray, " pairs"],
    present: Bool[np.ndarray, "pairs classes"],
) -> PerturbedOutputs:
    """Hide patches in the order of every method's map, in every test, and run the model again.

    Args:
        explainer: the model.
        images: the image of each prompt, as the model takes it.
        grids: raw relevance of each method.
        texts: unit rows of the prompts.
        class_embeddings: unit rows of class id 1, 2, ...; may be none.
        class_of_pair: the class of each prompt.
        scene_of_pair: number of the scene of each prompt.
        present: which classes are in the scene of each prompt.
    """
    shape = (len(grids), len(TESTS), len(SHARES), len(texts))
    found = PerturbedOutputs(np.full(shape, np.nan), np.full(shape, np.nan), scene_of_pair)
    for start in range(0, len(texts), IMAGES_AT_ONCE):
        pairs = slice(start, start + IMAGES_AT_ONCE)
        fillings = {test: filling_of(images[pairs], test) for test, _ in TESTS}
        for (method, kind), share in _steps(len(grids)):
            test, order = TESTS[kind]
            shown = perturbed_images(
                images[pairs], fillings[test], grids[method, pairs], SHARES[share], test=test, order=order
            )
            features = trace_images(explainer.tower, shown, 1, explainer.scoring).image_features.float()
            found.cosines[method, kind, share, pairs] = (features * texts[pairs].float()).sum(-1).cpu()
            if len(class_embeddings):
                found.hits[method, kind, share, pairs] = _hits(
                    (features @ class_embeddings.float().T).cpu().numpy(),
                    class_of_pair[pairs],
                    present[pairs],
                )
    # before the first patch every method has the same image
    found.cosines[1:, :, 0], found.hits[1:, :, 0] = found.cosines[:1, :, 0], found.hits[:1, :, 0]
    return found


def joined_outputs(batches: Sequence[PerturbedOutputs]) -> PerturbedOutputs:
    """Join the outputs of batches, at least one, whose scenes are numbered consecutively."""
    return PerturbedOutputs(
        np.concatenate([outputs.cosines for outputs in batches], axis=-1),
        np.concatenate([outputs.hits for outputs in batches], axis=-1),
        np.concatenate([outputs.scene_of_pair for outputs in batches]),
    )


def _steps(methods: int) -> list[tuple[tuple[int, int], int]]:
    """Return (method, test) and share, without the steps that are the same for every method."""
    return [
        ((method, test), share)
        for method in range(methods)
        for test in range(len(TESTS))
        for share in range(len(SHARES))
        if share or not method
    ]


def _hits(
    class_scores: Float[np.ndarray, "pairs classes"],
    class_of_pair: Int[np.ndarray, " pairs"],
    present: Bool[np.ndarray, "pairs classes"],
) -> Bool[np.ndarray, " pairs"]:
    own = class_scores[np.arange(len(class_scores)), class_of_pair - 1]
    rivals = np.where(present, -np.inf, class_scores).max(axis=1)
    hits: np.ndarray = own > rivals
    return hits


def score_perturbation(
    methods: Sequence[str], found: PerturbedOutputs, *, configured_name: str | None, seed: int
) -> tuple[PerturbationScores, ...]:
    """Return the curves of every method, and the areas under them with 95 % intervals over scenes.

    Args:
        methods: names of the kinds of map.
        found: outputs of the model for all perturbed images.
        configured_name: name of the method that a job used, if any.
        seed: of the bootstrap.
    """
    return tuple(
        PerturbationScores(
            method,
            method == configured_name,
            tuple(
                _curve(
                    test,
                    order,
                    found.cosines[row, kind],
                    found.hits[row, kind],
                    scene_of_pair=found.scene_of_pair,
                    seed=seed,
                )
                for kind, (test, order) in enumerate(TESTS)
            ),
        )
        for row, method in enumerate(methods)
    )


def _curve(
    test: str,
    order: str,
    cosines: Float[np.ndarray, "shares pairs"],
    hits: Float[np.ndarray, "shares pairs"],
    *,
    scene_of_pair: Int[np.ndarray, " pairs"],
    seed: int,
) -> PerturbationCurve:
    has_classes = not np.isnan(hits).any()
    return PerturbationCurve(
        test=test,
        order=order,
        accuracy=tuple(hits.mean(axis=1).tolist()) if has_classes else (),
        cosine=tuple(cosines.mean(axis=1).tolist()),
        accuracy_area=metrics.bootstrap_mean(area_under_curve(hits.T), scene_of_pair, seed=seed)
        if has_classes
        else None,
        cosine_area=metrics.bootstrap_mean(area_under_curve(cosines.T), scene_of_pair, seed=seed),
    )
