"""An annotator without a model, for tests of the dispatcher; some shards misbehave, as their names say."""

import os
import signal
import threading
import time
from pathlib import Path

from pipeline.annotate.annotator import ShardProgress, ShardReport
from pipeline.annotate.attempt import AttemptsInFlight
from pipeline.annotate.device_clock import WallClock
from pipeline.annotate.meter import Meter
from pipeline.errors import OutputError, ShardError
from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures
from pipeline.output.writer import ShardWriter
from pipeline.shards.sample_error import SampleError


class LightAnnotator:
    """Publishes one row a shard without any model; some shards misbehave, as their names say."""

    def __init__(self, config, metadata):
        self.config, self.metadata = config, metadata
        self.in_flight, self.changed = 0, threading.Condition()
        self.attempts = AttemptsInFlight()

    def annotate(self, shard):
        self._count(1)
        try:
            with self.attempts.begun(shard, ShardCounts) as attempt:
                return self._annotate(shard, attempt)
        finally:
            self._count(-1)

    def _count(self, more):
        with self.changed:
            self.in_flight += more
            self.changed.notify_all()

    def _annotate(self, shard, attempt):
        name = shard.canonical_url.rsplit("/", 1)[1]
        if name.startswith("poison"):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        if name.startswith("unreadable"):
            raise ShardError(f"{name}: connection refused")
        if name.startswith("full"):
            raise OutputError(f"{self.config.output.dir}: No space left on device")
        if name.startswith("zheld"):
            threading.Event().wait()
        if name.startswith("bug"):
            raise ZeroDivisionError("division by zero")
        metadata = {**self.metadata, "attempt": "a"}
        with ShardWriter(shard, metadata, with_maps=self.config.output.heatmap) as writer:
            if name.startswith("errors"):
                for index in range(1500):
                    writer.add_sample([], [SampleError("decode", "truncated", "m", str(index), index)])
            else:
                writer.add_sample(
                    [{"key": name, "sample_index": 0, "prompt_index": 0, "prompt": "p", "status": "ok"}], []
                )
            attempt.begin_publishing()
            return ShardReport(writer.publish(self.config.output.dir).counts, 0.1)

    def wait_for_room(self):
        with self.changed:
            self.changed.wait_for(lambda: self.in_flight < 2)

    def progress(self):
        return {attempt.shard_id: ShardProgress(attempt.counts()) for attempt in self.attempts}

    def abandon(self, shard_id):
        return self.attempts.abandon(shard_id)

    def measures(self):
        return Measures()


def light(config, metadata, cpus, device):
    return LightAnnotator(config, metadata)


def dies_while_loading(config, metadata, cpus, device):
    os.kill(os.getpid(), signal.SIGKILL)


class SlowAnnotator(LightAnnotator):
    """Takes its time over each shard, and pretends to have decoded an image and used a device.

    The shard `held.tar` is not done before a file `go` is beside the output folder.
    """

    def __init__(self, config, metadata):
        super().__init__(config, metadata)
        self.clock = WallClock()
        self.meter = Meter(self.clock)

    def annotate(self, shard):
        with self.clock.work():
            time.sleep(0.2)
            go = Path(self.config.output.dir).with_name("go")
            while shard.canonical_url.endswith("/held.tar") and not go.exists():
                time.sleep(0.1)
        self.meter.images_decoded(1)
        return super().annotate(shard)

    def measures(self):
        return self.meter.read()


def slow(config, metadata, cpus, device):
    return SlowAnnotator(config, metadata)
