"""The pairs of image and text, or class, that a baseline explains, with all that its map is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from legrad.arguments import as_index
from legrad.calls import features_like
from legrad.classes import ClassIndex, rows_of_prompts
from legrad.errors import InputError
from legrad.inputs import RaggedPrompts, as_ragged
from legrad.method.towers import Tower
from legrad.method.trace import Trace, in_words

PairGrids = Float[Tensor, "pairs grid_height grid_width"]


@dataclass(frozen=True)
class Pairs:
    """Texts, or classes of a classifier, each with its image, of images that are encoded.

    Attributes:
        tower: description of the tower that made the trace.
        trace: the encoded images.
        unit_rows: for each pair one unit text embedding; of a classifier, one row that is 1 at the class.
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
        return self._block_output(len(self.tower.blocks) - 2)

    @property
    def last_block_output(self) -> Float[Tensor, "batch tokens width"]:
        """Tokens that leave the last block; an InputError if the trace does not hold them."""
        return self._block_output(len(self.tower.blocks) - 1)

    def _block_output(self, index: int) -> Float[Tensor, "batch tokens width"]:
        for layer in self.trace.layers:
            if layer.index == index:
                return layer.block_outputs
        raise InputError(
            f"trace: expected one with block {index}, received {in_words(self.trace.layer_indices)}; pass "
            "the images, or their trace by an explainer with layers=2"
        )

    def given_images(self) -> Float[Tensor, "batch 3 height width"]:
        """Return the images; raise an InputError if only their trace is there."""
        if self.images is None:
            raise InputError(
                "images: expected preprocessed images, received a trace, which lacks the tokens that enter "
                "the first block"
            )
        return self.images

    def compared(self, features: Float[Tensor, "*leading embed_dim"]) -> Float[Tensor, "*leading embed_dim"]:
        """Return features in the form whose dot product with a row is the score: a cosine, or a logit."""
        return compared_features(self.tower, features)

    def patch_grids(self, per_token: Float[Tensor, "maps tokens"]) -> Float[Tensor, "maps height width"]:
        """Return the values of the patches on their grid, without those of prefix tokens."""
        return per_token[:, self.tower.prefix_tokens :].float().reshape(-1, *self.grid)


def compared_features(
    tower: Tower, features: Float[Tensor, "*leading embed_dim"]
) -> Float[Tensor, "*leading embed_dim"]:
    """Return features in float32, of unit length unless the score of the tower is a logit."""
    return F.normalize(features.float(), dim=-1) if tower.own.is_unit else features.float()


def as_prompts(
    tower: Tower,
    images: Float[Tensor, "batch 3 height width"] | Trace,
    text_embeddings: Float[Tensor, "*leading embed_dim"] | None,
    class_index: ClassIndex | None,
    image_index: Int[Tensor, " prompts"] | Sequence[int] | None,
) -> RaggedPrompts:
    """Return texts, or classes, in flat form; the arguments are those of `LeGrad.relevance`.

    Raises:
        InputError: texts for a classifier, classes for another model, neither; or shapes, dtypes, devices or
            indices do not fit.
    """
    features, index = features_like(tower, images), as_index(image_index)
    return as_ragged(features, rows_of_prompts(tower, features, text_embeddings, class_index, index), index)
