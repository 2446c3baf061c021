"""Progress of a run: lines in a log, a display on a terminal."""

import io
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.annotate.device_clock import WallClock
from pipeline.annotate.meter import Meter
from pipeline.console import PatientConsole, PrintableConsole
from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures
from pipeline.output.runs import RunState
from pipeline.run.progress import RecentPace, SharedProgress, as_line, open_progress
from pipeline.text import as_duration

STATE = RunState(
    shards_total=10,
    shards_skipped=2,
    shards_done=3,
    shards_failed=1,
    counts=ShardCounts(
        annotated=290, failed=10, rows=600, error_rows=10, errors_by_kind={"decode/truncated": 10}
    ),
    measures=Measures(images_decoded=290, device_busy_s=54.0, ready_s=60.0),
    workers_ready=2,
    elapsed_s=35.0,
    loading_s=5.0,
)


def logged(state, interval_s):
    log = io.StringIO()
    with open_progress(PrintableConsole(file=log, width=80), interval_s) as progress:
        progress.update(state)
    return log.getvalue()


def test_a_log_gets_one_plain_line_with_all_figures():
    line = logged(STATE, 0.0)
    assert line.count("\n") == 1
    assert "\x1b" not in line
    for part in (
        "shards 5/10, 0 damaged, 1 failed, 4 left",
        "samples 300 (10.0/s), 10 failed",
        "images 290",
        "device busy 90 %",
        "errors 10 (decode/truncated 10)",
        "elapsed 35s, remaining 40s",
    ):
        assert part in line


WITH_LOSSES = replace(
    STATE, workers_ready=6, workers_wanted=8, workers_lost=2, left_alone=("10.0.0.7, GPU 3: 3 workers lost",)
)


def test_a_log_names_the_workers_that_are_ready_wanted_and_lost():
    assert "| workers 6 of 8, 2 lost, 1 place left alone |" in logged(WITH_LOSSES, 0.0)
    assert "| workers 2 |" in logged(STATE, 0.0)
    assert logged(replace(STATE, workers_ready=0, workers_wanted=8), 0.0).startswith("waiting for workers | ")


def test_a_terminal_shows_the_workers_that_are_ready_wanted_and_lost():
    screen = io.StringIO()
    with open_progress(PrintableConsole(file=screen, force_terminal=True, width=80), 1.0) as progress:
        progress.update(WITH_LOSSES)
    assert "6 of 8, 2 lost, 1 place left alone" in screen.getvalue()


def test_a_log_gets_no_line_before_the_interval_has_passed():
    assert logged(STATE, 3600.0) == ""


def test_samples_of_shards_in_flight_count_in_the_time_left():
    # 4 shards of about 100 samples are left, 150 of these are done: 250 at 15/s
    assert "remaining 17s" in logged(replace(STATE, live_counts=ShardCounts(annotated=150)), 0.0)
    # shards without a single sample are counted as shards
    assert "remaining 40s" in logged(replace(STATE, counts=ShardCounts()), 0.0)


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_live_display_that_fits(width):
    screen = io.StringIO()
    with open_progress(PrintableConsole(file=screen, force_terminal=True, width=width), 1.0) as progress:
        progress.update(STATE)
        progress.say("Worker lost")
    shown = screen.getvalue()
    assert "\x1b[" in shown
    for part in (
        "5/10 done, 0 damaged, 1 failed, 4 left",
        "10.0/s",
        "290 decoded",
        "busy 90 %",
        "decode/truncated 10",
    ):
        assert part in shown
    assert "Worker lost" in shown


def test_a_line_names_the_most_common_kinds_of_error():
    kinds = {f"decode/kind{rank}": 10 - rank for rank in range(8)}
    line = as_line(replace(STATE, counts=ShardCounts(errors_by_kind=kinds)), RecentPace().update(STATE))
    assert "decode/kind0 10, decode/kind1 9, decode/kind2 8, ..." in line
    assert "kind3" not in line


