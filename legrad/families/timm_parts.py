"""Describe parts that several of timm's vision transformers share, as stages."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.patch_embed import PatchEmbed
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from legrad.families.parts import NotCovered, check_affine_norm, check_covered, class_name, resample_positions
from legrad.method.stages import Activation, Gate, Linear, Norm, Scale, Stage
from legrad.method.towers import Block, QueriesKeysValues, Scoring

Stages = tuple[Stage, ...]
HEAD_ACTIVATIONS = (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh)


def norm_stages(module: nn.Module) -> Stages:
    """Describe a LayerNorm; an identity gives no stages."""
    if isinstance(module, nn.Identity):
        return ()
    check_affine_norm(module, "norm")
    return (Norm(module),)  # type: ignore[arg-type]


def linear_stages(module: nn.Module) -> Stages:
    """Describe a linear layer; an identity gives no stages."""
    if isinstance(module, nn.Identity):
        return ()
    if type(module) is not nn.Linear:
        raise NotCovered(f"expected a linear layer, found {class_name(module)}", module)
    return (Linear.of(module),)


def scale_stages(module: nn.Module) -> Stages:
    """Describe a LayerScale; an identity gives no stages."""
    if isinstance(module, nn.Identity):
        return ()
    if type(module) is not LayerScale:
        raise NotCovered(f"expected a LayerScale, found {class_name(module)}", module)
    return (Scale(partial(getattr, module, "gamma")),)


def mlp_stages(mlp: nn.Module) -> Stages:
    """Describe an MLP: plain, or gated with one or two first layers; with or without a norm of its own."""
    if type(mlp) is Mlp:
        inner: Stages = (*linear_stages(mlp.fc1), Activation(mlp.act), *norm_stages(mlp.norm))
        return (*inner, *linear_stages(mlp.fc2))
    if type(mlp) is GluMlp and not mlp.gate_last:
        return (*linear_stages(mlp.fc1), Gate(mlp.act), *norm_stages(mlp.norm), *linear_stages(mlp.fc2))
    if type(mlp) is SwiGLU:
        first = side_by_side(mlp.fc1_g, mlp.fc1_x)
        return (first, Gate(mlp.act), *norm_stages(mlp.norm), *linear_stages(mlp.fc2))
    if type(mlp) is GeGluMlp:
        first = side_by_side(mlp.w0, mlp.w1)
        return (*norm_stages(mlp.norm), first, Gate(mlp.act), *linear_stages(mlp.w2))
    raise NotCovered(f"its MLP is {class_name(mlp)}", mlp)


def side_by_side(first: nn.Linear, second: nn.Linear) -> Linear:
    """Describe two linear layers with the same inputs as one; outputs of the first come first."""

    def bias() -> Tensor | None:
        biases = [layer.bias for layer in (first, second)]
        if all(bias is None for bias in biases):
            return None
        return torch.cat(
            [
                layer.weight.new_zeros(layer.out_features) if bias is None else bias
                for layer, bias in zip((first, second), biases, strict=True)
            ]
        )

    return Linear(lambda: torch.cat([first.weight, second.weight]), bias)


def layer_stages(head: nn.Module) -> Stages:
    """Describe the layers of a classifier's head: linear, norms, activations; dropouts are skipped."""
    if type(head) is nn.Sequential:
        return tuple(stage for layer in head for stage in layer_stages(layer))
    if type(head) is nn.Dropout:
        return ()
    if type(head) is nn.LayerNorm:
        return norm_stages(head)
    return (Activation(head),) if type(head) in HEAD_ACTIVATIONS else linear_stages(head)


def head_stages(trunk: nn.Module, head: nn.Module) -> Stages:
    """Describe what follows pooling: the trunk's last norm and linear layer, and open_clip's projection."""
    stages = (*norm_stages(trunk.fc_norm), *layer_stages(trunk.head))  # type: ignore[arg-type]
    # A Sequential in all models that open_clip makes.
    parts = head.named_children() if type(head) is nn.Sequential else [("head", head)]
    for name, module in parts:
        if type(module) is nn.Identity or isinstance(module, nn.Dropout):
            continue
        if type(module) not in (Mlp, nn.Linear):
            raise NotCovered(f"its head has a part {name!r}, {class_name(module)}", module)
        stages += mlp_stages(module) if isinstance(module, Mlp) else linear_stages(module)
    return stages


def check_no_gate(attention: nn.Module) -> None:
    """Raise `NotCovered` for an attention with gated outputs, which newer versions of timm have."""
    check_covered(("its attention has a gate", getattr(attention, "gate", None) is not None))


