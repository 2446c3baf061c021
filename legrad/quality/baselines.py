"""Baseline maps to compare LeGrad with, from the same forward pass of the same model.

All are raw grids on the patch grid, one for each prompt, so that upsampling, normalisation and thresholds are
the same as for LeGrad. They are computed from a `Trace`; its last block is run again where its attention or
gradient is needed. The model is not changed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from legrad.errors import InputError
from legrad.method.towers import Block, Tower
from legrad.method.trace import Trace, run_normed_block, score_features
from legrad.quality.dense_baselines import DENSE_BASELINES, last_block_input, token_text_cosines

CENTRE_PRIOR_SIGMA = 0.25  # standard deviation of the centre prior, as a share of each side


def baseline_grids(
    tower: Tower,
    trace: Trace,
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
    *,
    generator: torch.Generator,
    images: Float[Tensor, "batch 3 height width"] | None = None,
) -> dict[str, Float[Tensor, "prompts grid_height grid_width"]]:
    """Compute every baseline for the given (image, prompt) pairs.

    Args:
        tower: description of the tower that made the trace.
        trace: the encoded images, with at least the last two blocks.
        text_embeddings: unit rows, one for each prompt.
        image_index: for each prompt, the row of its image in the trace.
        generator: generator of the random grids, on the CPU.
        images: the images that the trace encodes. If they are given and the tower has a class token,
            attention rollout is included, and the trace must hold every block.

    Returns:
        Grids by name of the baseline, in float32.

    Raises:
        InputError: the trace holds fewer blocks than needed.
    """
    grid = (trace.grid_height, trace.grid_width)
    device = image_index.device
    return {
        "GradCAM, last block": gradcam(tower, trace, text_embeddings, image_index),
        "patch-text similarity": patch_text_similarity(tower, trace, text_embeddings, image_index),
        **{
            name: dense(tower, trace, text_embeddings, image_index) for name, dense in DENSE_BASELINES.items()
        },
        "mean-query attention": mean_query_attention(tower, trace)[image_index],
        **{name: grids[image_index] for name, grids in _pooling_attention(tower, trace, images).items()},
        "centre prior": centre_prior(*grid).to(device).expand(len(image_index), *grid),
        "random": random_grids(len(image_index), *grid, generator=generator).to(device),
    }


def _pooling_attention(tower: Tower, trace: Trace, images: Tensor | None) -> dict[str, Tensor]:
    """Return the attention from the pooled token to the patches, if the tower pools by attention."""
    if tower.own.pooler is not None:
        return {"pooler attention": pooler_attention(tower.own.pooler, tower, trace)}
    if not tower.prefix_tokens:
        return {}
    last = {"CLS attention": cls_attention(tower, trace)}
    return last if images is None else last | {"attention rollout": attention_rollout(tower, trace, images)}


def random_grids(
    prompts: int, grid_height: int, grid_width: int, *, generator: torch.Generator
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """Return independent uniform noise in every cell."""
    return torch.rand(prompts, grid_height, grid_width, generator=generator)


def centre_prior(grid_height: int, grid_width: int) -> Float[Tensor, "grid_height grid_width"]:
    """Return a centred Gaussian with a standard deviation of 1/4 side; independent of image and prompt."""
    rows, columns = (
        ((torch.arange(cells) + 0.5) / cells - 0.5) / CENTRE_PRIOR_SIGMA
        for cells in (grid_height, grid_width)
    )
    return torch.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / 2)


def cls_attention(tower: Tower, trace: Trace) -> Float[Tensor, "batch grid_height grid_width"]:
    """Return the class token's attention to each patch in the last block, averaged over heads.

    It does not depend on the prompt.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, figure 1
        (there one map for each head).
    """
    return _patch_grid(_last_attention(tower, trace)[:, 0], tower, trace)


@torch.no_grad()
def attention_rollout(
    tower: Tower, trace: Trace, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch grid_height grid_width"]:
    """Compute attention rollout: the share of each patch in the class token, if only attention mixed tokens.

    Each block's attention, averaged over heads, is averaged with the identity for the residual; the result is
    the class token's row of the product over all blocks. It does not depend on the prompt. Blocks are
    multiplied from last to first, so that only one row and one attention matrix are in memory at a time.

    Args:
        tower: description of the tower that made the trace.
        trace: the encoded images, with every block.
        images: the same images; their embedding enters the first block.

    Raises:
        InputError: the trace lacks blocks.

    Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, section 3.
    """
    if len(trace.layers) != len(tower.blocks):
        raise InputError(
            f"attention rollout: expected a trace of all {len(tower.blocks)} blocks, "
            f"received {len(trace.layers)}"
        )
    with torch.autocast(images.device.type, enabled=False):
        inputs = [tower.embed(images).tokens, *(layer.block_outputs for layer in trace.layers[:-1])]
    reaching = F.one_hot(torch.zeros(len(images), dtype=torch.long), inputs[0].shape[1])
    rows = reaching.to(images.device, torch.float32)[:, None]
    for block, tokens in zip(reversed(tower.blocks), reversed(inputs), strict=True):
        rows = (rows @ _attention(block, tokens, trace.rotary) + rows) / 2
    return _patch_grid(rows[:, 0], tower, trace)


def pooler_attention(
    pooler: Block, tower: Tower, trace: Trace
) -> Float[Tensor, "batch grid_height grid_width"]:
    """Return an attentional pooler's attention to each patch, averaged over heads; no prompt is used."""
    attention = _attention(pooler, trace.layers[-1].block_outputs, None)
    return _patch_grid(attention[:, 0], tower, trace)


