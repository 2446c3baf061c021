"""Perturbation tests of a relevance map: change of a score while patches are deleted or inserted.

They work for maps of any method, given one grid for each image. The images are the model's normalised input,
in which 0 is the mean colour of its training data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from legrad.arguments import kind_of, shown
from legrad.checks import check_images
from legrad.classes import ClassIndex, check_compares_texts
from legrad.errors import InputError
from legrad.explainer import LeGrad
from legrad.method.towers import Tower
from legrad.method.trace import trace_images
from legrad.quality.pairs import as_prompts, compared_features

Test = Literal["deletion", "insertion"]
Order = Literal["positive", "negative"]
Filling = Literal["mean", "black"]

TESTS: dict[str, tuple[Test, Order]] = {
    "deletion_positive": ("deletion", "positive"),
    "deletion_negative": ("deletion", "negative"),
    "insertion_positive": ("insertion", "positive"),
    "insertion_negative": ("insertion", "negative"),
}
SHARES = np.arange(10) / 10  # 0 to 90 %
BLUR_SIGMA = 5 / 224  # blur of the image that insertion starts from, as a share of the shorter side


@dataclass(frozen=True)
class PerturbationCurve:
    """The output of the model for one test as more and more patches are hidden, or shown.

    Attributes:
        shares: share of the patches that is deleted or inserted at each step, ascending.
        score: cosine of each map's text and its perturbed image; of a classifier, the logit of its class.
        is_right: whether the right class of each map scores highest; None if right classes were not passed.

    Example:
        >>> pixels, text = explainer.preprocess([image]), explainer.embed_text(["a panda"])
        >>> relevance = explainer.relevance(pixels, text)
        >>> tests = ["deletion_positive"]
        >>> curves = legrad.insertion_deletion(explainer, pixels, relevance, text, tests=tests)
        >>> curves["deletion_positive"].score.shape, curves["deletion_positive"].score_area.shape
        ((1, 1, 10), (1, 1))
    """

    shares: Float[np.ndarray, " shares"]
    score: Float[np.ndarray, "*maps shares"]
    is_right: Bool[np.ndarray, "*maps shares"] | None

    @property
    def score_area(self) -> Float[np.ndarray, "*maps"]:
        """Area under each map's score, divided by the range of the shares."""
        return area_under_curve(self.score, self.shares)

    @property
    def accuracy(self) -> Float[np.ndarray, " shares"] | None:
        """Share of the maps whose right class scores highest, at each step."""
        return None if self.is_right is None else self.is_right.reshape(-1, len(self.shares)).mean(axis=0)

    @property
    def accuracy_area(self) -> float | None:
        """Area under `accuracy`, divided by the range of the shares."""
        return None if self.accuracy is None else float(area_under_curve(self.accuracy, self.shares))


