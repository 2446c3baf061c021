"""What a worker returns where its annotator raises: whose fault it was, in one line."""

import errno

import pytest
import torch

from pipeline.errors import OutputError, ScratchError, ShardAbandoned, ShardError, UserError
from pipeline.output.measures import Measures
from pipeline.run import worker as workers
from pipeline.run.worker import Worker
from pipeline.storage import ShardSource

SHARD = ShardSource("a", "file:///a.tar", "file:///a.tar", 1)


class Failing:
    """An annotator that raises an error for every shard."""

    def __init__(self, error):
        self.error, self.reads = error, 0

    def annotate(self, shard):
        raise self.error

    def progress(self):
        return {}

    def measures(self):
        self.reads += 1
        if self.reads > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return Measures(images_decoded=7)


def worker_of(factory, device="cpu"):
    return Worker(None, {}, cpus=1, device=device, factory=factory)


def outcome_of(error, device="cpu"):
    worker = worker_of(lambda *_: Failing(error), device)
    assert worker.load().message == ""
    return worker.annotate(SHARD)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ShardError("connection refused"), "retry"),
        (OSError(errno.EIO, "Input/output error"), "retry"),
        (ZeroDivisionError("division by zero"), "retry"),
        (OutputError("OUT: No space left on device"), "output"),
        (OSError(errno.ENOSPC, "No space left on device"), "machine"),
        (OSError(errno.EROFS, "Read-only file system"), "machine"),
        (MemoryError(), "machine"),
        (ScratchError("/tmp: No space left on device"), "machine"),
        (ShardAbandoned("a"), "abandoned"),
    ],
)
def test_the_status_says_whose_fault_a_failure_was(error, status):
    outcome = outcome_of(error)
    assert outcome.status == status
    assert outcome.report is None
    assert str(error) in outcome.message


def test_an_unexpected_error_is_described_by_type_and_place_in_one_line():
    message = outcome_of(ValueError("bad\n\x1b[31mcolour s3://key:secret@host/x?X-Amz-Signature=abc")).message
    assert message.startswith("ValueError: bad ")
    assert "(annotate:" in message
    assert "\n" not in message
    assert "\x1b" not in message
    assert "secret" not in message


def test_a_broken_device_is_reported_and_the_last_measures_are_kept(monkeypatch):
    monkeypatch.setattr(workers, "_device_answers", lambda device: False)
    worker = worker_of(lambda *_: Failing(RuntimeError("CUDA error: unspecified launch failure")), "cuda")
    worker.load()
    assert worker.heartbeat().measures.images_decoded == 7
    outcome = worker.annotate(SHARD)
    assert (outcome.status, outcome.measures.images_decoded) == ("device", 7)
    assert "unspecified launch failure" in outcome.message
    assert worker.heartbeat().measures.images_decoded == 7


def raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "is_user_error", "is_device_fault"),
    [
        (UserError("model.name X: unknown"), True, False),
        (raised_from(UserError("cannot be read"), OSError(errno.EIO, "NFS")), False, False),
        (OSError(errno.ESTALE, "Stale file handle"), False, False),
        (ImportError("no module"), False, False),
        (torch.OutOfMemoryError("CUDA out of memory."), False, True),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), False, True),
        (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), False, True),
        (RuntimeError("shapes differ"), False, False),
    ],
)
def test_an_error_of_loading_is_returned_and_says_whose_fault_it_was(
    error, is_user_error, is_device_fault, caplog
):
    def factory(*_):
        raise error

    outcome = worker_of(factory).load()
    assert (outcome.is_user_error, outcome.is_device_fault) == (is_user_error, is_device_fault)
    assert str(error) in outcome.message
    assert "\n" not in outcome.message
    if not isinstance(error, UserError):
        assert outcome.message.startswith(type(error).__name__)
        assert "Traceback" in caplog.text


def test_a_worker_without_a_model_annotates_nothing_and_has_nothing_to_abandon():
    worker = worker_of(lambda *_: Failing(ShardError("unused")))
    assert worker.annotate(SHARD).status == "retry"
    assert worker.heartbeat().progress == {}
    assert not worker.abandon(SHARD)
