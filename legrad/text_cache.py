"""Embed texts with a cache, for streams of prompts in which texts recur."""

import sys
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from legrad.explainer import LeGrad
from legrad.memory import uploaded
from legrad.text import (
    CausalMaskReader,
    embed_by_length,
    refuse_active_dropout,
    require_tokenizer,
)
from legrad.tokens import RowTokenizer, TokenRow, as_token_ids

# Memory of one cached text beside its characters and its row, measured and rounded up.
ENTRY_OVERHEAD_BYTES = 1024
FEWEST_ROWS = 1024
# Bounds the memory for tokens and rows of the texts in new ensembles.
TEXTS_AT_ONCE = 8192

NO_TOKENS: Mapping[str, TokenRow] = {}

Ensemble = tuple[str, ...]


@dataclass(frozen=True)
class EmbeddedTexts:
    """Texts, or ensembles of texts, as unit rows of the joint space.

    Attributes:
        unit_rows: one row for each, float32 (float64 for a float64 model), on the model's device.
        truncated: for each, whether the tokenizer truncated it, or one of its texts, at its context length.
    """

    unit_rows: Float[Tensor, "prompts embed_dim"]
    truncated: tuple[bool, ...]


class _Entry(NamedTuple):
    place: int
    truncated: bool
    size_bytes: int


class _NewRows(NamedTuple):
    """Rows of ensembles that are not cached yet: on the device, in the order of the ensembles."""

    ensembles: list[Ensemble]
    unit_rows: Float[Tensor, "ensembles embed_dim"]
    truncated: list[bool]


class _RowStore:
    """Rows of equal length, in one tensor that doubles when it is full.

    Many small, long-lived tensors allocated among the large ones of a batch would fragment the heap: the
    process would grow by far more than the size of the rows.
    """

    def __init__(self) -> None:
        self._rows = torch.empty(0, 0)
        self._free: list[int] = []

    def places(self, new: Sequence[Tensor]) -> list[int]:
        """Take a free place for each row of some tensors."""
        number = sum(map(len, new))
        missing = number - len(self._free)
        if missing > 0:
            self._grow(missing, new[0])
        return [self._free.pop() for _ in range(number)]

    def exchange(
        self, new: Sequence[Tensor], new_places: list[int], wanted_places: list[int]
    ) -> Float[Tensor, "wanted embed_dim"]:
        """Store rows at their places, then return a copy of the rows at the wanted places.

        One copy to the device for all places, one write for each tensor of new rows, one read.
        """
        places = uploaded(torch.tensor([*new_places, *wanted_places]), self._rows.device)
        start = 0
        for rows in new:
            self._rows.index_copy_(0, places[start : start + len(rows)], rows)
            start += len(rows)
        return self._rows.index_select(0, places[start:])

    def drop(self, places: Sequence[int]) -> None:
        """Free places for other rows."""
        self._free += places

    def _grow(self, missing: int, like: Tensor) -> None:
        number = len(self._rows)
        larger = max(2 * number, number + missing, FEWEST_ROWS)
        with torch.inference_mode(False):  # otherwise only callers in that mode could write to the rows
            grown = torch.empty(larger, like.shape[1], dtype=like.dtype, device=like.device)
            if number:
                grown[:number] = self._rows
                if grown.is_cuda:  # perhaps allocated on another stream, which must not reuse them too early
                    self._rows.record_stream(torch.cuda.current_stream(grown.device))
            self._rows = grown
        self._free[:0] = range(larger - 1, number - 1, -1)


