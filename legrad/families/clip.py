"""Describe open_clip's own VisionTransformer: CLIP, CLIPA and similar, and CoCa with its pooler."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from open_clip.transformer import AttentionalPooler, LayerScale, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from legrad.families.parts import (
    NotCovered,
    check_affine_norm,
    check_covered,
    class_name,
    describe_blocks,
    resample_positions,
    split_heads,
)
from legrad.method.stages import Activation, Linear, Norm, Scale, Stage
from legrad.method.towers import Block, EmbeddedImages, QueriesKeysValues, Scoring, Tower

PREFIX_TOKENS = 1


def describe(visual: VisionTransformer) -> Tower:
    """Describe a tower.

    Raises:
        NotCovered: a part of it is not covered.
    """
    pooler = visual.attn_pool
    check_affine_norm(visual.ln_post, "ln_post")
    if isinstance(visual.proj, nn.Module):
        raise NotCovered("its final projection is not a matrix", visual.proj)
    check_covered(
        ("its final projection was removed", visual.proj is None),
        (f"its patches are not square: {visual.patch_size}", len(set(visual.patch_size)) != 1),
        (
            "it pools by the 'parallel' or 'cascade' attention, which no configuration of open_clip uses",
            getattr(visual, "attn_pool_contrastive", None) is not None,
        ),
        (
            f"its pooling is {visual.pool_type!r}, not 'tok' or 'avg'",
            visual.pool_type not in (("tok",) if pooler is not None else ("tok", "avg")),
        ),
    )
    if pooler is not None:
        _check_pooler(pooler)
    grid_height, grid_width = visual.grid_size
    mean_of_all_tokens = Scoring((), slice(0, None), (Norm(visual.ln_post), _projection(visual)))
    reference = mean_of_all_tokens if pooler is None else _authors_coca(visual)
    return Tower(
        family="clip" if pooler is None else "coca",
        patch_size=visual.patch_size[0],
        native_grid=(grid_height, grid_width),
        native_size=(grid_height * visual.patch_size[0], grid_width * visual.patch_size[1]),
        takes_any_grid=True,
        embed_dim=visual.proj.shape[1],
        prefix_tokens=PREFIX_TOKENS,
        normalisation="upsampled",
        embed=partial(embed, visual, visual.grid_size),
        blocks=describe_blocks(visual.transformer.resblocks, _describe_block),
        reference=reference,
        authors=reference,
        own=_own_scoring(visual) if pooler is None else _pooled_by_attention(visual),
        parameter=partial(getattr, visual.conv1, "weight"),
    )


def _check_pooler(pooler: Any) -> None:
    if type(pooler) is not AttentionalPooler:
        raise NotCovered(f"it pools by {class_name(pooler)}", pooler)
    check_affine_norm(pooler.ln_k, "attn_pool.ln_k")
    _check_attention(pooler.attn)
    if pooler.attn.in_proj_bias is None:
        raise NotCovered("its pooler's attention has no bias", pooler.attn)


def _check_attention(attention: Any) -> None:
    if type(attention) is not nn.MultiheadAttention:
        raise NotCovered(f"its attention is {class_name(attention)}", attention)
    if attention.bias_k is not None or attention.add_zero_attn:
        raise NotCovered("its attention adds keys beyond those of the tokens", attention)


def _check_block(block: Any) -> None:
    if type(block) is not ResidualAttentionBlock:
        raise NotCovered(f"it is {class_name(block)}, not a ResidualAttentionBlock", block)
    check_block_parts(block)
    for name in ("ls_1", "ls_2"):
        _check_kind(block, name, nn.Identity, LayerScale)


def check_block_parts(block: Any) -> None:
    """Check the parts that blocks of open_clip and of OpenAI's clip have in common.

    Raises:
        NotCovered: a part is of another class, or has other settings.
    """
    _check_attention(block.attn)
    if block.attn.in_proj_weight is None:
        raise NotCovered("its queries, keys and values have no joint projection", block.attn)
    if type(block.mlp) is not nn.Sequential or list(block.mlp._modules) != ["c_fc", "gelu", "c_proj"]:
        parts = list(block.mlp._modules)
        raise NotCovered(f"its MLP is made of {parts}, not ['c_fc', 'gelu', 'c_proj']", block.mlp)
    check_affine_norm(block.ln_1, "ln_1")
    check_affine_norm(block.ln_2, "ln_2")
    for name in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
        _check_kind(block, name, nn.Linear, NonDynamicallyQuantizableLinear)


def _check_kind(block: nn.Module, name: str, *allowed: type[nn.Module]) -> None:
    module = block.get_submodule(name)
    if type(module) not in allowed:
        raise NotCovered(f"its {name} is {class_name(module)}", module)


def _describe_block(block: Any) -> Block:
    _check_block(block)
    return Block(
        norm=block.ln_1,
        project=partial(project, block.attn),
        out=(Linear.of(block.attn.out_proj), *_layer_scale(block.ls_1)),
        mlp=(
            Norm(block.ln_2),
            Linear.of(block.mlp.c_fc),
            Activation(block.mlp.gelu),
            Linear.of(block.mlp.c_proj),
            *_layer_scale(block.ls_2),
        ),
    )


def _layer_scale(module: nn.Module) -> tuple[Stage, ...]:
    return (Scale(lambda: module.gamma),) if isinstance(module, LayerScale) else ()


def project(
    attention: nn.MultiheadAttention, tokens: Float[Tensor, "batch tokens width"], _rotary: Tensor | None
) -> QueriesKeysValues:
    """Project tokens to queries, keys and values by torch's attention."""
    joint = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    return split_heads(joint, attention.num_heads)


