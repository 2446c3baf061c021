"""Fields of a sample: found by extension, or named where they are missing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

from pipeline.errors import SampleFailure
from pipeline.shards.samples import SampleFields
from pipeline.text import printable

# of fields and JSON keys that a message names
MAX_NAMES_TOLD = 12


MAX_NAME_CHARACTERS_TOLD = 30


def find_field(fields: Mapping[str, bytes], spec: str, *, stage: str = "decode") -> bytes:
    """Find the first of several fields that a sample has.

    Args:
        fields: the sample's, by lower-cased extension; those that were skipped are named where none is found.
        spec: extensions by preference, separated by semicolons, such as `jpg;png;webp`.
        stage: what a missing field is reported under.

    Raises:
        SampleFailure: kind `missing_field`: the sample has none of them.
    """
    names = spec.lower().split(";")
    for name in names:
        if name in fields:
            return fields[name]
    raise SampleFailure(
        stage, "missing_field", f"sample has no field {_quoted(names)}{told_fields(fields, names)}"
    )


def told_fields(fields: Mapping[str, bytes], missed: Sequence[str] = ()) -> str:
    """The end of a message: which fields there are, and why none has a missed name where that can be told."""
    present = sorted({*fields, *(fields.skipped if isinstance(fields, SampleFields) else ())})
    told = f"; fields present: {listed_names(present)}"
    dotted = next((field for field in present if field.endswith(tuple(f".{name}" for name in missed))), None)
    if dotted is None:
        return told
    return f"{told} (a key ends at the first dot of the base name, and all that follows is the field)"


def _quoted(names: Sequence[str]) -> str:
    return " or ".join(f"`{printable(name)}`" for name in names)


def listed_names(names: Collection[str]) -> str:
    """Some of the names, fit to be shown: at most MAX_NAMES_TOLD, each cut to MAX_NAME_CHARACTERS_TOLD."""
    told = [printable(name[:MAX_NAME_CHARACTERS_TOLD]) for name in islice(names, MAX_NAMES_TOLD)]
    left = len(names) - len(told)
    return ", ".join(told) + (f" and {left} more" if left else "") if told else "none"
