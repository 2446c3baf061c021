"""Read captions from the untrusted bytes of a sample, within limits that keep tokenizers fast."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import regex

from pipeline.errors import SampleFailure
from pipeline.shards.fields import find_field, listed_names
from pipeline.text import printable

MAX_JSON_BYTES = 4 * 2**20
MAX_CAPTION_CHARACTERS = 2**14
# byte-pair encoding takes quadratic time on a run of letters, and no language has such words
MAX_LETTERS_IN_A_ROW = 400
# sorting combining marks takes quadratic time too; one letter has a few
MAX_MARKS_IN_A_ROW = 400
# all of a sample's captions are embedded, if only to find the most similar ones
MAX_CAPTIONS = 1024

_LETTERS = re.compile(r"[^\W\d_]+")
_MARKS = regex.compile(rf"\p{{M}}{{{MAX_MARKS_IN_A_ROW + 1}}}")


def read_captions(
    fields: Mapping[str, bytes], spec: str, *, several: bool | None
) -> list[str | SampleFailure]:
    """Read a sample's caption, or its list of captions.

    Args:
        fields: the sample's, by lower-cased extension.
        spec: `txt`, or `json:NAME` for a key of a JSON object.
        several: whether the value must be a list of captions (JSON only) or one text; None: either.

    Returns:
        The caption without surrounding white space; for a list, the caption of each element in order, or the
        failure of that element alone, so that positions are prompt indices. An empty list stays empty.

    Raises:
        SampleFailure: stage `caption`; kind `missing_field`, `missing_key`, `empty`, `not_utf8`, `not_json`,
            `wrong_type`, `too_long` or `too_many`: the sample has no usable caption at all.
    """
    field_spec, _, name = spec.partition(":")
    content = find_field(fields, field_spec, stage="caption")
    value: Any = _json_value(content, name) if name else _text(content, MAX_CAPTION_CHARACTERS * 4)
    if not (isinstance(value, list) if several is None else several):
        if isinstance(value, list):
            remedy = "prompts.source=captions takes each text of a list"
            raise _failure("wrong_type", f"expected a string as caption in {spec}, received list; {remedy}")
        return [check_caption(value)]
    if not isinstance(value, list):
        remedy = "; prompts.source=caption takes one text" if isinstance(value, str) else ""
        message = f"expected a list of captions in {spec}, received {_type_name(value)}{remedy}"
        raise _failure("wrong_type", message)
    if len(value) > MAX_CAPTIONS:
        raise _failure("too_many", f"the sample has {len(value)} captions; the limit is {MAX_CAPTIONS}")
    return [_caption_or_failure(element) for element in value]


def _caption_or_failure(value: object) -> str | SampleFailure:
    try:
        return check_caption(value)
    except SampleFailure as failure:
        return failure


def check_caption(value: object) -> str:
    """Return a caption without surrounding white space.

    Raises:
        SampleFailure: stage `caption`; kind `wrong_type`, `empty`, `too_long` or `not_utf8`.
    """
    if not isinstance(value, str):
        raise _failure("wrong_type", f"expected a string as caption, received {_type_name(value)}")
    caption = value.strip()
    if not caption:
        raise _failure("empty", "the caption is empty")
    if len(caption) > MAX_CAPTION_CHARACTERS:
        raise _failure(
            "too_long", f"the caption has {len(caption)} characters; the limit is {MAX_CAPTION_CHARACTERS}"
        )
    if any(len(letters) > MAX_LETTERS_IN_A_ROW for letters in _LETTERS.findall(caption)):
        raise _failure(
            "too_long",
            f"the caption has a run of letters longer than the limit of {MAX_LETTERS_IN_A_ROW}",
        )
    if _MARKS.search(caption):
        raise _failure(
            "too_long",
            f"the caption has a run of combining marks longer than the limit of {MAX_MARKS_IN_A_ROW}",
        )
    # JSON can spell half a surrogate pair, which no file could hold
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise _failure("not_utf8", "the caption contains half of a surrogate pair, which UTF-8 cannot encode")
    return caption


def _json_value(content: bytes, name: str) -> object:
    try:
        # no caption is a number, and parsing long integers takes quadratic time
        document = json.loads(_text(content, MAX_JSON_BYTES), parse_int=float)
    except (ValueError, RecursionError) as error:
        raise _failure("not_json", f"{type(error).__name__}: {error}") from error
    if not isinstance(document, dict):
        raise _failure("wrong_type", f"expected a JSON object, received {_type_name(document)}")
    if name not in document:
        message = f"the JSON object has no key `{printable(name)}`; keys present: {listed_names(document)}"
        raise _failure("missing_key", message)
    return document[name]


def _text(content: bytes, max_bytes: int) -> str:
    if len(content) > max_bytes:
        raise _failure("too_long", f"the field has {len(content)} bytes; the limit is {max_bytes}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _failure("not_utf8", f"the field is not UTF-8: {error.reason} at byte {error.start}") from error


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _failure(kind: str, message: str) -> SampleFailure:
    return SampleFailure("caption", kind, message)
