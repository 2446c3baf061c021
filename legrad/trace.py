"""One forward pass through a vision tower, returning what the explanation needs as values."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from legrad.towers import Block, Tower


@dataclass(frozen=True)
class LayerTrace:
    """What one block computed, in the notation y = x + attention, z = y + MLP.

    Attributes:
        index: position of the block in the tower, 0 first.
        values: V, one matrix for each head.
        attended: y, the tokens after the attention's residual sum.
        hidden: the MLP's first layer, before its activation.
        outputs: z, the tokens that leave the block.
    """

    index: int
    values: Float[Tensor, "batch heads tokens head_dim"]
    attended: Float[Tensor, "batch tokens width"]
    hidden: Float[Tensor, "batch tokens hidden"]
    outputs: Float[Tensor, "batch tokens width"]


@dataclass(frozen=True)
class Trace:
    """A batch of encoded images: enough to explain any number of prompts without a second encode.

    Attributes:
        layers: the explained blocks, first to last.
        image_features: the model's own, unit rows, as `model.encode_image(images, normalize=True)` gives
            them.
        grid_height: patches down.
        grid_width: patches across.
    """

    layers: tuple[LayerTrace, ...]
    image_features: Float[Tensor, "batch embed_dim"]
    grid_height: int
    grid_width: int

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return len(self.image_features)


@torch.no_grad()
def trace_images(tower: Tower, images: Float[Tensor, "batch 3 height width"], layers: int) -> Trace:
    """Encode images once, keeping what the last blocks computed.

    The forward pass is written over the tower's own submodules: nothing is hooked, no state that training
    mode would change is used, and attention stays fused. Autocast does not act.

    Args:
        tower: description of the tower.
        images: preprocessed images; both sides multiples of the patch size.
        layers: how many of the last blocks to keep.

    Returns:
        The trace, in the dtype of the tower's parameters.
    """
    first_kept = len(tower.blocks) - layers
    kept: list[LayerTrace] = []
    with torch.autocast(images.device.type, enabled=False):
        tokens = tower.embed(images)
        for index, block in enumerate(tower.blocks):
            layer = _run_block(block, index, tokens)
            tokens = layer.outputs
            if index >= first_kept:
                # A copy, or the view would keep queries and keys in memory as well.
                kept.append(
                    LayerTrace(index, layer.values.contiguous(), layer.attended, layer.hidden, tokens)
                )
        features = F.normalize(tower.own_feature(tokens), dim=-1)
    height, width = images.shape[-2:]
    return Trace(tuple(kept), features, height // tower.patch_size, width // tower.patch_size)


def _run_block(block: Block, index: int, tokens: Float[Tensor, "batch tokens width"]) -> LayerTrace:
    attention = block.attention
    joint = F.linear(block.attention_norm(tokens), attention.in_proj_weight, attention.in_proj_bias)
    queries, keys, values = torch.unflatten(joint, -1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    attended = tokens + block.attention_scale(attention.out_proj(mixed))
    hidden = block.mlp_in(block.mlp_norm(attended))
    # An activation that works in place must not overwrite what is kept.
    activated = block.activation(hidden.clone() if getattr(block.activation, "inplace", False) else hidden)
    outputs = attended + block.mlp_scale(block.mlp_out(activated))
    return LayerTrace(index, values, attended, hidden, outputs)
