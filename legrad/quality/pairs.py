"""The (image, text) pairs that a baseline explains, with everything that its map is computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from legrad.errors import InputError
from legrad.method.towers import Tower
from legrad.method.trace import Trace

PairGrids = Float[Tensor, "pairs grid_height grid_width"]


@dataclass(frozen=True)
class Pairs:
    """Texts, each with its image, of images that are encoded.

    Attributes:
        tower: description of the tower that made the trace.
        trace: the encoded images.
        unit_rows: one unit text embedding for each pair.
        image_index: for each pair, the row of its image in the trace.
        generator: generator of the random grids, on the CPU.
        images: the images that the trace encodes, or None.
    """

    tower: Tower
    trace: Trace
    unit_rows: Float[Tensor, "pairs embed_dim"]
    image_index: Int[Tensor, " pairs"]
    generator: torch.Generator
    images: Float[Tensor, "batch 3 height width"] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.trace.grid_height, self.trace.grid_width

    @property
    def last_block_input(self) -> Float[Tensor, "batch tokens width"]:
        """Tokens that enter the last block; an InputError if the trace does not hold them."""
        if len(self.trace.layers) < 2:
            raise InputError(f"trace: expected at least 2 blocks, received {len(self.trace.layers)}")
        return self.trace.layers[-2].block_outputs

    def given_images(self) -> Float[Tensor, "batch 3 height width"]:
        """Return the images; raise an InputError if only their trace is there."""
        if self.images is None:
            raise InputError(
                "images: expected preprocessed images, received a trace, which lacks the tokens that enter "
                "the first block"
            )
        return self.images

    def patch_grids(self, per_token: Float[Tensor, "maps tokens"]) -> Float[Tensor, "maps height width"]:
        """Return the values of the patches on their grid, without those of prefix tokens."""
        return per_token[:, self.tower.prefix_tokens :].float().reshape(-1, *self.grid)
