"""Maps that LeGrad has to beat, from the same forward pass of the same model.

All are raw grids on the patch grid, one a prompt, so that they go through the same upsampling, normalisation
and thresholds as LeGrad's own. They are computed from a `Trace`, whose last block is run again where its
attention or its gradient is needed; the model is not touched.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from legrad.errors import InputError
from legrad.method.stages import run_stages
from legrad.method.towers import Block, Scoring, Tower
from legrad.method.trace import Trace, run_block, run_normed_block, score_features

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
    """Every baseline for the given (image, prompt) pairs.

    Args:
        tower: description of the tower that made the trace.
        trace: the encoded images, with the last two blocks at least.
        text_embeddings: unit rows, one a prompt.
        image_index: for each prompt, the row of its image in the trace.
        generator: of the random grids; on the CPU.
        images: what the trace encodes; given, and where the tower has a class token, rollout is one of the
            baselines, and the trace must hold every block.

    Returns:
        Name of the baseline to its grids, in float32.

    Raises:
        InputError: the trace holds one block alone, or not every block where rollout needs them.
    """
    grid = (trace.grid_height, trace.grid_width)
    device = image_index.device
    return {
        "GradCAM, last block": gradcam(tower, trace, text_embeddings, image_index),
        "patch-text similarity": patch_text_similarity(tower, trace, text_embeddings, image_index),
        "mean-query attention": mean_query_attention(tower, trace)[image_index],
        **{name: grids[image_index] for name, grids in _pooling_attention(tower, trace, images).items()},
        "centre prior": centre_prior(*grid).to(device).expand(len(image_index), *grid),
        "random": random_grids(len(image_index), *grid, generator=generator).to(device),
    }


def _pooling_attention(tower: Tower, trace: Trace, images: Tensor | None) -> dict[str, Tensor]:
    """The attention by which the tower gathers its feature, where there is such a thing."""
    if tower.own.pooler is not None:
        return {"pooler attention": pooler_attention(tower.own.pooler, tower, trace)}
    if not tower.prefix_tokens:
        return {}
    last = {"CLS attention": cls_attention(tower, trace)}
    return last if images is None else last | {"attention rollout": attention_rollout(tower, trace, images)}


def random_grids(
    prompts: int, grid_height: int, grid_width: int, *, generator: torch.Generator
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """Independent uniform noise in every cell."""
    return torch.rand(prompts, grid_height, grid_width, generator=generator)


def centre_prior(grid_height: int, grid_width: int) -> Float[Tensor, "grid_height grid_width"]:
    """A Gaussian around the centre, its deviation a quarter of each side; knows neither image nor prompt."""
    rows, columns = (
        ((torch.arange(cells) + 0.5) / cells - 0.5) / CENTRE_PRIOR_SIGMA
        for cells in (grid_height, grid_width)
    )
    return torch.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / 2)


def cls_attention(tower: Tower, trace: Trace) -> Float[Tensor, "batch grid_height grid_width"]:
    """How much the class token attends to each patch in the last block, averaged over heads; knows no prompt.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, figure 1
        (there one map a head).
    """
    return _patch_grid(_last_attention(tower, trace)[:, 0], tower, trace)


@torch.no_grad()
def attention_rollout(
    tower: Tower, trace: Trace, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch grid_height grid_width"]:
    """How much of each patch reaches the class token, if every block mixed tokens as its attention says.

    Each block's attention, averaged over heads, is averaged with the identity for the residual, and the
    product over all blocks is read at the class token; knows no prompt. Blocks are taken from the last to the
    first, so that one row is carried instead of a matrix, and one attention matrix is held at a time.

    Args:
        tower: description of the tower that made the trace.
        trace: the encoded images, with every block.
        images: the same images; their embedding enters the first block.

    Raises:
        InputError: a trace of fewer blocks.

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
    """How much an attentional pooler looks at each patch, averaged over heads; knows no prompt."""
    attention = _attention(pooler, trace.layers[-1].block_outputs, None)
    return _patch_grid(attention[:, 0], tower, trace)


