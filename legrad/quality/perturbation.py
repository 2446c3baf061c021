"""How faithful a relevance map is to the model: what becomes of a score as patches are taken away or shown.

Works on maps of any origin: all that is needed is one grid an image. The images are the model's normalised
input, in which 0 is the mean colour of the data that it was trained on.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.integrate import trapezoid
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

Test = Literal["deletion", "insertion"]
Order = Literal["positive", "negative"]

SHARES = np.arange(10) / 10  # 0 to 90 %
BLUR_SIGMA = 5 / 224  # of the blurred image that insertion starts from, as a share of the shorter side


def perturbed_images(
    images: Float[Tensor, "maps 3 height width"],
    filling: Float[Tensor, "maps 3 height width"],
    relevance_grids: Float[Tensor, "maps grid_height grid_width"],
    share: float,
    *,
    test: Test,
    order: Order,
) -> Float[Tensor, "maps 3 height width"]:
    """Take away, or show, a share of each image's patches in the order of their relevance.

    Args:
        images: normalised model input; whole patches down and across.
        filling: what stands where a patch is not shown; see `filling_of`.
        relevance_grids: a grid for each image.
        share: of the patches, from 0 to 1, rounded to whole ones.
        test: "deletion": these patches are taken away; "insertion": these alone are shown.
        order: "positive": the most relevant patches first; "negative": the least relevant first.

    Returns:
        New images. For a map that is faithful the score falls early under positive deletion and late under
        negative, and rises early under positive insertion.

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
    """What stands in place of hidden patches: the mean colour under deletion, the blurred image else."""
    return torch.zeros_like(images) if test == "deletion" else blurred(images)


def first_patches(
    relevance_grids: Float[Tensor, "maps grid_height grid_width"], share: float, order: Order
) -> Bool[Tensor, "maps grid_height grid_width"]:
    """Mark the share of patches that come first; of equal ones those that come first row by row.

    Args:
        relevance_grids: any scale; only the order counts.
        share: from 0 to 1.
        order: "positive": the most relevant first; "negative": the least relevant first.
    """
    flat = relevance_grids.flatten(1)
    ranked = flat.argsort(dim=1, descending=order == "positive", stable=True)
    count = round(share * flat.shape[1])
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, ranked[:, :count], True)
    return chosen.reshape(relevance_grids.shape)


def blurred(images: Float[Tensor, "maps 3 height width"]) -> Float[Tensor, "maps 3 height width"]:
    """Images without detail: a Gaussian of 5 pixels for images of 224."""
    sigma = BLUR_SIGMA * min(images.shape[-2:])
    side = 2 * max(1, round(2 * sigma)) + 1
    # reflection needs a side shorter than the image
    side = min(side, 2 * ((min(images.shape[-2:]) - 1) // 2) + 1)
    softened: Tensor = gaussian_blur(images, [side, side], [sigma, sigma])
    return softened


def area_under_curve(
    curves: Float[np.ndarray, "*leading shares"], shares: Float[np.ndarray, " shares"] = SHARES
) -> Float[np.ndarray, "*leading"]:
    """The area under a score over the share of patches, divided by the range of the shares.

    By the trapezoidal rule; a score that does not change has itself as area.
    """
    area: np.ndarray = np.asarray(trapezoid(curves, shares, axis=-1) / (shares[-1] - shares[0]))
    return area
