"""Text embeddings that are kept: for streams of prompts in which texts come again."""

import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from legrad.explainer import LeGrad
from legrad.prompts import embed_tokens, refuse_active_dropout, require_tokenizer, truncated

# What Python and torch keep for one text beside its characters and its numbers: measured, rounded up.
ENTRY_OVERHEAD_BYTES = 1024
ROWS_A_BLOCK = 1024


@dataclass(frozen=True)
class EmbeddedTexts:
    """Texts as unit rows of the joint space.

    Attributes:
        unit_rows: one row a text, float32 (float64 for a float64 model), on the model's device.
        truncated: for each text, whether the tokenizer cut it at its context length.
    """

    unit_rows: Float[Tensor, "prompts embed_dim"]
    truncated: tuple[bool, ...]


@dataclass(frozen=True)
class _Entry:
    place: int
    truncated: bool
    size_bytes: int


class _RowStore:
    """Rows of one length in few large blocks.

    Many small tensors that live long, each allocated between a batch's large ones, would break up the heap:
    the process would grow with every text, by far more than the rows take.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._free: list[int] = []

    def put(self, row: Float[Tensor, " embed_dim"]) -> int:
        """Copy a row in; returns its place."""
        if not self._free:
            first = len(self._blocks) * ROWS_A_BLOCK
            with torch.inference_mode(False):  # or only callers in that mode could write to the block
                self._blocks.append(row.new_empty(ROWS_A_BLOCK, len(row)))
            self._free = list(range(first + ROWS_A_BLOCK - 1, first - 1, -1))
        place = self._free.pop()
        self.row(place).copy_(row)
        return place

    def row(self, place: int) -> Float[Tensor, " embed_dim"]:
        """A view of a row."""
        return self._blocks[place // ROWS_A_BLOCK][place % ROWS_A_BLOCK]

    def drop(self, place: int) -> None:
        """Let a place be used again."""
        self._free.append(place)


class TextEmbedder:
    """Embeds texts with a model's text tower and keeps what was used last; threads take turns.

    Attributes:
        cached_bytes: what the kept embeddings take now, an estimate from above.
    """

    def __init__(
        self, explainer: LeGrad, *, max_cache_bytes: int = 256 << 20, batch_size: int | None = None
    ) -> None:
        """Prepare to embed; nothing is computed yet.

        Args:
            explainer: whose text tower and tokenizer are used.
            max_cache_bytes: the embeddings used least recently are dropped above this; 0 keeps none. On a
                CUDA device the rows, not the texts, are in its memory.
            batch_size: texts that pass the tower at once; None: what suits the device.

        Raises:
            TokenizerError: the explainer was made without a tokenizer.
        """
        self._explainer = explainer
        self._tokenizer = require_tokenizer(explainer.tokenizer)
        self._max_cache_bytes = max_cache_bytes
        self._batch_size = batch_size
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._rows = _RowStore()
        self._lock = threading.Lock()
        self.cached_bytes = 0

    def embed(self, texts: Sequence[str]) -> EmbeddedTexts:
        """Embed texts, in order; a text is embedded once while it is kept, however often it comes.

        Raises:
            InputError: the text tower is in training mode with active dropout, or the tokenizer is not the
                model's.
        """
        with self._lock:
            unknown = [text for text in dict.fromkeys(texts) if text not in self._entries]
            if unknown:
                self._keep(unknown)
            entries = []
            for text in texts:
                self._entries.move_to_end(text)
                entries.append(self._entries[text])
            rows = [self._rows.row(entry.place) for entry in entries]
            empty = torch.zeros(0, self._explainer.embed_dim, device=self._explainer.device)
            # a copy, within the lock: a place that is dropped is soon another text's
            unit_rows = torch.stack(rows) if rows else empty
            self._evict()
        return EmbeddedTexts(unit_rows, tuple(entry.truncated for entry in entries))

    def _keep(self, texts: Sequence[str]) -> None:
        refuse_active_dropout(self._explainer.model)
        token_ids = self._tokenizer(list(texts))
        cut = truncated(self._tokenizer, texts, token_ids)
        unit_rows = embed_tokens(self._explainer.model, token_ids, self._explainer.device, self._batch_size)
        for text, row, is_cut in zip(texts, unit_rows, cut, strict=True):
            size_bytes = row.nbytes + sys.getsizeof(text) + ENTRY_OVERHEAD_BYTES
            self._entries[text] = _Entry(self._rows.put(row), is_cut, size_bytes)
            self.cached_bytes += size_bytes

    def _evict(self) -> None:
        while self.cached_bytes > self._max_cache_bytes:
            _, dropped = self._entries.popitem(last=False)
            self._rows.drop(dropped.place)
            self.cached_bytes -= dropped.size_bytes