class TextEmbedder:
    """Embed texts with a model's text tower and cache the most recently used embeddings; thread-safe.

    Nothing waits for the device. Callers that use several streams of a GPU must order their calls among them,
    as the cached rows are shared.

    Attributes:
        cached_bytes: upper estimate of the memory that the cache uses now.
    """

    def __init__(
        self, explainer: LeGrad, *, max_cache_bytes: int = 256 << 20, batch_size: int | None = None
    ) -> None:
        """Prepare to embed; nothing is computed yet.

        Args:
            explainer: explainer of the model; its text tower and tokenizer are used.
            max_cache_bytes: bound on the cache; the least recently used embeddings are dropped above it, and
                0 disables the cache. For a CUDA model the rows are in GPU memory, the texts are not.
            batch_size: number of texts per batch; None: a default for the device.

        Raises:
            TokenizerError: the explainer was made without a tokenizer.
        """
        self._explainer = explainer
        self._tokenizer = RowTokenizer(require_tokenizer(explainer.tokenizer))
        self._max_cache_bytes = max_cache_bytes
        self._batch_size = batch_size
        self._is_causal = CausalMaskReader()
        self._entries: OrderedDict[Ensemble, _Entry] = OrderedDict()
        self._rows = _RowStore()
        self._lock = threading.Lock()
        self.cached_bytes = 0

    def embed(self, texts: Sequence[str], tokens: Mapping[str, TokenRow] = NO_TOKENS) -> EmbeddedTexts:
        """Embed texts, in order; cached texts are not embedded again.

        Args:
            texts: any number of texts.
            tokens: tokens of some of the texts, made by a `RowTokenizer` of the same tokenizer; the others
                are tokenised here.

        Raises:
            InputError: the text tower is in training mode with active dropout, or the tokenizer is not the
                model's.
        """
        return self.embed_ensembles([(text,) for text in texts], tokens)

    def embed_ensembles(
        self, ensembles: Sequence[Ensemble], tokens: Mapping[str, TokenRow] = NO_TOKENS
    ) -> EmbeddedTexts:
        """Embed ensembles of texts, each as one unit row: the normalised mean of its texts' unit rows.

        Args:
            ensembles: at least one text each, such as a class name in several templates. The mean is cached,
                not the rows of single texts.
            tokens: see `embed`.

        Raises:
            InputError: see `embed`.

        Source: Radford et al., https://arxiv.org/abs/2103.00020, section 3.1.4; open_clip's
        `build_zero_shot_classifier`.
        """
        if not ensembles:
            empty = torch.zeros(0, self._explainer.embed_dim, device=self._explainer.device)
            return EmbeddedTexts(empty, ())
        with self._lock:
            unknown = [ensemble for ensemble in dict.fromkeys(ensembles) if ensemble not in self._entries]
            new = list(chain.from_iterable(self._embedded(some, tokens) for some in _of_few_texts(unknown)))
            # Entries are made once their rows are stored: a failure leaves the cache as it was.
            unit_rows, entries = self._stored(new, ensembles)
            self._entries |= entries
            self.cached_bytes += sum(entry.size_bytes for entry in entries.values())
            truncated = tuple(self._entries[ensemble].truncated for ensemble in ensembles)
            for ensemble in ensembles:
                self._entries.move_to_end(ensemble)
            self._evict()
        return EmbeddedTexts(unit_rows, truncated)

    def _stored(
        self, new: Sequence[_NewRows], wanted: Sequence[Ensemble]
    ) -> tuple[Float[Tensor, "wanted embed_dim"], dict[Ensemble, _Entry]]:
        """Store new rows; return a copy of the wanted rows, and the entries of the new ones."""
        entries: dict[Ensemble, _Entry] = {}
        row_bytes = sum(rows.unit_rows[0].nbytes for rows in new[:1])
        places = self._rows.places([rows.unit_rows for rows in new])
        for (ensemble, truncated), place in zip(
            chain.from_iterable(zip(rows.ensembles, rows.truncated, strict=True) for rows in new),
            places,
            strict=True,
        ):
            size_bytes = row_bytes + sum(map(sys.getsizeof, ensemble)) + ENTRY_OVERHEAD_BYTES
            entries[ensemble] = _Entry(place, truncated, size_bytes)
        known = self._entries
        found = [(entries.get(ensemble) or known[ensemble]).place for ensemble in wanted]
        try:
            # A copy, made while the lock is held, as evicted places are reused.
            return self._rows.exchange([rows.unit_rows for rows in new], places, found), entries
        except BaseException:
            self._rows.drop(places)
            raise

    def _embedded(self, ensembles: Sequence[Ensemble], tokens: Mapping[str, TokenRow]) -> list[_NewRows]:
        """Embed ensembles; return those of one text, and those of each other number of texts."""
        refuse_active_dropout(self._explainer.model)
        texts = list(dict.fromkeys(chain.from_iterable(ensembles)))
        tokens = {**tokens, **self._tokenizer(text for text in texts if text not in tokens)}
        text_rows, by_length = embed_by_length(
            self._explainer.model,
            as_token_ids([tokens[text] for text in texts]),
            self._explainer.device,
            self._batch_size,
            self._is_causal,
        )
        row_of = {texts[position]: row for row, position in enumerate(by_length.tolist())}
        by_size: dict[int, list[Ensemble]] = defaultdict(list)
        for ensemble in ensembles:
            by_size[len(ensemble)].append(ensemble)
        new = []
        for some in by_size.values():
            in_order, unit_rows = _means(some, row_of, text_rows)
            cut = [any(tokens[text].is_truncated for text in ensemble) for ensemble in in_order]
            new.append(_NewRows(in_order, unit_rows, cut))
        return new

    def _evict(self) -> None:
        while self.cached_bytes > self._max_cache_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._rows.drop([dropped.place])
            self.cached_bytes -= dropped.size_bytes


def _of_few_texts(ensembles: Sequence[Ensemble]) -> Iterator[Sequence[Ensemble]]:
    """Split a list of ensembles into parts of about TEXTS_AT_ONCE texts."""
    start, texts = 0, 0
    for position, ensemble in enumerate(ensembles):
        texts += len(ensemble)
        if texts >= TEXTS_AT_ONCE:
            yield ensembles[start : position + 1]
            start, texts = position + 1, 0
    if start < len(ensembles):
        yield ensembles[start:]


def _means(
    ensembles: list[Ensemble], row_of: Mapping[str, int], text_rows: Float[Tensor, "texts embed_dim"]
) -> tuple[list[Ensemble], Float[Tensor, "ensembles embed_dim"]]:
    """Return ensembles of one size, and the normalised mean of each one's rows."""
    if len(ensembles[0]) == 1 and len(ensembles) == len(text_rows):
        # The rows are all those of single texts: these are sorted instead, which needs no device.
        return sorted(ensembles, key=lambda ensemble: row_of[ensemble[0]]), text_rows
    members = torch.tensor([[row_of[text] for text in ensemble] for ensemble in ensembles])
    rows = text_rows[uploaded(members, text_rows.device)]
    # A single text keeps exactly its own row.
    return ensembles, rows[:, 0] if rows.shape[1] == 1 else F.normalize(rows.mean(dim=1), dim=1)
