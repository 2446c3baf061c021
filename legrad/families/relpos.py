"""Describe timm's VisionTransformerRelPos: relative position biases."""

import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_rel import RelPosBias, RelPosMlp
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from legrad.families.parts import NotCovered, check_covered, class_name, describe_blocks, split_heads
from legrad.families.timm_parts import (
    embed_dim,
    linear_stages,
    mean_scorings,
    mlp_stages,
    norm_stages,
    other_patches,
    patch_tokens,
    scale_stages,
    square_patch_size,
)
from legrad.method.towers import Block, EmbeddedImages, QueriesKeysValues, Tower


def describe(trunk: Any, projection: nn.Module) -> Tower:
    """Describe a tower whose trunk is timm's VisionTransformerRelPos.

    Args:
        trunk: the transformer.
        projection: applied to its output, such as the projection to a joint space; or an identity.

    Raises:
        NotCovered: a part of it is not covered.
    """
    check_covered(
        other_patches(trunk, PatchEmbed),
        (f"its pooling is {trunk.global_pool!r}", trunk.global_pool not in ("token", "avg")),
    )
    reference, own = mean_scorings(trunk, projection)
    return Tower(
        family="relpos",
        patch_size=square_patch_size(trunk.patch_embed),
        native_grid=tuple(trunk.patch_embed.grid_size),
        native_size=tuple(trunk.patch_embed.img_size),
        takes_any_grid=False,
        embed_dim=embed_dim(trunk, projection),
        prefix_tokens=trunk.num_prefix_tokens,
        normalisation="upsampled",
        embed=partial(_embed, trunk),
        blocks=describe_blocks(trunk.blocks, partial(_describe_block, trunk.shared_rel_pos)),
        reference=reference,
        authors=reference,
        own=own,
        parameter=lambda: next(trunk.patch_embed.parameters()),
    )


def _describe_block(shared_bias: nn.Module | None, block: Any) -> Block:
    if type(block) not in (RelPosBlock, ResPostRelPosBlock):
        raise NotCovered(f"it is {class_name(block)}", block)
    attention = block.attn
    if type(attention) is not RelPosAttention:
        raise NotCovered(f"its attention is {class_name(attention)}", attention)
    position_bias: Any = shared_bias if attention.rel_pos is None else attention.rel_pos
    if type(position_bias) not in (RelPosMlp, RelPosBias, type(None)):
        raise NotCovered(f"its positions are {class_name(position_bias)}", position_bias)
    out, mlp = linear_stages(attention.proj), mlp_stages(block.mlp)
    first_norm, second_norm = norm_stages(block.norm1), norm_stages(block.norm2)
    project, bias = partial(_project, attention), partial(_bias, position_bias)
    if type(block) is ResPostRelPosBlock:
        return Block(nn.Identity(), project, (*out, *first_norm), (*mlp, *second_norm), bias)
    return Block(
        norm=block.norm1,
        project=project,
        out=(*out, *scale_stages(block.ls1)),
        mlp=(*second_norm, *mlp, *scale_stages(block.ls2)),
        bias=bias,
    )


def _project(
    attention: Any, tokens: Float[Tensor, "batch tokens width"], _rotary: Tensor | None
) -> QueriesKeysValues:
    queries, keys, values = split_heads(attention.qkv(tokens), attention.num_heads)
    return attention.q_norm(queries), attention.k_norm(keys), values


def _bias(position_bias: Any) -> Float[Tensor, "1 heads tokens tokens"] | None:
    if position_bias is None:
        return None
    if position_bias.training:
        # A copy in eval mode, as the model must not change, and dropout acts on the bias in training.
        position_bias = copy.deepcopy(position_bias).eval()
    bias: Tensor = position_bias.get_bias()
    return bias


def _embed(trunk: Any, images: Float[Tensor, "batch 3 height width"]) -> EmbeddedImages:
    patches, _ = patch_tokens(trunk.patch_embed, images)
    if trunk.cls_token is None:
        return EmbeddedImages(patches)
    return EmbeddedImages(torch.cat([trunk.cls_token.expand(len(patches), -1, -1), patches], dim=1))
