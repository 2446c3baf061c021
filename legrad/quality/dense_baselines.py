"""Training-free dense CLIP features as baseline maps: patch-text similarity, MaskCLIP, SCLIP and NACLIP.

The last three replace the attention of the last block. All send every patch token on its own through the
model's final norm and head, and take its score: the cosine with the text, or for a classifier the logit of
the class. q, k and v are the queries, keys and values of
the last block, for each head, with position embeddings and biases as the block has them, and s = 1 /
sqrt(head_dim).

The papers define them for models that pool a class token. In a tower that pools by attention, each token
passes the pooler alone: attention over one token returns its value.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from legrad.method.stages import run_stages
from legrad.method.towers import Block, Tower
from legrad.method.trace import run_block
from legrad.quality.pairs import PairGrids, Pairs

# Standard deviation of NACLIP's neighbourhood in patches, the authors' default.
NEIGHBOURHOOD_SIGMA = 5.0


@torch.no_grad()
def patch_text_similarity(pairs: Pairs) -> PairGrids:
    """Return the score of each output patch token after the model's final norm and projection.

    Source: the unmodified dense features that Zhou et al., "Extract Free Dense Labels from CLIP", ECCV 2022,
        start from; their method, `maskclip`, also changes the last attention.
    """
    return _token_scores(pairs, pairs.last_block_output)


@torch.no_grad()
def maskclip(pairs: Pairs) -> PairGrids:
    """Compute the score of out(v), the value of each patch: attention is the identity.

    Residual and MLP are omitted, as in `naclip`.

    Source: Zhou, Loy and Dai, "Extract Free Dense Labels from CLIP", ECCV 2022, section 3.2,
        https://arxiv.org/abs/2112.01071.
    """
    block = pairs.tower.blocks[-1]
    _, _, values = _projections(block, pairs)
    return _token_scores(pairs, _branch(block, values))


@torch.no_grad()
def sclip(pairs: Pairs) -> PairGrids:
    """Compute the score of each patch of the block's output with correlative self-attention.

    The attention is softmax(s q q^T) + softmax(s k k^T); residual and MLP stay.

    Source: Wang, Mei and Yuille, "SCLIP: Rethinking Self-Attention for Dense Vision-Language Inference",
        ECCV 2024, https://arxiv.org/abs/2312.01597, section 3.2.
    """
    block = pairs.tower.blocks[-1]
    queries, keys, values = _projections(block, pairs)
    bias = block.bias()
    by_queries, by_keys = (
        F.scaled_dot_product_attention(own, own, values, attn_mask=bias) for own in (queries, keys)
    )
    attended = pairs.last_block_input + _branch(block, by_queries + by_keys)
    outputs = attended + run_stages(block.mlp, attended)[0]
    return _token_scores(pairs, outputs)


@torch.no_grad()
def naclip(pairs: Pairs) -> PairGrids:
    """Compute the score of each patch after neighbourhood-aware attention.

    The attention is softmax(s k k^T + w) with w[i, j] = exp(-d^2 / (2 sigma^2)) for patches at a distance of
    d patches, sigma = 5, and 0 where a token before the patches is involved; without residual and MLP.

    Source: Hajimiri, Ben Ayed and Dolz, "Pay Attention to Your Neighbours: Training-Free Open-Vocabulary
        Semantic Segmentation", WACV 2025, https://arxiv.org/abs/2404.08181, section 3; sigma: their code.
    """
    block = pairs.tower.blocks[-1]
    _, keys, values = _projections(block, pairs)
    logits = neighbourhood(*pairs.grid, pairs.tower.prefix_tokens).to(keys)
    bias = block.bias()
    mask = logits if bias is None else logits + bias
    mixed = F.scaled_dot_product_attention(keys, keys, values, attn_mask=mask)
    return _token_scores(pairs, _branch(block, mixed))


def neighbourhood(grid_height: int, grid_width: int, prefix_tokens: int) -> Float[Tensor, "tokens tokens"]:
    """Return NACLIP's addition to the logits: a Gaussian of the distance of two patches, else 0."""
    rows, columns = torch.arange(grid_height), torch.arange(grid_width)
    places = torch.cartesian_prod(rows, columns).float().reshape(-1, 2)
    patches = torch.exp(-torch.cdist(places, places).square() / (2 * NEIGHBOURHOOD_SIGMA**2))
    return F.pad(patches, (prefix_tokens, 0, prefix_tokens, 0))


def _token_scores(pairs: Pairs, tokens: Float[Tensor, "batch tokens width"]) -> PairGrids:
    """Return the score of the feature that the model computes from each patch token alone."""
    features = _token_features(pairs.tower, tokens[:, pairs.tower.prefix_tokens :])
    compared = pairs.compared(features)[pairs.image_index]
    scores = torch.einsum("ptd,pd->pt", compared, pairs.unit_rows.float())
    return scores.reshape(-1, *pairs.grid)


def _projections(block: Block, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    return block.project(block.norm(pairs.last_block_input), pairs.trace.rotary)


def _branch(block: Block, mixed: Float[Tensor, "batch heads tokens head_dim"]) -> Tensor:
    """Return what the block adds to its input for an output of the attention, heads still apart."""
    return run_stages(block.out, mixed.transpose(1, 2).flatten(2))[0]


def _token_features(
    tower: Tower, tokens: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch tokens embed_dim"]:
    """Return the feature that the model computes from each token on its own."""
    # Both are the same for one token of a classifier, but a DeiT's own has one head for each prefix token.
    scoring = tower.reference if tower.is_classifier else tower.own
    if scoring.pooler is not None:
        pooled = run_block(scoring.pooler, tokens.flatten(0, 1)[:, None], None).outputs
        tokens = torch.unflatten(pooled[:, 0], 0, tokens.shape[:2])
    normed, _ = run_stages(scoring.token_stages, tokens)
    return run_stages(scoring.head, normed)[0]