def _projection(visual: VisionTransformer) -> Linear:
    return Linear(lambda: visual.proj.T, lambda: None)


def _own_scoring(visual: VisionTransformer) -> Scoring:
    norm, projection = Norm(visual.ln_post), _projection(visual)
    pooled_tokens = slice(0, 1) if visual.pool_type == "tok" else slice(1, None)
    if visual.final_ln_after_pool:
        return Scoring((), pooled_tokens, (norm, projection))
    return Scoring((norm,), pooled_tokens, (projection,))


def _pooled_by_attention(visual: VisionTransformer) -> Scoring:
    """Score the output of the pooler's first query, which becomes the image feature."""
    head = (Norm(visual.ln_post), _projection(visual))
    return Scoring((), slice(0, 1), head, _describe_pooler(visual.attn_pool))


def _authors_coca(visual: VisionTransformer) -> Scoring:
    """Score as the authors' package does: no norm after the pooler, and the plain product with the text."""
    pooler = _describe_pooler(visual.attn_pool)
    return Scoring((), slice(0, 1), (_projection(visual),), pooler, is_unit=False)


def _describe_pooler(pooler: AttentionalPooler) -> Block:
    return Block(
        norm=pooler.ln_k,
        project=partial(_pooler_project, pooler),
        out=(Linear.of(pooler.attn.out_proj),),
        mlp=(),
        is_pooler=True,
    )


def _pooler_project(
    pooler: AttentionalPooler, tokens: Float[Tensor, "batch tokens width"], _rotary: Tensor | None
) -> QueriesKeysValues:
    """Project the first query only: queries do not interact, and only the first is scored."""
    attention = pooler.attn
    width, heads = attention.embed_dim, attention.num_heads
    by_query, by_key, by_value = attention.in_proj_bias.chunk(3)
    if attention.in_proj_weight is not None:
        query_weight, key_weight, value_weight = attention.in_proj_weight.chunk(3)
    else:
        query_weight, key_weight, value_weight = (
            attention.q_proj_weight,
            attention.k_proj_weight,
            attention.v_proj_weight,
        )
    # With precision "fp16" and "bf16", open_clip keeps the query in float32.
    query = F.linear(pooler.ln_q(pooler.query[:1]).to(tokens.dtype), query_weight, by_query)
    projected = (
        query.expand(len(tokens), 1, width),
        F.linear(tokens, key_weight, by_key),
        F.linear(tokens, value_weight, by_value),
    )
    queries, keys, values = (torch.unflatten(part, -1, (heads, -1)).transpose(1, 2) for part in projected)
    return queries, keys, values


def embed(
    visual: Any, native_grid: tuple[int, int], images: Float[Tensor, "batch 3 height width"]
) -> EmbeddedImages:
    """Embed patches of images of any size, without the patch dropout of training."""
    patches = visual.conv1(images)
    class_token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    tokens = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
    grid_height, grid_width = patches.shape[-2:]
    positions = resample_positions(
        visual.positional_embedding,
        native_grid,
        (grid_height, grid_width),
        prefix_tokens=PREFIX_TOKENS,
    )
    return EmbeddedImages(visual.ln_pre(tokens + positions.to(tokens.dtype)))
