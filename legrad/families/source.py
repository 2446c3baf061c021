"""What depends on the library that a model comes from, as plain data: the rest of the code asks for none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from legrad.families.modules import KnownModules
from legrad.images import ImageTransform
from legrad.method.towers import Tower
from legrad.tokens import Tokenizer

# Decides whether an attention mask keeps every token from attending to later ones.
IsCausal = Callable[[Tensor | None], bool]


@dataclass(frozen=True)
class TextEncoder:
    """How the token ids of texts become embeddings, as the model is now.

    Attributes:
        needed_lengths: (token ids [texts, context], is_causal) -> for each text, the number of first tokens
            that its embedding depends on, [texts].
        encode: (token ids [texts, length], context) -> embeddings [texts, embed_dim], not normalised; the
            tokens may be cut at the longest needed length of the texts.
        context: most tokens of a text, or None if any number is possible.
        vocabulary: number of token ids, or None if it is not known.
        tokenizer: where the model's own tokenizer comes from, for error messages.
    """

    needed_lengths: Callable[[Int[Tensor, "texts context"], IsCausal], Int[Tensor, " texts"]]
    encode: Callable[[Int[Tensor, "texts length"], int], Float[Tensor, "texts embed_dim"]]
    context: int | None
    vocabulary: int | None
    tokenizer: str


def whole_context(token_ids: Int[Tensor, "texts context"], _is_causal: IsCausal) -> Int[Tensor, " texts"]:
    """Return the needed lengths of a text tower whose tokens are never cut."""
    return torch.full_like(token_ids[:, 0], token_ids.shape[1])


@dataclass(frozen=True)
class Source:
    """One model, and everything about it that depends on its library.

    A source is cheap to make: nothing is checked or computed before one of its functions is called.

    Attributes:
        library: name of the library.
        model: the model.
        visual: its vision tower.
        visual_path: path of the vision tower in the model; empty: the tower is the model itself.
        name: names the model's class and that of its tower, in error messages.
        describe: returns the tower's description, after `check_modules`; raises a `NotCovered` that names the
            module (see `located`) if its structure is not covered.
        known: the modules that the description covers.
        entry: (names, functions): methods of the model that compute image features. None of the names may be
            replaced on the model itself, and the first, taken from its class, must be one of the functions.
        own_features: images -> image features [batch, embed_dim] as the model itself computes them, not
            normalised; for a classifier its logits.
        block_paths: returns the path, in the model, of every block, first to last.
        transform: returns the model's own preprocessing.
        expected: what to explain instead of a model that was changed, for error messages.
        supported: models that are covered, for error messages.
        others: modules outside of the vision tower that image features pass, by path.
        texts: returns how texts are embedded; None: the model is a classifier.
        as_tokenizer: the tokenizer that the caller passed, or None -> a callable that returns the token ids
            of texts, or None.
    """

    library: str
    model: nn.Module
    visual: nn.Module
    visual_path: str
    name: str
    describe: Callable[[], Tower]
    known: KnownModules
    entry: tuple[tuple[str, ...], tuple[object, ...]]
    own_features: Callable[[Tensor], Tensor]
    block_paths: Callable[[], tuple[str, ...]]
    transform: Callable[[], ImageTransform]
    expected: str
    supported: str
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    texts: Callable[[], TextEncoder] | None = None
    as_tokenizer: Callable[[Tokenizer | None], Tokenizer | None] = lambda tokenizer: tokenizer
