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
    unit_row: Tensor
    truncated: bool
    size_bytes: int


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
            self._evict()
        rows = [entry.unit_row for entry in entries]
        empty = torch.zeros(0, self._explainer.embed_dim, device=self._explainer.device)
        return EmbeddedTexts(
            torch.stack(rows) if rows else empty, tuple(entry.truncated for entry in entries)
        )

    def _keep(self, texts: Sequence[str]) -> None:
        refuse_active_dropout(self._explainer.model)
        token_ids = self._tokenizer(list(texts))
        cut = truncated(self._tokenizer, texts, token_ids)
        unit_rows = embed_tokens(self._explainer.model, token_ids, self._explainer.device, self._batch_size)
        for text, row, is_cut in zip(texts, unit_rows, cut, strict=True):
            size_bytes = row.nbytes + sys.getsizeof(text) + ENTRY_OVERHEAD_BYTES
            # a copy: a view would keep the whole batch in memory
            self._entries[text] = _Entry(row.clone(), is_cut, size_bytes)
            self.cached_bytes += size_bytes

    def _evict(self) -> None:
        while self.cached_bytes > self._max_cache_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.cached_bytes -= dropped.size_bytes
