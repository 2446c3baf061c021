"""How long a device was busy: by events of streams, and by the time that a CPU computes."""

import threading

import pytest
import torch

from pipeline.annotate import device_clock as module
from pipeline.annotate.device_clock import EventClock, WallClock, device_clock


class FakeDevice:
    """A device whose events happen at times that a test sets, in milliseconds."""

    def __init__(self):
        self.now_ms, self.done_until_ms = 0.0, float("inf")

    def event(self):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, device):
        self._device = device

    def record(self):
        self.at_ms = self._device.now_ms

    def query(self):
        return self.at_ms <= self._device.done_until_ms

    def elapsed_time(self, end):
        return end.at_ms - self.at_ms


def work(clock, device, start_ms, end_ms):
    device.now_ms = start_ms
    with clock.work():
        device.now_ms = end_ms


def test_intervals_add_up_and_gaps_between_them_do_not_count():
    device = FakeDevice()
    clock = EventClock(device.event)
    work(clock, device, 0, 10)
    work(clock, device, 15, 20)
    assert clock.take_busy_s() == pytest.approx(0.015)
    assert clock.take_busy_s() == 0
    work(clock, device, 30, 31)
    assert clock.take_busy_s() == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("intervals", "busy_ms"),
    [([(0, 10), (4, 12)], 12), ([(0, 10), (2, 5)], 10), ([(0, 10), (2, 5), (8, 14)], 14), ([(3, 3)], 0)],
)
def test_time_in_which_two_streams_work_counts_once(intervals, busy_ms):
    device = FakeDevice()
    clock = EventClock(device.event)
    for interval in intervals:
        work(clock, device, *interval)
    assert clock.take_busy_s() == pytest.approx(busy_ms / 1000)


def test_an_interval_counts_once_its_end_has_happened():
    device = FakeDevice()
    clock = EventClock(device.event)
    work(clock, device, 0, 10)
    device.now_ms = 10
    unfinished = clock.work()
    unfinished.__enter__()
    device.done_until_ms = 5
    assert clock.take_busy_s() == 0
    device.done_until_ms = 30
    assert clock.take_busy_s() == pytest.approx(0.010)
    device.now_ms = 30
    unfinished.__exit__(None, None, None)
    assert clock.take_busy_s() == pytest.approx(0.020)


def test_work_that_fails_counts_until_then():
    device = FakeDevice()
    clock = EventClock(device.event)
    with pytest.raises(ZeroDivisionError), clock.work():
        device.now_ms = 7
        _ = 1 / 0
    assert clock.take_busy_s() == pytest.approx(0.007)


def test_on_a_cpu_the_time_inside_counts_and_once_for_several_threads(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now_s[0])
    clock = device_clock(torch.device("cpu"))
    assert isinstance(clock, WallClock)
    now_s[0] = 5.0
    inside, may_leave = threading.Event(), threading.Event()

    def other():
        with clock.work():
            inside.set()
            may_leave.wait(60)

    thread = threading.Thread(target=other)
    with clock.work():
        now_s[0] = 6.0
        thread.start()
        inside.wait(60)
        now_s[0] = 8.0
        assert clock.take_busy_s() == 3.0
    now_s[0] = 9.0
    may_leave.set()
    thread.join()
    now_s[0] = 100.0
    assert clock.take_busy_s() == 1.0
