"""Learned position embeddings for another grid than the tower was trained for."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def resample_positions(
    positions: Float[Tensor, "native_tokens width"],
    native_grid: tuple[int, int],
    grid: tuple[int, int],
    *,
    prefix_tokens: int,
) -> Float[Tensor, "tokens width"]:
    """Resample the patches' position embeddings bicubically with antialiasing, as the authors do.

    Args:
        positions: of the prefix tokens, then of the patches, row by row.
        native_grid: patches (down, across) that the embeddings were learned for.
        grid: patches (down, across) wanted.
        prefix_tokens: how many of the first rows belong to no patch; they stay as they are.
    """
    if tuple(grid) == tuple(native_grid):
        return positions
    prefix, patches = positions[:prefix_tokens], positions[prefix_tokens:]
    maps = patches.T.reshape(1, -1, *native_grid)
    # Half precision would lose in the resampling what the parameters still hold.
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    resampled = F.interpolate(maps, size=tuple(grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix.to(maps.dtype), resampled.flatten(2)[0].T])
