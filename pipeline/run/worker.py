"""What runs in a worker process: a plain class around one annotator. Knows nothing of ray."""

from __future__ import annotations

import errno
import logging
import os
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from pipeline.annotate.annotator import ShardAnnotator, ShardReport
from pipeline.annotate.model import load_explainer
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
        status: done; retry: worth another attempt; fatal: no other shard would fare better.
        report: counts and duration, where done.
        message: what went wrong, where not.
        measures: of the worker since it loaded its model.
        live_counts: outcomes so far of the shards that it still has in hand.
    """

    status: Literal["done", "retry", "fatal"]
    report: ShardReport | None = None
    message: str = ""
    measures: Measures = field(default_factory=Measures)
    live_counts: ShardCounts = field(default_factory=ShardCounts)


@dataclass(frozen=True)
class Pulse:
    """How far a worker is: outcomes in its shards in hand, and its measures since it loaded its model."""

    counts: ShardCounts
    measures: Measures


@dataclass(frozen=True)
class LoadOutcome:
    """Whether a worker is ready: an empty message, or the user's mistake that keeps it from loading."""

    message: str = ""


class Annotator(Protocol):
    """What a worker drives: annotates one shard, and tells how far it is with those in hand."""

    def annotate(self, shard: ShardSource) -> ShardReport:
        """Read, explain and publish one shard."""

    def wait_for_room(self) -> None:
        """Return when another shard would be begun at once."""

    def live_counts(self) -> ShardCounts:
        """Outcomes so far of the shards in hand."""

    def measures(self) -> Measures:
        """Images decoded and time on the device, since the model was loaded."""


class AnnotatorFactory(Protocol):
    """Builds the annotator inside the worker process."""

    def __call__(self, config: JobConfig, metadata: Mapping[str, Any], cpus: int, device: str) -> Annotator:
        """Load whatever is needed; raises UserError for the user's own mistakes."""


def build_annotator(config: JobConfig, metadata: Mapping[str, Any], cpus: int, device: str) -> Annotator:
    """The real annotator: its own model on its own device."""
    batches_at_once = min(BATCHES_AT_ONCE, cpus)
    # batches side by side share the cores better than the threads of one batch, which wait for each other
    torch.set_num_threads(cpus // batches_at_once)
    explainer = load_explainer(config.model, device, expected_digest=metadata.get("weights_digest"))
    return ShardAnnotator(
        config,
        explainer,
        decode_threads=config.run.decode_threads or cpus,
        metadata=metadata,
        batches_at_once=batches_at_once,
    )


class Worker:
    """Loads once, then annotates shards, several at a time where its threads allow; never raises.

    Args:
        config: the job's configuration.
        metadata: goes into every file beside the counts.
        cpus: CPU cores that belong to this worker.
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
        """Build the annotator; says so where the configuration is at fault."""
        try:
            with self._loading:
                self._annotator = self._factory(*self._arguments)
        except UserError as error:
            return LoadOutcome(str(error))
        return LoadOutcome()

    def annotate(self, shard: ShardSource) -> ShardOutcome:
        """Annotate one shard and tell how it ended."""
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
                # a broken device fails every later shard too: only a new process gets a new one
                os._exit(1)
            logger.exception("%s: unexpected error", shard.canonical_url)
            where = traceback.extract_tb(error.__traceback__)[-1]
            return ShardOutcome(
                "retry",
                message=f"{type(error).__name__}: {shown_text(str(error))} ({where.name}:{where.lineno})",
            )

    def wait_for_room(self) -> None:
        """Return when the worker can use another shard."""
        if self._annotator is not None:
            self._annotator.wait_for_room()

    def pulse(self) -> Pulse:
        """How far the shards in hand are, and what the worker has done so far."""
        if self._annotator is None:
            return Pulse(ShardCounts(), Measures())
        return Pulse(self._annotator.live_counts(), self._annotator.measures())


def _device_answers(device: str) -> bool:
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
