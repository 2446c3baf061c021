"""Training-free dense CLIP features as baseline maps: MaskCLIP, SCLIP and NACLIP.

Each replaces the attention of the last block, sends every patch token on its own through the model's final
norm and head, and takes its cosine with the text. q, k and v are the queries, keys and values of that block,
for each head, with position embeddings and biases as the block has them, and s = 1 / sqrt(head_dim).

The papers define them for models that pool a class token. In a tower that pools by attention, each token
passes the pooler alone: attention over one token returns its value.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from legrad.errors import InputError
from legrad.method.stages import run_stages
from legrad.method.towers import Block, Scoring, Tower
from legrad.method.trace import Trace, in_words, run_block

# Standard deviation of NACLIP's neighbourhood in patches, the authors' default.
NEIGHBOURHOOD_SIGMA = 5.0

PromptGrids = Float[Tensor, "prompts grid_height grid_width"]


@torch.no_grad()
def maskclip(
    tower: Tower,
    trace: Trace,
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
) -> PromptGrids:
    """Compute the cosine of the text and out(v), the value of each patch: attention is the identity.

    Residual and MLP are omitted, as in `naclip`.

    Args:
        tower: description of the tower that made the trace.
        trace: the encoded images, with at least the last two blocks.
        text_embeddings: unit rows, one for each prompt.
        image_index: for each prompt, the row of its image in the trace.

    Raises:
        InputError: the trace holds fewer blocks than needed.

    Source: Zhou, Loy and Dai, "Extract Free Dense Labels from CLIP", ECCV 2022, section 3.2,
        https://arxiv.org/abs/2112.01071.
    """
    block = tower.blocks[-1]
    _, _, values = _projections(block, trace)
    return token_text_cosines(tower, trace, _branch(block, values), text_embeddings, image_index)


@torch.no_grad()
def sclip(
    tower: Tower,
    trace: Trace,
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
) -> PromptGrids:
    """Compute the cosine of the text and the block's output with correlative self-attention.

    The attention is softmax(s q q^T) + softmax(s k k^T); residual and MLP stay.

    Args:
        tower: as in `maskclip`.
        trace: as in `maskclip`.
        text_embeddings: as in `maskclip`.
        image_index: as in `maskclip`.

    Raises:
        InputError: the trace holds fewer blocks than needed.

    Source: Wang, Mei and Yuille, "SCLIP: Rethinking Self-Attention for Dense Vision-Language Inference",
        ECCV 2024, https://arxiv.org/abs/2312.01597, section 3.2.
    """
    block = tower.blocks[-1]
    queries, keys, values = _projections(block, trace)
    bias = block.bias()
    by_queries, by_keys = (
        F.scaled_dot_product_attention(own, own, values, attn_mask=bias) for own in (queries, keys)
    )
    attended = last_block_input(trace) + _branch(block, by_queries + by_keys)
    outputs = attended + run_stages(block.mlp, attended)[0]
    return token_text_cosines(tower, trace, outputs, text_embeddings, image_index)


@torch.no_grad()
def naclip(
    tower: Tower,
    trace: Trace,
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
) -> PromptGrids:
    """Compute the cosine of the text and each patch after neighbourhood-aware attention.

    The attention is softmax(s k k^T + w) with w[i, j] = exp(-d^2 / (2 sigma^2)) for patches at a distance of
    d patches, sigma = 5, and 0 where a token before the patches is involved; without residual and MLP.

    Args:
        tower: as in `maskclip`.
        trace: as in `maskclip`.
        text_embeddings: as in `maskclip`.
        image_index: as in `maskclip`.

    Raises:
        InputError: the trace holds fewer blocks than needed.

    Source: Hajimiri, Ben Ayed and Dolz, "Pay Attention to Your Neighbours: Training-Free Open-Vocabulary
        Semantic Segmentation", WACV 2025, https://arxiv.org/abs/2404.08181, section 3; sigma: their code.
    """
    block = tower.blocks[-1]
    _, keys, values = _projections(block, trace)
    logits = neighbourhood(trace.grid_height, trace.grid_width, tower.prefix_tokens).to(keys)
    bias = block.bias()
    mask = logits if bias is None else logits + bias
    mixed = F.scaled_dot_product_attention(keys, keys, values, attn_mask=mask)
    return token_text_cosines(tower, trace, _branch(block, mixed), text_embeddings, image_index)


DENSE_BASELINES = {"MaskCLIP": maskclip, "SCLIP": sclip, "NACLIP": naclip}


def neighbourhood(grid_height: int, grid_width: int, prefix_tokens: int) -> Float[Tensor, "tokens tokens"]:
    """Return NACLIP's addition to the logits: a Gaussian of the distance of two patches, else 0."""
    rows, columns = torch.arange(grid_height), torch.arange(grid_width)
    places = torch.cartesian_prod(rows, columns).float().reshape(-1, 2)
    patches = torch.exp(-torch.cdist(places, places).square() / (2 * NEIGHBOURHOOD_SIGMA**2))
    return F.pad(patches, (prefix_tokens, 0, prefix_tokens, 0))


def token_text_cosines(
    tower: Tower,
    trace: Trace,
    tokens: Float[Tensor, "batch tokens width"],
    text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
) -> PromptGrids:
    """Return the cosine of the text and the feature that the model computes from each patch token alone.

    Args:
        tower: description of the tower.
        trace: the encoded images.
        tokens: tokens in place of the last block's output.
        text_embeddings: unit rows, one for each prompt.
        image_index: for each prompt, the row of its image.
    """
    features = _token_features(tower.own, tokens[:, tower.prefix_tokens :])
    unit_features = F.normalize(features.float(), dim=-1)[image_index]
    cosines = torch.einsum("ptd,pd->pt", unit_features, text_embeddings.float())
    return cosines.reshape(-1, trace.grid_height, trace.grid_width)


def last_block_input(trace: Trace) -> Float[Tensor, "batch tokens width"]:
    """Return the tokens that enter the last block; raise an InputError if the trace does not hold them."""
    held = trace.layer_indices
    if len(held) < 2 or held[-2] != held[-1] - 1:
        raise InputError(f"baselines: expected a trace of the last 2 blocks, received {in_words(held)}")
    return trace.layers[-2].block_outputs


def _projections(block: Block, trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
    return block.project(block.norm(last_block_input(trace)), trace.rotary)


def _branch(block: Block, mixed: Float[Tensor, "batch heads tokens head_dim"]) -> Tensor:
    """Return what the block adds to its input for an output of the attention, heads still apart."""
    return run_stages(block.out, mixed.transpose(1, 2).flatten(2))[0]


def _token_features(
    scoring: Scoring, tokens: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch tokens embed_dim"]:
    """Return the feature that the model computes from each token on its own."""
    if scoring.pooler is not None:
        pooled = run_block(scoring.pooler, tokens.flatten(0, 1)[:, None], None).outputs
        tokens = torch.unflatten(pooled[:, 0], 0, tokens.shape[:2])
    normed, _ = run_stages(scoring.token_stages, tokens)
    return run_stages(scoring.head, normed)[0]
