"""CLIP's byte-pair encoding as open_clip defines it, in time bounded by the number of tokens that are wanted.

open_clip's own `SimpleTokenizer` encodes a whole text before it truncates it, in time quadratic in the
length of a run of letters or symbols (seconds for a caption of 16,384 symbols), and keeps every word that it
ever met. Here an encoding ends at the last token that is wanted, and a bounded number of words is kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

from open_clip.tokenizer import SimpleTokenizer, canonicalize_text, get_clean_fn

# Words whose tokens are kept, the most recently used ones: 8 MB for words of common lengths, 40 MB at most.
WORDS_KEPT = 1 << 15
# Longer words, in characters, are not kept.
LONGEST_KEPT = 32
# Runs of letters or symbols up to this length, in bytes, are encoded at once.
SHORT_RUN = 64
# Bytes within which a position is searched where a longer run may be split.
SEARCH_BYTES = 512

# For each of open_clip's ways to clean a text: how to find the words of a text that contains only printable
# ASCII and no "&". The steps that cost most, ftfy and HTML entities, leave such a text as it is.
PLAIN_WORDS: dict[Callable[[str], str], Callable[[str], list[str]]] = {
    get_clean_fn("lower"): lambda text: text.lower().split(),
    get_clean_fn("whitespace"): str.split,
    get_clean_fn("canonicalize"): lambda text: canonicalize_text(text).split(),
}


class BytePairEncoder:
    """Encodes texts as `SimpleTokenizer.encode` does; thread-safe.

    Args:
        tokenizer: its vocabulary, pattern and way of cleaning are used; it is not changed. The vocabulary
            contains every product of a merge.
    """

    def __init__(self, tokenizer: SimpleTokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.decoder[token_id] for token_id in tokenizer.all_special_ids)
        self._plain_words = PLAIN_WORDS.get(tokenizer.clean_fn)
        # Words are encoded one by one if no token spans whitespace, which further special tokens may do.
        self._has_words = self._plain_words is not None and len(self._special) == 2
        self._kept = lru_cache(WORDS_KEPT)(self._tokens_of_word)

    @property
    def words_kept(self) -> int:
        """Number of words whose tokens are kept."""
        return self._kept.cache_info().currsize

    def first_tokens(self, text: str, most: int) -> list[int]:
        """Return the first `most` tokens of a text, without those that mark its start and end."""
        tokens: list[int] = []
        for word in self._words(text):
            if len(word) <= LONGEST_KEPT:
                tokens += self._kept(word)
            else:
                for part in self._parts(word):
                    tokens += part
                    if len(tokens) >= most:
                        break
            if len(tokens) >= most:
                return tokens[:most]
        return tokens

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._tokenizer.encoder))

    def _words(self, text: str) -> Sequence[str]:
        """Clean a text and split it where no token spans a position."""
        if not self._has_words:
            return (self._tokenizer.clean_fn(text),)
        if self._plain_words is not None and text.isascii() and text.isprintable() and "&" not in text:
            return self._plain_words(text)
        words: list[str] = self._tokenizer.clean_fn(text).split()
        return words

    def _tokens_of_word(self, word: str) -> tuple[int, ...]:
        runs = self._tokenizer.pat.findall(word)
        if len(runs) == 1:
            return tuple(token for part in self._parts_of_run(runs[0]) for token in part)
        return tuple(token for run in runs for token in self._kept(run))

    def _parts(self, word: str) -> Iterator[Sequence[int]]:
        """Encode a word, or a whole text, part by part."""
        for run in self._tokenizer.pat.finditer(word):
            yield from (self._kept(run[0]),) if len(run[0]) <= LONGEST_KEPT else self._parts_of_run(run[0])

    def _parts_of_run(self, run: str) -> Iterator[list[int]]:
        """Encode a run of letters or symbols, part by part."""
        vocabulary = self._tokenizer.encoder
        symbols = [self._tokenizer.byte_encoder[byte] for byte in run.encode("utf-8")]
        encoded, start = "".join(symbols), 0
        if encoded in self._special:
            yield [vocabulary[encoded]]
            return
        while start < len(encoded):
            end = len(encoded) if len(encoded) <= SHORT_RUN else self._cut(encoded, start + SHORT_RUN)
            part = symbols[start:end]
            if end == len(encoded):
                part[-1] += "</w>"
            yield [vocabulary[token] for token in merged(part, self._tokenizer.bpe_ranks)]
            start = end

    def _cut(self, run: str, first: int) -> int:
        """Find a position in a run that no token spans: no merge crosses it, so both sides are independent.

        Args:
            run: bytes in open_clip's notation, one character each.
            first: first position to consider.

        Returns:
            The position where the run may be split, or its end if none is near.
        """
        longest = self._longest_token
        for place in range(first, min(first + SEARCH_BYTES, len(run) - longest)):
            spanning = (
                run[start:end]
                for start in range(max(0, place - longest + 1), place)
                for end in range(place + 1, start + longest + 1)
            )
            if not any(token in self._tokenizer.encoder for token in spanning):
                return place
        return len(run)


def merged(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair merges: always all pairs of the lowest rank, left to right, until no pair has a rank.

    Args:
        symbols: symbols to merge, changed in place.
        ranks: rank of each pair of neighbours; ranks are unique.

    Source: Sennrich et al., https://arxiv.org/abs/1508.07909, algorithm 1; `SimpleTokenizer.bpe` of open_clip
        3.3, here with pairs that are looked up once.
    """
    if len(symbols) > SHORT_RUN:
        return _merged_by_heap(symbols, ranks)
    unranked = len(ranks)
    pair_ranks = [ranks.get(pair, unranked) for pair in pairwise(symbols)]
    while (lowest := min(pair_ranks, default=unranked)) < unranked:
        while lowest in pair_ranks:
            place = pair_ranks.index(lowest)
            symbols[place] += symbols.pop(place + 1)
            del pair_ranks[place]
            for left in range(max(0, place - 1), min(place + 1, len(pair_ranks))):
                pair_ranks[left] = ranks.get((symbols[left], symbols[left + 1]), unranked)
    return symbols


def _merged_by_heap(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge a long run, with a heap of pairs: n log n steps in total instead of n for each merge."""
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
