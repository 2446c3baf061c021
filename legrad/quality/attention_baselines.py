"""Baseline maps from attention matrices: raw attention, attention rollout and gradient-weighted attention.

A model scores a text, or a class, by its *pooled token*: the class token, the mean over some tokens, or the
one token of an attentional pooler. Raw attention and rollout are those of the pooled token, and ignore text
and class.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from legrad.errors import InputError
from legrad.method.stages import run_stages
from legrad.method.towers import Block, Scoring
from legrad.method.trace import score_features
from legrad.quality.pairs import PairGrids, Pairs


@torch.no_grad()
def raw_attention(pairs: Pairs) -> PairGrids:
    """Return the pooled token's attention to each patch, averaged over heads.

    It is that of the pooler, if the model has one, otherwise that of the last block. For a class token:

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, figure 1
        (there one map for each head).
    """
    pooler = pairs.tower.own.pooler
    if pooler is not None:
        rows = _mean_attention(pooler, pairs.last_block_output, None)[:, 0]
    else:
        rows = _last_attention(pairs)[:, pairs.tower.own.pooled_tokens].mean(dim=1)
    return pairs.patch_grids(rows)[pairs.image_index]


@torch.no_grad()
def mean_query_attention(pairs: Pairs) -> PairGrids:
    """Return the attention to each patch in the last block, averaged over heads and queries."""
    return pairs.patch_grids(_last_attention(pairs).mean(dim=1))[pairs.image_index]


@torch.no_grad()
def attention_rollout(pairs: Pairs) -> PairGrids:
    """Compute attention rollout: the share of each patch in the pooled token, if only attention mixed tokens.

    Each block's attention, averaged over heads, is averaged with the identity for the residual; the result is
    the pooled token's row of the product over all blocks, and a pooler's attention its first factor. Blocks
    are multiplied from last to first, so that only one row and one attention matrix are in memory at a time.

    Raises:
        InputError: the images are missing, or the trace lacks blocks.

    Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, section 3.
    """
    tower, trace, images = pairs.tower, pairs.trace, pairs.given_images()
    if len(trace.layers) != len(tower.blocks):
        raise InputError(
            f"trace: expected all {len(tower.blocks)} blocks for attention rollout, received "
            f"{len(trace.layers)}"
        )
    with torch.autocast(images.device.type, enabled=False):
        inputs = [tower.embed(images).tokens, *(layer.block_outputs for layer in trace.layers[:-1])]
    if tower.own.pooler is not None:
        rows = _mean_attention(tower.own.pooler, trace.layers[-1].block_outputs, None)[:, :1]
    else:
        rows = _pooling_weights(tower.own, inputs[0]).expand(len(images), 1, -1)
    for block, tokens in zip(reversed(tower.blocks), reversed(inputs), strict=True):
        rows = (rows @ _mean_attention(block, tokens, trace.rotary) + rows) / 2
    return pairs.patch_grids(rows[:, 0])[pairs.image_index]


def chefercam(pairs: Pairs) -> PairGrids:
    """Compute the relevancy of Chefer et al. for the model's own score: a cosine, or a classifier's logit.

    With A the attention of a block and G the gradient of the score with respect to it, the mean over heads
    of relu(A * G), M, updates the relevancy of all tokens: R <- R + M R, from R = identity. The result is
    the pooled token's row of R; for an attentional pooler, its own M is multiplied with R.

    Every image runs forward once, and backward once for each text or class, with all attention matrices in
    memory.

    Raises:
        InputError: the images are missing.

    Source: Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and
        Encoder-Decoder Transformers", ICCV 2021, equations 5 and 6.
    """
    images, tokens = pairs.given_images(), pairs.last_block_output.shape[1]
    rows = torch.zeros(len(pairs.unit_rows), tokens, device=images.device)
    for image in set(pairs.image_index.tolist()):
        of_image = pairs.image_index == image
        rows[of_image] = _relevancy(pairs, images[image : image + 1], pairs.unit_rows[of_image])
    return pairs.patch_grids(rows)


def _relevancy(
    pairs: Pairs, image: Float[Tensor, "one 3 height width"], unit_rows: Float[Tensor, "texts embed_dim"]
) -> Float[Tensor, "texts tokens"]:
    """Return the pooled token's row of the relevancy of one image, for each text or class."""
    own = pairs.tower.own
    with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
        embedded = pairs.tower.embed(image)
        tokens = embedded.tokens.detach().requires_grad_()
        attentions = []
        for block in pairs.tower.blocks:
            tokens, attention = _run_with_attention(block, tokens, embedded.rotary)
            attentions.append(attention)
        start = _pooling_weights(own, tokens)[None]
        if own.pooler is not None:
            tokens, attention = _run_with_attention(own.pooler, tokens, None)
            attentions.append(attention)
        features = pairs.compared(score_features(replace(own, pooler=None), tokens))
        scores = (features @ unit_rows.float().T)[0]
        rows = []
        for score in scores:
            gradients = torch.autograd.grad(score, attentions, retain_graph=True)
            weighted = [
                (attention.detach() * gradient).float().relu().mean(dim=1)
                for attention, gradient in zip(attentions, gradients, strict=True)
            ]
            row = weighted.pop()[:, :1] if own.pooler is not None else start
            for mixing in reversed(weighted):
                row = row + row @ mixing
            rows.append(row[0, 0])
    return torch.stack(rows)


def _run_with_attention(
    block: Block, tokens: Float[Tensor, "batch tokens width"], rotary: Tensor | None
) -> tuple[Float[Tensor, "batch queries own_width"], Float[Tensor, "batch heads queries keys"]]:
    """Run a block or pooler; return its output tokens and its attention matrices."""
    queries, keys, values = block.project(block.norm(tokens), rotary)
    attention = _attention_weights(block, queries, keys)
    mixed = attention.to(values.dtype) @ values
    branch, _ = run_stages(block.out, mixed.transpose(1, 2).flatten(2))
    attended = branch if block.is_pooler else tokens + branch
    branch, _ = run_stages(block.mlp, attended)
    return attended + branch if block.mlp else attended, attention


def _pooling_weights(
    scoring: Scoring, tokens: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "1 tokens"]:
    """Return the weight of each token in the pooled token of a tower without pooler."""
    weights = torch.zeros(1, tokens.shape[1], device=tokens.device)
    weights[:, scoring.pooled_tokens] = 1
    return weights / weights.sum()


def _last_attention(pairs: Pairs) -> Float[Tensor, "batch queries keys"]:
    return _mean_attention(pairs.tower.blocks[-1], pairs.last_block_input, pairs.trace.rotary)


def _mean_attention(
    block: Block, tokens: Float[Tensor, "batch tokens width"], rotary: Tensor | None
) -> Float[Tensor, "batch queries keys"]:
    """Return a block's attention matrix, averaged over heads, in float32."""
    queries, keys, _ = block.project(block.norm(tokens), rotary)
    mean: Tensor = _attention_weights(block, queries, keys).mean(dim=1)
    return mean


def _attention_weights(
    block: Block, queries: Tensor, keys: Tensor
) -> Float[Tensor, "batch heads queries keys"]:
    logits = queries.float() @ keys.float().mT / queries.shape[-1] ** 0.5
    bias = block.bias()
    weights: Tensor = (logits if bias is None else logits + bias.float()).softmax(dim=-1)
    return weights
