"""Tokens equal those of open_clip for any text, and the cost of a long text is bounded by the context."""

import random
import unicodedata
from copy import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from legrad.text import truncated
from legrad.tokens import first_tokens, merged, token_ids_of

THEIRS, OURS = SimpleTokenizer(), SimpleTokenizer()
SHORT_CONTEXT = SimpleTokenizer(context_length=9)
PICTURES = [chr(code) for code in range(0xA1, 0x1FFFF) if unicodedata.category(chr(code)) in ("So", "Sm")]
FRAGMENTS = [
    bytes(THEIRS.byte_decoder[letter] for letter in token.removesuffix("</w>"))
    for token in list(THEIRS.encoder)[:-2]
]

runs = st.one_of(
    st.text(st.sampled_from("!?=-~.*"), max_size=400),
    st.text(st.sampled_from(PICTURES), max_size=120),
    st.text(st.sampled_from("etaoinshrd"), max_size=400),
    st.text(st.characters(), max_size=200),
    # what merges well: pieces of the vocabulary, one behind the other
    st.lists(st.sampled_from(FRAGMENTS), max_size=60).map(
        lambda parts: b"".join(parts).decode("utf-8", "ignore")
    ),
)
texts = st.lists(runs, max_size=4).map(" ".join)


@settings(max_examples=200)
@given(texts)
@example("")
@example("<start_of_text> a dog <end_of_text> " * 30)
@example("&amp;" * 100 + "\u00c3\u00a9" * 100)
@example("a" * 100 + "'s" * 100)
def test_the_ids_of_any_text_are_those_of_open_clip(text):
    assert first_tokens(OURS, text, 10**9) == THEIRS.encode(text)
    assert torch.equal(token_ids_of(OURS, [text, "a dog"]), THEIRS([text, "a dog"]))
    assert torch.equal(token_ids_of(SHORT_CONTEXT, [text]), THEIRS([text], context_length=9))


@settings(max_examples=100)
@given(texts, st.integers(1, 12))
def test_a_text_is_reported_as_truncated_exactly_if_its_tokens_do_not_fit(text, context_length):
    tokenizer = copy(SHORT_CONTEXT)
    tokenizer.context_length = context_length
    expected = [len(THEIRS.encode(text)) + 2 > tokenizer.context_length]
    assert truncated(tokenizer, [text]) == expected
    assert truncated(tokenizer, [text], token_ids_of(tokenizer, [text])) == expected


@given(
    st.text("ab", max_size=40),
    st.lists(st.sampled_from(["a b", "b a", "a a", "b b", "ab a", "aa b", "a ba"])),
)
def test_merging_by_a_heap_is_merging_one_pair_after_the_other(word, rules):
    ranks = {tuple(rule.split()): rank for rank, rule in enumerate(dict.fromkeys(rules))}
    expected = list(word)
    while pairs := [pair for pair in pairwise(expected) if pair in ranks]:
        best, left = min(pairs, key=ranks.get), expected
        expected = []
        while left:
            taken = 2 if tuple(left[:2]) == best else 1
            expected.append("".join(left[:taken]))
            left = left[taken:]
    assert merged(list(word), ranks) == expected


class CountedRanks(dict):
    """Ranks of pairs that count how often they are asked for."""

    asked = 0

    def get(self, key, default=None):
        self.asked += 1
        return super().get(key, default)


@pytest.mark.parametrize(
    "alphabet",
    [PICTURES, "!?=-~.*#$%", "abcdefghij", [chr(code) for code in range(0x4E00, 0x9FFF)]],
    ids=["pictures", "symbols", "letters", "characters"],
)
def test_the_longest_caption_costs_what_its_first_tokens_cost(alphabet):
    caption = "".join(random.Random(0).choices(alphabet, k=16_384))
    tokenizer = SimpleTokenizer()
    tokenizer.bpe_ranks = CountedRanks(tokenizer.bpe_ranks)
    known = len(tokenizer.cache)
    token_ids_of(tokenizer, [caption])
    # open_clip looks at each of 16,384 symbols, and at all of them for each pair that it merges
    assert tokenizer.bpe_ranks.asked < 16_384 * 4 * (1 if alphabet != "abcdefghij" else 4)
    assert len(tokenizer.cache) == known, "a long run is not kept"


class FirstWords(SimpleTokenizer):
    """A tokenizer with a way of its own."""

    def encode(self, text):
        return super().encode(" ".join(text.split()[:2]))


def test_a_tokenizer_with_ways_of_its_own_is_asked_itself():
    tokenizer = FirstWords(context_length=4)
    text = "a dog and a cat"
    assert torch.equal(token_ids_of(tokenizer, [text]), THEIRS(["a dog"], context_length=4))
    assert truncated(tokenizer, [text]) == [False]
