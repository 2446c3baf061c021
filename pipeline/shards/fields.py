"""Find a field of a sample by its extension, and describe the fields present where it is missing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

from pipeline.errors import SampleFailure
from pipeline.shards.samples import SampleFields
from pipeline.text import printable

# field names and JSON keys shown in a message
MAX_NAMES_SHOWN = 12
MAX_NAME_CHARACTERS_SHOWN = 30


def find_field(fields: Mapping[str, bytes], spec: str, *, stage: str = "decode") -> bytes:
    """Return the content of the first of several fields that a sample has.

    Args:
        fields: the sample's, by lower-cased extension; the error names those that were skipped too.
        spec: extensions by preference, separated by semicolons, such as `jpg;png;webp`.
        stage: stage under which a missing field is reported.

    Raises:
        SampleFailure: kind `missing_field`: the sample has none of them.
    """
    names = spec.lower().split(";")
    for name in names:
        if name in fields:
            return fields[name]
    wanted = " or ".join(f"`{printable(name)}`" for name in names)
    raise SampleFailure(
        stage, "missing_field", f"sample has no field {wanted}{describe_fields(fields, names)}"
    )


def describe_fields(fields: Mapping[str, bytes], missed: Sequence[str] = ()) -> str:
    """Return the end of a message: the fields present, and why a missing one may have another name."""
    present = sorted({*fields, *(fields.skipped if isinstance(fields, SampleFields) else ())})
    description = f"; fields present: {listed_names(present)}"
    dotted = next((field for field in present if field.endswith(tuple(f".{name}" for name in missed))), None)
    if dotted is None:
        return description
    return f"{description} (a key ends at the first dot of the base name, and all that follows is the field)"


def listed_names(names: Collection[str]) -> str:
    """Return printable names: at most MAX_NAMES_SHOWN, each cut to MAX_NAME_CHARACTERS_SHOWN."""
    shown = [printable(name[:MAX_NAME_CHARACTERS_SHOWN]) for name in islice(names, MAX_NAMES_SHOWN)]
    omitted = len(names) - len(shown)
    return ", ".join(shown) + (f" and {omitted} more" if omitted else "") if shown else "none"
