"""Which blocks of a tower are explained, and with what weights their relevance is summed."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from legrad.errors import InputError

Layers: TypeAlias = int | Literal["all"] | Sequence[int]


@dataclass(frozen=True)
class ChosenLayers:
    """The explained blocks of a tower.

    Attributes:
        indices: of the blocks, 0 first, in the tower's order.
        weights: of each of them, in the same order; None: all one.
    """

    indices: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def merged(self, grids: Float[Tensor, "layers *rest"]) -> Float[Tensor, "*rest"]:
        """Return the sum of the layers' grids, each times its weight."""
        if self.weights is None:
            return grids.sum(dim=0)
        total = torch.zeros_like(grids[0])
        for weight, grid in zip(self.weights, grids, strict=True):
            total.add_(grid, alpha=weight)
        return total


def chosen_layers(layers: Any, layer_weights: Any, depth: int) -> ChosenLayers:
    """Return the blocks to explain.

    Args:
        layers: see `legrad.LeGrad`.
        layer_weights: see `legrad.LeGrad`.
        depth: number of blocks of the tower.

    Raises:
        InputError: the tower does not have the blocks, a block is named twice, or the weights do not fit.
    """
    indices = _indices(layers, depth)
    weights = None if layer_weights is None else _checked_weights(layer_weights, len(indices))
    order = sorted(range(len(indices)), key=indices.__getitem__)
    return ChosenLayers(
        tuple(indices[place] for place in order), weights and tuple(weights[place] for place in order)
    )


def repeatable(values: Any) -> Any:
    """Return what may be read more than once: a generator's values as a tuple, all else as it is."""
    return values if isinstance(values, str) or not hasattr(values, "__iter__") else tuple(values)


def _indices(layers: Any, depth: int) -> list[int]:
    if isinstance(layers, str) and layers == "all":
        return list(range(depth))
    count = _whole_number(layers)
    if count is not None and 1 <= count <= depth:
        return list(range(depth - count, depth))
    if count is not None or isinstance(layers, str) or not hasattr(layers, "__iter__"):
        hint = f"; layers=[{count}] names block {depth + count}" if count and -depth <= count < 0 else ""
        raise InputError(
            f"layers: expected 'all' or a number from 1 to {depth}, received {layers!r}{hint}; "
            "or pass the indices of blocks as a list"
        )
    named = list(layers)
    if not named:
        raise InputError(f"layers: expected the index of at least one of {depth} blocks, received {layers!r}")
    indices = [_index(each, depth, named) for each in named]
    twice = sorted({index for index in indices if indices.count(index) > 1})
    if twice:
        raise InputError(f"layers: expected different blocks, received block {twice[0]} twice in {named!r}")
    return indices


def _index(value: Any, depth: int, named: list[Any]) -> int:
    index = _whole_number(value)
    if index is None or not -depth <= index < depth:
        raise InputError(
            f"layers: expected indices from 0 to {depth - 1}, or from -{depth} (the first block) to -1 (the "
            f"last), received {value!r} in {named!r}"
        )
    return index % depth


def _whole_number(value: Any) -> int | None:
    """Return a whole number of any type; None for truth values, fractions and other objects."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _checked_weights(layer_weights: Any, layers: int) -> tuple[float, ...]:
    expected = f"layer_weights: expected {layers} finite numbers of at least 0, one for each layer"
    try:
        weights = tuple(map(float, layer_weights))
    except (TypeError, ValueError):
        raise InputError(f"{expected}, received {layer_weights!r}") from None
    if len(weights) != layers:
        raise InputError(f"{expected}, received {len(weights)}: {list(weights)}")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise InputError(f"{expected}, received {list(weights)}")
    if not any(weights):
        raise InputError(f"{expected}, not all of them 0, received {list(weights)}")
    return weights
