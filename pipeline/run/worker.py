"""The worker: a plain class around one annotator that returns every outcome as a value; without Ray."""

from __future__ import annotations

import errno
import logging
import threading
import traceback
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from legrad.memory import is_out_of_memory
from pipeline.annotate.annotator import ShardAnnotator, ShardProgress, ShardReport
from pipeline.annotate.annotator_parts import AnnotatorParts, parts_with_model
from pipeline.annotate.model import check_device, load_explainer
from pipeline.annotate.processes import SampleProcesses
from pipeline.annotate.segmenting import load_sharpener
from pipeline.annotate.stored_maps import parts_from_maps
from pipeline.config.schema import JobConfig
from pipeline.errors import OutputError, ScratchError, ShardAbandoned, ShardError, UserError
from pipeline.output.measures import Measures
from pipeline.storage import ShardSource, shown_text
from pipeline.text import printable

logger = logging.getLogger(__name__)

BATCHES_AT_ONCE = 2
FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class ShardOutcome:
    """How an attempt at a shard ended.

    Attributes:
        status: done. retry: the shard's own fault; another attempt may succeed. output: the output folder
            cannot be written. machine: a fault of this machine, such as a full temporary disk or no memory;
            another machine may succeed. device: the CUDA context is broken, so every later shard on this
            worker fails too. abandoned: `Worker.abandon` was called.
        report: counts and duration; None unless done.
        message: what went wrong, in one line; empty if done.
        measures: of the worker since it loaded its model.
    """

    status: Literal["done", "retry", "output", "machine", "device", "abandoned"]
    report: ShardReport | None = None
    message: str = ""
    measures: Measures = field(default_factory=Measures)


@dataclass(frozen=True)
class Heartbeat:
    """Progress of a worker.

    Attributes:
        progress: of the shards in flight, by shard id.
        measures: of the worker since it loaded its model.
    """

    progress: Mapping[str, ShardProgress]
    measures: Measures


@dataclass(frozen=True)
class LoadOutcome:
    """Whether a worker has loaded its model.

    Attributes:
        message: why the model is not loaded; empty if it is.
        is_user_error: whether the message names invalid input or configuration, which every worker has.
        is_device_fault: whether the device failed: no memory, busy, defect.
    """

    message: str = ""
    is_user_error: bool = False
    is_device_fault: bool = False


class Annotator(Protocol):
    """Annotates shards, several at a time, and reports its progress."""

    def annotate(self, shard: ShardSource) -> ShardReport:
        """Read, explain and publish one shard."""

    def wait_for_room(self) -> None:
        """Return once another shard would be begun at once."""

    def progress(self) -> dict[str, ShardProgress]:
        """Return the progress of the shards in flight, by shard id."""

    def abandon(self, shard_id: str) -> bool:
        """Return True if this worker will certainly not publish the shard any more.

        False: it was published, is being published, or is not in flight.
        """

    def measures(self) -> Measures:
        """Return images decoded and device time since the model was loaded."""


class AnnotatorFactory(Protocol):
    """Build the annotator inside the worker process."""

    def __call__(self, config: JobConfig, metadata: Mapping[str, Any], cpus: int, device: str) -> Annotator:
        """Load the model; raise UserError for invalid input or configuration."""


