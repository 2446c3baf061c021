"""The worker: a plain class around one annotator that returns every outcome as a value; without Ray."""

from __future__ import annotations

import errno
import logging
import os
import threading
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from pipeline.annotate.annotator import ShardAnnotator, ShardReport
from pipeline.annotate.model import check_device, load_explainer
from pipeline.annotate.processes import SampleProcesses
from pipeline.config.schema import JobConfig
from pipeline.errors import OutputError, ShardError, UserError
from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures
from pipeline.storage import ShardSource, shown_text

logger = logging.getLogger(__name__)

BATCHES_AT_ONCE = 2
FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class ShardOutcome:
    """How an attempt at a shard ended.

    Attributes:
        status: done; retry: another attempt may succeed; fatal: every other shard would fail as well.
        report: counts and duration; None unless done.
        message: what went wrong; empty if done.
        measures: of the worker since it loaded its model.
        live_counts: outcomes so far in the shards that are still in flight on this worker.
    """

    status: Literal["done", "retry", "fatal"]
    report: ShardReport | None = None
    message: str = ""
    measures: Measures = field(default_factory=Measures)
    live_counts: ShardCounts = field(default_factory=ShardCounts)


@dataclass(frozen=True)
class Heartbeat:
    """Progress of a worker.

    Attributes:
        counts: outcomes so far in the shards in flight.
        measures: of the worker since it loaded its model.
    """

    counts: ShardCounts
    measures: Measures


@dataclass(frozen=True)
class LoadOutcome:
    """Whether a worker is ready.

    Attributes:
        message: the invalid input or configuration that keeps the model from loading; empty if it is loaded.
    """

    message: str = ""


class Annotator(Protocol):
    """Annotates shards, several at a time, and reports its progress."""

    def annotate(self, shard: ShardSource) -> ShardReport:
        """Read, explain and publish one shard."""

    def wait_for_room(self) -> None:
        """Return once another shard would be begun at once."""

    def live_counts(self) -> ShardCounts:
        """Return the outcomes so far in the shards in flight."""

    def measures(self) -> Measures:
        """Return images decoded and device time since the model was loaded."""


class AnnotatorFactory(Protocol):
    """Build the annotator inside the worker process."""

    def __call__(self, config: JobConfig, metadata: Mapping[str, Any], cpus: int, device: str) -> Annotator:
        """Load the model; raises UserError for invalid input or configuration."""


def build_annotator(config: JobConfig, metadata: Mapping[str, Any], cpus: int, device: str) -> Annotator:
    """Return an annotator with its own model on its own device."""
    batches_at_once = min(BATCHES_AT_ONCE, cpus)
    # parallel batches use the cores better than threads within one batch, which wait for each other
    torch.set_num_threads(cpus // batches_at_once)
    check_device(config.model, device)
    threads = config.run.decode_threads or cpus
    with ExitStack() as if_it_fails:
        processes = None
        if config.run.decode_threads != 0:
            # before the model, so that both load at the same time
            processes = SampleProcesses(threads, config.run.decode_bytes)
            if_it_fails.callback(processes.close)
        explainer = load_explainer(config.model, device, expected_digest=metadata.get("weights_digest"))
        annotator = ShardAnnotator(
            config,
            explainer,
            decode_threads=threads,
            metadata=metadata,
            batches_at_once=batches_at_once,
            processes=processes,
        )
        if_it_fails.pop_all()
    return annotator


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

    def load(self) -> LoadOutcome:
        """Build the annotator; return the message of a UserError instead of raising it."""
        try:
            with self._loading:
                self._annotator = self._factory(*self._arguments)
        except UserError as error:
            return LoadOutcome(str(error))
        return LoadOutcome()

    def annotate(self, shard: ShardSource) -> ShardOutcome:
        """Annotate one shard and return how the attempt ended."""
        if self._annotator is None:
            return ShardOutcome("retry", message="the worker has not loaded its model")
        outcome = self._attempt(self._annotator, shard)
        annotator = self._annotator
        return replace(outcome, measures=annotator.measures(), live_counts=annotator.live_counts())

    def _attempt(self, annotator: Annotator, shard: ShardSource) -> ShardOutcome:
        try:
            return ShardOutcome("done", annotator.annotate(shard))
        except OutputError as error:
            return ShardOutcome("fatal", message=str(error))
        except ShardError as error:
            return ShardOutcome("retry", message=str(error))
        except OSError as error:
            return ShardOutcome("fatal" if error.errno in FULL_DISK_ERRORS else "retry", message=str(error))
        except Exception as error:
            if not _device_answers(self._device):
                # a broken CUDA context fails every later shard too; only a new process gets a new context
                os._exit(1)
            logger.exception("%s: unexpected error", shard.canonical_url)
            where = traceback.extract_tb(error.__traceback__)[-1]
            return ShardOutcome(
                "retry",
                message=f"{type(error).__name__}: {shown_text(str(error))} ({where.name}:{where.lineno})",
            )

    def wait_for_room(self) -> None:
        """Return once the worker can use another shard."""
        if self._annotator is not None:
            self._annotator.wait_for_room()

    def heartbeat(self) -> Heartbeat:
        """Return the progress of the shards in flight, and the worker's measures so far."""
        if self._annotator is None:
            return Heartbeat(ShardCounts(), Measures())
        return Heartbeat(self._annotator.live_counts(), self._annotator.measures())


def _device_answers(device: str) -> bool:
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