def mean_query_attention(tower: Tower, trace: Trace) -> Float[Tensor, "batch grid_height grid_width"]:
    """Return the attention to each patch in the last block, averaged over heads and queries."""
    return _patch_grid(_last_attention(tower, trace).mean(dim=1), tower, trace)


def patch_text_similarity(
    tower: Tower,
    trace: Trace,
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """Return the cosine of the text and each output patch token after the model's final norm and projection.

    Source: the unmodified dense features that Zhou et al., "Extract Free Dense Labels from CLIP", ECCV 2022,
        start from; their method (`legrad.quality.dense_baselines`) also changes the last attention.
    """
    with torch.no_grad():
        tokens = trace.layers[-1].block_outputs
        return token_text_cosines(tower, trace, tokens, text_embeddings, image_index)


def gradcam(
    tower: Tower,
    trace: Trace,
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """Compute GradCAM of the model's own image-text cosine at the normalised input of the last block.

    The activations are those after the block's first norm: for a model that pools its class token, the last
    ones in which the score depends on the patches. A channel's weight is its gradient averaged over the
    patches, and the map is the ReLU of the weighted sum of channels.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, equations 1 and 2; the layer is the usual choice for
        vision transformers (Gildenblat et al., pytorch-grad-cam).
    """
    block = tower.blocks[-1]
    residual = last_block_input(trace)[image_index]
    with torch.enable_grad():
        activations = block.norm(residual).detach().requires_grad_()
        layer = run_normed_block(block, residual, activations, trace.rotary)
        features = score_features(tower.own, layer.outputs)
        score = (F.normalize(features.float(), dim=-1) * text_embeddings.float()).sum()
        gradient = torch.autograd.grad(score, activations)[0]
    channel_weights = gradient[:, tower.prefix_tokens :].float().mean(dim=1)
    weighted_sum = torch.einsum("ptc,pc->pt", activations.detach().float(), channel_weights)
    return _patch_grid(weighted_sum.relu(), tower, trace)


def _last_attention(tower: Tower, trace: Trace) -> Float[Tensor, "batch queries keys"]:
    return _attention(tower.blocks[-1], last_block_input(trace), trace.rotary)


@torch.no_grad()
def _attention(
    block: Block, tokens: Float[Tensor, "batch tokens width"], rotary: Tensor | None
) -> Float[Tensor, "batch queries keys"]:
    """Return a block's attention matrix, averaged over heads."""
    queries, keys, _ = block.project(block.norm(tokens), rotary)
    logits = queries.float() @ keys.float().mT / queries.shape[-1] ** 0.5
    bias = block.bias()
    weights = (logits if bias is None else logits + bias.float()).softmax(dim=-1)
    mean_of_heads: Tensor = weights.mean(dim=1)
    return mean_of_heads


def _patch_grid(
    per_token: Float[Tensor, "maps tokens"], tower: Tower, trace: Trace
) -> Float[Tensor, "maps grid_height grid_width"]:
    return per_token[:, tower.prefix_tokens :].reshape(-1, trace.grid_height, trace.grid_width)
