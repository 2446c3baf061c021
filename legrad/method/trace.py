"""Run a vision tower once, and return everything that explanations need from the forward pass."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from legrad.method.affinity import KEY_BLOCKS, joined_keys, unit_patch_keys
from legrad.method.precision import full_precision_convolutions
from legrad.method.stages import run_stages
from legrad.method.towers import Block, Scoring, Tower

Pool = Literal["reference", "model", "authors"]
StageInputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class LayerTrace:
    """Values computed by one explained attention, with y = x + out(attention) and z = y + mlp(y).

    The attention is that of the pooler if the tower has one, otherwise that of the block.

    Attributes:
        index: position of the block in the tower, 0 first.
        values: V, one matrix for each head.
        out_inputs: inputs of each stage of `out`, None for linear stages.
        mlp_inputs: inputs of each stage of `mlp`, None for linear stages.
        outputs: z, the tokens that are scored: those of the block, or the pooler's one token.
        block_outputs: output tokens of the block.

    Example:
        >>> layer = explainer.encode(explainer.preprocess([image])).layers[-1]
        >>> layer.index, layer.values.shape
        (5, torch.Size([1, 3, 145, 64]))
    """

    index: int
    values: Float[Tensor, "batch heads tokens head_dim"]
    out_inputs: StageInputs
    mlp_inputs: StageInputs
    outputs: Float[Tensor, "batch queries width"]
    block_outputs: Float[Tensor, "batch tokens block_width"]


@dataclass(frozen=True)
class Trace:
    """A batch of encoded images: everything needed to explain any number of prompts without another encode.

    Attributes:
        layers: the explained blocks, first to last.
        image_features: unit rows, as returned by `model.encode_image(images, normalize=True)`.
        grid_height: rows of patches.
        grid_width: columns of patches.
        rotary: the rotary position embedding that the blocks used, or None.
        pool: the choice of `pool` that the trace was made for; "authors" for `as_authors`, if that differs.
        structure: identifies the modules that made the trace; None in a copy or if it is not known.
        unit_keys: keys of the patches in the last blocks, see `legrad.method.affinity`; None: not kept.

    Example:
        >>> trace = explainer.encode(explainer.preprocess([image, image]))
        >>> trace.batch_size, trace.grid_height, trace.grid_width
        (2, 12, 12)
        >>> explainer.similarity(trace, explainer.embed_text(["a panda"])).shape
        torch.Size([2, 1])
    """

    layers: tuple[LayerTrace, ...]
    image_features: Float[Tensor, "batch embed_dim"]
    grid_height: int
    grid_width: int
    rotary: Tensor | None = None
    pool: Pool = "reference"
    structure: int | None = None
    unit_keys: Float[Tensor, "batch patches keys_width"] | None = None

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return len(self.image_features)

    def __getstate__(self) -> dict[str, object]:
        """Return the state for a copy, whose explainer may have copied modules."""
        return vars(self) | {"structure": None}


@torch.no_grad()
def trace_images(
    tower: Tower,
    images: Float[Tensor, "batch 3 height width"],
    layers: int,
    scoring: Scoring,
    *,
    keep_keys: bool = False,
) -> Trace:
    """Encode images once, and store what the last blocks computed.

    The forward pass calls the tower's own submodules, without hooks and independent of training mode, and
    uses fused attention. Autocast is disabled.

    Args:
        tower: description of the tower.
        images: preprocessed images; both sides multiples of the patch size.
        layers: number of last blocks to store.
        scoring: how a layer is scored; its pooler, if any, is run on the tokens of each stored block.
        keep_keys: store the keys of the patches in the last blocks, which are computed once more for it.

    Returns:
        The trace, in the dtype of the tower's parameters.
    """
    first_kept = len(tower.blocks) - layers
    kept: list[LayerTrace] = []
    keys: list[Tensor] = []
    with torch.autocast(images.device.type, enabled=False):
        with full_precision_convolutions(images.dtype):
            embedded = tower.embed(images)
        tokens = embedded.tokens
        for index, block in enumerate(tower.blocks):
            if keep_keys and index >= len(tower.blocks) - KEY_BLOCKS:
                keys.append(unit_patch_keys(block, tokens, tower.prefix_tokens))
            layer = run_block(block, tokens, embedded.rotary, index)
            tokens = layer.outputs
            if index >= first_kept:
                pooled = layer if scoring.pooler is None else run_block(scoring.pooler, tokens, None, index)
                # a copy, as the view would also keep queries and keys in memory
                kept.append(replace(pooled, values=pooled.values.contiguous(), block_outputs=tokens))
        features = F.normalize(score_features(tower.own, tokens), dim=-1)
    height, width = images.shape[-2:]
    grid_height, grid_width = height // tower.patch_size, width // tower.patch_size
    return Trace(
        tuple(kept),
        features,
        grid_height,
        grid_width,
        embedded.rotary,
        pool_of(tower, scoring),
        unit_keys=joined_keys(keys) if keys else None,
    )


def pool_of(tower: Tower, scoring: Scoring) -> Pool:
    """Return the choice of `pool` that a scoring of a tower belongs to."""
    if scoring is tower.reference:
        return "reference"
    return "model" if scoring is tower.own else "authors"


def run_block(
    block: Block, tokens: Float[Tensor, "batch tokens width"], rotary: Tensor | None, index: int = 0
) -> LayerTrace:
    """Run one block or pooler, and return the values that it computed."""
    return run_normed_block(block, tokens, block.norm(tokens), rotary, index)


def run_normed_block(
    block: Block,
    tokens: Float[Tensor, "batch tokens width"],
    normed_tokens: Float[Tensor, "batch tokens width"],
    rotary: Tensor | None,
    index: int = 0,
) -> LayerTrace:
    """Run a block after its first norm, given its input tokens before and after that norm."""
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
    """Pool tokens and apply the head of a scoring; the feature is not normalised."""
    if scoring.pooler is not None:
        tokens = run_block(scoring.pooler, tokens, None).outputs
    # Selected before the stages, so that with a class token the norm only runs on that token.
    normed, _ = run_stages(scoring.token_stages, tokens[:, scoring.pooled_tokens])
    features, _ = run_stages(scoring.head, normed.mean(dim=1, keepdim=True))
    return features[:, 0]
