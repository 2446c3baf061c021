"""Fields and captions of samples: found, or refused with what was found instead."""

import io
import json
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import SampleFailure
from pipeline.shards.captions import (
    MAX_CAPTION_CHARACTERS,
    MAX_CAPTIONS,
    MAX_JSON_BYTES,
    MAX_LETTERS_IN_A_ROW,
    MAX_MARKS_IN_A_ROW,
    read_captions,
)
from pipeline.shards.fields import find_field
from pipeline.shards.samples import read_samples


def test_the_first_field_by_preference_is_found_in_any_case():
    fields = {"png": b"p", "jpg": b"j"}
    assert find_field(fields, "jpg;png;webp") == b"j"
    assert find_field(fields, "webp;PNG") == b"p"


def test_a_missing_field_names_what_was_expected_and_what_there_is():
    with pytest.raises(SampleFailure) as caught:
        find_field({"txt": b"", "json": b""}, "jpg;png")
    assert (caught.value.stage, caught.value.kind) == ("decode", "missing_field")
    assert caught.value.message == "sample has no field `jpg` or `png`; fields present: json, txt"


def fields_of(*names: str, wanted=("jpg", "txt")):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    (found,) = read_samples(io.BytesIO(sink.getvalue()), max_member_bytes=10, wanted_fields=wanted)
    return found.fields


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg"], "sample has no field `txt`; fields present: jpg"),
        (["a.jpg", "a.json", "a.CLS"], "sample has no field `txt`; fields present: cls, jpg, json"),
        (["a.json"], "sample has no field `txt`; fields present: json"),
        (
            ["22.05.jpg", "22.05.txt"],
            "sample has no field `txt`; fields present: 05.jpg, 05.txt (a key ends at the first dot of the "
            "base name, and all that follows is the field)",
        ),
        (["a.jpg", "a.\x1b[2J"], r"sample has no field `txt`; fields present: \x1b[2j, jpg"),
        (
            [f"a.{'x' * 90}{number:02d}" for number in range(40)],
            f"sample has no field `txt`; fields present: {'x' * 30}",
        ),
        (
            [f"a.f{number:02d}" for number in range(14)],
            "sample has no field `txt`; fields present: f00, f01, f02, f03, f04, f05, f06, f07, f08, f09, "
            "f10, f11 and 2 more",
        ),
    ],
)
def test_a_missing_field_names_what_is_there_even_if_nobody_wants_it(names, message):
    with pytest.raises(SampleFailure) as caught:
        find_field(fields_of(*names), "txt", stage="caption")
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("document", "keys"),
    [
        ({}, "none"),
        ({"text": "a dog", "url": 1}, "text, url"),
        ({"a\n\u202eb": 1}, r"a\x0a\u202eb"),
        (
            {f"k{number}": 1 for number in range(100_000)},
            "k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11 and",
        ),
        ({"x" * 100_000: 1}, "x" * 30),
    ],
)
def test_a_missing_json_key_names_the_keys_that_are_there(document, keys):
    with pytest.raises(SampleFailure) as caught:
        captions_of(document, "json:caption", several=False)
    assert f"no key `caption`; keys present: {keys}" in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


def captions_of(content: bytes | object, spec: str = "json:captions", *, several: bool = True):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_captions({"txt": data, "json": data}, spec, several=several)


def kind_of(content: bytes | object, spec: str, *, several: bool = False) -> str:
    with pytest.raises(SampleFailure) as caught:
        captions_of(content, spec, several=several)
    assert caught.value.stage == "caption"
    assert caught.value.message.encode()
    return caught.value.kind


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a dog", "a dog"),
        (b"  a dog\r\n", "a dog"),
        ("\ufeffein H\u00fcndchen".encode(), "ein H\u00fcndchen"),
        ("\u72ac \U0001f436".encode(), "\u72ac \U0001f436"),
        (b"two\nlines", "two\nlines"),
    ],
)
def test_a_text_field_is_one_caption(content, caption):
    assert captions_of(content, "txt", several=False) == [caption]


@pytest.mark.parametrize("content", [b"", b" \n\t", "\ufeff".encode(), "\u2003\u00a0".encode()])
def test_a_caption_of_white_space_is_empty(content):
    assert kind_of(content, "txt") == "empty"


@pytest.mark.parametrize("content", [b"caf\xe9", "text".encode("utf-16"), b"\xed\xa0\x80", b"\xc0\xaf"])
def test_text_that_is_not_utf8_is_refused(content):
    assert kind_of(content, "txt") == "not_utf8"
    assert kind_of(content, "json:caption") == "not_utf8"


def test_a_missing_caption_field_is_a_fault_of_the_caption():
    with pytest.raises(SampleFailure) as caught:
        read_captions({"jpg": b""}, "txt", several=False)
    assert (caught.value.stage, caught.value.kind) == ("caption", "missing_field")


