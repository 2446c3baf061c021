"""Perturbation tests: the output of the model as patches are hidden in the order of each method's map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import legrad
from legrad.quality import metrics
from legrad.quality.perturbation import SHARES, TESTS, area_under_curve
from pipeline.evaluation.result import PerturbationCurve, PerturbationScores


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
    every_image = torch.arange(len(texts), device=texts.device)
    has_classes = len(class_embeddings) > 0
    for method, maps in enumerate(grids):
        curves = legrad.insertion_deletion(
            explainer,
            images,
            maps,
            texts,
            every_image,
            class_embeddings=class_embeddings if has_classes else None,
            right_class=torch.from_numpy(class_of_pair - 1) if has_classes else None,
            rivals=torch.from_numpy(~present) if has_classes else None,
        )
        for row, curve in enumerate(curves.values()):
            found.cosines[method, row] = curve.score.T
            if curve.is_right is not None:
                found.hits[method, row] = curve.is_right.T
    return found


def joined_outputs(batches: Sequence[PerturbedOutputs]) -> PerturbedOutputs:
    """Join the outputs of batches, at least one, whose scenes are numbered consecutively."""
    return PerturbedOutputs(
        np.concatenate([outputs.cosines for outputs in batches], axis=-1),
        np.concatenate([outputs.hits for outputs in batches], axis=-1),
        np.concatenate([outputs.scene_of_pair for outputs in batches]),
    )


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
                for kind, (test, order) in enumerate(TESTS.values())
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
