"""One forward pass through a vision tower, returning what the explanation needs as values."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from legrad.method.stages import run_stages
from legrad.method.towers import Block, Scoring, Tower

Pool = Literal["reference", "model", "authors"]
StageInputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class LayerTrace:
    """What one explained attention computed, in the notation y = x + out(attention), z = y + mlp(y).

    The attention is the block's own, or the pooler's where the tower has one.

    Attributes:
        index: position of the block in the tower, 0 first.
        values: V, one matrix for each head.
        out_inputs: inputs of each stage of `out` that is not linear.
        mlp_inputs: inputs of each stage of `mlp` that is not linear.
        outputs: z, the tokens that are scored: the block's, or the pooler's one.
        block_outputs: the tokens that leave the block.
    """

    index: int
    values: Float[Tensor, "batch heads tokens head_dim"]
    out_inputs: StageInputs
    mlp_inputs: StageInputs
    outputs: Float[Tensor, "batch queries width"]
    block_outputs: Float[Tensor, "batch tokens block_width"]


@dataclass(frozen=True)
class Trace:
    """A batch of encoded images: enough to explain any number of prompts without a second encode.

    Attributes:
        layers: the explained blocks, first to last.
        image_features: the model's own, unit rows, as `model.encode_image(images, normalize=True)` gives
            them.
        grid_height: patches down.
        grid_width: patches across.
        rotary: the rotary position embedding that the blocks used, or None.
        pool: the choice of `pool` that the layers were kept for; "authors": that of `as_authors`, where it is
            another.
        structure: tells the modules that were run from those of another model; None in a copy or where it is
            not known.
    """

    layers: tuple[LayerTrace, ...]
    image_features: Float[Tensor, "batch embed_dim"]
    grid_height: int
    grid_width: int
    rotary: Tensor | None = None
    pool: Pool = "reference"
    structure: int | None = None

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return len(self.image_features)

    def __getstate__(self) -> dict[str, object]:
        """Give what a copy keeps: its explainer may be one of copied modules."""
        return vars(self) | {"structure": None}


@torch.no_grad()
def trace_images(
    tower: Tower, images: Float[Tensor, "batch 3 height width"], layers: int, scoring: Scoring
) -> Trace:
    """Encode images once, keeping what the last blocks computed.

    The forward pass is written over the tower's own submodules: nothing is hooked, no state that training
    mode would change is used, and attention stays fused. Autocast does not act.

    Args:
        tower: description of the tower.
        images: preprocessed images; both sides multiples of the patch size.
        layers: how many of the last blocks to keep.
        scoring: how a layer is scored; its pooler, if any, is run on each kept block's tokens.

    Returns:
        The trace, in the dtype of the tower's parameters.
    """
    first_kept = len(tower.blocks) - layers
    kept: list[LayerTrace] = []
    with torch.autocast(images.device.type, enabled=False):
        embedded = tower.embed(images)
        tokens = embedded.tokens
        for index, block in enumerate(tower.blocks):
            layer = run_block(block, tokens, embedded.rotary, index)
            tokens = layer.outputs
            if index >= first_kept:
                pooled = layer if scoring.pooler is None else run_block(scoring.pooler, tokens, None, index)
                kept.append(_compact(pooled, tokens))
        features = F.normalize(score_features(tower.own, tokens), dim=-1)
    height, width = images.shape[-2:]
    grid_height, grid_width = height // tower.patch_size, width // tower.patch_size
    return Trace(tuple(kept), features, grid_height, grid_width, embedded.rotary, pool_of(tower, scoring))


def pool_of(tower: Tower, scoring: Scoring) -> Pool:
    """Name the way in which a tower's layers are scored."""
    if scoring is tower.reference:
        return "reference"
    return "model" if scoring is tower.own else "authors"


def run_block(
    block: Block, tokens: Float[Tensor, "batch tokens width"], rotary: Tensor | None, index: int = 0
) -> LayerTrace:
    """Run one block, or pooler, keeping what it computed on the way."""
    return run_normed_block(block, tokens, block.norm(tokens), rotary, index)


def run_normed_block(
    block: Block,
    tokens: Float[Tensor, "batch tokens width"],
    normed_tokens: Float[Tensor, "batch tokens width"],
    rotary: Tensor | None,
    index: int = 0,
) -> LayerTrace:
    """Run what follows a block's first norm, given the block's inputs and their normed form."""
    queries, keys, values = block.project(normed_tokens, rotary)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=block.bias())
    branch, out_inputs = run_stages(block.out, mixed.transpose(1, 2).flatten(2))
    attended = branch if block.is_pooler else tokens + branch
    branch, mlp_inputs = run_stages(block.mlp, attended)
    outputs = attended + branch if block.mlp else attended
    block_outputs = tokens if block.is_pooler else outputs
    return LayerTrace(index, values, out_inputs, mlp_inputs, outputs, block_outputs)


def score_features(
    scoring: Scoring, tokens: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch embed_dim"]:
    """Pool tokens and apply the head, as a scoring says; the feature is not brought to unit length."""
    if scoring.pooler is not None:
        tokens = run_block(scoring.pooler, tokens, None).outputs
    # Selected before the stages: with a class token the norm sees that alone.
    normed, _ = run_stages(scoring.token_stages, tokens[:, scoring.pooled_tokens])
    features, _ = run_stages(scoring.head, normed.mean(dim=1, keepdim=True))
    return features[:, 0]


def _compact(layer: LayerTrace, block_outputs: Tensor) -> LayerTrace:
    """Copy the values, or their view would keep queries and keys in memory as well."""
    return LayerTrace(
        layer.index,
        layer.values.contiguous(),
        layer.out_inputs,
        layer.mlp_inputs,
        layer.outputs,
        block_outputs,
    )