def insertion_deletion(
    explainer: LeGrad,
    images: Float[Tensor, "batch 3 height width"],
    relevance_grids: Float[Tensor, "*maps grid_height grid_width"],
    text_embeddings: Float[Tensor, "*leading embed_dim"] | None = None,
    image_index: Int[Tensor, " prompts"] | Sequence[int] | None = None,
    *,
    class_index: ClassIndex | None = None,
    tests: Sequence[str] = tuple(TESTS),
    shares: Sequence[float] = tuple(SHARES.tolist()),
    filling: Filling = "mean",
    class_embeddings: Float[Tensor, "classes embed_dim"] | None = None,
    right_class: Int[Tensor, "*maps"] | ClassIndex | None = None,
    rivals: Bool[Tensor, "*maps classes"] | None = None,
    batch_size: int = 64,
) -> dict[str, PerturbationCurve]:
    """Hide, or show, the patches of images in the order of their relevance, and run the model again.

    For a faithful map the score falls early under positive deletion, late under negative deletion, and rises
    early under positive insertion.

    Args:
        explainer: the model.
        images: preprocessed images.
        relevance_grids: a map of any method for each prompt, as `LeGrad.relevance` and `legrad.baseline`
            return them; or heat maps at the size of the images, to perturb pixel by pixel.
        text_embeddings: as in `LeGrad.relevance`; the score is the cosine.
        image_index: as in `LeGrad.relevance`.
        class_index: of a classifier, in place of text embeddings, as in `LeGrad.relevance`: the class that
            each map explains, whose logit is the score.
        tests: keys of the result: "deletion_positive" and "deletion_negative" hide the most, or the least,
            relevant patches first; "insertion_positive" and "insertion_negative" show them in a blurred
            image.
        shares: shares of the patches, ascending, from 0 to 1; each is rounded to a whole number of patches.
        filling: what deletion hides patches by: the mean colour of the model's training data, or black.
        class_embeddings: unit rows of all classes, for `PerturbationCurve.accuracy`; None for a classifier,
            whose logits take their place.
        right_class: for each map, the class that is right, which may differ from the one that it explains: a
            row of `class_embeddings`, or a class of the classifier.
        rivals: for each map, the classes that its right class must exceed; None: all others.
        batch_size: number of images that are run at a time.

    Returns:
        One curve for each test; its arrays have the shape of the maps, and the shares as last axis.

    Raises:
        InputError: texts for a classifier, or classes for another model; shapes, dtypes, devices, indices or
            options do not fit.

    Source: positive and negative deletion: Chefer et al., "Transformer Interpretability Beyond Attention
        Visualization", CVPR 2021, section 4, taken over by LeGrad (arXiv:2404.03214); insertion into a
        blurred image: Petsiuk et al., "RISE", BMVC 2018, section 4.3.

    Example:
        >>> pixels, text = explainer.preprocess([image]), explainer.embed_text(["a panda"])
        >>> curves = legrad.insertion_deletion(explainer, pixels, explainer.relevance(pixels, text), text)
        >>> relevant, irrelevant = curves["deletion_positive"], curves["deletion_negative"]
        >>> bool(relevant.score_area < irrelevant.score_area)  # relevant patches count more
        True
    """
    explainer._follow_changes()
    tower = explainer.tower
    check_images(tower, images)
    steps = _checked_shares(shares)
    _check_options(tests, filling, batch_size)
    prompts = as_prompts(tower, images, text_embeddings, class_index, image_index)
    if not isinstance(relevance_grids, Tensor):
        raise InputError(
            f"relevance_grids: expected a tensor, received {kind_of(relevance_grids)}; pass "
            "torch.as_tensor(grids)"
        )
    grids = _checked_grids(relevance_grids, prompts.leading, images).to(images.device)
    classes = _checked_classes(
        tower,
        class_embeddings,
        _as_classes(right_class),
        rivals,
        leading=prompts.leading,
        device=images.device,
    )
    shape = (len(tests), len(grids), len(steps))
    score, is_right = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    for start in range(0, len(grids), batch_size):
        maps = slice(start, start + batch_size)
        batch = images[prompts.image_index[maps]]
        for row, name in enumerate(tests):
            perturbed = _perturbed_features(
                explainer, batch, grids[maps], TESTS[name], shares=steps, filling=filling
            )
            for step, features in enumerate(perturbed):
                scores = (features * prompts.unit_rows[maps].float()).sum(dim=-1)
                score[row, maps, step] = scores.cpu().numpy()
                if classes is not None:
                    is_right[row, maps, step] = classes.right(features, maps).cpu().numpy()
    of_caller = (len(tests), *prompts.leading, len(steps))
    score, is_right = score.reshape(of_caller), is_right.reshape(of_caller)
    return {
        name: PerturbationCurve(steps, score[row], None if classes is None else is_right[row])
        for row, name in enumerate(tests)
    }


def _perturbed_features(
    explainer: LeGrad,
    images: Float[Tensor, "maps 3 height width"],
    grids: Float[Tensor, "maps grid_height grid_width"],
    kind: tuple[Test, Order],
    *,
    shares: Float[np.ndarray, " shares"],
    filling: Filling,
) -> Iterator[Float[Tensor, "maps embed_dim"]]:
    """Yield the features, or logits, of the images with each share of the patches hidden, or shown."""
    test, order = kind
    ranks = patch_ranks(grids, order)
    is_black = filling == "black" and test == "deletion"
    replacement = _black(explainer, images) if is_black else filling_of(images, test)
    for share in shares.tolist():
        shown = _perturbed(images, replacement, ranks < _patches(share, ranks), test)
        features = trace_images(explainer.tower, shown, 1, explainer.scoring).image_features
        yield compared_features(explainer.tower, features)


@dataclass(frozen=True)
class _Classes:
    """The classes that the right class of each map competes with.

    Attributes:
        unit_rows: an embedding for each class; None: the features are the logits of the classes.
        right_class: for each map, the class that is right.
        rivals: for each map, the classes that the right one must exceed; None: all others.
    """

    unit_rows: Float[Tensor, "classes embed_dim"] | None
    right_class: Int[Tensor, " maps"]
    rivals: Bool[Tensor, "maps classes"] | None

    def right(self, features: Tensor, maps: slice) -> Bool[Tensor, " maps"]:
        """Return whether the right class of each map scores above its rivals."""
        scores = features if self.unit_rows is None else features @ self.unit_rows.float().T
        right = self.right_class[maps, None]
        others = scores.scatter(1, right, -torch.inf)
        if self.rivals is not None:
            others = others.masked_fill(~self.rivals[maps], -torch.inf)
        is_above: Tensor = scores.gather(1, right)[:, 0] > others.amax(dim=1)
        return is_above


