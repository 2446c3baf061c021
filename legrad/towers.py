"""What a vision tower is made of, as far as the method needs to know.

Everything that depends on a model family is here: a `Tower` describes one tower, and `legrad.trace` and
`legrad.relevance` work on the description alone. The family is decided by the tower's structure, not by its
name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import open_clip
import torch
from jaxtyping import Float
from open_clip.transformer import LayerScale, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from legrad.errors import UnsupportedModelError

SUPPORTED = "open_clip's VisionTransformer without attentional pooling (CLIP, CLIPA and their kin)"


@dataclass(frozen=True)
class Block:
    """The parts of one pre-norm transformer block: y = x + s1(attn(norm1(x))), z = y + s2(mlp(norm2(y))).

    Attributes:
        attention_norm: norm1.
        attention: self-attention with one joint projection for queries, keys and values.
        attention_scale: s1, a LayerScale or the identity.
        mlp_norm: norm2.
        mlp_in: first layer of the MLP.
        activation: the MLP's elementwise non-linearity.
        mlp_out: second layer of the MLP.
        mlp_scale: s2, a LayerScale or the identity.
    """

    attention_norm: nn.LayerNorm
    attention: nn.MultiheadAttention
    attention_scale: nn.Module
    mlp_norm: nn.LayerNorm
    mlp_in: nn.Linear
    activation: nn.Module
    mlp_out: nn.Linear
    mlp_scale: nn.Module


@dataclass(frozen=True)
class Head:
    """From a pooled token to the joint image-text space: norm(token) @ projection().

    Attributes:
        norm: the tower's final norm.
        projection: gives the matrix [width, embed_dim] as it is now, so that reloaded weights are followed.
    """

    norm: nn.LayerNorm
    projection: Callable[[], Tensor]


@dataclass(frozen=True)
class Tower:
    """One vision tower, described.

    Attributes:
        family: name of the rules that apply, as `legrad.supported_models` lists it.
        patch_size: side of a square patch, in pixels.
        native_grid: patches (down, across) at the size the tower was trained for.
        embed_dim: dimension of the joint image-text space.
        prefix_tokens: tokens in front of the patches (the class token).
        embed: images [batch, 3, height, width] -> tokens entering the first block.
        own_feature: tokens leaving the last block -> the model's own pooled feature, before unit norm.
        blocks: every block, first to last.
        head: what follows pooling.
        own_pool: the tokens that the model's own pooling averages before `head`; None where it does
            otherwise.
        parameter: one parameter of the patch embedding; its dtype and device are those of the images.
    """

    family: str
    patch_size: int
    native_grid: tuple[int, int]
    embed_dim: int
    prefix_tokens: int
    embed: Callable[[Tensor], Tensor]
    own_feature: Callable[[Tensor], Tensor]
    blocks: tuple[Block, ...]
    head: Head
    own_pool: slice | None
    parameter: Callable[[], Tensor]


@dataclass(frozen=True)
class ModelSupport:
    """Whether one open_clip model can be explained.

    Attributes:
        family: the family whose rules apply, or None.
        reason: why the model is refused, or None.
    """

    family: str | None
    reason: str | None


def describe_tower(model: nn.Module) -> Tower:
    """Describe the vision tower of an open_clip model.

    Args:
        model: a model with a `visual` tower, as `open_clip.create_model` gives it. It is not changed.

    Raises:
        UnsupportedModelError: the tower's structure is not covered; names model, tower and reason.
    """
    visual = getattr(model, "visual", None)
    if visual is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected an open_clip model with a `visual` tower"
        )
    reason = refusal(visual)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} with a vision tower {type(visual).__name__}: {reason}. "
            f"Supported: {SUPPORTED}"
        )
    return _describe_vision_transformer(visual)


def refusal(visual: nn.Module) -> str | None:
    """Say why a vision tower is not covered, or None where it is."""
    if not isinstance(visual, VisionTransformer):
        return f"the tower is a {_class_name(visual)}, not a VisionTransformer"
    checks = {
        "it pools by attention": visual.attn_pool is not None,
        f"its pooling is {visual.pool_type!r}, not 'tok' or 'avg'": visual.pool_type not in ("tok", "avg"),
        "its final projection was removed": visual.proj is None,
        "its ln_post is no LayerNorm with weight and bias": not _is_affine_norm(visual.ln_post),
        f"its patches are not square: {visual.patch_size}": len(set(visual.patch_size)) != 1,
    }
    tower_reason = next((reason for reason, applies in checks.items() if applies), None)
    if tower_reason is not None:
        return tower_reason
    block_reasons = ((i, _block_refusal(block)) for i, block in enumerate(visual.transformer.resblocks))
    return next((f"block {i}: {reason}" for i, reason in block_reasons if reason is not None), None)


def supported_models() -> dict[str, ModelSupport]:
    """List every model that open_clip knows by name, with its family or the reason for its refusal.

    Vision towers are built without memory for their weights; the first call takes seconds. Nothing is
    downloaded.
    """
    return {name: model_support(name) for name in open_clip.list_models()}


def model_support(name: str) -> ModelSupport:
    """Say whether the open_clip model of this name can be explained, from its configuration alone."""
    config = open_clip.get_model_config(name)
    if config is None:
        return ModelSupport(None, f"open_clip has no model of the name {name!r}")
    reason = _refusal_by_config(config)
    return ModelSupport("clip", None) if reason is None else ModelSupport(None, reason)


def _refusal_by_config(config: dict[str, Any]) -> str | None:
    """Apply open_clip's own choice of tower class, and build the tower only where its parts decide."""
    vision = config["vision_cfg"]
    if vision.get("timm_model_name"):
        return f"the tower is a TimmModel({vision['timm_model_name']}), not a VisionTransformer"
    if isinstance(vision.get("layers"), list | tuple):
        return "the tower is a ModifiedResNet, not a VisionTransformer"
    with torch.device("meta"):
        model = open_clip.CLIP(config["embed_dim"], vision, _smallest_text_config())
    return refusal(model.visual)


