"""Describe the SiglipModel and Siglip2Model of Hugging Face transformers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2

from legrad.families.hf_parts import (
    check_class,
    check_embeddings,
    describe_block,
    embedded,
    known_modules,
    linear,
    mlp,
    native_size,
    norm,
)
from legrad.families.modules import check_modules, located
from legrad.families.parts import NotCovered, check_covered, class_name, describe_blocks
from legrad.families.timm_vit import AUTHORS_NEUTRAL_TEXT
from legrad.method.towers import Block, EmbeddedImages, QueriesKeysValues, Scoring, Tower

_ROLES = (
    "VisionModel",
    "VisionTransformer",  # within VisionModel in earlier versions
    "Encoder",
    "EncoderLayer",
    "Attention",
    "MLP",
    "MultiheadAttentionPoolingHead",
)


def _classes(library: Any, prefix: str) -> dict[str, type[nn.Module]]:
    return {role: getattr(library, prefix + role) for role in _ROLES if hasattr(library, prefix + role)}


_SIGLIP, _SIGLIP2 = _classes(siglip, "Siglip"), _classes(siglip2, "Siglip2")
KNOWN = known_modules(*_SIGLIP.values(), *_SIGLIP2.values())


def describe(model: Any) -> Tower:
    """Describe the vision tower of a model.

    Raises:
        NotCovered: a part of it is not covered.
    """
    with located({"": model}, KNOWN):
        visual = model.vision_model
        for classes in (_SIGLIP, _SIGLIP2):
            if type(visual) in (classes["VisionModel"], classes.get("VisionTransformer")):
                check_modules(visual, KNOWN)
                return _describe_fixed(visual) if classes is _SIGLIP else _describe_flexible(visual)
        raise NotCovered(f"{class_name(visual)} is not covered", visual)


def _describe_fixed(visual: Any) -> Tower:
    check_embeddings(visual.embeddings, siglip.SiglipVisionEmbeddings, nn.Conv2d)
    return _describe(visual, _SIGLIP, lambda images: EmbeddedImages(embedded(visual, images)))


def _describe_flexible(visual: Any) -> Tower:
    """Describe a tower of the NaFlex checkpoints, whose input are patches of an image of any aspect ratio."""
    embeddings = visual.embeddings
    check_embeddings(embeddings, siglip2.Siglip2VisionEmbeddings, nn.Linear)
    return _describe(
        visual,
        _SIGLIP2,
        lambda images: EmbeddedImages(embeddings(*patches_of(images, embeddings.patch_size))),
    )


def _describe(
    visual: Any, classes: dict[str, type[nn.Module]], embed: Callable[[Tensor], EmbeddedImages]
) -> Tower:
    check_covered(("its pooling head was removed", not visual.use_head))
    patch_size = int(visual.embeddings.patch_size)
    height, width = native_size(visual)
    norm(visual.post_layernorm, "post_layernorm")
    pooler_class = classes["MultiheadAttentionPoolingHead"]
    straight = _describe_pooler(pooler_class, visual.head, nn.Identity())
    normed = _describe_pooler(pooler_class, visual.head, visual.post_layernorm)
    reference = Scoring((), slice(0, 1), (), straight)
    return Tower(
        family="siglip",
        patch_size=patch_size,
        native_grid=(height // patch_size, width // patch_size),
        native_size=(height, width),
        takes_any_grid=True,
        embed_dim=int(visual.embeddings.embed_dim),
        prefix_tokens=0,
        normalisation="grid",
        embed=embed,
        blocks=describe_blocks(visual.encoder.layers, partial(describe_block, classes["EncoderLayer"])),
        reference=reference,
        authors=reference,
        own=Scoring((), slice(0, 1), (), normed),
        parameter=lambda: visual.embeddings.patch_embedding.weight,
        authors_neutral_text=AUTHORS_NEUTRAL_TEXT,
    )


def _describe_pooler(kind: type[nn.Module], pooler: Any, first_norm: nn.Module) -> Block:
    check_class(pooler, kind, f"it pools by {class_name(pooler)}")
    attention, reason = pooler.attention, "its pooler's attention is not the plain one"
    check_class(attention, nn.MultiheadAttention, reason)
    is_joint = attention.in_proj_weight is not None and attention.in_proj_bias is not None
    if not is_joint or attention.bias_k is not None or attention.add_zero_attn:
        raise NotCovered(reason, attention)
    return Block(
        norm=first_norm,
        project=partial(_pooler_project, pooler),
        out=(linear(attention.out_proj),),
        mlp=(*norm(pooler.layernorm, "layernorm"), *mlp(pooler.mlp)),
        is_pooler=True,
    )


def _pooler_project(
    pooler: Any, tokens: Float[Tensor, "batch tokens width"], _rotary: Tensor | None
) -> QueriesKeysValues:
    attention = pooler.attention
    by_query, by_key, by_value = attention.in_proj_weight.chunk(3)
    query_bias, key_bias, value_bias = attention.in_proj_bias.chunk(3)
    projected = (
        F.linear(pooler.probe, by_query, query_bias).expand(len(tokens), -1, -1),
        F.linear(tokens, by_key, key_bias),
        F.linear(tokens, by_value, value_bias),
    )
    queries, keys, values = (
        torch.unflatten(part, -1, (attention.num_heads, -1)).transpose(1, 2) for part in projected
    )
    return queries, keys, values


def patches_of(
    images: Float[Tensor, "batch 3 height width"], patch_size: int
) -> tuple[Float[Tensor, "batch patches values"], Int[Tensor, "batch 2"]]:
    """Cut images into patches, row by row, as Siglip2Processor does.

    Returns:
        The values of each patch, and the rows and columns of patches of each image.
    """
    batch, _, height, width = images.shape
    grid = (height // patch_size, width // patch_size)
    cells = torch.unflatten(torch.unflatten(images, 3, (grid[1], -1)), 2, (grid[0], -1))
    patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid[0] * grid[1], -1)
    return patches, torch.tensor([grid]).expand(batch, 2)
