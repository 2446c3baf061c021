"""How many shards must be in flight to keep a device busy that one worker feeds with small shards?

    python tests/bench/small_shards.py [--in-flight 2 4 6 7 8 12] [--write]

The worker's own stream of batches, and around it the driver's rule: the next shard begins when the worker has
room, and at most `--in-flight` are begun and not published. A device step sleeps 50 ms for a batch of 25; a
shard of 50 samples takes 0.25 s to open and 0.15 s to publish. Opening, publishing and the steps are
simulated; batching, threads and limits are the worker's. One JSON row for each number of shards in flight:

    busy_share       share of the time in which a device step ran
    useful_share     time of full batches for the samples done, over the whole time
    shards_begun     shards begun and not published, on average over the device steps
"""

import argparse
import statistics
import threading
import time
from collections.abc import Iterator, Sequence

from published import figure_parser, recording
from shards_in_flight import work_through

from pipeline.annotate.annotator import stream_limits
from pipeline.annotate.stream import BatchStream
from pipeline.annotate.stream_steps import SampleSteps
from pipeline.config.schema import RunConfig

PREPARE_S = 0.002
FINISH_S = 0.001


class Simulation:
    """One round: a stream of its own, a device that sleeps, shards that take time to open and publish."""

    def __init__(self, arguments: argparse.Namespace, in_flight: int) -> None:
        self.arguments, self.in_flight = arguments, in_flight
        self.busy_s = 0.0
        self.begun: list[int] = []
        self.shards_begun = self.done = 0
        self._lock = threading.Lock()

    def run(self) -> dict[str, float]:
        """Work through all shards, and return the shares."""
        batch_size = self.arguments.batch_size
        stream = BatchStream(
            SampleSteps(lambda _: 150_000, prepared, lambda _: "one shape", self._step, finished),
            stream_limits(RunConfig(shards_in_flight=self.in_flight), self.arguments.threads, 1, batch_size),
            lambda _: batch_size,
        )
        elapsed_s = work_through(
            range(self.arguments.shards),
            lambda _: self._shard(stream),
            stream.wait_for_room,
            self.in_flight,
        )
        stream.close()
        if self.done != self.arguments.shards * self.arguments.samples:
            raise RuntimeError(f"{self.done} samples done, so the figures mean nothing")
        needed_s = self.done / batch_size * self.arguments.step_s
        return {
            "busy_share": self.busy_s / elapsed_s,
            "useful_share": needed_s / elapsed_s,
            "shards_begun": statistics.mean(self.begun),
        }

    def _shard(self, stream: BatchStream[int, int, int, Sequence[int]]) -> None:
        self._count_begun(+1)
        stream.run(self._samples(), self._count_done)
        time.sleep(self.arguments.publish_s)
        self._count_begun(-1)

    def _samples(self) -> Iterator[int]:
        time.sleep(self.arguments.open_s)
        yield from range(self.arguments.samples)

    def _count_begun(self, more: int) -> None:
        with self._lock:
            self.shards_begun += more

    def _count_done(self, outcomes: Sequence[Sequence[int]]) -> None:
        with self._lock:
            self.done += sum(map(len, outcomes))

    def _step(self, batch: Sequence[int]) -> Sequence[int]:
        started_s = time.perf_counter()
        self.begun.append(self.shards_begun)
        time.sleep(self.arguments.step_s)
        self.busy_s += time.perf_counter() - started_s
        return batch


def prepared(samples: Sequence[int]) -> Sequence[int]:
    """Sleep as long as decoding takes."""
    time.sleep(PREPARE_S * len(samples))
    return samples


def finished(samples: Sequence[int]) -> Sequence[int]:
    """Sleep as long as masks take."""
    time.sleep(FINISH_S * len(samples))
    return list(samples)


def main() -> None:
    """Measure each number of shards in flight."""
    parser = figure_parser(__doc__)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[2, 4, 6, 7, 8, 12])
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--step-s", type=float, default=0.05)
    parser.add_argument("--open-s", type=float, default=0.25)
    parser.add_argument("--publish-s", type=float, default=0.15)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with recording(__file__, arguments) as record:
        for in_flight in arguments.in_flight:
            rounds = [Simulation(arguments, in_flight).run() for _ in range(arguments.rounds)]
            medians = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
            record("in_flight", {"in_flight": in_flight, **medians})


if __name__ == "__main__":
    main()