def _smallest_text_config() -> dict[str, int]:
    return {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


def _class_name(visual: nn.Module) -> str:
    trunk = getattr(visual, "trunk", None)
    return type(visual).__name__ + (f"({type(trunk).__name__})" if trunk is not None else "")


def _block_refusal(block: Any) -> str | None:
    if type(block) is not ResidualAttentionBlock:
        return f"it is a {type(block).__name__}, not a ResidualAttentionBlock"
    attention, parts = block.attn, dict(block.mlp.named_children())
    if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
        return "its queries, keys and values have no joint projection"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "its attention adds keys of its own"
    if list(parts) != ["c_fc", "gelu", "c_proj"]:
        return f"its MLP is made of {list(parts)}, not ['c_fc', 'gelu', 'c_proj']"
    if not (_is_affine_norm(block.ln_1) and _is_affine_norm(block.ln_2)):
        return "its norms are not LayerNorms with weight and bias"
    kinds: list[tuple[str, nn.Module, tuple[type[nn.Module], ...]]] = [
        ("attn.out_proj", attention.out_proj, (nn.Linear,)),
        ("mlp.c_fc", parts["c_fc"], (nn.Linear,)),
        ("mlp.c_proj", parts["c_proj"], (nn.Linear,)),
        ("ls_1", block.ls_1, (nn.Identity, LayerScale)),
        ("ls_2", block.ls_2, (nn.Identity, LayerScale)),
    ]
    wrong = ((name, module) for name, module, allowed in kinds if not isinstance(module, allowed))
    return next((f"its {name} is a {type(module).__name__}" for name, module in wrong), None)


def _is_affine_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def _describe_vision_transformer(visual: VisionTransformer) -> Tower:
    grid_height, grid_width = visual.grid_size
    return Tower(
        family="clip",
        patch_size=visual.patch_size[0],
        native_grid=(grid_height, grid_width),
        embed_dim=visual.proj.shape[1],
        prefix_tokens=1,
        embed=partial(_embed, visual),
        own_feature=partial(_own_feature, visual),
        blocks=tuple(_describe_block(block) for block in visual.transformer.resblocks),
        head=Head(norm=visual.ln_post, projection=partial(getattr, visual, "proj")),
        own_pool=_own_pool(visual),
        parameter=partial(getattr, visual.conv1, "weight"),
    )


def _describe_block(block: ResidualAttentionBlock) -> Block:
    return Block(
        attention_norm=block.ln_1,
        attention=block.attn,
        attention_scale=block.ls_1,
        mlp_norm=block.ln_2,
        mlp_in=block.mlp.c_fc,
        activation=block.mlp.gelu,
        mlp_out=block.mlp.c_proj,
        mlp_scale=block.ls_2,
    )


def _own_pool(visual: VisionTransformer) -> slice | None:
    if visual.pool_type == "tok":
        return slice(0, 1)
    # A mean of normed tokens is not the norm of their mean, so only the other order fits `Head`.
    return slice(1, None) if visual.final_ln_after_pool else None


def _embed(
    visual: VisionTransformer, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch tokens width_"]:
    """Embed patches of images of any size; the patch dropout of training never acts."""
    patches = visual.conv1(images)
    class_token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    tokens = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
    positions = _resample_positions(visual.positional_embedding, visual.grid_size, patches.shape[-2:])
    embedded: Tensor = visual.ln_pre(tokens + positions.to(tokens.dtype))
    return embedded


def _resample_positions(
    positions: Float[Tensor, "native_tokens width"], native_grid: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "tokens width"]:
    if tuple(grid) == tuple(native_grid):
        return positions
    class_position, patch_positions = positions[:1], positions[1:]
    maps = patch_positions.T.reshape(1, -1, *native_grid)
    # Half precision would lose in the resampling what the parameters still hold.
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    resampled = F.interpolate(maps, size=tuple(grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([class_position.to(maps.dtype), resampled.flatten(2)[0].T])


def _own_feature(
    visual: VisionTransformer, tokens: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch embed_dim"]:
    patches_or_class = slice(0, 1) if visual.pool_type == "tok" else slice(1, None)
    if visual.final_ln_after_pool:
        pooled = visual.ln_post(tokens[:, patches_or_class].mean(dim=1))
    else:
        pooled = visual.ln_post(tokens[:, patches_or_class]).mean(dim=1)
    feature: Tensor = pooled @ visual.proj
    return feature