def mean_query_attention(tower: Tower, trace: Trace) -> Float[Tensor, "batch grid_height grid_width"]:
    """How much all tokens attend to each patch in the last block, averaged over heads; knows no prompt."""
    return _patch_grid(_last_attention(tower, trace).mean(dim=1), tower, trace)


def patch_text_similarity(
    tower: Tower,
    trace: Trace,
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """Cosine of each output patch token, through the model's final norm and projection, with the text.

    Source: the direct reading of dense features that Zhou et al., "Extract Free Dense Labels from CLIP",
        ECCV 2022, improve on by changing the last attention, which this baseline does not.
    """
    with torch.no_grad():
        features = _token_features(tower.own, trace.layers[-1].block_outputs)
    unit_features = F.normalize(features.float(), dim=-1)[image_index]
    return _patch_grid(torch.einsum("ptd,pd->pt", unit_features, text_embeddings.float()), tower, trace)


def gradcam(
    tower: Tower,
    trace: Trace,
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
) -> Float[Tensor, "prompts grid_height grid_width"]:
    """GradCAM of the model's own image-text cosine, at the last block's normalised input.

    The activations are those after the block's first norm, the last place where the score still depends on
    the patches when the model pools its class token. A channel's weight is its gradient averaged over the
    patches, and the map is the ReLU of the weighted sum of channels.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, equations 1 and 2; the layer is the one commonly taken
        for vision transformers (Gildenblat et al., pytorch-grad-cam).
    """
    block = tower.blocks[-1]
    residual = _last_block_input(trace)[image_index]
    with torch.enable_grad():
        activations = block.norm(residual).detach().requires_grad_()
        layer = run_normed_block(block, residual, activations, trace.rotary)
        features = score_features(tower.own, layer.outputs)
        score = (F.normalize(features.float(), dim=-1) * text_embeddings.float()).sum()
        gradient = torch.autograd.grad(score, activations)[0]
    channel_weights = gradient[:, tower.prefix_tokens :].float().mean(dim=1)
    weighted_sum = torch.einsum("ptc,pc->pt", activations.detach().float(), channel_weights)
    return _patch_grid(weighted_sum.relu(), tower, trace)


def _token_features(
    scoring: Scoring, tokens: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch tokens embed_dim"]:
    """The feature that the model would make of each token, were it the only one."""
    if scoring.pooler is not None:
        pooled = run_block(scoring.pooler, tokens.flatten(0, 1)[:, None], None).outputs
        tokens = torch.unflatten(pooled[:, 0], 0, tokens.shape[:2])
    normed, _ = run_stages(scoring.token_stages, tokens)
    return run_stages(scoring.head, normed)[0]


def _last_attention(tower: Tower, trace: Trace) -> Float[Tensor, "batch queries keys"]:
    return _attention(tower.blocks[-1], _last_block_input(trace), trace.rotary)


@torch.no_grad()
def _attention(
    block: Block, tokens: Float[Tensor, "batch tokens width"], rotary: Tensor | None
) -> Float[Tensor, "batch queries keys"]:
    """A block's attention matrix, averaged over heads."""
    queries, keys, _ = block.project(block.norm(tokens), rotary)
    logits = queries.float() @ keys.float().mT / queries.shape[-1] ** 0.5
    bias = block.bias()
    weights = (logits if bias is None else logits + bias.float()).softmax(dim=-1)
    mean_of_heads: Tensor = weights.mean(dim=1)
    return mean_of_heads


def _last_block_input(trace: Trace) -> Float[Tensor, "batch tokens width"]:
    if len(trace.layers) < 2:
        raise InputError(f"baselines: expected a trace of at least 2 blocks, received {len(trace.layers)}")
    return trace.layers[-2].block_outputs


def _patch_grid(
    per_token: Float[Tensor, "maps tokens"], tower: Tower, trace: Trace
) -> Float[Tensor, "maps grid_height grid_width"]:
    return per_token[:, tower.prefix_tokens :].reshape(-1, trace.grid_height, trace.grid_width)
