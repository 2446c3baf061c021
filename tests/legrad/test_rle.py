"""Run-length encodings of unknown origin against a plain reading of the format, one character at a time."""

import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from legrad.errors import MaskError, RleError
from legrad.masks.rle import (
    MAX_DIGITS,
    check_rles,
    decode_rle,
    decode_runs,
    encode_rle,
    mask_area,
    mask_bbox_xywh,
)

ALPHABET = "".join(chr(48 + digit) for digit in range(64))


def numbers_of(counts):
    """The numbers that the characters spell, or None where they spell none."""
    numbers, digits = [], []
    for character in counts:
        if character not in ALPHABET:
            return None
        digit = ord(character) - 48
        digits.append(digit & 0x1F)
        if digit & 0x20:
            continue
        number = sum(value << 5 * place for place, value in enumerate(digits))
        numbers.append(number - (1 << 5 * len(digits)) if digit & 0x10 else number)
        if len(digits) > MAX_DIGITS:
            return None
        digits = []
    return None if digits else numbers


def mask_by_reference(height, width, counts):
    """The mask as a plain list of columns' pixels, or None where the counts are none of its size."""
    numbers = numbers_of(counts)
    if numbers is None:
        return None
    runs = []
    for place, number in enumerate(numbers):
        runs.append(number + runs[place - 2] if place > 2 else number)
    if any(run < 0 for run in runs) or sum(runs) != height * width or len(runs) > height * width + 1:
        return None
    return [place % 2 == 1 for place, run in enumerate(runs) for _ in range(run)]


def counts_of(runs):
    """What pycocotools would write for these runs, whether or not they make sense."""
    text = ""
    for place, run in enumerate(runs):
        number = run - runs[place - 2] if place > 2 else run
        while True:
            digit = number & 0x1F
            number >>= 5
            more = number != (-1 if digit & 0x10 else 0)
            text += chr(48 + digit + 32 * more)
            if not more:
                break
    return text


def box_of(mask):
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    if not len(rows):
        return [0, 0, 0, 0]
    return [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]


def assert_read_as_by_reference(height, width, counts):
    rle = {"size": [height, width], "counts": counts}
    expected = mask_by_reference(height, width, counts)
    if expected is None:
        for read in (decode_rle, lambda one: mask_area([one]), lambda one: mask_bbox_xywh([one])):
            with pytest.raises(RleError):
                read(rle)
        return
    mask = np.array(expected, dtype=bool).reshape(width, height).T
    np.testing.assert_array_equal(decode_rle(rle), mask)
    assert mask_area([rle]).tolist() == [mask.sum()]
    assert mask_bbox_xywh([rle]).tolist() == [box_of(mask)]


sides = st.integers(0, 9)
run_lists = st.lists(st.integers(0, 12), max_size=12)


@settings(deadline=None, max_examples=400)
@given(sides, sides, st.one_of(st.text(ALPHABET, max_size=12), st.text(max_size=6)))
@example(2, 6, "o" * 40)
@example(2, 6, "<\x00")
@example(0, 5, "")
def test_any_text_is_refused_or_decoded_as_the_format_defines(height, width, counts):
    assert_read_as_by_reference(height, width, counts)


@settings(deadline=None, max_examples=300)
@given(sides, run_lists, st.booleans())
def test_any_runs_are_refused_or_decoded_as_the_format_defines(height, runs, fitting):
    width = 5
    if fitting and sum(runs) <= height * width:
        runs = [*runs, height * width - sum(runs)]
    assert_read_as_by_reference(height, width, counts_of(runs))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1)), max_size=6))
def test_many_masks_at_once_are_read_as_each_by_itself(seeded):
    rles = [
        encode_rle(np.random.default_rng(seed).random((1, height, width)) < 0.4)[0]
        for height, width, seed in seeded
    ]
    masks = [decode_rle(rle) for rle in rles]
    assert mask_area(rles).tolist() == [mask.sum() for mask in masks]
    assert mask_bbox_xywh(rles).tolist() == [box_of(mask) for mask in masks]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 90_000), (400, 300), (65, 31)]), st.floats(0, 1))
def test_areas_and_boxes_of_our_own_masks_are_those_of_pycocotools(seed, size, density):
    rng = np.random.default_rng(seed)
    rles = encode_rle(rng.random((2, *size)) < density * np.linspace(0, 1, size[1]) ** 8)
    assert mask_area(rles).tolist() == coco.area(rles).tolist()
    assert mask_bbox_xywh(rles).tolist() == coco.toBbox(rles).tolist()
    for rle in rles:
        assert counts_of(runs_of(decode_rle(rle))) == rle["counts"]


