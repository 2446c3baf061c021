"""A stream of plain numbers in the place of samples, whose steps a test may slow down, stop or break."""

import time
from concurrent.futures import ThreadPoolExecutor

from pipeline.annotate.stream import BatchStream
from pipeline.annotate.stream_steps import SampleSteps, StreamLimits

PATIENT_S = 3600.0
SOON_S = 120.0


class Bench:
    """A stream of plain numbers; a sample is (shard, number), and remembers which batches were formed."""

    def __init__(self, *, batch_size=4, shape=lambda sample: "square", size=lambda sample: 1, **hooks):
        self.batches, self.chunks, self.written = [], [], {}
        self.hooks = hooks
        limits = {"threads": 3, "max_samples": 32, "max_wait_s": PATIENT_S, "chunk_samples": 1}
        names = (*limits, "max_bytes", "max_readers", "part_bytes")
        limits |= {name: hooks.pop(name) for name in names if name in hooks}
        self.shape_of = shape
        measures = {name: hooks.pop(name) for name in ("prepared_bytes", "explained_bytes") if name in hooks}
        steps = SampleSteps(size, self.prepare, self.shape, self.explain, self.finish, **measures)
        self.stream = BatchStream(steps, StreamLimits(**limits), lambda shape: batch_size)

    def prepare(self, samples):
        self.chunks.append(list(samples))
        prepared = map(self.hooks.get("prepare", lambda sample: sample), samples)
        return [("unexplained", *each) if self.shape_of(each) is None else each for each in prepared]

    def shape(self, prepared):
        return None if prepared[0] == "unexplained" else self.shape_of(prepared)

    def explain(self, batch):
        self.hooks.get("explain", lambda batch: None)(batch)
        self.batches.append(list(batch))
        return [("explained", *sample) for sample in batch]

    def finish(self, explained):
        for sample in explained:
            self.hooks.get("finish", lambda sample: None)(sample[1:])
        return tuple(explained)

    def run(self, shard, samples):
        """Run one shard; its outcomes are in `written[shard]`."""
        outcomes = self.written.setdefault(shard, [])

        def sink(parts):
            together = [each for part in parts for each in (part if isinstance(part[0], tuple) else [part])]
            for outcome in sorted(together, key=lambda outcome: outcome[2]):
                self.hooks.get("sink", lambda outcome: None)(outcome)
                outcomes.append(outcome)

        self.stream.run(samples, sink)

    def run_all(self, samples_of_shards):
        """Run shards at once, a thread each; returns their exceptions, None where all went well."""
        with ThreadPoolExecutor(len(samples_of_shards)) as hands:
            runs = [hands.submit(self.run, shard, samples) for shard, samples in samples_of_shards.items()]
            return [run.exception(SOON_S) for run in runs]


def numbered(shard, count):
    return [(shard, number) for number in range(count)]


def explained(shard, count):
    return [("explained", shard, number) for number in range(count)]


def wait_until(condition):
    until_s = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.002)
