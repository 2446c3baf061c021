"""Tokenise texts as open_clip does, in time bounded by the context length instead of the text length.

open_clip's own byte-pair encoding tokenises a whole text before it truncates it, in time quadratic in the
length of a run of letters or symbols: seconds for a caption of 16,384 symbols.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

# open_clip's tokenizers share no base class: they are callables with a `context_length`.
Tokenizer: TypeAlias = Any

# Length of a run in bytes; up to it open_clip's own encoding, which has a cache, is used.
SHORT_RUN = 64
# Bytes within which a position is searched where a long run may be split.
SEARCH_BYTES = 512


def token_ids_of(tokenizer: Tokenizer, texts: Sequence[str]) -> Int[Tensor, "texts context"]:
    """Tokenise texts as `tokenizer(texts)` does, truncated and padded to its context length."""
    if not _is_plain(tokenizer):
        ids: Tensor = tokenizer(texts)
        return ids
    rows = torch.zeros(len(texts), tokenizer.context_length, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        own = first_tokens(tokenizer, text, tokenizer.context_length - 1)
        marked = [tokenizer.sot_token_id, *own, tokenizer.eot_token_id][: tokenizer.context_length]
        row[: len(marked)] = torch.tensor([*marked[:-1], tokenizer.eot_token_id])
    return rows


def exceeds_context(tokenizer: Tokenizer, text: str) -> bool:
    """Return whether one of open_clip's own tokenizers truncates a text."""
    most: int = tokenizer.context_length - 2
    if not _is_plain(tokenizer):
        whole: Sequence[int] = tokenizer.encode(text)
        return len(whole) > most
    return len(first_tokens(tokenizer, text, most + 1)) > most


def first_tokens(tokenizer: SimpleTokenizer, text: str, most: int) -> list[int]:
    """Return the first `most` tokens of `tokenizer.encode(text)`."""
    tokens: list[int] = []
    for run in tokenizer.pat.finditer(tokenizer.clean_fn(text)):
        for part in _parts_of_run(tokenizer, run[0]):
            tokens += [tokenizer.encoder[token] for token in part]
            if len(tokens) >= most:
                return tokens[:most]
    return tokens


def _is_plain(tokenizer: Tokenizer) -> bool:
    # A subclass, or a reduction that drops other tokens than the last ones, may behave differently.
    return type(tokenizer) is SimpleTokenizer and tokenizer.reduction_fn is None


def _parts_of_run(tokenizer: SimpleTokenizer, run: str) -> Iterator[list[str]]:
    """Byte-pair encode a run of letters or symbols, part by part."""
    encoded = "".join(tokenizer.byte_encoder[byte] for byte in run.encode("utf-8"))
    if len(encoded) <= SHORT_RUN or encoded in tokenizer.cache:
        yield tokenizer.bpe(encoded).split(" ")
        return
    start = 0
    while start < len(encoded):
        end = _cut(tokenizer, encoded, start + SHORT_RUN)
        part = list(encoded[start:end])
        if end == len(encoded):
            part[-1] += "</w>"
        yield merged(part, tokenizer.bpe_ranks)
        start = end


def _cut(tokenizer: SimpleTokenizer, run: str, first: int) -> int:
    """Find a position in a run that no token spans: no merge crosses it, so both sides are independent.

    Args:
        tokenizer: its vocabulary contains every product of a merge.
        run: bytes in open_clip's notation, one character each.
        first: first position to consider.

    Returns:
        The position where the run may be split, or its end if none is near.
    """
    longest = _longest_token(tokenizer)
    for place in range(first, min(first + SEARCH_BYTES, len(run) - longest)):
        spanning = (
            run[start:end]
            for start in range(max(0, place - longest + 1), place)
            for end in range(place + 1, start + longest + 1)
        )
        if not any(token in tokenizer.encoder for token in spanning):
            return place
    return len(run)


@lru_cache(maxsize=4)
def _longest_token(tokenizer: SimpleTokenizer) -> int:
    return max(map(len, tokenizer.encoder))


def merged(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges: always all pairs of the lowest rank, left to right, until no pair has a rank.

    Args:
        symbols: symbols to merge, changed in place.
        ranks: rank of each pair of neighbours; ranks are unique.

    Source: Sennrich et al., https://arxiv.org/abs/1508.07909, algorithm 1; `SimpleTokenizer.bpe` of open_clip
        3.3, here with a heap of pairs: n log n steps in total instead of n for each merge.
    """
    count = len(symbols)
    after, before = list(range(1, count + 1)), list(range(-1, count - 1))

    def rank_at(place: int) -> int | None:
        pair_exists = place >= 0 and symbols[place] and after[place] < count
        return ranks.get((symbols[place], symbols[after[place]])) if pair_exists else None

    heap = [(rank, place) for place in range(count) if (rank := rank_at(place)) is not None]
    heapify(heap)
    while heap:
        lowest, changed = heap[0][0], []
        while heap and heap[0][0] == lowest:
            _, place = heappop(heap)
            if rank_at(place) == lowest:  # otherwise the pair has changed since
                _join(symbols, after, before, place)
                changed += [before[place], place]
        # Added only now, as new pairs wait until all pairs of this rank are merged.
        for place in changed:
            if (rank := rank_at(place)) is not None:
                heappush(heap, (rank, place))
    return [symbol for symbol in symbols if symbol]


def _join(symbols: list[str], after: list[int], before: list[int], place: int) -> None:
    """Append the following symbol to the one at a position, and leave an empty one in its place."""
    following = after[place]
    symbols[place] += symbols[following]
    symbols[following] = ""
    after[place] = after[following]
    if after[place] < len(symbols):
        before[after[place]] = place
