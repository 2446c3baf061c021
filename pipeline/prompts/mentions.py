"""Find the classes that a text mentions, word by word, in singular or plural, the longest name first."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

import regex

from pipeline.config.classes import ClassEntry

# words, and any other characters between them; a hyphen separates words as a space does
_TOKENS = regex.compile(r"[\p{L}\p{M}\p{N}]+|[^\p{L}\p{M}\p{N}\s\-\u2010_]")


class MentionFinder:
    """Finds the classes that a text mentions by name, synonym or plural.

    Whole words are matched, in any case; hyphens and underscores separate words as spaces do. A mention
    within a longer one does not count: where "hot dog" is a class, the text "hot dog" does not mention a dog.
    Scripts without spaces have no word boundaries to match at.

    Args:
        entries: the classes; a synonym may belong to several.
    """

    def __init__(self, entries: Sequence[ClassEntry]) -> None:
        owners: dict[tuple[str, ...], dict[int, None]] = defaultdict(dict)
        for ordinal, form in _forms_of(entries):
            owners[tuple(_words(form))][ordinal] = None
        owners.pop((), None)
        lengths: dict[str, set[int]] = defaultdict(set)
        for words in owners:
            lengths[words[0]].add(len(words))
        self._ordinals = {words: tuple(ordinals) for words, ordinals in owners.items()}
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def mentioned(self, text: str) -> set[int]:
        """Return the ordinals of the classes that a text mentions."""
        words = _words(text)
        found: set[int] = set()
        covered_to = 0
        for start, first in enumerate(words):
            for length in self._lengths.get(first, ()):
                ordinals = self._ordinals.get(tuple(words[start : start + length]))
                if ordinals is None:
                    continue
                if start + length > covered_to:
                    found.update(ordinals)
                    covered_to = start + length
                break
        return found

    def names_a_class(self, text: str) -> bool:
        """Return whether a text as a whole is the name, a synonym or a plural of a class."""
        return tuple(_words(text)) in self._ordinals


def _words(text: str) -> list[str]:
    if text.isascii():
        folded = text.lower()
    else:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        folded = folded.replace("\u2019", "'")
    words: list[str] = _TOKENS.findall(folded)
    return words


def _forms_of(entries: Sequence[ClassEntry]) -> Iterator[tuple[int, str]]:
    """Yield the ordinal of each class with every text that names it."""
    # imported here: importing it takes a second, and most jobs do not need it
    import inflect

    modern, classical = inflect.engine(), inflect.engine()
    classical.classical(all=True)
    for ordinal, entry in enumerate(entries):
        for name in (entry.name, *entry.synonyms):
            plurals = (modern.plural_noun(name), classical.plural_noun(name))  # cactuses, cacti
            yield from ((ordinal, str(form)) for form in (name, *plurals))
        yield from ((ordinal, form) for form in entry.plurals)
