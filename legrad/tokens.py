"""Tokenise texts as a model's own tokenizer does, here or in another process."""

import pickle
import threading
from array import array
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from torch import Tensor

from legrad.byte_pairs import BytePairEncoder

# open_clip's tokenizers share no base class: they are callables with a `context_length`.
Tokenizer: TypeAlias = Any


class TokenRow(NamedTuple):
    """The tokens of a text.

    Attributes:
        token_ids: int32 [context], padded, as bytes, which pass between processes at a third of the cost of
            an array.
        is_truncated: whether the text exceeds the context.
    """

    token_ids: bytes
    is_truncated: bool


class ProcessorTokenizer:
    """Tokenise texts with a tokenizer of transformers, padded and truncated to a model's context length.

    Args:
        tokenizer: a tokenizer of transformers.
        context_length: number of tokens of each text.
        lower_case: whether texts are put in lower case first, unless the tokenizer's own `do_lower_case` is
            False. The tokenizer does all other cleaning.

    Attributes:
        tokenizer: the same.
        context_length: the same.
        clean_fn: what is done to a text before it is tokenised.
    """

    def __init__(self, tokenizer: Any, context_length: int, *, lower_case: bool) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        lowers = lower_case and tokenizer.init_kwargs.get("do_lower_case", True)
        self.clean_fn = str.lower if lowers else str

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "texts context"]:
        """Return the token ids of texts."""
        rows = self.tokenizer(
            [self.clean_fn(text) for text in texts],
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=False,
        )["input_ids"]
        return torch.tensor(rows)


def tokenizer_of_transformers(
    tokenizer: Tokenizer | None, processor: Any, context_length: int, *, lower_case: bool
) -> Tokenizer | None:
    """Return a callable that makes the token ids of a model, or None.

    Args:
        tokenizer: a tokenizer of transformers, or a callable that gives token ids; None: that of the
            processor, if it has one.
        processor: of transformers, or None.
        context_length: of the model.
        lower_case: whether the model was trained with texts in lower case.
    """
    found = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
    is_of_transformers = hasattr(found, "model_max_length") and hasattr(found, "pad_token_id")
    if not is_of_transformers:
        return found
    return ProcessorTokenizer(found, context_length, lower_case=lower_case)


class RowTokenizer:
    """Tokenises texts as a tokenizer of open_clip, or a `ProcessorTokenizer`, does; thread-safe.

    For `SimpleTokenizer` the time is bounded by the context length instead of the text length, and the
    tokenizer itself keeps nothing. It can be pickled if the tokenizer can.

    Args:
        tokenizer: as returned by `open_clip.get_tokenizer`, or a `ProcessorTokenizer`.

    Attributes:
        tokenizer: the same.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # A subclass, or a reduction that drops other tokens than the last ones, may behave differently.
        is_plain = type(tokenizer) is SimpleTokenizer and tokenizer.reduction_fn is None
        self._encoder = BytePairEncoder(tokenizer) if is_plain else None
        self._lock = threading.Lock()  # tokenizers of transformers hold the settings of the current call

    def __reduce__(self) -> tuple[type["RowTokenizer"], tuple[Tokenizer]]:
        """Return what a copy is made from; it starts with no words kept."""
        return type(self), (self.tokenizer,)

    def __call__(self, texts: Iterable[str]) -> dict[str, TokenRow]:
        """Return the tokens of each distinct text, truncated and padded to the context length."""
        distinct = list(dict.fromkeys(texts))
        if self._encoder is not None:
            return {text: self._plain_row(self._encoder, text) for text in distinct}
        if not distinct:
            return {}
        with self._lock:
            token_ids: Tensor = self.tokenizer(distinct)
            is_truncated = _truncated(self.tokenizer, distinct, token_ids)
        rows = map(TokenRow, map(_as_bytes, token_ids), is_truncated)
        return dict(zip(distinct, rows, strict=True))

    def token_ids(self, texts: Sequence[str]) -> Int[Tensor, "texts context"]:
        """Return the token ids of at least one text, on the CPU; the tokenizer may be any callable."""
        if self._encoder is not None:
            return as_token_ids([self._plain_row(self._encoder, text) for text in texts])
        with self._lock:
            token_ids: Tensor = self.tokenizer(list(texts))
        return token_ids

    def _plain_row(self, encoder: BytePairEncoder, text: str) -> TokenRow:
        tokenizer = self.tokenizer
        context: int = tokenizer.context_length
        own = encoder.first_tokens(text, context - 1)
        marked = array("i", [tokenizer.sot_token_id, *own[: context - 2], tokenizer.eot_token_id][-context:])
        return TokenRow(
            marked.tobytes().ljust(context * marked.itemsize, b"\0"),
            len(own) + 2 > context,
        )


def picklable_tokenizer(tokenizer: Tokenizer) -> RowTokenizer | None:
    """Return a copy of a tokenizer for use in other threads and processes; None if it cannot be pickled."""
    try:
        pickle.dumps(tokenizer)
    except Exception:  # whatever the tokenizer's own code raises
        return None
    return deepcopy(RowTokenizer(tokenizer))


def as_token_ids(rows: Sequence[TokenRow]) -> Int[Tensor, "texts context"]:
    """Return the token ids of at least one text, int64 on the CPU."""
    joined = bytearray().join(row.token_ids for row in rows)
    return torch.frombuffer(joined, dtype=torch.int32).reshape(len(rows), -1).long()


def _as_bytes(token_ids: Int[Tensor, " context"]) -> bytes:
    as_bytes: bytes = token_ids.to(torch.int32).numpy().tobytes()
    return as_bytes


def _truncated(
    tokenizer: Tokenizer, texts: Sequence[str], token_ids: Int[Tensor, "texts context"]
) -> list[bool]:
    """Return for each text whether the tokenizer truncates it at its context length."""
    suspects = _suspect_rows(tokenizer, token_ids)
    is_cut = _exceed_context(tokenizer, [texts[row] for row in suspects])
    cut = {row for row, exceeds in zip(suspects, is_cut, strict=True) if exceeds}
    return [row in cut for row in range(len(texts))]


def _suspect_rows(tokenizer: Tokenizer, token_ids: Int[Tensor, "texts context"]) -> Sequence[int]:
    """Return the rows of texts that may have been truncated: all, if the tokens do not show it."""
    if hasattr(tokenizer, "tokenizer"):  # some pad with the token that also ends a truncated text
        return range(len(token_ids))
    # open_clip's own tokenizer pads with 0, which never ends a truncated text.
    rows: list[int] = token_ids[:, -1].nonzero().flatten().tolist()
    return rows


def _exceed_context(tokenizer: Tokenizer, texts: Sequence[str]) -> list[bool]:
    """Return for each text whether it exceeds the context, including start and end tokens."""
    if not texts:
        return []
    pretrained = getattr(tokenizer, "tokenizer", None)
    if pretrained is None:
        return [len(tokenizer.encode(text)) + 2 > tokenizer.context_length for text in texts]
    # SigLipTokenizer has no other choice than "canonicalize".
    clean = getattr(tokenizer, "clean_fn", None) or get_clean_fn("canonicalize")
    own_marks = getattr(tokenizer, "tokenizer_mode", "") == "clips"  # start, end, class
    token_ids = pretrained(
        [clean(text) for text in texts], truncation=False, add_special_tokens=not own_marks, verbose=False
    )["input_ids"]
    return [len(ids) + 3 * own_marks > tokenizer.context_length for ids in token_ids]
