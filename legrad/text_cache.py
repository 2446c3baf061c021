"""Embed texts with a cache, for streams of prompts in which texts recur."""

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from legrad.explainer import LeGrad
from legrad.text import embed_tokens, refuse_active_dropout, require_tokenizer, truncated
from legrad.tokens import token_ids_of

# Memory of one cached text beside its characters and its row, measured and rounded up.
ENTRY_OVERHEAD_BYTES = 1024
ROWS_A_BLOCK = 1024
# Bounds the memory for tokens and rows of the texts in new ensembles.
TEXTS_AT_ONCE = 8192


@dataclass(frozen=True)
class EmbeddedTexts:
    """Texts, or ensembles of texts, as unit rows of the joint space.

    Attributes:
        unit_rows: one row for each, float32 (float64 for a float64 model), on the model's device.
        truncated: for each, whether the tokenizer truncated it, or one of its texts, at its context length.
    """

    unit_rows: Float[Tensor, "prompts embed_dim"]
    truncated: tuple[bool, ...]


@dataclass(frozen=True)
class _Entry:
    place: int
    truncated: bool
    size_bytes: int


class _RowStore:
    """Rows of equal length, stored in few large blocks.

    Many small, long-lived tensors allocated among the large ones of a batch would fragment the heap: the
    process would grow by far more than the size of the rows.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._free: list[int] = []

    def put(self, row: Float[Tensor, " embed_dim"]) -> int:
        """Store a copy of a row and return its place."""
        if not self._free:
            first = len(self._blocks) * ROWS_A_BLOCK
            with torch.inference_mode(False):  # otherwise only callers in that mode could write to the block
                self._blocks.append(row.new_empty(ROWS_A_BLOCK, len(row)))
            self._free = list(range(first + ROWS_A_BLOCK - 1, first - 1, -1))
        place = self._free.pop()
        self.row(place).copy_(row)
        return place

    def row(self, place: int) -> Float[Tensor, " embed_dim"]:
        """Return a view of a row."""
        return self._blocks[place // ROWS_A_BLOCK][place % ROWS_A_BLOCK]

    def drop(self, place: int) -> None:
        """Free a place for another row."""
        self._free.append(place)


class TextEmbedder:
    """Embed texts with a model's text tower and cache the most recently used embeddings; thread-safe.

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
        self._tokenizer = require_tokenizer(explainer.tokenizer)
        self._max_cache_bytes = max_cache_bytes
        self._batch_size = batch_size
        self._entries: OrderedDict[tuple[str, ...], _Entry] = OrderedDict()
        self._rows = _RowStore()
        self._lock = threading.Lock()
        self.cached_bytes = 0

    def embed(self, texts: Sequence[str]) -> EmbeddedTexts:
        """Embed texts, in order; cached texts are not embedded again.

        Raises:
            InputError: the text tower is in training mode with active dropout, or the tokenizer is not the
                model's.
        """
        return self.embed_ensembles([(text,) for text in texts])

    def embed_ensembles(self, ensembles: Sequence[tuple[str, ...]]) -> EmbeddedTexts:
        """Embed ensembles of texts, each as one unit row: the normalised mean of its texts' unit rows.

        Args:
            ensembles: at least one text each, such as a class name in several templates. The mean is cached,
                not the rows of single texts.

        Raises:
            InputError: see `embed`.

        Source: Radford et al., https://arxiv.org/abs/2103.00020, section 3.1.4; open_clip's
        `build_zero_shot_classifier`.
        """
        with self._lock:
            unknown = [ensemble for ensemble in dict.fromkeys(ensembles) if ensemble not in self._entries]
            for some in _of_few_texts(unknown):
                self._keep(some)
            entries = []
            for ensemble in ensembles:
                self._entries.move_to_end(ensemble)
                entries.append(self._entries[ensemble])
            rows = [self._rows.row(entry.place) for entry in entries]
            empty = torch.zeros(0, self._explainer.embed_dim, device=self._explainer.device)
            # A copy, made while the lock is held, as evicted places are reused.
            unit_rows = torch.stack(rows) if rows else empty
            self._evict()
        return EmbeddedTexts(unit_rows, tuple(entry.truncated for entry in entries))

    def _keep(self, ensembles: Sequence[tuple[str, ...]]) -> None:
        refuse_active_dropout(self._explainer.model)
        texts = list(dict.fromkeys(text for ensemble in ensembles for text in ensemble))
        token_ids = token_ids_of(self._tokenizer, texts)
        is_cut = dict(zip(texts, truncated(self._tokenizer, texts, token_ids), strict=True))
        text_rows = embed_tokens(self._explainer.model, token_ids, self._explainer.device, self._batch_size)
        for ensemble, row in zip(ensembles, _means(ensembles, texts, text_rows), strict=True):
            characters = sum(map(sys.getsizeof, ensemble))
            size_bytes = row.nbytes + characters + ENTRY_OVERHEAD_BYTES
            cut = any(is_cut[text] for text in ensemble)
            self._entries[ensemble] = _Entry(self._rows.put(row), cut, size_bytes)
            self.cached_bytes += size_bytes

    def _evict(self) -> None:
        while self.cached_bytes > self._max_cache_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._rows.drop(dropped.place)
            self.cached_bytes -= dropped.size_bytes


def _of_few_texts(ensembles: Sequence[tuple[str, ...]]) -> Iterator[Sequence[tuple[str, ...]]]:
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
    ensembles: Sequence[tuple[str, ...]], texts: Sequence[str], text_rows: Float[Tensor, "texts embed_dim"]
) -> Float[Tensor, "ensembles embed_dim"]:
    """Return the normalised mean of each ensemble's rows; a single text keeps exactly its own row."""
    row_of = {text: row for row, text in enumerate(texts)}
    means = []
    for ensemble in ensembles:
        members = [row_of[text] for text in ensemble]
        alone = len(members) == 1
        means.append(text_rows[members[0]] if alone else F.normalize(text_rows[members].mean(dim=0), dim=0))
    return torch.stack(means)
