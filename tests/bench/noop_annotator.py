"""An annotator that does nothing but leave two ready-made files, to measure what surrounds it."""

import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.annotate.annotator import ShardReport
from pipeline.config.schema import JobConfig
from pipeline.output.counts import ShardCounts
from pipeline.output.runs import Measures
from pipeline.output.writer import ShardWriter
from pipeline.storage import ShardSource

SHARDS_WITH_ROOM = 2
SHARD_SECONDS = "LEGRAD_BENCH_SHARD_SECONDS"
FOLDERS = ("errors", "annotations")


class NoopAnnotator:
    """Leaves two files a shard; sleeps for the time of its device steps, of one shard after the other."""

    def __init__(self, config: JobConfig, metadata: Mapping[str, Any], shard_s: float) -> None:
        self._out, self._shard_s = Path(config.output.dir), shard_s
        self._files, self._counts = ready_made(metadata)
        for folder in FOLDERS:
            (self._out / folder).mkdir(parents=True, exist_ok=True)
        self._in_flight, self._changed = 0, threading.Condition()
        self._device = threading.Lock()

    def annotate(self, shard: ShardSource) -> ShardReport:
        self._count(+1)
        try:
            if self._shard_s:
                with self._device:
                    time.sleep(self._shard_s)
            for folder, content in self._files.items():
                (self._out / folder / f"{shard.shard_id}.parquet").write_bytes(content)
            return ShardReport(self._counts, self._shard_s)
        finally:
            self._count(-1)

    def wait_for_room(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight < SHARDS_WITH_ROOM)

    def live_counts(self) -> ShardCounts:
        return ShardCounts()

    def measures(self) -> Measures:
        return Measures()

    def _count(self, more: int) -> None:
        with self._changed:
            self._in_flight += more
            self._changed.notify_all()


def ready_made(metadata: Mapping[str, Any]) -> tuple[dict[str, bytes], ShardCounts]:
    """Both files of a shard with one sample, and their counts."""
    row = {"key": "k", "sample_index": 0, "prompt_index": 0, "prompt": "p", "status": "ok"}
    with tempfile.TemporaryDirectory() as folder:
        # of no known version, so that one pair of files fits every shard
        shard = ShardSource("s", "bench", "bench", None)
        with ShardWriter(shard, {**metadata, "attempt": "a"}) as writer:
            writer.add_sample([row], [])
            counts = writer.publish(folder).counts
        return {name: (Path(folder) / name / "s.parquet").read_bytes() for name in FOLDERS}, counts


def noop(config: JobConfig, metadata: Mapping[str, Any], cpus: int, device: str) -> NoopAnnotator:
    """Builds one inside a worker; the environment says how long a shard takes."""
    return NoopAnnotator(config, metadata, float(os.environ.get(SHARD_SECONDS, "0")))