def test_a_key_of_a_json_object_is_one_caption():
    assert captions_of({"caption": " a dog "}, "json:caption", several=False) == ["a dog"]
    assert captions_of(b'\xef\xbb\xbf{"caption": "a dog"}', "json:caption", several=False) == ["a dog"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"text": "a dog"}, "missing_key"),
        ({"caption": None}, "wrong_type"),
        ({"caption": ["a dog"]}, "wrong_type"),
        ({"caption": 7}, "wrong_type"),
        ({"caption": " "}, "empty"),
        (["caption"], "wrong_type"),
        (b"null", "wrong_type"),
        (b'{"caption": "a dog"', "not_json"),
        (b"", "not_json"),
        (b'{"caption": ' + b"9" * 4_000_000 + b"}", "wrong_type"),
        (b'{"caption": -1e999999999}', "wrong_type"),
        (b'{"caption": "\\ud83d"}', "not_utf8"),
        (b"[" * 1_000_000, "not_json"),
        (b'{"a":' * 500_000, "not_json"),
        (b" " * (MAX_JSON_BYTES + 1), "too_long"),
        ({"caption": "x " * MAX_CAPTION_CHARACTERS}, "too_long"),
        ({"caption": "a dog " + "x" * (MAX_LETTERS_IN_A_ROW + 1)}, "too_long"),
        ({"caption": "a" + "\u0301\u0323" * (MAX_MARKS_IN_A_ROW // 2) + "\u0301"}, "too_long"),
    ],
)
def test_json_that_holds_no_caption_fails_the_sample(content, kind):
    assert kind_of(content, "json:caption") == kind


def test_a_caption_may_be_long_but_not_of_any_length():
    longest = ("a dog " * MAX_CAPTION_CHARACTERS)[: MAX_CAPTION_CHARACTERS - 1] + "."
    assert captions_of(longest.encode(), "txt", several=False) == [longest]
    assert kind_of(b"a dog " * MAX_CAPTION_CHARACTERS, "txt") == "too_long"


def test_marks_on_a_letter_may_be_many_but_not_of_any_number():
    caption = "a" + "\u0301\u0323" * (MAX_MARKS_IN_A_ROW // 2) + " dog"
    assert captions_of(caption.encode(), "txt", several=False) == [caption]


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\u72ac"])
def test_a_run_of_letters_is_bounded_since_tokenizing_it_takes_quadratic_time(letter):
    word = letter * MAX_LETTERS_IN_A_ROW
    for caption in (f"{word} {word}", f"{word}.{word}", f"{word}7{word}"):
        assert captions_of(caption.encode(), "txt", several=False) == [caption]
    assert kind_of(f"a dog {word}{letter}".encode(), "txt") == "too_long"


def test_a_list_keeps_the_place_of_every_caption_and_gives_each_fault_its_own_failure():
    found = captions_of({"captions": ["a dog", "", " a car ", None, "a dog"]})
    assert [item if isinstance(item, str) else item.kind for item in found] == [
        "a dog",
        "empty",
        "a car",
        "wrong_type",
        "a dog",
    ]


def test_an_empty_list_is_no_fault():
    assert captions_of({"captions": []}) == []


@pytest.mark.parametrize(
    ("content", "spec", "kind"),
    [
        ({"captions": "a dog"}, "json:captions", "wrong_type"),
        ({"captions": {"0": "a dog"}}, "json:captions", "wrong_type"),
        (b"a dog", "txt", "wrong_type"),
        ({"captions": ["x"] * (MAX_CAPTIONS + 1)}, "json:captions", "too_many"),
    ],
)
def test_several_captions_need_a_list_of_bounded_length(content, spec, kind):
    assert kind_of(content, spec, several=True) == kind


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["txt", "json:caption"]), st.booleans())
def test_arbitrary_bytes_are_captions_that_can_be_written_or_failures(content, spec, several):
    try:
        captions = captions_of(content, spec, several=several)
    except SampleFailure as failure:
        assert failure.stage == "caption"
    else:
        assert all(caption.strip() and caption.encode() for caption in captions)


@pytest.mark.parametrize(
    ("value", "several", "remedy"),
    [(["a", "b"], False, "prompts.source=captions"), ("a", True, "prompts.source=caption takes one text")],
)
def test_a_caption_of_the_other_kind_is_an_error_that_names_the_way_out(value, several, remedy):
    with pytest.raises(SampleFailure, match=remedy) as failure:
        read_captions({"json": json.dumps({"c": value}).encode()}, "json:c", several=several)
    assert (failure.value.stage, failure.value.kind) == ("caption", "wrong_type")