def runs_of(mask):
    pixels = mask.T.ravel()
    edges = np.flatnonzero(np.diff(pixels, prepend=False))
    return np.diff([0, *edges, len(pixels)]).tolist()


FAULTS = {
    "truncated": [2, 6, "0o"],
    "alphabet": [2, 6, "0p"],
    "alphabet, below the digits": [2, 6, "0/"],
    "alphabet, the end of a C string": [2, 6, "<\x00"],
    "not_ascii": [2, 6, "<\u0661"],
    "not_ascii, half a surrogate pair": [2, 6, "\ud800"],
    "overflow": [2, 6, "PPPPPPP0"],
    "overflow of 64 bits": [6, 6, "o" * 30 + "0"],
    "negative_run": [2, 6, counts_of([16, -4])],
    "negative_run, as a difference": [2, 6, counts_of([1, 1, 11, -1])],
    "long_run": [2, 6, counts_of([13])],
    "long_run of nearly 2**32 pixels": [2, 6, counts_of([2**32 - 1, 13])],
    "sum too small": [2, 6, counts_of([5])],
    "sum of nothing": [2, 6, ""],
    "sum too large": [2, 6, counts_of([12, 12])],
    "many_runs": [1, 2, counts_of([0, 1, 0, 1])],
    "many_runs, by their text": [1, 1, "0" * 1000],
    "counts as bytes": [2, 6, b"<"],
    "counts as a list": [2, 6, [12]],
    "counts missing": [2, 6, None],
    "size, negative": [-2, -6, "<"],
    "size, no whole number": [2.0, 6, "<"],
    "size, a truth value": [True, 12, "<"],
    "size, missing": [None, 6, "<"],
    "size of a hundred thousand by a hundred thousand": [100_000, 100_000, counts_of([0])],
    "size beyond 32 bits": [2**32, 2**32, ""],
    "size beyond any decimal": [10**6000, 1, ""],
    "size beyond 32 bits, without pixels": [2**40, 0, ""],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_malformation_has_its_own_fault(fault):
    height, width, counts = FAULTS[fault]
    rle = {"size": [height, width], "counts": counts}
    for read in (decode_rle, lambda one: mask_area([one]), lambda one: check_rles([one])):
        with pytest.raises(RleError) as refusal:
            read(rle)
        assert refusal.value.fault == fault.replace(",", "").split()[0]
        assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    "rle", [{}, {"size": [1, 1]}, {"counts": "1"}, {"size": [1], "counts": "1"}, {"size": 1, "counts": "1"}]
)
def test_what_is_no_encoding_at_all_is_refused(rle):
    with pytest.raises(RleError):
        decode_rle(rle)


def test_one_damaged_mask_among_many_is_refused():
    rles = [*encode_rle(np.eye(6, dtype=bool)[None].repeat(3, axis=0)), {"size": [6, 6], "counts": "0o"}]
    with pytest.raises(MaskError, match="end within a number"):
        mask_area(rles)


def test_a_mask_is_bounded_by_what_the_caller_expects():
    rle = encode_rle(np.ones((1, 30, 40), dtype=bool))[0]
    assert decode_rle(rle, max_pixels=1200).all()
    with pytest.raises(RleError, match="30 x 40 pixels; the limit is 1,199"):
        decode_rle(rle, max_pixels=1199)


def test_a_refusal_survives_the_way_between_processes():
    refusal = pickle.loads(pickle.dumps(RleError("sum", "runs of 5 pixels")))
    assert (refusal.fault, str(refusal)) == ("sum", "mask: runs of 5 pixels")


@settings(deadline=None)
@given(run_lists)
def test_a_list_of_runs_is_the_mask_that_its_text_is(runs):
    height, width = 1, sum(runs)
    if len(runs) > width + 1:
        with pytest.raises(RleError):
            decode_runs(runs, height, width)
    else:
        expected = decode_rle({"size": [height, width], "counts": counts_of(runs)})
        np.testing.assert_array_equal(decode_runs(runs, height, width), expected)


@pytest.mark.parametrize(
    ("runs", "fault"),
    [
        ([5], "sum"),
        ([12, 1], "sum"),
        ([13, -1], "negative_run"),
        ([12.0], "counts"),
        ([None], "counts"),
        ([True] * 12, "counts"),
        ([10**6000], "sum"),
        ([0] * 14, "many_runs"),
        ("12", "counts"),
        (None, "counts"),
    ],
)
def test_a_list_of_runs_that_does_not_make_the_mask_is_refused(runs, fault):
    with pytest.raises(RleError) as refusal:
        decode_runs(runs, 2, 6)
    assert refusal.value.fault == fault
