"""What the descriptions of several families share."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from legrad.towers import QueriesKeysValues


def first_reason(*checks: tuple[str, bool]) -> str | None:
    """Return the first reason whose condition holds."""
    return next((reason for reason, applies in checks if applies), None)


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
