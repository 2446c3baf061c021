"""Which step sets the pace of a run."""

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.output.measures import STEPS, Measures, pace_setter, pace_text

# two workers, ready for 30 s each, with four sample processes each
READY = {"ready_s": 60.0, "sample_process_s": 240.0}


@pytest.mark.parametrize(
    ("times", "text"),
    [
        ({"device_busy_s": 57.0, "decoding_s": 239.0}, "device busy 95 %, pace set by the device"),
        (
            {"device_busy_s": 18.6, "decoding_s": 180.0, "masks_s": 52.8},
            "device busy 31 %, pace set by decoding (8 processes, 97 % busy)",
        ),
        (
            {"device_busy_s": 18.6, "decoding_s": 52.8, "masks_s": 180.0, "reading_s": 600.0},
            "device busy 31 %, pace set by masks (8 processes, 97 % busy)",
        ),
        (
            {"device_busy_s": 6.0, "decoding_s": 24.0, "reading_s": 150.0},
            "device busy 10 %, pace set by reading (5.0 shards waiting for their bytes on average)",
        ),
        (
            {"device_busy_s": 6.0, "reading_s": 30.0, "publishing_s": 90.0},
            "device busy 10 %, pace set by publishing (3.0 shards being published on average)",
        ),
        # not saturated, but busier than anything else
        ({"device_busy_s": 48.0, "decoding_s": 120.0}, "device busy 80 %, pace set by the device"),
        ({"device_busy_s": 12.0, "reading_s": 6.0}, "device busy 20 %"),
    ],
)
def test_the_step_that_sets_the_pace_is_named_with_its_figures(times, text):
    assert pace_text(Measures(**READY, **times), workers=2) == text


def test_nothing_is_named_before_a_worker_has_been_ready_for_a_second():
    assert pace_text(Measures(), workers=0) == "device busy ?"
    assert pace_setter(Measures(device_busy_s=0.9, ready_s=0.9)) is None


def test_without_sample_processes_the_device_and_the_shards_are_judged():
    assert pace_setter(Measures(device_busy_s=54.0, ready_s=60.0)) == "device"
    assert pace_setter(Measures(device_busy_s=6.0, ready_s=60.0, reading_s=50.0)) == "reading"
    assert Measures(ready_s=1.0).sample_process_busy_share is None


times = st.lists(st.floats(0, 1e6), min_size=7, max_size=7).map(lambda values: Measures(10, *values))


@given(times, times)
def test_measures_of_workers_add_up_and_subtract_field_by_field(one, other):
    total = one + other
    for both, first, second in zip(*map(astuple, (total, one, other)), strict=True):
        assert both == first + second
    assert astuple(total - other) == pytest.approx(astuple(one), abs=1e-6)


@given(times)
def test_any_measures_give_a_step_or_none(measures):
    step = pace_setter(measures)
    assert step is None or step in STEPS
    assert ("pace set by" in pace_text(measures, 3)) == (step is not None)
