"""What the descriptions of several families share."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from legrad.errors import LeGradError
from legrad.towers import Block, QueriesKeysValues


class NotCovered(LeGradError):
    """A part of a tower that no description covers; the message is the reason."""


def check_covered(*checks: tuple[str, bool]) -> None:
    """Raise `NotCovered` with the first reason whose condition holds."""
    for reason, applies in checks:
        if applies:
            raise NotCovered(reason)


def is_affine_norm(norm: nn.Module) -> bool:
    """Whether a module is a LayerNorm over one axis with weight and bias."""
    return (
        isinstance(norm, nn.LayerNorm)
        and len(norm.normalized_shape) == 1
        and norm.weight is not None
        and norm.bias is not None
    )


def split_heads(joint: Float[Tensor, "batch tokens three_widths"], heads: int) -> QueriesKeysValues:
    """Cut a joint projection into queries, keys and values, [batch, heads, tokens, head_dim] each."""
    queries, keys, values = torch.unflatten(joint, -1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return queries, keys, values


def describe_blocks(blocks: Iterable[nn.Module], describe_block: Callable[[Any], Block]) -> tuple[Block, ...]:
    """Describe each block; a reason for refusal names the block."""
    described = []
    for index, block in enumerate(blocks):
        try:
            described.append(describe_block(block))
        except NotCovered as reason:
            raise NotCovered(f"block {index}: {reason}") from None
    return tuple(described)
