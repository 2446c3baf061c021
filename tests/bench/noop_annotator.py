"""An annotator that only publishes one row for each shard, to measure what surrounds it."""

import os
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

from pipeline.annotate.annotator import ShardProgress, ShardReport
from pipeline.annotate.attempt import AttemptsInFlight
from pipeline.config.schema import JobConfig
from pipeline.output.measures import Measures
from pipeline.output.writer import ShardWriter
from pipeline.storage import ShardSource

SHARDS_WITH_ROOM = 2
SHARD_SECONDS = "LEGRAD_BENCH_SHARD_SECONDS"
ROW = {"key": "k", "sample_index": 0, "prompt_index": 0, "prompt": "p", "status": "ok"}


class NoopAnnotator:
    """Publishes one row per shard; sleeps for the time of its device steps, of one shard after the other."""

    def __init__(self, config: JobConfig, metadata: Mapping[str, Any], shard_s: float) -> None:
        self._output, self._metadata, self._shard_s = config.output, metadata, shard_s
        self._in_flight, self._changed = 0, threading.Condition()
        self._attempts = AttemptsInFlight()
        self._device = threading.Lock()

    def annotate(self, shard: ShardSource) -> ShardReport:
        self._count(+1)
        try:
            if self._shard_s:
                with self._device:
                    time.sleep(self._shard_s)
            metadata = {**self._metadata, "attempt": uuid.uuid4().hex}
            with (
                ShardWriter(shard, metadata, with_maps=self._output.heatmap) as writer,
                self._attempts.begun(shard, writer.counts) as attempt,
            ):
                writer.add_sample([ROW], [])
                attempt.begin_publishing()
                published = writer.publish(self._output.dir)
            return ShardReport(published.counts, self._shard_s)
        finally:
            self._count(-1)

    def wait_for_room(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight < SHARDS_WITH_ROOM)

    def progress(self) -> dict[str, ShardProgress]:
        return {attempt.shard_id: ShardProgress(attempt.counts()) for attempt in self._attempts}

    def abandon(self, shard_id: str) -> bool:
        return self._attempts.abandon(shard_id)

    def measures(self) -> Measures:
        return Measures()

    def _count(self, more: int) -> None:
        with self._changed:
            self._in_flight += more
            self._changed.notify_all()


def noop(config: JobConfig, metadata: Mapping[str, Any], cpus: int, device: str) -> NoopAnnotator:
    """Builds one inside a worker; the environment says how long a shard takes."""
    return NoopAnnotator(config, metadata, float(os.environ.get(SHARD_SECONDS, "0")))
