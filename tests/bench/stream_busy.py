"""Busy share of a simulated device that one worker feeds: is it ever short of samples?

    python tests/bench/stream_busy.py [--shards 400]

The worker's own stream of batches, and around it the driver's rule: the next shard is handed over when the
worker has room. A device step sleeps 50 ms for a batch of 25; a shard of 50 samples takes 0.25 s to open and
0.15 s to publish. Opening, publishing and the step itself are simulated; batching, threads and limits are the
worker's. Two shares are kept apart, since many small batches would keep a device busy too:

    busy_share       share of the time in which a step ran
    useful_share     full batches' time for the samples done, over the whole time

One JSON row; the first round warms up.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence

from environment import environment
from shards_in_flight import work_through

from pipeline.annotate.annotator import LOOKAHEAD_BATCHES
from pipeline.annotate.stream import BatchStream, SampleSteps, StreamLimits

PREPARE_S = 0.002
FINISH_S = 0.001


class Simulation:
    """One round: a stream of its own, a device that sleeps, shards that take time to open and publish."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.busy_s = 0.0
        self.batch_sizes: list[int] = []
        self.done = 0
        self._lock = threading.Lock()

    def run(self) -> dict[str, float]:
        batch_size = self.arguments.batch_size
        stream = BatchStream(
            SampleSteps(lambda _: 150_000, prepare, lambda _: "one shape", self._step, finish),
            StreamLimits(
                threads=self.arguments.threads,
                max_samples=LOOKAHEAD_BATCHES * batch_size + self.arguments.threads,
            ),
            lambda _: batch_size,
        )
        elapsed_s = work_through(
            range(self.arguments.shards),
            lambda _: self._shard(stream),
            stream.wait_for_room,
            self.arguments.handover_s,
        )
        stream.close()
        assert self.done == self.arguments.shards * self.arguments.samples
        needed_s = self.done / batch_size * self.arguments.step_s
        return {
            "busy_share": self.busy_s / elapsed_s,
            "useful_share": needed_s / elapsed_s,
            "mean_batch": statistics.mean(self.batch_sizes),
            "elapsed_s": elapsed_s,
        }

    def _shard(self, stream: BatchStream) -> None:
        stream.run(self._samples(), self._count)
        time.sleep(self.arguments.publish_s)

    def _samples(self) -> Iterator[int]:
        time.sleep(self.arguments.open_s)
        yield from range(self.arguments.samples)

    def _count(self, _outcome: int) -> None:
        with self._lock:
            self.done += 1

    def _step(self, batch: Sequence[int]) -> Sequence[int]:
        started_s = time.perf_counter()
        time.sleep(self.arguments.step_s)
        self.busy_s += time.perf_counter() - started_s
        self.batch_sizes.append(len(batch))
        return batch


def prepare(sample: int) -> int:
    time.sleep(PREPARE_S)
    return sample


def finish(sample: int) -> int:
    time.sleep(FINISH_S)
    return sample


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--step-s", type=float, default=0.05)
    parser.add_argument("--open-s", type=float, default=0.25)
    parser.add_argument("--publish-s", type=float, default=0.15)
    parser.add_argument("--handover-s", type=float, default=0.005, help="from room to the next shard's start")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rounds = [Simulation(arguments).run() for _ in range(arguments.rounds)]
    medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    print(
        json.dumps(
            {
                "benchmark": "stream_busy",
                **environment(),
                "settings": vars(arguments),
                **{name: round(value, 4) for name, value in medians.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