def _check_options(tests: Sequence[str], filling: str, batch_size: int) -> None:
    unknown = [name for name in tests if name not in TESTS]
    if unknown or isinstance(tests, str):
        raise InputError(f"tests: expected some of {', '.join(TESTS)}, received {unknown or tests!r}")
    if filling not in ("mean", "black"):
        raise InputError(f"filling: expected 'mean' or 'black', received {filling!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected a number of images from 1 on, received {batch_size!r}")


def _checked_shares(shares: Sequence[float]) -> Float[np.ndarray, " shares"]:
    steps = np.asarray(shares, dtype=np.float64)
    if (
        steps.ndim != 1
        or len(steps) < 2
        or not ((steps >= 0) & (steps <= 1)).all()
        or (np.diff(steps) <= 0).any()
    ):
        raise InputError(
            f"shares: expected two or more from 0 to 1, ascending, received {list(shares)!r:.200}"
        )
    return steps


def _checked_grids(
    grids: Tensor, leading: tuple[int, ...], images: Tensor
) -> Float[Tensor, "maps height width"]:
    height, width = images.shape[-2:]
    shape = tuple(grids.shape)
    if shape[:-2] != leading or len(shape) < 2 or not 0 < shape[-2] <= height or not 0 < shape[-1] <= width:
        raise InputError(
            f"relevance_grids: expected {[*leading, 'grid_height', 'grid_width']}, one map for each prompt "
            f"with at most {height} x {width} cells, received {list(shape)}"
        )
    if not grids.is_floating_point() or not bool(grids.isfinite().all()):
        raise InputError("relevance_grids: expected finite floating-point values, received others")
    return grids.detach().reshape(-1, *shape[-2:])


def _checked_classes(
    tower: Tower,
    embeddings: Tensor | None,
    right_class: Tensor | None,
    rivals: Tensor | None,
    *,
    leading: tuple[int, ...],
    device: torch.device,
) -> _Classes | None:
    if embeddings is not None:
        check_compares_texts(tower, "class_embeddings")
    for name, each in (("class_embeddings", embeddings), ("rivals", rivals)):
        if each is not None and not isinstance(each, Tensor):
            raise InputError(f"{name}: expected a tensor, received {kind_of(each)}")
    if right_class is None or (embeddings is None and not tower.is_classifier):
        if any(each is not None for each in (embeddings, right_class, rivals)):
            raise InputError(
                "rivals: expected right_class with them, received none"
                if tower.is_classifier
                else "class_embeddings, right_class: expected both or none, and with rivals both"
            )
        return None
    if embeddings is not None and (embeddings.ndim != 2 or embeddings.shape[1] != tower.embed_dim):
        raise InputError(
            f"class_embeddings: expected [classes, {tower.embed_dim}], received {list(embeddings.shape)}"
        )
    classes = tower.embed_dim if embeddings is None else len(embeddings)
    _check_right_class(right_class, leading, classes)
    if rivals is not None and (rivals.dtype != torch.bool or tuple(rivals.shape) != (*leading, classes)):
        raise InputError(
            f"rivals: expected truth values {[*leading, classes]}, received {rivals.dtype} "
            f"{list(rivals.shape)}"
        )
    flat_rivals = None if rivals is None else rivals.reshape(-1, classes).to(device)
    unit_rows = None if embeddings is None else embeddings.to(device)
    return _Classes(unit_rows, right_class.reshape(-1).to(device, torch.int64), flat_rivals)


def _as_classes(right_class: object) -> Tensor | None:
    if right_class is None:
        return None
    try:
        return torch.as_tensor(right_class)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"right_class: expected whole numbers, received {shown(right_class)}") from error


def _check_right_class(right_class: Tensor, leading: tuple[int, ...], classes: int) -> None:
    if (
        tuple(right_class.shape) != leading
        or right_class.is_floating_point()
        or right_class.dtype == torch.bool
    ):
        raise InputError(
            f"right_class: expected whole numbers {list(leading)}, received {right_class.dtype} "
            f"{list(right_class.shape)}"
        )
    if right_class.numel() and not 0 <= int(right_class.min()) <= int(right_class.max()) < classes:
        raise InputError(
            f"right_class: expected classes from 0 to {classes - 1}, received {int(right_class.min())} to "
            f"{int(right_class.max())}"
        )


