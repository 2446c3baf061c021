"""Run a vision tower once, and return everything that explanations need from the forward pass."""

from collections.abc import Callable, Collection, Iterator, Sequence
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


@dataclass(frozen=True, eq=False, repr=False)
class LayerTrace:
    """Values computed by one explained attention, with y = x + out(attention) and z = y + mlp(y).

    The attention is that of the pooler if the tower has one, otherwise that of the block. Two of these are
    equal if all their values are, on whatever devices.

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

    def named_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yield every value with its name; None where a stage is linear."""
        yield "values", self.values
        for name, inputs in (("out_inputs", self.out_inputs), ("mlp_inputs", self.mlp_inputs)):
            yield from ((f"{name}.{place}", each) for place, each in enumerate(inputs))
        yield "outputs", self.outputs
        yield "block_outputs", self.block_outputs

    def map(self, change: Callable[[Tensor], Tensor]) -> "LayerTrace":
        """Return a copy with every tensor replaced by what a function returns for it."""

        def changed(inputs: StageInputs) -> StageInputs:
            return tuple(None if each is None else change(each) for each in inputs)

        return LayerTrace(
            self.index,
            change(self.values),
            changed(self.out_inputs),
            changed(self.mlp_inputs),
            change(self.outputs),
            change(self.block_outputs),
        )

    def __eq__(self, other: object) -> bool:
        """Return whether all values are equal."""
        if not isinstance(other, LayerTrace):
            return NotImplemented
        return self.index == other.index and _are_equal(self.named_tensors(), other.named_tensors())

    def __hash__(self) -> int:
        """Return a number that equal traces share."""
        return hash((self.index, self.values.shape, self.outputs.shape))

    def __repr__(self) -> str:
        """Return block, shape and dtype in a line."""
        images, queries, width = self.outputs.shape
        return f"LayerTrace(block {self.index}, {images} x {queries} x {width}, {_kind(self.outputs)})"


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """A batch of encoded images: everything needed to explain any number of prompts without another encode.

    Two traces are equal if all their values are, on whatever devices. `legrad.save_trace` writes a file.

    Attributes:
        layers: the explained blocks, first to last.
        image_features: unit rows, as returned by `model.encode_image(images, normalize=True)`; for a
            classifier its logits, as returned by `model(images)`.
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

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Index of each layer's block in the tower, 0 first."""
        return tuple(layer.index for layer in self.layers)

    def named_tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yield every value with its name; None where there is none."""
        yield "image_features", self.image_features
        yield "rotary", self.rotary
        yield "unit_keys", self.unit_keys
        for layer in self.layers:
            yield from ((f"layers.{layer.index}.{name}", each) for name, each in layer.named_tensors())

    @property
    def nbytes(self) -> int:
        """Memory of all values, in bytes."""
        tensors = {id(each): each.nbytes for _, each in self.named_tensors() if each is not None}
        return sum(tensors.values())

    def to(self, device: str | torch.device) -> "Trace":
        """Return the trace on a device."""
        moved: dict[int, Tensor] = {}  # layers may share a tensor

        def move(each: Tensor) -> Tensor:
            if id(each) not in moved:
                moved[id(each)] = each.to(device)
            return moved[id(each)]

        rotary = None if self.rotary is None else move(self.rotary)
        return replace(self._mapped(move), rotary=rotary)

    def rows(self, images: slice) -> "Trace":
        """Return the trace of consecutive images, which shares its memory with this one."""
        return self._mapped(lambda each: each[images])

    def only(self, indices: Sequence[int]) -> "Trace":
        """Return the trace with these blocks alone, all of which it must hold."""
        held = {layer.index: layer for layer in self.layers}
        return replace(self, layers=tuple(held[index] for index in indices))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Trace":
        return replace(
            self,
            layers=tuple(layer.map(change) for layer in self.layers),
            image_features=change(self.image_features),
            unit_keys=None if self.unit_keys is None else change(self.unit_keys),
        )

    def __eq__(self, other: object) -> bool:
        """Return whether all values are equal; by which explainer they were made does not count."""
        if not isinstance(other, Trace):
            return NotImplemented
        return self._facts == other._facts and _are_equal(self.named_tensors(), other.named_tensors())

    def __hash__(self) -> int:
        """Return a number that equal traces share."""
        return hash(self._facts)

    @property
    def _facts(self) -> tuple[object, ...]:
        return self.batch_size, self.grid_height, self.grid_width, self.pool, self.layer_indices

    def __repr__(self) -> str:
        """Return what was encoded in a line."""
        plural = "image" if self.batch_size == 1 else "images"
        return (
            f"Trace({self.batch_size} {plural}, grid {self.grid_height} x {self.grid_width}, "
            f"{in_words(self.layer_indices)}, {_kind(self.image_features)}, {self.nbytes / 2**20:.1f} MiB)"
        )

    def __getstate__(self) -> dict[str, object]:
        """Return the state for a copy, whose explainer may have copied modules."""
        return vars(self) | {"structure": None}


def in_words(indices: Sequence[int]) -> str:
    """Name blocks in a few words: "block 3", "blocks 6, 9" or "blocks 0 to 11"."""
    if len(indices) == 1:
        return f"block {indices[0]}"
    if len(indices) > 3 and indices[-1] - indices[0] == len(indices) - 1:
        return f"blocks {indices[0]} to {indices[-1]}"
    return f"blocks {', '.join(map(str, indices))}"


def _kind(tensor: Tensor) -> str:
    return f"{tensor.device}, {str(tensor.dtype).removeprefix('torch.')}"


def _are_equal(
    some: Iterator[tuple[str, Tensor | None]], others: Iterator[tuple[str, Tensor | None]]
) -> bool:
    pairs = [list(some), list(others)]
    return len(pairs[0]) == len(pairs[1]) and all(
        name == other_name and _is_equal(tensor, other)
        for (name, tensor), (other_name, other) in zip(*pairs, strict=True)
    )


def _is_equal(tensor: Tensor | None, other: Tensor | None) -> bool:
    if tensor is None or other is None:
        return tensor is other
    return tensor.dtype == other.dtype and torch.equal(tensor, other.to(tensor.device))


@torch.no_grad()
def trace_images(
    tower: Tower,
    images: Float[Tensor, "batch 3 height width"],
    layers: int | Collection[int],
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
        layers: number of last blocks to store, or the indices of the blocks.
        scoring: how a layer is scored; its pooler, if any, is run on the tokens of each stored block.
        keep_keys: store the keys of the patches in the last blocks, which are computed once more for it.

    Returns:
        The trace, in the dtype of the tower's parameters.
    """
    depth = len(tower.blocks)
    stored = range(depth - layers, depth) if isinstance(layers, int) else layers
    kept: list[LayerTrace] = []
    keys: list[Tensor] = []
    with torch.autocast(images.device.type, enabled=False):
        with full_precision_convolutions(images.dtype):
            embedded = tower.embed(images)
        tokens = embedded.tokens
        for index, block in enumerate(tower.blocks):
            if keep_keys and index >= depth - KEY_BLOCKS:
                keys.append(unit_patch_keys(block, tokens, tower.prefix_tokens))
            layer = run_block(block, tokens, embedded.rotary, index)
            tokens = layer.outputs
            if index in stored:
                pooled = layer if scoring.pooler is None else run_block(scoring.pooler, tokens, None, index)
                # a copy, as the view would also keep queries and keys in memory
                kept.append(replace(pooled, values=pooled.values.contiguous(), block_outputs=tokens))
        features = score_features(tower.own, tokens)
        if tower.own.is_unit:
            features = F.normalize(features, dim=-1)
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