def mean_scorings(trunk: Any, projection: nn.Module) -> tuple[Scoring, Scoring]:
    """Describe two ways of scoring a layer of a tower without pooler: the reference, and the model's own.

    The reference is the authors' way, adapted to the norms of the tower: the mean over all tokens, then norms
    and head.
    """
    norm, head = norm_stages(trunk.norm), head_stages(trunk, projection)
    own_tokens = slice(0, 1) if trunk.global_pool == "token" else slice(trunk.num_prefix_tokens, None)
    return Scoring((), slice(0, None), (*norm, *head)), Scoring(norm, own_tokens, head)


def describe_pooler(pooler: nn.Module, norm: nn.Module) -> Block:
    """Describe timm's attentional pooling with a learned query.

    Args:
        pooler: the pooler.
        norm: module applied to the tokens before the pooler.
    """
    if type(pooler) is not AttentionPoolLatent:
        raise NotCovered(f"it pools by {class_name(pooler)}", pooler)
    check_covered(
        ("its pooler adds position embeddings", pooler.pos_embed is not None),
        (f"its pooler takes {pooler.pool!r}, not the first query", pooler.pool != "token"),
    )
    return Block(
        norm=norm,
        project=partial(_pooler_project, pooler),
        out=linear_stages(pooler.proj),
        mlp=() if pooler.mlp is None else (*norm_stages(pooler.norm), *mlp_stages(pooler.mlp)),
        is_pooler=True,
    )


def _pooler_project(
    pooler: AttentionPoolLatent, tokens: Float[Tensor, "batch tokens width"], _rotary: Tensor | None
) -> QueriesKeysValues:
    """Project the first query only: queries do not interact, and only the first is scored."""
    query = pooler.q(pooler.latent[:, :1].to(tokens.dtype)).expand(len(tokens), -1, -1)
    queries = torch.unflatten(query, -1, (pooler.num_heads, -1)).transpose(1, 2)
    joint = torch.unflatten(pooler.kv(tokens), -1, (2, pooler.num_heads, -1))
    keys, values = joint.permute(2, 0, 3, 1, 4)
    return pooler.q_norm(queries), pooler.k_norm(keys), values


def embed_dim(trunk: Any, projection: nn.Module) -> int:
    """Return the dimension of a tower's features: that of its last projection, otherwise of its trunk."""
    heads = (*trunk.head.modules(), *projection.modules())
    projections = [module for module in heads if isinstance(module, nn.Linear)]
    return projections[-1].out_features if projections else int(trunk.num_features)


def other_patches(trunk: Any, *kinds: type) -> tuple[str, bool]:
    """Return a check for `check_covered` that applies if no class of `kinds` makes a trunk's patches."""
    made_by = type(trunk.patch_embed)
    return f"its patches are made by a {made_by.__name__}", made_by not in kinds


def square_patch_size(patch_embed: PatchEmbed) -> int:
    """Return the side of a patch in pixels."""
    patch_height, patch_width = patch_embed.patch_size
    if patch_height != patch_width:
        raise NotCovered(f"its patches are not square: {patch_height} x {patch_width}")
    return int(patch_height)


def patch_tokens(
    patch_embed: PatchEmbed, images: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch patches width_"], tuple[int, int]]:
    """Split images of any size into patches and embed each.

    Returns:
        The patches row by row, and the numbers of rows and columns.
    """
    patches = patch_embed.proj(images)
    grid_height, grid_width = patches.shape[-2:]
    return patch_embed.norm(patches.flatten(2).transpose(1, 2)), (grid_height, grid_width)


def add_prefix_and_positions(
    trunk: Any, patches: Float[Tensor, "batch patches width"], grid: tuple[int, int]
) -> Float[Tensor, "batch tokens width"]:
    """Prepend the class, distillation and register tokens to the patches, and add learned positions, if any.

    Args:
        trunk: a trunk of timm with the usual attribute names for tokens and positions.
        patches: embedded patches, row by row.
        grid: number of rows and columns of patches.
    """
    prefix = [
        token.expand(len(patches), -1, -1)
        for token in (trunk.cls_token, getattr(trunk, "dist_token", None), trunk.reg_token)
        if token is not None
    ]
    tokens = torch.cat([*prefix, patches], dim=1)
    if trunk.pos_embed is None:
        return tokens
    without_position = trunk.num_prefix_tokens if trunk.no_embed_class else 0
    positions = resample_positions(
        trunk.pos_embed[0],
        trunk.patch_embed.grid_size,
        grid,
        prefix_tokens=trunk.num_prefix_tokens - without_position,
    ).to(tokens.dtype)
    return torch.cat([tokens[:, :without_position], tokens[:, without_position:] + positions], dim=1)
