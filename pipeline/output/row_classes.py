"""Classes of annotation rows whose prompts are captions: the one class that the prompt mentions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from pipeline.config.classes import ClassEntry
from pipeline.prompts.mentions import MentionFinder

# names of counts
WITHOUT_CLASS, SEVERAL_CLASSES = "rows_without_class", "rows_several_classes"


class RowClasses:
    """Finds the class of a row without one, by the rules of `prompts.mentioned_in`.

    A prompt belongs to a class if it mentions this class alone: by name, synonym or plural, as whole words.
    A prompt that mentions several has one mask for all of them, so it belongs to none.

    Args:
        entries: the classes.
    """

    def __init__(self, entries: Sequence[ClassEntry]) -> None:
        self._entries = tuple(entries)

    @cached_property
    def _finder(self) -> MentionFinder:
        # importing the plurals takes a second, and rows of classes need none
        return MentionFinder(self._entries)

    def classified(
        self, row: Mapping[str, Any], count: Callable[[str], None] = lambda _reason: None
    ) -> Mapping[str, Any] | None:
        """Return a row with its class.

        Args:
            row: an annotation row; one with a class is returned as it is.
            count: called with the reason, `rows_without_class` or `rows_several_classes`, if there is none.

        Returns:
            The row, with `class_id` and, where it had none, `class_name`; None if its prompt mentions no
            class, or several.
        """
        if row["class_id"] is not None:
            return row
        mentioned = self._finder.mentioned(row["prompt"])
        if len(mentioned) != 1:
            count(SEVERAL_CLASSES if mentioned else WITHOUT_CLASS)
            return None
        entry = self._entries[mentioned.pop()]
        return {**row, "class_id": entry.class_id, "class_name": entry.name}
