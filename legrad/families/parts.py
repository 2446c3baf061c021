"""Checks and building blocks that the descriptions of several families share."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from legrad.errors import LeGradError
from legrad.method.towers import Block, QueriesKeysValues

_WHY_NOT = {
    "ModifiedResNet": "is convolutional: its only attention pools a feature map at the end",
    "ResNet": "is convolutional and has no attention",
    "ConvNeXt": "is convolutional and has no attention",
    "FastVit": "puts convolutions after its attention, which mix the patches again",
    "SwinTransformer": "attends within windows and merges patches from stage to stage",
}


class NotCovered(LeGradError):
    """A part of a vision tower is not covered by any description; the message is the reason.

    Attributes:
        module: the module that is not covered, or None.
    """

    def __init__(self, reason: str, module: nn.Module | None = None) -> None:
        """Keep the reason and the module."""
        super().__init__(reason)
        self.module = module


def qualified_name(thing: Any) -> str:
    """Return the name of a class or function with its Python module."""
    return f"{thing.__module__}.{thing.__qualname__}"


def class_name(module: nn.Module) -> str:
    """Return the class name of a module with an article; error messages add its full name and path."""
    return f"a {type(module).__name__}"


def why_not_covered(tower: nn.Module) -> str | None:
    """Return why an architecture cannot be explained, or None if nothing is known about it."""
    return next((_WHY_NOT[kind.__name__] for kind in type(tower).__mro__ if kind.__name__ in _WHY_NOT), None)


def check_covered(*checks: tuple[str, bool]) -> None:
    """Raise `NotCovered` with the first reason whose condition holds."""
    for reason, applies in checks:
        if applies:
            raise NotCovered(reason)


def check_affine_norm(norm: nn.Module, name: str) -> None:
    """Raise `NotCovered` unless a module is a LayerNorm over one axis with weight and bias."""
    is_affine = (
        isinstance(norm, nn.LayerNorm)
        and len(norm.normalized_shape) == 1
        and norm.weight is not None
        and norm.bias is not None
    )
    if not is_affine:
        raise NotCovered(f"its {name} is {class_name(norm)}, not a LayerNorm with weight and bias", norm)


def split_heads(joint: Float[Tensor, "batch tokens three_widths"], heads: int) -> QueriesKeysValues:
    """Split a joint projection into queries, keys and values, each [batch, heads, tokens, head_dim]."""
    queries, keys, values = torch.unflatten(joint, -1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return queries, keys, values


def describe_blocks(blocks: Iterable[nn.Module], describe_block: Callable[[Any], Block]) -> tuple[Block, ...]:
    """Describe each block; the message of a `NotCovered` names the block."""
    described = []
    for index, block in enumerate(blocks):
        try:
            described.append(describe_block(block))
        except NotCovered as reason:
            culprit = block if reason.module is None else reason.module
            raise NotCovered(f"block {index}: {reason}", culprit) from None
    return tuple(described)


def resample_positions(
    positions: Float[Tensor, "native_tokens width"],
    native_grid: tuple[int, int],
    grid: tuple[int, int],
    *,
    prefix_tokens: int,
) -> Float[Tensor, "tokens width"]:
    """Resample the patches' position embeddings bicubically with antialiasing, as the authors do.

    Args:
        positions: embeddings of the prefix tokens, then of the patches, row by row.
        native_grid: rows and columns of patches that the embeddings were learned for.
        grid: rows and columns of patches to return.
        prefix_tokens: number of first embeddings that belong to no patch; they are returned unchanged.

    Source: `legrad_torch` 1.1, which resamples the position embeddings in the same way.
    """
    if tuple(grid) == tuple(native_grid):
        return positions
    prefix, patches = positions[:prefix_tokens], positions[prefix_tokens:]
    maps = patches.T.reshape(1, -1, *native_grid)
    # Resampling in half precision would lose accuracy.
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    resampled = F.interpolate(maps, size=tuple(grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix.to(maps.dtype), resampled.flatten(2)[0].T])
