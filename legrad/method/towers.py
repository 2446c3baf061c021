"""What a vision tower is made of, as far as the method needs to know.

Everything that depends on a model family is in `legrad.families`, which describes a tower as a `Tower`;
`legrad.method.trace` and `legrad.method.relevance` work on that description alone.
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
        rotary: rotary position embedding of the patches, as the attention's `project` takes it, or None.
    """

    tokens: Tensor
    rotary: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """A transformer block or an attentional pooler: y = x + out(attention(norm(x))), z = y + mlp(y).

    A post-norm block has its norms at the end of `out` and `mlp`, and the identity as `norm`. A pooler has no
    residual x, and y is its only token.

    Attributes:
        norm: what the attention's inputs pass first.
        project: (normed tokens, rotary embedding) -> queries, keys and values,
            [batch, heads, tokens, head_dim].
        bias: gives what is added to the attention's logits, [1, heads, queries, keys], or None.
        out: from the mixed values, heads side by side, to what is added to x.
        mlp: from y to what is added to y; empty where there is none.
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
    """From the tokens that leave a block to the feature that is compared with a text.

    Attributes:
        pooler: attentional pooler that the tokens go through first; its attention is then the one explained.
        token_stages: what each token passes before the mean.
        pooled_tokens: the tokens that are averaged.
        head: what the mean passes.
        is_unit: the score is the cosine; else the plain product with the unit text.
    """

    token_stages: tuple[Stage, ...]
    pooled_tokens: slice
    head: tuple[Stage, ...]
    pooler: Block | None = None
    is_unit: bool = True


@dataclass(frozen=True)
class Tower:
    """One vision tower, described.

    Attributes:
        family: name of the rules that apply, as `legrad.supported_models` lists it.
        patch_size: side of a square patch, in pixels of the model's input.
        native_grid: patches (down, across) at the size the tower was trained for.
        native_size: (height, width) of that size in pixels; patches may leave a margin of it unseen.
        takes_any_grid: other grids are possible; else images must have the native size.
        embed_dim: dimension of the joint image-text space.
        prefix_tokens: tokens in front of the patches (class and register tokens).
        normalisation: how the authors bring a heat map of this family to 0 to 1: after ("upsampled") or
            before ("grid") it is upsampled.
        embed: images [batch, 3, height, width] -> tokens entering the first block.
        blocks: every block, first to last.
        reference: how a layer is scored by default: the authors' way, or the nearest to it for a family that
            they do not have.
        authors: how the authors' package would score a layer; `reference`, but for PE-Core.
        own: the model's own pooling and head; of the last block's tokens it makes the image feature.
        parameter: one parameter of the patch embedding; its dtype and device are those of the images.
        authors_neutral_text: the text by whose map the authors correct every map of this family, or None.
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
