"""The driver's time a shard, its memory, and the time of listing and resuming; left out: models and images.

    python tests/bench/driver_overhead.py [--shards 100000] [--workers 2] [--write]

A real local Ray, real workers, and an annotator that publishes one row for each shard. In a row:
listing (`prepare_job` on a fresh folder), the run, resuming (`prepare_job` where every shard but one is done)
and concluding (the footers of all shards, and _SUCCESS). One JSON row:

    wall_ms_a_shard, driver_cpu_ms_a_shard    from the first shard done to the last
    rss_mib                                   of the driver, by share of the shards done
"""

import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from noop_annotator import noop
from published import figure_parser, recording

from pipeline.config.load import parse_config
from pipeline.config.schema import JobConfig
from pipeline.demo.assets import DEMO_MODEL_NAME
from pipeline.output.runs import RunState
from pipeline.run.job import prepare_job
from pipeline.run.runner import run_job

PAGE_BYTES = resource.getpagesize()


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / 2**20


class Observer:
    """Takes the driver's state as a progress display does, and notes time and memory along the way."""

    def __init__(self, shards: int) -> None:
        self.rss_by_share: dict[str, float] = {}
        self.first: tuple[int, float, float] | None = None
        self.last = (0, 0.0, 0.0)
        self._marks = [0.1, 0.25, 0.5, 0.75, 0.99]
        self._shards = shards

    def update(self, state: RunState) -> None:
        self.last = (state.shards_done, time.perf_counter(), time.process_time())
        if self.first is None and state.shards_done:
            self.first = self.last
        while self._marks and state.shards_done >= self._marks[0] * self._shards:
            self.rss_by_share[f"{self._marks.pop(0):g}"] = round(rss_mib(), 1)

    def say(self, message: str) -> None:
        print(message, file=sys.stderr)

    def ms_a_shard(self) -> tuple[float, float]:
        """Wall time and the driver's own CPU time, of all its threads."""
        first = self.first or self.last
        shards = max(1, self.last[0] - first[0])
        wall_s, cpu_s = self.last[1] - first[1], self.last[2] - first[2]
        return round(wall_s * 1000 / shards, 3), round(cpu_s * 1000 / shards, 3)


def job_config(folder: Path, workers: int) -> JobConfig:
    return parse_config(
        {
            "input": {"shards": f"{folder}/in/*.tar"},
            "model": {"name": DEMO_MODEL_NAME, "pretrained": "demo"},
            "output": {"dir": str(folder / "out")},
            "run": {"workers": workers, "cpus_per_worker": 1, "gpus_per_worker": 0},
        }
    )


def write_shards(folder: Path, shards: int) -> None:
    (folder / "in").mkdir()
    for number in range(shards):
        (folder / "in" / f"{number:06d}.tar").touch()


def main() -> None:
    """Measure one run."""
    parser = figure_parser(__doc__)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    # workers import the annotator by name
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    )
    with recording(__file__, arguments) as record, tempfile.TemporaryDirectory() as name:
        record("runs", measured(Path(name), arguments.shards, arguments.workers))


def measured(folder: Path, shards: int, workers: int) -> dict[str, Any]:
    """Return the figures of a run."""
    observer = Observer(shards)
    write_shards(folder, shards)
    config = job_config(folder, workers)
    seconds = {"before": time.perf_counter()}
    job = prepare_job(config)
    seconds["listing_s"] = time.perf_counter()
    result = run_job(job, observer, noop)
    seconds["run_with_start_and_conclusion_s"] = time.perf_counter()
    if result.state.shards_done != shards:
        raise RuntimeError(f"the job ended with {result.state.shards_done} of {shards} shards done")
    next((folder / "out" / "annotations").iterdir()).unlink()
    (folder / "out" / "_SUCCESS").unlink(missing_ok=True)
    left = prepare_job(config)
    seconds["resuming_s"] = time.perf_counter()
    if len(left.todo) != 1:
        raise RuntimeError(f"{len(left.todo)} shards are left, expected 1")
    starts = list(seconds.values())
    durations = {name: end - starts[i] for i, (name, end) in enumerate(list(seconds.items())[1:])}
    wall_ms, cpu_ms = observer.ms_a_shard()
    return {
        "shards": shards,
        "workers": workers,
        **durations,
        "wall_ms_a_shard": wall_ms,
        "driver_cpu_ms_a_shard": cpu_ms,
        "rss_mib_by_share_done": observer.rss_by_share,
    }


if __name__ == "__main__":
    main()
