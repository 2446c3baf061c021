"""Descriptions of vision towers: blocks, pooling and scoring, without details of model families.

Everything that depends on a model family is in `legrad.families`, which describes a tower as a `Tower`;
`legrad.method.trace` and `legrad.method.relevance` only use that description.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from legrad.heatmaps import Normalisation
from legrad.method.stages import Stage

QueriesKeysValues = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class EmbeddedImages:
    """Patches as tokens, ready for the first block.

    Attributes:
        tokens: [batch, prefix and patches, width].
        rotary: rotary position embedding of the patches for `Block.project`, or None.
    """

    tokens: Tensor
    rotary: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """A transformer block or an attentional pooler: y = x + out(attention(norm(x))), z = y + mlp(y).

    A post-norm block has its norms at the end of `out` and `mlp`, and the identity as `norm`. A pooler has no
    residual x, and y is its only token.

    Attributes:
        norm: applied to the tokens before the attention.
        project: (normed tokens, rotary embedding) -> queries, keys and values,
            [batch, heads, tokens, head_dim].
        out: stages from the attention's output, heads concatenated, to the residual branch added to x.
        mlp: stages from y to the residual branch added to y; empty if there is none.
        bias: returns the bias of the attention's logits, [1, heads, queries, keys], or None.
        is_pooler: x is not added to y.
    """

    norm: nn.Module
    project: Callable[[Tensor, Tensor | None], QueriesKeysValues]
    out: tuple[Stage, ...]
    mlp: tuple[Stage, ...]
    bias: Callable[[], Tensor | None] = lambda: None
    is_pooler: bool = False


@dataclass(frozen=True)
class Scoring:
    """Computation from the output tokens of a block to the feature that is compared with a text.

    Attributes:
        token_stages: applied to each token before the mean.
        pooled_tokens: the tokens that are averaged.
        head: applied to the mean.
        pooler: attentional pooler applied first, or None; if there is one, its attention is explained.
        is_unit: True: the score is the cosine; False: the dot product of the feature and the unit text, which
            for a classifier is one logit.
    """

    token_stages: tuple[Stage, ...]
    pooled_tokens: slice
    head: tuple[Stage, ...]
    pooler: Block | None = None
    is_unit: bool = True


@dataclass(frozen=True)
class Tower:
    """Description of one vision tower.

    Attributes:
        family: name of the model family, as in `legrad.supported_models`.
        patch_size: side of a square patch, in pixels of the model's input.
        native_grid: rows and columns of patches at the size that the tower was trained for.
        native_size: (height, width) of that size in pixels; patches may not cover it completely.
        takes_any_grid: whether other grids are possible; otherwise images must have the native size.
        embed_dim: dimension of the joint image-text space; for a classifier, the number of its classes.
        prefix_tokens: number of tokens before the patches (class and register tokens).
        normalisation: whether the authors min-max normalise maps of this family after ("upsampled") or before
            ("grid") upsampling.
        embed: images [batch, 3, height, width] -> input tokens of the first block.
        blocks: every block, first to last.
        reference: default scoring of a layer: the authors' way, or the closest to it for a family that their
            package does not cover.
        authors: scoring of the authors' package; differs from `reference` for PE-Core only.
        own: the model's own pooling and head, which computes the image feature from the last block.
        parameter: returns a parameter of the patch embedding; images must have its dtype and device.
        authors_neutral_text: text whose map the authors use to correct every map of this family, or None.
        is_classifier: the features are the logits of classes, and no texts are compared with them.
    """

    family: str
    patch_size: int
    native_grid: tuple[int, int]
    native_size: tuple[int, int]
    takes_any_grid: bool
    embed_dim: int
    prefix_tokens: int
    normalisation: Normalisation
    embed: Callable[[Tensor], EmbeddedImages]
    blocks: tuple[Block, ...]
    reference: Scoring
    authors: Scoring
    own: Scoring
    parameter: Callable[[], Tensor]
    authors_neutral_text: str | None = None
    is_classifier: bool = False
