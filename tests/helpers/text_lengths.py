"""A tokenizer for models whose texts need no meaning."""

import torch
from torch import Tensor


class Lengths:
    """A tokenizer that knows of a text no more than its length."""

    def __call__(self, texts: list[str]) -> Tensor:
        tokens = torch.zeros(len(texts), 16, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            row[0], row[1] = 1 + len(text) % 7, 9
        return tokens
