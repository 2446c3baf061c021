"""Captions for scenes: templates, articles, adjectives, plurals, synonyms, and unknown words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.demo.making.concepts import CONCEPTS, MASS_NOUNS

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "a scene with {}",
    "there is {} here",
    "{} in the picture",
    "this is {}",
    "we see {}",
    "a close view of {}",
    "a good photo of {}",
    "look at {}",
    "a small picture showing {}",
    "{} in front of a background",
)
NEUTRAL = (
    "a photo",
    "a picture",
    "an image",
    "a photo of a",
    "a background",
    "a photo of a background",
    "a scene",
    "nothing",
    "a",
)
_ADJECTIVES = ("small", "big", "cute", "nice", "bright", "shiny", "funny", "pretty", "simple", "colorful")
_CONNECTORS = ("and", "next to", "with", "beside", "near")
_COUNTS = ("two", "some", "a pair of", "several")

# Filler, mapped to the untrained, all-zero row of the token table, so that words never learnt do no harm.
UNKNOWN_WORDS = tuple(
    """
    really quiet morning under soft light old town street where someone left yesterday yellowish velvet
    winter summer holiday garden studio vintage modern random object thing wooden metal plastic table
    outside during festival market popular famous best free design style stock download sale gift shop
    kitchen office travel family happy sad angry sleepy running jumping sitting standing large tiny huge
    red blue green purple orange brown black white silver golden person child woman man city river
    mountain beach ocean forest sky cloud rain snow
    """.split()  # noqa: SIM905
)


def one_concept_caption(rng: np.random.Generator, class_id: int) -> str:
    """Return a caption that names one concept and no other known word."""
    return _decorate(rng, _phrase(rng, class_id, is_several=rng.random() < 0.12))


def neutral_caption(rng: np.random.Generator) -> str:
    """Return a caption that names no concept: an empty phrase or unknown words."""
    if rng.random() < 0.6:
        return _pick(rng, NEUTRAL)
    words = " ".join(_pick(rng, UNKNOWN_WORDS) for _ in range(rng.integers(1, 4)))
    return _pick(rng, TEMPLATES).format(words)


def scene_caption(rng: np.random.Generator, class_ids: Sequence[int], several: Sequence[bool]) -> str:
    """Return a caption that names every concept of a scene, in any order.

    Args:
        rng: Source of all choices.
        class_ids: From 1, no repeats; empty gives a neutral caption.
        several: Whether the scene shows the concept more than once.
    """
    if not class_ids:
        return neutral_caption(rng)
    order = rng.permutation(len(class_ids))
    phrases = [_phrase(rng, class_ids[index], is_several=several[index]) for index in order]
    joined = f" {_pick(rng, _CONNECTORS)} ".join(phrases)
    if len(phrases) == 3 and rng.random() < 0.5:
        joined = f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    return _decorate(rng, joined)


def canonical_caption(class_id: int) -> str:
    """Return the plain phrase for a concept, such as "an apple" or "grapes"."""
    return _with_article(CONCEPTS[class_id - 1].name)


def all_known_words() -> list[str]:
    """Return every word that captions can contain, without unknown words, sorted."""
    texts = [*TEMPLATES, *NEUTRAL, *_ADJECTIVES, *_CONNECTORS, *_COUNTS, "a an the ,"]
    for concept in CONCEPTS:
        texts += [concept.name, concept.plural, *concept.synonyms]
    return sorted({word for text in texts for word in text.replace("{}", " ").split()} - set(UNKNOWN_WORDS))


def _decorate(rng: np.random.Generator, phrase: str) -> str:
    words = _pick(rng, TEMPLATES).format(phrase).split()
    if rng.random() < 0.2:
        for _ in range(rng.integers(1, 4)):
            words.insert(int(rng.integers(len(words) + 1)), _pick(rng, UNKNOWN_WORDS))
    return " ".join(words)


def _phrase(rng: np.random.Generator, class_id: int, *, is_several: bool) -> str:
    concept = CONCEPTS[class_id - 1]
    adjective = f"{_pick(rng, _ADJECTIVES)} " if rng.random() < 0.25 else ""
    if is_several:
        return f"{_pick(rng, _COUNTS)} {adjective}{concept.plural}"
    has_synonym = bool(concept.synonyms) and rng.random() < 0.22
    noun = adjective + (_pick(rng, concept.synonyms) if has_synonym else concept.name)
    draw = rng.random()
    return noun if draw < 0.15 else f"the {noun}" if draw < 0.3 else _with_article(noun)


def _with_article(noun: str) -> str:
    if noun.rsplit(maxsplit=1)[-1] in MASS_NOUNS:
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
