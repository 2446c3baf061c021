"""Describe timm's VisionTransformer: SigLIP, ViTamin, MobileCLIP and similar."""

from functools import partial
from typing import Any

from jaxtyping import Float
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from legrad.errors import InputError
from legrad.families.parts import NotCovered, check_covered, class_name, describe_blocks, split_heads
from legrad.families.timm_parts import (
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
    scale_stages,
)
from legrad.method.towers import Block, EmbeddedImages, QueriesKeysValues, Scoring, Tower

# `legrad_torch`, `compute_legrad_siglip`: its `apply_correction` is true by default.
AUTHORS_NEUTRAL_TEXT = "a photo of a"


def describe(trunk: VisionTransformer, projection: nn.Module) -> Tower:
    """Describe a tower whose trunk is timm's VisionTransformer.

    Args:
        trunk: the transformer.
        projection: applied to its output, such as the projection to a joint space; or an identity.

    Raises:
        NotCovered: a part of it is not covered.
    """
    patches = trunk.patch_embed
    check_covered(
        other_patches(trunk, PatchEmbed, HybridEmbed),
        (
            "its position embeddings are of another kind",
            trunk.pos_embed is not None and trunk.pos_embed.ndim != 3,
        ),
        (f"its pooling is {trunk.global_pool!r}", trunk.global_pool not in ("token", "avg", "map")),
        ("its pooling includes prefix tokens", trunk.pool_include_prefix),
        (
            "it has both prefix tokens and an attentional pooler",
            trunk.global_pool == "map" and trunk.num_prefix_tokens > 0,
        ),
    )
    patch_height, patch_width = patches.feat_ratio(as_scalar=False)
    if patch_height != patch_width:
        raise NotCovered(f"its patches are not square: {patch_height} x {patch_width}")
    reference, own = _scorings(trunk, projection)
    return Tower(
        family=_family(trunk),
        patch_size=patch_height,
        native_grid=tuple(patches.grid_size),
        native_size=tuple(patches.img_size),
        takes_any_grid=True,
        embed_dim=embed_dim(trunk, projection),
        prefix_tokens=trunk.num_prefix_tokens,
        normalisation="grid" if trunk.attn_pool is not None else "upsampled",
        embed=partial(_embed, trunk),
        blocks=describe_blocks(trunk.blocks, _describe_block),
        reference=reference,
        authors=reference,
        own=own,
        parameter=lambda: next(patches.parameters()),
        authors_neutral_text=None if trunk.attn_pool is None else AUTHORS_NEUTRAL_TEXT,
    )


def _family(trunk: VisionTransformer) -> str:
    if trunk.attn_pool is not None:
        return "siglip"
    return "timm-hybrid" if isinstance(trunk.patch_embed, HybridEmbed) else "timm-vit"


def _scorings(trunk: VisionTransformer, projection: nn.Module) -> tuple[Scoring, Scoring]:
    """Describe two ways of scoring a layer: the authors' (or the closest to it), and the model's own."""
    if trunk.attn_pool is None:
        return mean_scorings(trunk, projection)
    head = head_stages(trunk, projection)
    straight = describe_pooler(trunk.attn_pool, nn.Identity())
    normed = describe_pooler(trunk.attn_pool, trunk.norm)
    return Scoring((), slice(0, 1), head, straight), Scoring((), slice(0, 1), head, normed)


def _describe_block(block: Any) -> Block:
    attention = getattr(block, "attn", block)
    if type(block) is not TimmBlock or type(attention) is not Attention:
        culprit = attention if type(block) is TimmBlock else block
        raise NotCovered(f"it is {class_name(block)} with {class_name(attention)}", culprit)
    check_no_gate(attention)
    norm_stages(block.norm1)
    return Block(
        norm=block.norm1,
        project=partial(_project, attention),
        out=(*norm_stages(attention.norm), *linear_stages(attention.proj), *scale_stages(block.ls1)),
        mlp=(*norm_stages(block.norm2), *mlp_stages(block.mlp), *scale_stages(block.ls2)),
    )


def _project(
    attention: Attention, tokens: Float[Tensor, "batch tokens width"], _rotary: Tensor | None
) -> QueriesKeysValues:
    queries, keys, values = split_heads(attention.qkv(tokens), attention.num_heads)
    return attention.q_norm(queries), attention.k_norm(keys), values


def _embed(trunk: VisionTransformer, images: Float[Tensor, "batch 3 height width"]) -> EmbeddedImages:
    """Embed patches of images of any size, without the dropouts of training."""
    patches = _patches(trunk.patch_embed, images)
    grid_height, grid_width = patches.shape[-2:]
    tokens = patches.flatten(2).transpose(1, 2)
    if isinstance(trunk.patch_embed, PatchEmbed):
        tokens = trunk.patch_embed.norm(tokens)
    with_prefix = add_prefix_and_positions(trunk, tokens, (grid_height, grid_width))
    return EmbeddedImages(trunk.norm_pre(with_prefix))


def _patches(
    patch_embed: PatchEmbed | HybridEmbed, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch width_ grid_height grid_width"]:
    if isinstance(patch_embed, HybridEmbed):
        _check_nothing_trains(patch_embed.backbone)
        features = patch_embed.backbone(images)
        images = features[-1] if isinstance(features, list | tuple) else features
    patches: Tensor = patch_embed.proj(images)
    return patches


def _check_nothing_trains(backbone: nn.Module) -> None:
    """Raise an InputError if training mode changes what the convolutions before the patches compute."""
    training = [module for module in backbone.modules() if module.training]
    if any(isinstance(module, _BatchNorm) for module in training):
        raise InputError(
            "the convolutions before the patches hold batch norms in training mode, which would mix the "
            "images of a batch and change the model: call model.eval() first"
        )
    if any(isinstance(module, _DropoutNd | DropPath) for module in training):
        raise InputError(
            "the convolutions before the patches hold dropouts in training mode, which would make maps "
            "random: call model.eval() first"
        )
