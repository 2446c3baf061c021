"""Describe timm's Eva: EVA01, EVA02 and the Perception Encoder (PE-Core)."""

import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.attention import AttentionRope
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn
from torch.nn import functional as F

from legrad.families.parts import NotCovered, check_covered, class_name, describe_blocks, split_heads
from legrad.families.timm_parts import (
    Stages,
    add_prefix_and_positions,
    check_no_gate,
    describe_pooler,
    embed_dim,
    head_stages,
    linear_stages,
    mean_scorings,
    mlp_stages,
    norm_stages,
    other_patches,
    patch_tokens,
    square_patch_size,
)
from legrad.method.stages import Scale
from legrad.method.towers import Block, EmbeddedImages, QueriesKeysValues, Scoring, Tower


def describe(trunk: Any, projection: nn.Module) -> Tower:
    """Describe a tower whose trunk is timm's Eva.

    Args:
        trunk: the transformer.
        projection: applied to its output, such as the projection to a joint space; or an identity.

    Raises:
        NotCovered: a part of it is not covered.
    """
    check_covered(
        other_patches(trunk, PatchEmbed),
        (
            f"its pooling is {trunk.global_pool!r}",
            trunk.attn_pool is None and trunk.global_pool not in ("token", "avg"),
        ),
    )
    reference, authors, own = _scorings(trunk, projection)
    return Tower(
        family="eva" if trunk.attn_pool is None else "pe",
        patch_size=square_patch_size(trunk.patch_embed),
        native_grid=tuple(trunk.patch_embed.grid_size),
        native_size=tuple(trunk.patch_embed.img_size),
        takes_any_grid=True,
        embed_dim=embed_dim(trunk, projection),
        prefix_tokens=trunk.num_prefix_tokens,
        normalisation="upsampled",
        embed=partial(_embed, trunk),
        blocks=describe_blocks(trunk.blocks, _describe_block),
        reference=reference,
        authors=authors,
        own=own,
        parameter=lambda: next(trunk.patch_embed.parameters()),
    )


def _scorings(trunk: Any, projection: nn.Module) -> tuple[Scoring, Scoring, Scoring]:
    """Describe three ways of scoring a layer: the reference, the authors' package, and the model's own.

    The authors' package does not cover these families. With a pooler the reference is the model's own path:
    its final norm, then the pooler. Their package would skip the norm, as it does for SigLIP.
    """
    if trunk.attn_pool is None:
        reference, own = mean_scorings(trunk, projection)
        return reference, reference, own
    head = head_stages(trunk, projection)
    pooled = Scoring((), slice(0, 1), head, describe_pooler(trunk.attn_pool, trunk.norm))
    straight = Scoring((), slice(0, 1), head, describe_pooler(trunk.attn_pool, nn.Identity()))
    return pooled, straight, pooled


def _describe_block(block: Any) -> Block:
    if type(block) not in (EvaBlock, EvaBlockPostNorm):
        raise NotCovered(f"it is {class_name(block)}", block)
    attention = block.attn
    if type(attention) not in (EvaAttention, AttentionRope):
        raise NotCovered(f"its attention is {class_name(attention)}", attention)
    check_no_gate(attention)
    for projection in (attention.qkv, *(getattr(attention, f"{part}_proj", None) for part in "qkv")):
        if projection is not None:
            linear_stages(projection)
    out = (*norm_stages(attention.norm), *linear_stages(attention.proj))
    mlp = mlp_stages(block.mlp)
    project = partial(_project, attention)
    first_norm, second_norm = norm_stages(block.norm1), norm_stages(block.norm2)
    if type(block) is EvaBlockPostNorm:
        return Block(nn.Identity(), project, (*out, *first_norm), (*mlp, *second_norm))
    return Block(
        norm=block.norm1,
        project=project,
        out=(*out, *_layer_scale(block, "gamma_1")),
        mlp=(*second_norm, *mlp, *_layer_scale(block, "gamma_2")),
    )


def _layer_scale(block: EvaBlock, name: str) -> Stages:
    return () if getattr(block, name) is None else (Scale(partial(getattr, block, name)),)


def _project(
    attention: Any,
    tokens: Float[Tensor, "batch tokens width"],
    rotary: Tensor | None,
) -> QueriesKeysValues:
    queries, keys, values = _projections(attention, tokens)
    queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    if rotary is not None:
        queries, keys = (_rotate(attention, part, rotary).to(values.dtype) for part in (queries, keys))
    if keys.shape[1] != queries.shape[1]:  # grouped queries: several heads share their keys and values
        heads_per_group = queries.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(heads_per_group, dim=1) for part in (keys, values))
    return queries, keys, values


def _projections(attention: Any, tokens: Float[Tensor, "batch tokens width"]) -> QueriesKeysValues:
    if attention.qkv is None:
        parts = (attention.q_proj(tokens), attention.k_proj(tokens), attention.v_proj(tokens))
        head_dim = parts[0].shape[-1] // attention.num_heads
        queries, keys, values = (torch.unflatten(part, -1, (-1, head_dim)).transpose(1, 2) for part in parts)
        return queries, keys, values
    bias = attention.qkv.bias
    if getattr(attention, "q_bias", None) is not None:  # EvaAttention stores them separately
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    return split_heads(F.linear(tokens, attention.qkv.weight, bias), attention.num_heads)


def _rotate(
    attention: Any,
    part: Float[Tensor, "batch heads tokens head_dim"],
    rotary: Float[Tensor, "patches sines_and_cosines"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Rotate queries or keys of the patches by their position; prefix tokens have no position."""
    prefix, patches = part[:, :, : attention.num_prefix_tokens], part[:, :, attention.num_prefix_tokens :]
    turned = apply_rot_embed_cat(patches, rotary, half=attention.rotate_half)
    return torch.cat([prefix, turned], dim=2)


def _embed(trunk: Any, images: Float[Tensor, "batch 3 height width"]) -> EmbeddedImages:
    """Embed patches of images of any size, without the dropouts of training."""
    patches, grid = patch_tokens(trunk.patch_embed, images)
    tokens = add_prefix_and_positions(trunk, patches, grid)
    return EmbeddedImages(trunk.norm_pre(tokens), _rotary(trunk, grid))


def _rotary(trunk: Any, grid: tuple[int, int]) -> Float[Tensor, "patches sines_and_cosines"] | None:
    """Compute the rotary position embedding of a grid, as timm does when a model is set to that size.

    If the model defines `ref_feat_shape`, the grid that it was first trained for, timm scales the positions
    of any grid to that one, along each side.
    """
    rope = trunk.rope
    if rope is None:
        return None
    if rope.training or (rope.feat_shape is not None and tuple(rope.feat_shape) != grid):
        # A copy, so that the model keeps its size; in eval mode, as training may shift positions randomly.
        rope = copy.deepcopy(rope).eval()
        rope.update_feat_shape(grid)
    embedding: Tensor = rope.get_embed(shape=grid)
    return embedding
