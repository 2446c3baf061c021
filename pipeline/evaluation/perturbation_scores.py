"""What the model says of scenes as patches are hidden in the order of each method's map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

import legrad
from legrad.method.trace import trace_images
from legrad.quality.perturbation import SHARES, Order, Test, filling_of, perturbed_images

TESTS: tuple[tuple[Test, Order], ...] = (
    ("deletion", "positive"),
    ("deletion", "negative"),
    ("insertion", "positive"),
    ("insertion", "negative"),
)
IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class PerturbedScores:
    """What the model says of a batch's prompts in images with a share of the patches hidden, or shown.

    Attributes:
        cosines: similarity of image and prompt.
        hits: 1 where the prompt's class scores above every class that the scene does not show; NaN without a
            class list.
    """

    cosines: Float[np.ndarray, "methods tests shares pairs"]
    hits: Float[np.ndarray, "methods tests shares pairs"]


def perturb(
    explainer: legrad.LeGrad,
    images: Float[Tensor, "pairs 3 height width"],
    grids: Float[Tensor, "methods pairs grid_height grid_width"],
    texts: Float[Tensor, "pairs embed_dim"],
    *,
    class_embeddings: Float[Tensor, "classes embed_dim"],
    class_of_pair: Int[np.ndarray, " pairs"],
    present: Bool[np.ndarray, "pairs classes"],
) -> PerturbedScores:
    """Hide patches by every method's map, in every test, and ask the model again.

    Args:
        explainer: the model.
        images: the image of each prompt, as the model takes it.
        grids: raw relevance of each method.
        texts: unit rows of the prompts.
        class_embeddings: unit rows of class id 1, 2, ...; may be none.
        class_of_pair: the class of each prompt.
        present: which classes are in the scene of each prompt.
    """
    shape = (len(grids), len(TESTS), len(SHARES), len(texts))
    scores = PerturbedScores(np.full(shape, np.nan), np.full(shape, np.nan))
    for start in range(0, len(texts), IMAGES_AT_ONCE):
        pairs = slice(start, start + IMAGES_AT_ONCE)
        fillings = {test: filling_of(images[pairs], test) for test, _ in TESTS}
        for (method, kind), share in _steps(len(grids)):
            test, order = TESTS[kind]
            shown = perturbed_images(
                images[pairs], fillings[test], grids[method, pairs], SHARES[share], test=test, order=order
            )
            features = trace_images(explainer.tower, shown, 1, explainer.scoring).image_features.float()
            scores.cosines[method, kind, share, pairs] = (features * texts[pairs].float()).sum(-1).cpu()
            if len(class_embeddings):
                scores.hits[method, kind, share, pairs] = _hits(
                    (features @ class_embeddings.float().T).cpu().numpy(),
                    class_of_pair[pairs],
                    present[pairs],
                )
    # before the first patch every method has the same image
    scores.cosines[1:, :, 0], scores.hits[1:, :, 0] = scores.cosines[:1, :, 0], scores.hits[:1, :, 0]
    return scores


def _steps(methods: int) -> list[tuple[tuple[int, int], int]]:
    """(method, test) and share, without what is the same for every method."""
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