def _black(explainer: LeGrad, images: Tensor) -> Tensor:
    """Return black images as the model takes them."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64)
        for values in (explainer.transform.mean, explainer.transform.std)
    )
    return (-mean / std).to(images)[None, :, None, None].expand_as(images)


def perturbed_images(
    images: Float[Tensor, "maps 3 height width"],
    filling: Float[Tensor, "maps 3 height width"],
    relevance_grids: Float[Tensor, "maps grid_height grid_width"],
    share: float,
    *,
    test: Test,
    order: Order,
) -> Float[Tensor, "maps 3 height width"]:
    """Delete, or insert, a share of each image's patches in the order of their relevance.

    Args:
        images: normalised model input, a whole number of patches high and wide.
        filling: replacement for hidden patches; see `filling_of`.
        relevance_grids: one grid for each image.
        share: share of the patches in [0, 1], rounded to a whole number of them.
        test: "deletion": hide these patches; "insertion": show only these.
        order: "positive": the most relevant patches first; "negative": the least relevant first.

    Returns:
        New images. For a faithful map the score falls early under positive deletion, late under negative
        deletion, and rises early under positive insertion.

    Source: positive and negative deletion: Chefer et al., "Transformer Interpretability Beyond Attention
        Visualization", CVPR 2021, section 4, taken over by LeGrad (arXiv:2404.03214); insertion into a
        blurred image: Petsiuk et al., "RISE", BMVC 2018, section 4.3 (there pixels, here patches).
    """
    return _perturbed(images, filling, first_patches(relevance_grids, share, order), test)


def _perturbed(images: Tensor, filling: Tensor, chosen: Tensor, test: Test) -> Tensor:
    pixels = F.interpolate(chosen[:, None].to(images.dtype), size=images.shape[-2:], mode="nearest") > 0
    return torch.where(pixels if test == "insertion" else ~pixels, images, filling)


def filling_of(
    images: Float[Tensor, "maps 3 height width"], test: Test
) -> Float[Tensor, "maps 3 height width"]:
    """Return what replaces hidden patches: mean colour for deletion, the blurred image for insertion."""
    return torch.zeros_like(images) if test == "deletion" else blurred(images)


def first_patches(
    relevance_grids: Float[Tensor, "maps grid_height grid_width"], share: float, order: Order
) -> Bool[Tensor, "maps grid_height grid_width"]:
    """Mark the share of patches that come first by relevance; ties are in row-major order.

    Args:
        relevance_grids: grids of any scale; only the order matters.
        share: from 0 to 1.
        order: "positive": the most relevant first; "negative": the least relevant first.
    """
    ranks = patch_ranks(relevance_grids, order)
    return ranks < _patches(share, ranks)


def patch_ranks(
    relevance_grids: Float[Tensor, "maps grid_height grid_width"], order: Order
) -> Int[Tensor, "maps grid_height grid_width"]:
    """Return the place of each patch in the order of its map, from 0; ties are in row-major order."""
    flat = relevance_grids.flatten(1)
    ranked = flat.argsort(dim=1, descending=order == "positive", stable=True)
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(ranked)
    return torch.empty_like(ranked).scatter_(1, ranked, places).reshape(relevance_grids.shape)


def _patches(share: float, ranks: Tensor) -> int:
    """Return a share of the patches of a grid as a whole number of them."""
    return round(share * ranks[0].numel()) if len(ranks) else 0


def blurred(images: Float[Tensor, "maps 3 height width"]) -> Float[Tensor, "maps 3 height width"]:
    """Blur images with a Gaussian whose standard deviation is 5 pixels for images of 224 pixels."""
    sigma = BLUR_SIGMA * min(images.shape[-2:])
    side = 2 * max(1, round(2 * sigma)) + 1
    # Padding by reflection needs a kernel smaller than the image.
    side = min(side, 2 * ((min(images.shape[-2:]) - 1) // 2) + 1)
    softened: Tensor = gaussian_blur(images, [side, side], [sigma, sigma])
    return softened


def area_under_curve(
    curves: Float[np.ndarray, "*leading shares"], shares: Float[np.ndarray, " shares"] = SHARES
) -> Float[np.ndarray, "*leading"]:
    """Return the area under a score over the share of patches, divided by the range of the shares.

    It is computed by the trapezoidal rule; for a constant score it equals the score.
    """
    from scipy.integrate import trapezoid

    area: np.ndarray = np.asarray(trapezoid(curves, shares, axis=-1) / (shares[-1] - shares[0]))
    return area
