"""The rows of the token table that training uses: a compact table while training, the full one on export.

Nearly all of CLIP's 49408 tokens never occur in the demo's captions. Their rows are zero in the exported
table, and while training they share one row that is kept at zero, so that unknown words carry no meaning, in
training as later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip import SimpleTokenizer

from pipeline.demo.making.captions import all_known_words

_PAD_TOKEN = 0
UNKNOWN_ROW = 1


class CompactVocabulary:
    """Maps captions to rows of a compact token table; end-of-text keeps the highest row, as pooling needs."""

    def __init__(self, context_length: int) -> None:
        self._tokenizer = SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.full_size = int(self._tokenizer.vocab_size)
        tokens = {token for word in all_known_words() for token in self._tokenizer.encode(word)}
        tokens |= {self._tokenizer.sot_token_id, self._tokenizer.eot_token_id}
        self._known_tokens = sorted(tokens - {_PAD_TOKEN})
        self._row_of = {token: row for row, token in enumerate(self._known_tokens, start=UNKNOWN_ROW + 1)}
        self._rows_of_word: dict[str, list[int]] = {}

    @property
    def size(self) -> int:
        """Rows of the compact table."""
        return UNKNOWN_ROW + 1 + len(self._known_tokens)

    def rows(self, captions: Sequence[str]) -> torch.Tensor:
        """Rows of the compact table, int64 [captions, context_length]: start, words, end, padding."""
        result = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        start, end = self._row_of[self._tokenizer.sot_token_id], self._row_of[self._tokenizer.eot_token_id]
        for index, caption in enumerate(captions):
            words = [row for word in caption.split() for row in self._word_rows(word)]
            sentence = [start, *words[: self.context_length - 2], end]
            result[index, : len(sentence)] = torch.tensor(sentence)
        return result

    def _word_rows(self, word: str) -> list[int]:
        if word not in self._rows_of_word:
            tokens = self._tokenizer.encode(word)
            self._rows_of_word[word] = [self._row_of.get(token, UNKNOWN_ROW) for token in tokens]
        return self._rows_of_word[word]

    def compact(self, full_table: torch.Tensor) -> torch.Tensor:
        """The rows of the compact table in a full one, zero for unknown words."""
        compact_table = full_table.new_zeros(self.size, full_table.shape[1])
        compact_table[UNKNOWN_ROW + 1 :] = full_table[torch.tensor(self._known_tokens)]
        compact_table[_PAD_TOKEN] = full_table[_PAD_TOKEN]
        return compact_table

    def expand(self, compact_table: torch.Tensor) -> torch.Tensor:
        """The full token table: trained rows in their places, zeros elsewhere."""
        full = compact_table.new_zeros(self.full_size, compact_table.shape[1])
        full[torch.tensor(self._known_tokens)] = compact_table[UNKNOWN_ROW + 1 :]
        full[_PAD_TOKEN] = compact_table[_PAD_TOKEN]
        return full
