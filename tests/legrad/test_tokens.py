"""Tokens equal those of open_clip for any text, and the cost of a long text is bounded by the context."""

import html.entities
import pickle
import random
import sys
import threading
import unicodedata
from copy import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from legrad import byte_pairs
from legrad.byte_pairs import LONGEST_KEPT, SHORT_RUN, BytePairEncoder, merged
from legrad.tokens import RowTokenizer, picklable_tokenizer
from tests.helpers.token_rows import token_ids, truncated

CLEANINGS = ["lower", "whitespace", "canonicalize"]
# open_clip's own, which do the work here for comparison
THEIRS = {clean: SimpleTokenizer(clean=clean) for clean in CLEANINGS}
OURS = {clean: SimpleTokenizer(clean=clean) for clean in CLEANINGS}
ENCODERS = {clean: BytePairEncoder(tokenizer) for clean, tokenizer in OURS.items()}
SHORT_CONTEXT = SimpleTokenizer(context_length=9)

# neither unassigned, nor private, nor surrogates
ASSIGNED = [
    character
    for character in map(chr, range(sys.maxunicode + 1))
    if unicodedata.category(character) not in ("Cn", "Co", "Cs")
]
OF_CATEGORY = {
    category: [character for character in ASSIGNED if unicodedata.category(character) == category]
    for category in ("So", "Sm", "Cc", "Cf", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Lm", "Lo", "Lt", "Pi", "Pf")
}
CATEGORIES = list(OF_CATEGORY.values())
PICTURES = [character for character in OF_CATEGORY["So"] + OF_CATEGORY["Sm"] if character > "\xa0"]
SPACES = [character for character in ASSIGNED if character.isspace()] + ["\u200b", "\ufeff", "\u180e", "\r\n"]
WORDS = [
    token.removesuffix("</w>")
    for token in THEIRS["lower"].encoder
    if token.endswith("</w>") and token.isascii()
]
FRAGMENTS = [
    bytes(THEIRS["lower"].byte_decoder[letter] for letter in token.removesuffix("</w>"))
    for token in list(THEIRS["lower"].encoder)[:-2]
]
ENTITIES = list(html.entities.html5)
CONTRACTIONS = [
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'LL",
    "'\u017f",
    "\u2019s",
    "''s",
    "'",
    "!'s",
]
MARKS = ["<start_of_text>", "<end_of_text>", "<START_OF_TEXT>", "<end_of_text", "<|endoftext|>", "</w>", "_"]
BROKEN_ENTITIES = [
    "&",
    "&amp",
    "&ampamp;",
    "&#;",
    "&#x;",
    "&#xd800;",
    "&#1114112;",
    "&#0;",
    "&#128;",
    "&#x85;",
]
BROKEN_ENTITIES += [
    "&;",
    "&nosuch;",
    "&notin",
    "&lt;br&gt;",
    "&#38;lt;",
    "&amp;amp;amp;amp;lt;",
    "& lt;",
    "&#10",
]
NASTY = [
    *(
        "",
        " ",
        "\n",
        "\x00",
        "\x7f",
        "\x85",
        "\xa0",
        "\x1c",
        "a\x1cb",
        "a\x0bb",
        "a\x0cb",
        "a\x85b",
        "a\u2028b",
    ),
    *(
        "\x1b[31mred\x1b[0m dog",
        "tab\tand\r\nline",
        "a\x00dog",
        "caf\u0065\u0301",
        "\u0301",
        "a\u0300\u0316b",
    ),
    *("\u0130stanbul", "\u017f", "\u212a", "\u01c5", "\ufb01sh", "\uff21\uff22", "stra\u00dfe", "\u1e9e"),
    *("\u00c3\u00a9t\u00c3\u00a9", "\u00e2\u20ac\u2122s", "\u00e2\u0153\u201d", "doesn\u00e2\u20ac\u2122t"),
    *(
        "\u201cquoted\u201d",
        "it\u2019s",
        "a\u2026b",
        "\u0661\u0662",
        "\u00bd",
        "\u2167",
        "1,234.56",
        "\u4e2d\u6587",
    ),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u0e01\u0e33", "\u1100\u1161"),
    *(
        "<start_of_text> a dog <end_of_text> " * 30,
        "a<end_of_text>b",
        "&lt;end_of_text&gt;",
        "a" * 31,
        "a" * 32,
    ),
    *("a" * 33, "a" * 63, "a" * 64, "a" * 65, "\u00e9" * 32, "\u00e9" * 33, "ab" * 300, "&amp;" * 100),
    *(
        "\u00c3\u00a9" * 100,
        "a" * 100 + "'s" * 100,
        "a&b",
        "a & b",
        "a&ampb",
        "A_B-C",
        "\\u0041",
        "\ufffd\ufffd",
    ),
]


def mojibake(text, codec):
    return text.encode("utf-8", "ignore").decode(codec, "replace")


def piece(draw):
    """A part of a caption of one kind or another."""
    kind = draw.random()
    if kind < 0.45:
        return draw.choice(WORDS) + draw.choice(["", "", "", ".", ",", "!", "'s", "-", "?!"])
    if kind < 0.5:
        return "".join(draw.choices(WORDS, k=draw.randint(2, 12))).title()
    if kind < 0.56:
        name = draw.choice(ENTITIES)
        return "&" + draw.choice(["", "amp;", "amp;amp;", "amp"]) + draw.choice([name, name.rstrip(";")])
    if kind < 0.59:
        return draw.choice(["&#%d", "&#%d;", "&#x%x;", "&#x%x", "&amp;#%d;"]) % draw.randrange(0x110100)
    if kind < 0.64:
        return draw.choice(BROKEN_ENTITIES)
    if kind < 0.69:
        foreign = "".join(draw.choices(draw.choice(CATEGORIES), k=draw.randint(1, 6)))
        damaged = mojibake(foreign, draw.choice(["latin-1", "cp1252", "cp1251", "macroman", "cp437"]))
        return mojibake(damaged, "latin-1") if draw.random() < 0.2 else damaged
    if kind < 0.74:
        return draw.choice(CONTRACTIONS + MARKS)
    if kind < 0.78:
        return draw.choice(NASTY)
    if kind < 0.82:
        return b"".join(draw.choices(FRAGMENTS, k=draw.randint(1, 40))).decode("utf-8", "ignore")
    if kind < 0.9:
        return "".join(draw.choices(draw.choice(CATEGORIES), k=draw.randint(1, 40)))
    if kind < 0.95:
        return "".join(draw.choices(ASSIGNED, k=draw.randint(1, 20)))
    return "".join(map(chr, draw.choices(range(128), k=draw.randint(1, 20))))


def caption(draw):
    gap = (lambda: " ") if draw.random() < 0.6 else lambda: draw.choice(["", " ", *SPACES])
    return "".join(gap() + piece(draw) for _ in range(draw.randint(1, 8)))


def assert_tokens_are_those_of_open_clip(texts, clean="lower"):
    ours, theirs, encoder = OURS[clean], THEIRS[clean], ENCODERS[clean]
    for text in texts:
        whole = theirs.encode(text)
        assert encoder.first_tokens(text, 10**9) == whole, repr(text)
        assert encoder.first_tokens(text, 76) == whole[:76], repr(text)
    some = texts[:20]
    assert torch.equal(token_ids(ours, some), theirs(some))
    assert truncated(ours, some) == [len(theirs.encode(text)) > 75 for text in some]


@pytest.mark.parametrize("clean", CLEANINGS)
def test_the_ids_of_nasty_texts_are_those_of_open_clip(clean):
    assert_tokens_are_those_of_open_clip(NASTY + BROKEN_ENTITIES + CONTRACTIONS + MARKS, clean)
    assert_tokens_are_those_of_open_clip([f"a{character}b" for character in SPACES], clean)
    assert_tokens_are_those_of_open_clip([f"A{chr(code)}b" for code in range(256)], clean)


@pytest.mark.parametrize(
    "count", [300, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
@pytest.mark.parametrize("clean", CLEANINGS)
def test_the_ids_of_captions_of_every_kind_are_those_of_open_clip(clean, count):
    draw = random.Random(f"{clean} {count}")
    for _ in range(count // 100):
        assert_tokens_are_those_of_open_clip([caption(draw) for _ in range(100)], clean)


@pytest.mark.slow
def test_the_ids_of_each_word_of_the_vocabulary_and_of_each_character_are_those_of_open_clip():
    assert_tokens_are_those_of_open_clip(WORDS)
    assert_tokens_are_those_of_open_clip([f"x{character}1" for character in ASSIGNED[::9]])


runs = st.one_of(
    st.text(st.sampled_from("!?=-~.*"), max_size=400),
    st.text(st.sampled_from(PICTURES), max_size=120),
    st.text(st.sampled_from("etaoinshrd"), max_size=400),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    # what merges well: pieces of the vocabulary, one behind the other
    st.lists(st.sampled_from(FRAGMENTS), max_size=60).map(
        lambda parts: b"".join(parts).decode("utf-8", "ignore")
    ),
    st.sampled_from(NASTY),
)
texts = st.lists(runs, max_size=4).map(" ".join)


@settings(max_examples=200)
@given(texts, st.sampled_from(CLEANINGS))
@example("<start_of_text> a dog <end_of_text> " * 30, "whitespace")
def test_the_ids_of_any_text_are_those_of_open_clip(text, clean):
    assert_tokens_are_those_of_open_clip([text, "a dog"], clean)
    assert torch.equal(token_ids(SHORT_CONTEXT, [text]), THEIRS["lower"]([text], context_length=9))


@settings(max_examples=100)
@given(texts, st.integers(1, 12))
def test_a_text_is_reported_as_truncated_exactly_if_its_tokens_do_not_fit(text, context_length):
    tokenizer = copy(SHORT_CONTEXT)
    tokenizer.context_length = context_length
    assert truncated(tokenizer, [text]) == [len(THEIRS["lower"].encode(text)) + 2 > context_length]


def test_further_special_tokens_may_hold_spaces():
    options = {"additional_special_tokens": ["<a b>", "dog"]}
    theirs, ours = SimpleTokenizer(**options), SimpleTokenizer(**options)
    listed = ["my <a b> dog, dogs", "<A B> and <a  b>", "hot dog" * 40, "plain words"]
    assert torch.equal(token_ids(ours, listed), theirs(listed))


def test_a_cleaning_of_the_callers_own_is_used():
    theirs, ours = SimpleTokenizer(), SimpleTokenizer()
    theirs.clean_fn = ours.clean_fn = lambda text: text.upper().replace("X", "\x1c\u00a0")
    listed = ["a dog", "twoxwords", "!x!"]
    assert torch.equal(token_ids(ours, listed), theirs(listed))


def test_words_that_are_forgotten_are_encoded_again(monkeypatch):
    monkeypatch.setattr(byte_pairs, "WORDS_KEPT", 3)
    encoder = BytePairEncoder(OURS["lower"])
    listed = [" ".join(random.Random(number).choices(WORDS[:12], k=8)) for number in range(60)]
    assert [encoder.first_tokens(text, 99) for text in listed] == [
        THEIRS["lower"].encode(text) for text in listed
    ]
    assert encoder.words_kept == 3


def test_a_word_that_was_met_costs_no_merge_again():
    tokenizer = SimpleTokenizer()
    tokenizer.bpe_ranks = CountedRanks(tokenizer.bpe_ranks)
    row_tokenizer = RowTokenizer(tokenizer)
    row_tokenizer(["An unbelievably fluffy dog."])
    asked = tokenizer.bpe_ranks.asked
    assert asked
    row_tokenizer(["a fluffy, unbelievably AN dog"])
    assert tokenizer.bpe_ranks.asked == asked


def test_threads_share_a_tokenizer():
    row_tokenizer = RowTokenizer(OURS["lower"])
    listed = [caption(random.Random(number)) for number in range(200)]
    received = {}
    threads = [
        threading.Thread(target=lambda start=start: received.update({start: row_tokenizer(listed[start:])}))
        for start in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = RowTokenizer(THEIRS["lower"])(listed)
    assert all(expected[text] == row for rows in received.values() for text, row in rows.items())


@given(
    st.text("ab", max_size=SHORT_RUN + 40),
    st.lists(st.sampled_from(["a b", "b a", "a a", "b b", "ab a", "aa b", "a ba"])),
)
def test_merging_is_merging_one_pair_after_the_other(word, rules):
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
    text = "".join(random.Random(0).choices(alphabet, k=16_384))
    tokenizer = SimpleTokenizer()
    tokenizer.bpe_ranks = CountedRanks(tokenizer.bpe_ranks)
    known = len(tokenizer.cache)
    row_tokenizer = RowTokenizer(tokenizer)
    row_tokenizer([text])
    # open_clip looks at each of 16,384 symbols, and at all of them for each pair that it merges
    assert tokenizer.bpe_ranks.asked < 16_384 * 4 * (1 if alphabet != "abcdefghij" else 4)
    assert len(tokenizer.cache) == known, "the tokenizer itself keeps nothing"


def test_long_words_are_not_kept():
    encoder = BytePairEncoder(OURS["lower"])
    encoder.first_tokens("x" * (LONGEST_KEPT + 1) + " " + "!" * (LONGEST_KEPT + 1), 99)
    assert encoder.words_kept == 0


class FirstWords(SimpleTokenizer):
    """A tokenizer with a way of its own."""

    def encode(self, text):
        return super().encode(" ".join(text.split()[:2]))


def test_a_tokenizer_with_ways_of_its_own_is_asked_itself():
    tokenizer = FirstWords(context_length=4)
    text = "a dog and a cat"
    assert torch.equal(token_ids(tokenizer, [text]), THEIRS["lower"](["a dog"], context_length=4))
    assert truncated(tokenizer, [text]) == [False]


@pytest.mark.parametrize("clean", CLEANINGS)
def test_a_pickled_tokenizer_makes_the_same_tokens(clean):
    made = picklable_tokenizer(SimpleTokenizer(clean=clean, context_length=20))
    made(["a word that was met"])
    listed = [caption(random.Random(number)) for number in range(50)]
    assert pickle.loads(pickle.dumps(made))(listed) == made(listed)


def test_a_tokenizer_that_cannot_be_pickled_is_recognised():
    tokenizer = SimpleTokenizer()
    tokenizer.clean_fn = lambda text: text
    assert picklable_tokenizer(tokenizer) is None