def build_annotator(config: JobConfig, metadata: Mapping[str, Any], cpus: int, device: str) -> Annotator:
    """Return an annotator with its own model, or with stored maps, on its own device."""
    batches_at_once = min(BATCHES_AT_ONCE, cpus)
    # parallel batches use the cores better than threads within one batch, which wait for each other
    torch.set_num_threads(cpus // batches_at_once)
    threads = config.run.decode_threads or cpus
    with ExitStack() as if_it_fails:
        processes = None
        if config.run.decode_threads != 0:
            # before the model, so that both load at the same time
            processes = SampleProcesses(threads, config.run.decode_bytes, config.run.sample_timeout_s)
            if_it_fails.callback(processes.close)
        if config.input.maps is None:
            parts = _parts_with_model(config, metadata, device, batches_at_once, processes)
        else:
            parts = parts_from_maps(config, str(metadata["maps_hash"]), torch.device(device), processes)
        annotator = ShardAnnotator(
            config,
            parts,
            decode_threads=threads,
            metadata=metadata,
            batches_at_once=batches_at_once,
        )
        if_it_fails.pop_all()
    return annotator


def _parts_with_model(
    config: JobConfig,
    metadata: Mapping[str, Any],
    device: str,
    batches_at_once: int,
    processes: SampleProcesses | None,
) -> AnnotatorParts:
    check_device(config.model, device)
    explainer = load_explainer(config.model, device, expected_digest=metadata.get("weights_digest"))
    sharpener = load_sharpener(
        config.masks, device, config.model.precision, expected_digest=metadata.get("segmenter_digest")
    )
    return parts_with_model(
        config, explainer, batches_at_once=batches_at_once, sharpener=sharpener, processes=processes
    )


class Worker:
    """Load the model once, then annotate shards, several at a time; failures are returned, not raised.

    Args:
        config: the job's configuration.
        metadata: written to the footer of every file, beside the counts.
        cpus: CPU cores reserved for this worker.
        device: torch device of the model.
        factory: builds the annotator.
    """

    def __init__(
        self,
        config: JobConfig,
        metadata: Mapping[str, Any],
        *,
        cpus: int,
        device: str,
        factory: AnnotatorFactory,
    ) -> None:
        self._arguments = (config, metadata, cpus, device)
        self._device = device
        self._factory = factory
        self._annotator: Annotator | None = None
        self._loading = threading.Lock()
        self._last_measures = Measures()

    def load(self) -> LoadOutcome:
        """Load the model; every exception is returned."""
        try:
            with self._loading:
                self._annotator = self._factory(*self._arguments)
        except UserError as error:
            return LoadOutcome(str(error), is_user_error=not _is_from_os(error))
        except Exception as error:
            logger.exception("the model cannot be loaded")
            return LoadOutcome(_described(error), is_device_fault=_is_device_fault(error))
        return LoadOutcome()

    def annotate(self, shard: ShardSource) -> ShardOutcome:
        """Annotate one shard and return how the attempt ended."""
        if self._annotator is None:
            return ShardOutcome("retry", message="the worker has not loaded its model")
        outcome = self._attempt(self._annotator, shard)
        return replace(outcome, measures=self._measures(self._annotator))

    def _attempt(self, annotator: Annotator, shard: ShardSource) -> ShardOutcome:
        try:
            return ShardOutcome("done", annotator.annotate(shard))
        except ShardAbandoned as error:
            return ShardOutcome("abandoned", message=str(error))
        except OutputError as error:
            return ShardOutcome("output", message=str(error))
        except ScratchError as error:
            return ShardOutcome("machine", message=str(error))
        except ShardError as error:
            return ShardOutcome("retry", message=str(error))
        except MemoryError as error:
            logger.exception("%s: out of memory", shard.canonical_url)
            return ShardOutcome("machine", message=_described(error))
        except OSError as error:
            is_disk_full = error.errno in FULL_DISK_ERRORS
            return ShardOutcome("machine" if is_disk_full else "retry", message=_described(error))
        except Exception as error:
            logger.exception("%s: unexpected error", shard.canonical_url)
            # only a new process gets a new CUDA context
            device_answers = _device_answers(self._device)
            return ShardOutcome("retry" if device_answers else "device", message=_described(error))

    def wait_for_room(self) -> None:
        """Return once the worker can use another shard."""
        if self._annotator is not None:
            self._annotator.wait_for_room()

    def heartbeat(self) -> Heartbeat:
        """Return the progress of the shards in flight, and the worker's measures so far."""
        if self._annotator is None:
            return Heartbeat({}, Measures())
        return Heartbeat(self._annotator.progress(), self._measures(self._annotator))

    def abandon(self, shard: ShardSource) -> bool:
        """End the attempt at a shard unless it is being published.

        Returns:
            True if this worker will certainly not publish the shard any more; False if it was published, is
            being published, or is not in flight.
        """
        return self._annotator is not None and self._annotator.abandon(shard.shard_id)

    def _measures(self, annotator: Annotator) -> Measures:
        """Return the latest measures; a broken CUDA context takes no further ones."""
        with suppress(RuntimeError):
            self._last_measures = annotator.measures()
        return self._last_measures


def _device_answers(device: str) -> bool:
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _is_device_fault(error: BaseException) -> bool:
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and (is_out_of_memory(error) or "CUDA" in str(error))
    )


def _is_from_os(error: BaseException | None) -> bool:
    """Return whether an error was caused by the operating system, as it may be on one machine only."""
    return error is not None and (isinstance(error, OSError) or _is_from_os(error.__cause__))


def _described(error: Exception) -> str:
    """Return an error's type, message and place in one line, without secrets."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(shown_text(str(error)).split())
    return f"{type(error).__name__}: {printable(text)} ({where.name}:{where.lineno})"
