"""Maps that LeGrad has to beat, from the same model on the same images.

All give one grid a prompt on the patch grid, raw (not normalised), so that they go through the same
upsampling, normalisation and thresholds as LeGrad's own. The model is read by a hook on its last block, which
is gone when the call ends, also after an exception; nothing else touches it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from legrad.errors import LeGradError

CENTRE_PRIOR_SIGMA = 0.25  # standard deviation of the centre prior, as a share of each side
PREFIX_TOKENS = 1  # open_clip's VisionTransformer: the class token


@dataclass(frozen=True)
class LastBlock:
    """What goes into the last block of an image tower, and what is needed to go on from there.

    Attributes:
        visual: the image tower.
        tokens: input of the last block, class token first, patches in row-major order.
        grid_height: rows of the patch grid.
        grid_width: columns of the patch grid.
    """

    visual: VisionTransformer
    tokens: Float[Tensor, "batch tokens width"]
    grid_height: int
    grid_width: int

    @property
    def block(self) -> Any:
        """The last residual attention block."""
        return self.visual.transformer.resblocks[-1]


def baseline_grids(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    text_embeddings: Float[Tensor, "prompts dim"],
    image_index: Int[Tensor, " prompts"],
    *,
    generator: torch.Generator,
) -> dict[str, Float[Tensor, "prompts grid_height grid_width"]]:
    """Every baseline for the given (image, prompt) pairs, from one forward pass.

    Args:
        model: an open_clip model whose image tower is a `VisionTransformer` without attentional pooling.
        images: preprocessed images, on the model's device and in its precision.
        text_embeddings: unit rows, one a prompt.
        image_index: the row of ``images`` that each prompt belongs to.
        generator: of the random grids; on the CPU.

    Returns:
        Name of the baseline to its grids, in float32.

    Raises:
        LeGradError: the image tower is of another family.
    """
    last_block = read_last_block(model, images)
    grid = (last_block.grid_height, last_block.grid_width)
    return {
        "GradCAM, last block": gradcam(last_block, text_embeddings, image_index),
        "patch-text similarity": patch_text_similarity(last_block, text_embeddings, image_index),
        "mean-query attention": mean_query_attention(last_block)[image_index],
        "CLS attention": cls_attention(last_block)[image_index],
        "centre prior": centre_prior(*grid).to(images.device).expand(len(image_index), *grid),
        "random": random_grids(len(image_index), *grid, generator=generator).to(images.device),
    }


def read_last_block(model: nn.Module, images: Float[Tensor, "batch 3 height width"]) -> LastBlock:
    """Encode the images up to the input of the last block.

    Raises:
        LeGradError: the image tower is of another family.
    """
    visual = _plain_vision_transformer(model)
    captured: list[Tensor] = []
    with _seeing_input(visual.transformer.resblocks[-1], captured), torch.no_grad():
        visual(images)
    patch_height, patch_width = visual.patch_size
    return LastBlock(visual, captured[0], images.shape[2] // patch_height, images.shape[3] // patch_width)


def random_grids(
    prompts: int, grid_height: int, grid_width: int, *, generator: torch.Generator
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """Independent uniform noise in every cell."""
    return torch.rand(prompts, grid_height, grid_width, generator=generator)


def centre_prior(grid_height: int, grid_width: int) -> Float[Tensor, "grid_height grid_width"]:
    """A Gaussian around the centre, its deviation a quarter of each side; knows neither image nor prompt."""
    rows, columns = (
        (torch.arange(cells) + 0.5) / cells / CENTRE_PRIOR_SIGMA - 0.5 / CENTRE_PRIOR_SIGMA
        for cells in (grid_height, grid_width)
    )
    return torch.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / 2)


def cls_attention(last_block: LastBlock) -> Float[Tensor, "batch grid_height grid_width"]:
    """How much the class token attends to each patch in the last block, averaged over heads; knows no prompt.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, figure 1
        (there one map a head).
    """
    return _patch_grid(_attention(last_block)[:, 0], last_block)


def mean_query_attention(last_block: LastBlock) -> Float[Tensor, "batch grid_height grid_width"]:
    """How much all tokens attend to each patch in the last block, averaged over heads; knows no prompt."""
    return _patch_grid(_attention(last_block).mean(dim=1), last_block)


def patch_text_similarity(
    last_block: LastBlock,
    text_embeddings: Float[Tensor, "prompts dim"],
    image_index: Int[Tensor, " prompts"],
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """Cosine of each output patch token, through the model's final norm and projection, with the text.

    Source: the direct reading of dense features that Zhou et al., "Extract Free Dense Labels from CLIP",
        ECCV 2022, improve on by changing the last attention, which this baseline does not.
    """
    visual = last_block.visual
    with torch.no_grad():
        features = visual.ln_post(last_block.block(last_block.tokens)) @ visual.proj
    unit_features = F.normalize(features.float(), dim=-1)[image_index]
    return _patch_grid(torch.einsum("ptd,pd->pt", unit_features, text_embeddings.float()), last_block)


def gradcam(
    last_block: LastBlock,
    text_embeddings: Float[Tensor, "prompts dim"],
    image_index: Int[Tensor, " prompts"],
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """GradCAM of the model's own image-text cosine, at the last block's normalised input.

    The activations are those after the block's first norm, the last place where the score still depends on
    the patches when the model pools its class token. A channel's weight is its gradient averaged over the
    patches, and the map is the ReLU of the weighted sum of channels.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, equations 1 and 2; the layer is the one commonly taken
        for vision transformers (Gildenblat et al., pytorch-grad-cam).
    """
    block = last_block.block
    residual = last_block.tokens[image_index]
    with torch.enable_grad():
        activations = block.ln_1(residual).detach().requires_grad_()
        attended = block.attn(activations, activations, activations, need_weights=False)[0]
        tokens = residual + block.ls_1(attended)
        features = _pooled_features(last_block.visual, tokens + block.ls_2(block.mlp(block.ln_2(tokens))))
        score = (F.normalize(features.float(), dim=-1) * text_embeddings.float()).sum()
        gradient = torch.autograd.grad(score, activations)[0]
    channel_weights = gradient[:, PREFIX_TOKENS:].float().mean(dim=1)
    weighted_sum = torch.einsum("ptc,pc->pt", activations.detach().float(), channel_weights)
    return _patch_grid(weighted_sum.relu(), last_block)


def _pooled_features(visual: VisionTransformer, tokens: Tensor) -> Tensor:
    """The model's own way from the last block's output to the shared space, before unit norm."""
    pooled, _ = visual._pool(tokens)
    features: Tensor = pooled @ visual.proj
    return features


def _attention(last_block: LastBlock) -> Float[Tensor, "batch queries keys"]:
    """The last block's attention, averaged over heads."""
    with torch.no_grad():
        normalised = last_block.block.ln_1(last_block.tokens)
        weights: Tensor = last_block.block.attn(normalised, normalised, normalised, need_weights=True)[1]
    return weights.float()


def _patch_grid(
    per_token: Float[Tensor, "maps tokens"], last_block: LastBlock
) -> Float[Tensor, "maps grid_height grid_width"]:
    return per_token[:, PREFIX_TOKENS:].reshape(-1, last_block.grid_height, last_block.grid_width)


def _plain_vision_transformer(model: nn.Module) -> VisionTransformer:
    visual = getattr(model, "visual", None)
    supported = "an open_clip VisionTransformer with plain attention, a projection and no attentional pooling"
    if not isinstance(visual, VisionTransformer):
        raise LeGradError(f"baselines: expected {supported}, received {type(visual or model).__name__}")
    attention = visual.transformer.resblocks[-1].attn
    if (
        visual.attn_pool is not None
        or visual.proj is None
        or not isinstance(attention, nn.MultiheadAttention)
    ):
        raise LeGradError(f"baselines: expected {supported}, received one with another attention or pooling")
    return visual


@contextmanager
def _seeing_input(block: nn.Module, captured: list[Tensor]) -> Iterator[None]:
    """Append the block's first argument to ``captured`` on every call, inside the context alone."""
    handle = block.register_forward_pre_hook(lambda _, arguments: captured.append(arguments[0].detach()))
    try:
        yield
    finally:
        handle.remove()
