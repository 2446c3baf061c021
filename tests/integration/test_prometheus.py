"""Runs on an existing cluster: watched by Prometheus, and limited to some shards."""

import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.run.job import prepare_job
from pipeline.run.progress import SharedProgress
from pipeline.run.prometheus import COUNTERS, GAUGES
from pipeline.run.runner import run_job
from tests.helpers.corpus import demo_job
from tests.helpers.light_annotator import slow
from tests.helpers.ray_head import ray_head
from tests.helpers.waiting import PATIENCE_S

# a counter that has counted nothing, such as that of errors, is not shown
SHOWN = {
    *("ray_legrad_shards", "ray_legrad_workers", "ray_legrad_workers_wanted", "ray_legrad_pace_set_by"),
    "ray_legrad_places_left_alone",
    *("ray_legrad_samples", "ray_legrad_rows", "ray_legrad_images_decoded"),
    *("ray_legrad_device_busy_seconds", "ray_legrad_worker_seconds"),
}


@pytest.fixture(scope="module")
def head():
    with ray_head(dashboard=False) as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", started.address)
        yield started


@pytest.fixture
def job(tmp_path):
    """Return a function that prepares a job of some empty shards, and perhaps of a held one."""

    def make(number, *more):
        shards = [
            *(tmp_path / f"{index:02d}.tar" for index in range(number)),
            *(tmp_path / name for name in more),
        ]
        for shard in shards:
            # one that is written again is another version of itself
            if not shard.exists():
                shard.write_bytes(b"")
        return prepare_job(demo_job(shards, tmp_path / "out", run={"workers": 1, "gpus_per_worker": 0}))

    return make


class Scraper:
    """Read the metrics during the run; release the held shard once all of them are published."""

    def __init__(self, url, go):
        self.url, self.go, self.seen, self.until_s = url, go, {}, time.monotonic() + PATIENCE_S

    def update(self, state):
        if not state.shards_done or self.go.exists():
            return
        with urllib.request.urlopen(self.url, timeout=PATIENCE_S) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                if family.name.startswith("ray_legrad_"):
                    self.seen[family.name] = family
        if self.seen.keys() >= SHOWN:
            self.go.touch()
        assert time.monotonic() < self.until_s, sorted(self.seen)

    def say(self, message):
        pass


def test_a_run_can_be_watched_by_prometheus(head, job, tmp_path):
    scraper = Scraper(head.metrics_url, tmp_path / "go")
    result = run_job(job(9, "held.tar"), scraper, slow)
    assert result.complete
    assert {name.removeprefix("ray_") for name in scraper.seen} <= {*COUNTERS, *GAUGES}
    shards = {sample.labels["state"]: sample for sample in scraper.seen["ray_legrad_shards"].samples}
    assert set(shards) == {"done", "damaged", "failed", "left"}
    assert sum(sample.value for sample in shards.values()) == 10
    assert shards["done"].labels["output"] == str(tmp_path / "out")
    assert scraper.seen["ray_legrad_samples"].type == "counter"
    (annotated,) = scraper.seen["ray_legrad_samples"].samples
    assert (annotated.name, annotated.labels["outcome"]) == ("ray_legrad_samples_total", "annotated")
    assert 1 <= annotated.value <= 10
    assert scraper.seen["ray_legrad_workers"].samples[0].value == 1
    assert scraper.seen["ray_legrad_workers_wanted"].samples[0].value == 1
    assert scraper.seen["ray_legrad_places_left_alone"].samples[0].value == 0
    assert scraper.seen["ray_legrad_images_decoded"].samples[0].value >= 1
    busy_s = scraper.seen["ray_legrad_device_busy_seconds"].samples[0].value
    assert 0 < busy_s <= scraper.seen["ray_legrad_worker_seconds"].samples[0].value
    # the measures are complete at the end, whenever the last heartbeat was
    assert result.state.measures.images_decoded == 10
    assert 0 < result.state.measures.device_busy_share <= 1
    assert result.state.loading_s < result.state.elapsed_s


@pytest.mark.slow
def test_a_limited_run_annotates_that_many_shards_and_the_next_run_the_others(head, job, tmp_path):
    quiet = SharedProgress([])
    first = run_job(job(6), quiet, slow, max_shards=2)
    assert (first.state.shards_done, first.state.shards_left, first.complete) == (2, 4, False)
    published = sorted(path.name[:2] for path in (tmp_path / "out" / "annotations").iterdir())
    assert published == ["01", "04"]
    second = run_job(job(6), quiet, slow)
    assert (second.state.shards_skipped, second.state.shards_done, second.complete) == (2, 4, True)
