"""Captions for scenes: templates, articles, adjectives, plurals, synonyms, and unknown words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.demo.making.concepts import COUNTED_STUFF, FIRST_STUFF_ID, MASS_NOUNS, NAMED

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
_PLACES = ("on", "in front of", "against", "above", "with", "and", "over", "near")
_COUNTS = ("two", "some", "a pair of", "several")

# Filler, mapped to the untrained, all-zero row of the token table, so that words never learnt do no harm.
UNKNOWN_WORDS = tuple(
    """
    really quiet morning under soft light old town where someone left yesterday yellowish velvet
    winter summer holiday garden studio vintage modern random object thing wooden metal plastic table
    outside during festival market popular famous best free design style stock download sale gift shop
    kitchen office travel family happy sad angry sleepy running jumping sitting standing large tiny huge
    red blue green purple orange brown black white silver golden person child woman man city rain
    window ceiling fence railway tracks plain village harbour tunnel
    """.split()  # noqa: SIM905
)


def one_concept_caption(rng: np.random.Generator, class_id: int) -> str:
    """Return a caption that names one concept and no other known word."""
    if class_id >= FIRST_STUFF_ID:
        return _decorate(rng, _stuff_phrase(rng, class_id))
    return _decorate(rng, _phrase(rng, class_id, is_several=rng.random() < 0.12))


def neutral_caption(rng: np.random.Generator) -> str:
    """Return a caption that names no concept: an empty phrase or unknown words."""
    if rng.random() < 0.6:
        return _pick(rng, NEUTRAL)
    words = " ".join(_pick(rng, UNKNOWN_WORDS) for _ in range(rng.integers(1, 4)))
    return _pick(rng, TEMPLATES).format(words)


def named_subset(rng: np.random.Generator, class_ids: Sequence[int]) -> tuple[int, ...]:
    """Return what a caption of a scene names: its things nearly always, its stuff often, something always.

    Args:
        rng: Source of all choices.
        class_ids: Everything named that the scene shows.
    """
    things = tuple(class_id for class_id in class_ids if class_id < FIRST_STUFF_ID)
    stuff = tuple(class_id for class_id in class_ids if class_id >= FIRST_STUFF_ID)
    if len(stuff) > 1 and rng.random() < 0.3:
        stuff = (stuff[int(rng.integers(len(stuff)))],)
    if not (things and stuff):
        return things + stuff
    draw = rng.random()
    return things if draw < 0.25 else stuff if draw < 0.35 else things + stuff


def scene_caption(rng: np.random.Generator, class_ids: Sequence[int], several: Sequence[bool]) -> str:
    """Return a caption that names the given concepts, in any order, and no other.

    Args:
        rng: Source of all choices.
        class_ids: From 1, no repeats; empty gives a neutral caption.
        several: Whether the scene shows the concept more than once.
    """
    if not class_ids:
        return neutral_caption(rng)
    order = [int(index) for index in rng.permutation(len(class_ids))]
    things = [
        _phrase(rng, class_ids[index], is_several=several[index])
        for index in order
        if class_ids[index] < FIRST_STUFF_ID
    ]
    stuff = [_stuff_phrase(rng, class_ids[index]) for index in order if class_ids[index] >= FIRST_STUFF_ID]
    parts = [part for part in (_joined(rng, things), _joined(rng, stuff)) if part]
    if len(parts) == 2 and rng.random() < 0.2:
        parts.reverse()
    return _decorate(rng, f" {_pick(rng, _PLACES)} ".join(parts))


def _joined(rng: np.random.Generator, phrases: Sequence[str]) -> str:
    if len(phrases) == 3 and rng.random() < 0.5:
        return f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    return f" {_pick(rng, _CONNECTORS)} ".join(phrases)


def canonical_caption(class_id: int) -> str:
    """Return the plain phrase for a concept, such as "an apple", "grapes" or "grass"."""
    return _with_article(NAMED[class_id - 1].name, is_stuff=class_id >= FIRST_STUFF_ID)


def all_known_words() -> list[str]:
    """Return every word that captions can contain, without unknown words, sorted."""
    texts = [*TEMPLATES, *NEUTRAL, *_ADJECTIVES, *_CONNECTORS, *_PLACES, *_COUNTS, "a an the ,"]
    for concept in NAMED:
        texts += [concept.name, *concept.synonyms, *([concept.plural] if concept.codes else [])]
    return sorted({word for text in texts for word in text.replace("{}", " ").split()} - set(UNKNOWN_WORDS))


def _decorate(rng: np.random.Generator, phrase: str) -> str:
    words = _pick(rng, TEMPLATES).format(phrase).split()
    if rng.random() < 0.2:
        for _ in range(rng.integers(1, 4)):
            words.insert(int(rng.integers(len(words) + 1)), _pick(rng, UNKNOWN_WORDS))
    return " ".join(words)


def _phrase(rng: np.random.Generator, class_id: int, *, is_several: bool) -> str:
    concept = NAMED[class_id - 1]
    adjective = f"{_pick(rng, _ADJECTIVES)} " if rng.random() < 0.25 else ""
    if is_several:
        return f"{_pick(rng, _COUNTS)} {adjective}{concept.plural}"
    has_synonym = bool(concept.synonyms) and rng.random() < 0.22
    noun = adjective + (_pick(rng, concept.synonyms) if has_synonym else concept.name)
    draw = rng.random()
    return noun if draw < 0.15 else f"the {noun}" if draw < 0.3 else _with_article(noun)


def _stuff_phrase(rng: np.random.Generator, class_id: int) -> str:
    stuff = NAMED[class_id - 1]
    has_synonym = bool(stuff.synonyms) and rng.random() < 0.35
    noun = _pick(rng, stuff.synonyms) if has_synonym else stuff.name
    if rng.random() < 0.15:
        return f"{_pick(rng, _ADJECTIVES)} {noun}"
    draw = rng.random()
    return noun if draw < 0.4 else f"the {noun}" if draw < 0.55 else _with_article(noun, is_stuff=True)


def _with_article(noun: str, *, is_stuff: bool = False) -> str:
    last = noun.rsplit(maxsplit=1)[-1]
    if last in MASS_NOUNS or (is_stuff and last not in COUNTED_STUFF):
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
