"""Which classes a text mentions."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.classes import class_entries
from pipeline.demo.assets import demo_classes
from pipeline.prompts.mentions import MentionFinder

ENTRIES = class_entries(
    [
        "dog",
        "hot dog",
        {"name": "cat", "synonyms": ["kitty", "tom cat"]},
        "bus",
        "child",
        "sheep",
        {"name": "puppy", "synonyms": ["young dog"]},
        {"name": "T-shirt", "synonyms": ["shirt"]},
        {"name": "aircraft", "synonyms": ["plane"], "plurals": ["aeroplanes"]},
        {"name": "C++", "synonyms": ["men's shoe"]},
        "Café",
        {"name": "young animal", "synonyms": ["puppy", "kitten"]},
        "cactus",
        "हाथी",
    ]
)
NAMES = [entry.name for entry in ENTRIES]
FINDER = MentionFinder(ENTRIES)


def mentioned(text):
    return {NAMES[ordinal] for ordinal in FINDER.mentioned(text)}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a dog", {"dog"}),
        ("DOGS!", {"dog"}),
        ("the dog's bone and the dogs' kennel", {"dog"}),
        ("a hot dog", {"hot dog"}),
        ("two hot-dogs", {"hot dog"}),
        ("hot  \n dog", {"hot dog"}),
        ("it is hot, dog", {"dog"}),
        ("a dog eats a hot dog", {"dog", "hot dog"}),
        ("a category of cats", {"cat"}),
        ("a category", set()),
        ("kitties", {"cat"}),
        ("Tom Cat", {"cat"}),
        ("two buses", {"bus"}),
        ("business", set()),
        ("children and sheep", {"child", "sheep"}),
        ("puppies", {"puppy", "young animal"}),
        ("young dogs", {"puppy"}),
        ("a t-shirt", {"T-shirt"}),
        ("T SHIRTS", {"T-shirt"}),
        ("planes, aeroplanes", {"aircraft"}),
        ("in C++.", {"C++"}),
        ("in C", set()),
        ("men’s shoes", {"C++"}),
        ("CAFE\u0301s", {"Café"}),
        ("cafe", set()),
        ("cacti or cactuses", {"cactus"}),
        ("dog_and_cat.jpg", {"dog", "cat"}),
        ("dog2", set()),
        ("エdog", set()),
        ("हाथी!", {"हाथी"}),
        ("हाथीे", set()),
        ("", set()),
    ],
)
def test_whole_words_count_in_any_case_singular_or_plural(text, names):
    assert mentioned(text) == names


def test_a_text_as_a_whole_may_name_a_class():
    assert [FINDER.names_a_class(text) for text in ("Hot dogs", "a hot dog", "kitty", "sky", "")] == [
        True,
        False,
        True,
        False,
        False,
    ]


letters = st.text(st.characters(categories=("Ll", "Lu", "Lo", "Nd")), min_size=1, max_size=8).filter(
    lambda text: unicodedata.is_normalized("NFKC", text)  # or a single letter may stand for several words
)
ends = st.text(st.characters(categories=("Po", "Ps", "Pe", "Zs", "Cc", "Sm"), exclude_characters="'’"))
SINGLE_WORDS = ["dog", "DOGS", "sheep", "kitties", "buses", "Cacti"]


@given(st.text(), ends, st.sampled_from(SINGLE_WORDS), ends, st.text())
def test_a_class_is_found_whatever_is_around_it_beyond_a_mark(before, left, name, right, after):
    # the marks keep what is around from becoming part of a longer name
    text = f"{before}.{left} {name} {right}.{after}"
    assert mentioned(name) <= mentioned(text)


@given(letters, st.sampled_from(SINGLE_WORDS), letters)
def test_a_class_inside_a_longer_word_is_not_found(before, name, after):
    for word in (before + name, name + after, before + name + after):
        if not FINDER.names_a_class(word):  # as sheep and s do
            assert mentioned(word) == set()


VOCABULARY = ["dog", "hot", "cat", "tom", "young", "red", "kitty", "dogs"]


@given(st.lists(st.sampled_from(VOCABULARY), max_size=12))
def test_the_longest_names_count_and_what_lies_within_them_does_not(words):
    """Against regular expressions, tried at every place for every form."""
    forms = {"dog": 0, "dogs": 0, "hot dog": 1, "hot dogs": 1, "cat": 2, "kitty": 2, "tom cat": 2}
    forms |= {"young dog": 6, "young dogs": 6}
    text = " ".join(words)
    spans = {
        (start, start + len(form)): ordinal
        for form, ordinal in forms.items()
        for start in range(len(text))
        if re.match(rf"\b{form}\b", text[start:]) and (start == 0 or text[start - 1] == " ")
    }
    expected = {
        ordinal
        for (start, end), ordinal in spans.items()
        if not any(s <= start and end <= e and (s, e) != (start, end) for s, e in spans)
    }
    assert FINDER.mentioned(text) == expected


def test_among_the_classes_of_the_demo_a_plural_finds_its_own():
    names = demo_classes()
    finder = MentionFinder(class_entries(names))
    plurals = {
        "dog": "dogs",
        "fish": "fish",
        "octopus": "octopuses",
        "strawberry": "strawberries",
        "bus": "buses",
    }
    for name, plural in plurals.items():
        assert finder.mentioned(f"three {plural}, and more") == {names.index(name)}
