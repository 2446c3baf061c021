"""Spread relevance between the patches of an image whose keys are alike.

With K_l the unit keys of the patches in block l, all heads concatenated, c the mean of K_l K_l^T over the
last two blocks, and R a prompt's relevance,

    A[i, j] = max(0, c[i, j])^p,    R'[i] = sum_j A[i, j] R[j] / sum_j A[i, j],

so patches that look alike to the model get similar relevance. One product serves all prompts of an image. The
number of blocks and the power p = 8 were chosen on the demo model; p = 1 blurs its maps away.

Sources: the keys of the last attention tell objects apart: Siméoni et al., "Localizing Objects with
    Self-Supervised Transformers and no Labels" (LOST), BMVC 2021, and Wang et al., "TokenCut", CVPR 2022; in
    CLIP: Hajimiri et al., "Pay Attention to Your Neighbours" (NACLIP), https://arxiv.org/abs/2404.08181.
    Maps multiplied by an affinity of patches: Lin et al., "CLIP is Also an Efficient Segmenter" (CLIP-ES),
    https://arxiv.org/abs/2212.09506, section 3.4, there from attention matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from legrad.method.stages import accumulation_dtype
from legrad.method.towers import Block

Affinity = Literal["none", "keys"]
KEY_BLOCKS = 2
SHARPNESS = 8  # the power p

# Bound on a strip of the affinity: on a CPU it is to fit into the cache of a core.
CPU_STRIP_BYTES = 2**20
DEVICE_STRIP_BYTES = 512 * 2**20


def unit_patch_keys(
    block: Block, tokens: Float[Tensor, "batch tokens width"], prefix_tokens: int
) -> Float[Tensor, "batch patches keys_width"]:
    """Return the keys of the patches in a block as unit rows, all heads concatenated.

    Rotary position embeddings are not applied: likeness must not depend on how far two patches are apart.

    Args:
        block: a block of the trunk, also where the tower pools by attention: its pooler has one query only.
        tokens: the block's input.
        prefix_tokens: number of tokens before the patches.

    Returns:
        Rows in float32, or float64 for a float64 model.
    """
    _, keys, _ = block.project(block.norm(tokens), None)
    rows = keys[:, :, prefix_tokens:].transpose(1, 2).flatten(2)
    return F.normalize(rows.to(accumulation_dtype(rows.dtype)), dim=-1)


def joined_keys(
    keys_of_blocks: Sequence[Float[Tensor, "batch patches keys_width"]],
) -> Float[Tensor, "batch patches all_widths"]:
    """Return unit rows whose products are the mean over blocks of the products of their unit rows."""
    joined = torch.cat(list(keys_of_blocks), dim=-1)
    return joined.div_(len(keys_of_blocks) ** 0.5)


@torch.no_grad()
def spread_along_keys(
    grids: Float[Tensor, "*layers prompts grid_height grid_width"],
    unit_keys: Float[Tensor, "batch patches keys_width"],
    image_index: Int[Tensor, " prompts"],
    *,
    strip_bytes: int | None = None,
) -> Float[Tensor, "*layers prompts grid_height grid_width"]:
    """Replace each patch's relevance by the mean over all patches, weighted by the likeness of their keys.

    Costs patches^2 x (keys_width + layers x prompts) multiply-adds for each image. The affinity is computed
    in strips of rows, so that memory does not grow with the square of the number of patches.

    Args:
        grids: raw relevance.
        unit_keys: as `joined_keys` returns them.
        image_index: for each prompt, the row of its image; in any order.
        strip_bytes: bound on the memory of a strip, which has at least one row; a device has its own bound
            as well.

    Returns:
        Grids of the same shape and dtype; non-negative, and a constant grid stays constant.
    """
    most = CPU_STRIP_BYTES if grids.device.type == "cpu" else DEVICE_STRIP_BYTES
    strip_bytes = most if strip_bytes is None else min(strip_bytes, most)
    rows = grids.flatten(-2).movedim(-2, 0)
    spread = torch.empty_like(rows)
    counts = image_index.bincount(minlength=len(unit_keys)).tolist()
    by_image = torch.split(image_index.argsort(stable=True), counts)
    for keys, prompts in zip(unit_keys, by_image, strict=True):
        spread[prompts] = _spread_rows(rows[prompts], keys, strip_bytes)
    return spread.movedim(0, -2).reshape(grids.shape)


def _spread_rows(
    rows: Float[Tensor, "prompts *layers patches"],
    keys: Float[Tensor, "patches keys_width"],
    strip_bytes: int,
) -> Float[Tensor, "prompts *layers patches"]:
    spread = torch.empty_like(rows)
    strip = max(1, strip_bytes // (len(keys) * keys.element_size()))
    for start in range(0, len(keys), strip):
        patches = slice(start, start + strip)
        affinity = (keys[patches] @ keys.T).clamp_(min=0).pow_(SHARPNESS)
        weights = F.normalize(affinity, p=1, dim=-1)
        spread[..., patches] = rows @ weights.T
    return spread
