"""Perturbation tests of a relevance map: change of a score while patches are deleted or inserted.

They work for maps of any method, given one grid for each image. The images are the model's normalised input,
in which 0 is the mean colour of its training data.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

Test = Literal["deletion", "insertion"]
Order = Literal["positive", "negative"]

SHARES = np.arange(10) / 10  # 0 to 90 %
BLUR_SIGMA = 5 / 224  # blur of the image that insertion starts from, as a share of the shorter side


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
    chosen = first_patches(relevance_grids, share, order)
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
    flat = relevance_grids.flatten(1)
    ranked = flat.argsort(dim=1, descending=order == "positive", stable=True)
    count = round(share * flat.shape[1])
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, ranked[:, :count], True)
    return chosen.reshape(relevance_grids.shape)


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