def test_the_pace_is_that_of_the_last_minute_not_of_the_whole_run():
    pace = RecentPace()
    for second in range(601):
        fast = second - 500 if second > 500 else 0
        state = RunState(
            shards_total=1,
            shards_skipped=0,
            counts=ShardCounts(annotated=second + 9 * fast),
            measures=Measures(device_busy_s=second / 2 + fast / 4, ready_s=float(second)),
            elapsed_s=7.0 + second,
            loading_s=7.0,
        )
        found = pace.update(state)
        if second == 500:
            assert found.samples_per_s == pytest.approx(1.0)
            assert found.measures.device_busy_share == pytest.approx(0.5)
    assert found.samples_per_s == pytest.approx(10.0)
    assert found.measures.device_busy_share == pytest.approx(0.75)


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 100), st.booleans()), max_size=30))
def test_the_pace_is_never_negative_even_if_a_lost_worker_takes_samples_with_it(steps):
    pace, elapsed_s, samples = RecentPace(), 0.0, 0
    for passed_s, gained, lost in steps:
        elapsed_s, samples = elapsed_s + passed_s, max(0, samples - gained) if lost else samples + gained
        counts = ShardCounts(annotated=samples)
        state = RunState(shards_total=1, shards_skipped=0, live_counts=counts, elapsed_s=elapsed_s)
        assert pace.update(state).samples_per_s >= 0


def test_the_meter_adds_up_what_threads_report(monkeypatch):
    now = [100.0]
    for module in ("meter", "device_clock"):
        monkeypatch.setattr(f"pipeline.annotate.{module}.time.monotonic", lambda: now[0])
        monkeypatch.setattr(f"pipeline.annotate.{module}.time.perf_counter", lambda: now[0])
    clock = WallClock()
    with clock.work():
        now[0] += 5.0  # before the meter was there: the model was tried out
    meter = Meter(clock, sample_processes=3)
    meter.images_decoded(2)
    now[0] += 1.0
    with pytest.raises(ZeroDivisionError), clock.work():
        now[0] += 2.0
        raise ZeroDivisionError
    with meter.timed("masks_s"):
        now[0] += 4.0
    meter.add("reading_s", 0.5)
    now[0] += 3.0
    assert meter.read() == Measures(
        images_decoded=2,
        device_busy_s=2.0,
        ready_s=10.0,
        reading_s=0.5,
        masks_s=4.0,
        sample_process_s=30.0,
    )
    assert Measures(1, 2.0, 10.0).device_busy_share == 0.2
    assert Measures().device_busy_share is None


def test_every_display_receives_everything():
    logs = [io.StringIO(), io.StringIO()]
    consoles = [PrintableConsole(file=log) for log in logs]
    with open_progress(consoles[0], 0.0) as one, open_progress(consoles[1], 0.0) as other:
        both = SharedProgress([one, other])
        both.update(STATE)
        both.say("Worker lost")
    assert logs[0].getvalue() == logs[1].getvalue()
    assert logs[0].getvalue().count("\n") == 2


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3720, "1h02m")])
def test_durations_are_short(seconds, text):
    assert as_duration(seconds) == text


class Failing:
    """A part of what people see that fails each time."""

    def __init__(self):
        self.calls = 0

    def update(self, state):
        self.calls += 1
        raise UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range")

    def say(self, message):
        self.calls += 1
        raise OSError("the terminal is gone")


def test_a_display_that_fails_is_logged_once_and_the_others_continue(caplog):
    log, failing = io.StringIO(), Failing()
    with open_progress(PrintableConsole(file=log, width=80), 0.0) as shown:
        for progress in (SharedProgress([failing, shown]), SharedProgress([shown, failing])):
            progress.update(STATE)
            progress.say("still here")
            progress.update(STATE)
    assert failing.calls == 2
    assert log.getvalue().count("still here") == 2
    assert caplog.text.count("Failing failed (UnicodeEncodeError") == 2


def test_a_reader_that_closes_the_pipe_does_not_end_a_run():
    reader, writer = os.pipe()
    os.close(reader)
    with (
        os.fdopen(writer, "w") as stream,
        open_progress(PatientConsole(file=stream, width=80), 0.0) as progress,
    ):
        for _ in range(3):
            progress.update(STATE)
            progress.say("nobody reads this")
