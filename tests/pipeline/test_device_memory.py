"""Copies to a device, and the order of streams, on a pretended CUDA device."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from pipeline.annotate.device_memory import Streams, sent

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_arrays_are_stacked_also_if_they_cannot_be_written(dtype):
    arrays = [np.full((2, 3), number, dtype) for number in range(4)]
    for array in arrays:
        array.flags.writeable = False
    received = sent(arrays, torch.device("cpu"))
    assert received.is_contiguous()
    assert np.array_equal(received.numpy(), np.stack(arrays))


class FakeStream:
    """Records what is asked of a stream."""

    def __init__(self, log, number):
        self.log, self.name = log, f"stream {number}"

    def synchronize(self):
        self.log.append((self.name, "waited for"))

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event))

    def record_event(self):
        self.log.append((self.name, "records"))
        return f"event of {self.name}"


@pytest.fixture
def cuda(monkeypatch):
    """A pretended `torch.cuda`; returns its log."""
    log, current, made = [], threading.local(), []

    def new_stream(_device):
        made.append(FakeStream(log, len(made)))
        return made[-1]

    @contextmanager
    def on(stream):
        current.stream = stream
        yield

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: current.stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: log.append("waited for the device"))
    return log


def test_steps_at_the_same_time_have_streams_of_their_own_that_later_steps_use_again(cuda):
    streams = Streams(CUDA)
    with streams.own_stream(), streams.own_stream():
        pass
    with streams.own_stream(), streams.own_stream():
        pass
    names = [entry[0] for entry in cuda if entry != "waited for the device"]
    assert sorted(names) == ["stream 0", "stream 0", "stream 1", "stream 1"]
    assert cuda.count("waited for the device") == 2


def test_what_was_made_before_a_stream_is_complete_when_it_is_used(cuda):
    with Streams(CUDA).own_stream():
        assert cuda == ["waited for the device"]


def test_a_step_ends_by_waiting_for_its_stream_also_after_an_error(cuda):
    with pytest.raises(ZeroDivisionError), Streams(CUDA).own_stream():
        _ = 1 / 0
    assert cuda[-1] == ("stream 0", "waited for")


def test_shared_work_of_a_step_follows_that_of_the_step_before_on_the_device_too(cuda):
    streams = Streams(CUDA)
    with streams.own_stream():
        with streams.ordered():
            cuda.append("first")
        with streams.own_stream(), pytest.raises(ZeroDivisionError), streams.ordered():
            cuda.append("second")
            _ = 1 / 0
    with streams.own_stream(), streams.ordered():
        cuda.append("third")
    order = [entry for entry in cuda if "waited" not in str(entry)]
    assert order == [
        "first",
        ("stream 0", "records"),
        ("stream 1", "waits for", "event of stream 0"),
        "second",
        ("stream 1", "records"),
        ("stream 1", "waits for", "event of stream 1"),
        "third",
        ("stream 1", "records"),
    ]
