"""Parts of timm's vision transformers that several of them share, described as stages."""

from functools import partial

import torch
from jaxtyping import Float
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from legrad.families.parts import NotCovered, check_covered, is_affine_norm
from legrad.stages import Activation, Gate, Linear, Norm, Scale, Stage
from legrad.towers import Block, QueriesKeysValues

Stages = tuple[Stage, ...]


def norm_stages(module: nn.Module) -> Stages:
    """Describe a LayerNorm, or the identity in its place."""
    if isinstance(module, nn.Identity):
        return ()
    if not isinstance(module, nn.LayerNorm) or not is_affine_norm(module):
        raise NotCovered(f"its norm is a {type(module).__name__}, not a LayerNorm with weight and bias")
    return (Norm(module),)


def linear_stages(module: nn.Module) -> Stages:
    """Describe a linear layer, or the identity in its place."""
    if isinstance(module, nn.Identity):
        return ()
    if not isinstance(module, nn.Linear):
        raise NotCovered(f"a {type(module).__name__} stands where a linear layer is expected")
    return (Linear.of(module),)


def scale_stages(module: nn.Module) -> Stages:
    """Describe a LayerScale, or the identity in its place."""
    if isinstance(module, nn.Identity):
        return ()
    if not isinstance(module, LayerScale):
        raise NotCovered(f"a {type(module).__name__} stands where a LayerScale is expected")
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
    raise NotCovered(f"its MLP is a {type(mlp).__name__}")


def side_by_side(first: nn.Linear, second: nn.Linear) -> Linear:
    """Describe two linear layers of the same inputs as one, the outputs of the first in front."""

    def bias() -> Tensor | None:
        return None if first.bias is None else torch.cat([first.bias, second.bias])

    return Linear(lambda: torch.cat([first.weight, second.weight]), bias)


def head_stages(trunk: nn.Module, head: nn.Sequential) -> Stages:
    """Describe what follows pooling: the trunk's last norm and linear layer, and open_clip's projection."""
    stages = (*norm_stages(trunk.fc_norm), *linear_stages(trunk.head))  # type: ignore[arg-type]
    for name, module in head.named_children():
        if isinstance(module, nn.Dropout):
            continue
        if not isinstance(module, Mlp | nn.Linear):
            raise NotCovered(f"its head has a part {name!r}, a {type(module).__name__}")
        stages += mlp_stages(module) if isinstance(module, Mlp) else linear_stages(module)
    return stages


def describe_pooler(pooler: nn.Module, norm: nn.Module) -> Block:
    """Describe timm's attentional pooling with a learned query.

    Args:
        pooler: the pooler.
        norm: what the tokens pass before the pooler.
    """
    if not isinstance(pooler, AttentionPoolLatent):
        raise NotCovered(f"it pools by a {type(pooler).__name__}")
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
    """Project the first query alone: queries do not see each other, and only the first is scored."""
    query = pooler.q(pooler.latent[:, :1].to(tokens.dtype)).expand(len(tokens), -1, -1)
    queries = torch.unflatten(query, -1, (pooler.num_heads, -1)).transpose(1, 2)
    joint = torch.unflatten(pooler.kv(tokens), -1, (2, pooler.num_heads, -1))
    keys, values = joint.permute(2, 0, 3, 1, 4)
    return pooler.q_norm(queries), pooler.k_norm(keys), values
