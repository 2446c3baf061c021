"""Metrics of a run: names, tags, and counters that only rise."""

from dataclasses import replace

import pytest

from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures
from pipeline.output.runs import RunState
from pipeline.run.progress import SharedProgress
from pipeline.run.prometheus import COUNTERS, GAUGES, RunMetrics


class Recorder:
    """Stands in for ray's metrics: remembers values by tags, and holds ray's own rules."""

    made: dict

    def __init__(self, name, description, tag_keys):
        self.tag_keys, self.values = set(tag_keys), {}
        assert description
        Recorder.made[name] = self

    def inc(self, value, tags):
        assert value > 0
        self._put(tags, self.values.get(frozenset(tags.items()), 0) + value)

    def set(self, value, tags):
        self._put(tags, value)

    def _put(self, tags, value):
        assert set(tags) == self.tag_keys
        assert all(isinstance(text, str) and text.encode("ascii") for text in tags.values())
        self.values[frozenset(tags.items())] = value


@pytest.fixture
def metrics(monkeypatch):
    Recorder.made = {}
    monkeypatch.setattr("pipeline.run.prometheus.INTERVAL_S", 0.0)
    return RunMetrics("s3://masks/run", Recorder, Recorder)


def value(name, **tags):
    return Recorder.made[name].values.get(frozenset({"output": "s3://masks/run", **tags}.items()))


STATE = RunState(
    shards_total=10,
    shards_skipped=2,
    shards_done=3,
    shards_failed=1,
    counts=ShardCounts(annotated=7, failed=2, rows=20, errors_by_kind={"decode/bomb": 2}),
    live_counts=ShardCounts(annotated=5, rows=9),
    measures=Measures(images_decoded=12, device_busy_s=3.5, ready_s=4.0),
    workers_ready=2,
    workers_wanted=8,
    workers_lost=3,
    left_alone=("10.0.0.7, GPU 3: 3 workers lost with shards that others finished",),
)


def test_the_whole_state_of_a_run_is_published(metrics):
    metrics.update(STATE)
    assert set(Recorder.made) == {*COUNTERS, *GAUGES}
    assert value("legrad_samples", outcome="annotated") == 12
    assert value("legrad_samples", outcome="failed") == 2
    assert value("legrad_errors", kind="decode/bomb") == 2
    assert value("legrad_rows") == 29
    assert value("legrad_images_decoded") == 12
    assert (value("legrad_device_busy_seconds"), value("legrad_worker_seconds")) == (3.5, 4.0)
    assert [value("legrad_shards", state=state) for state in ("done", "failed", "left")] == [5, 1, 4]
    assert value("legrad_workers") == 2
    assert (value("legrad_workers_wanted"), value("legrad_workers_lost")) == (8, 3)
    assert value("legrad_places_left_alone") == 1


def test_counters_neither_fall_nor_count_twice_the_samples_of_a_lost_worker(metrics):
    metrics.update(STATE)
    metrics.update(replace(STATE, live_counts=ShardCounts()))
    assert value("legrad_samples", outcome="annotated") == 12
    metrics.update(replace(STATE, counts=ShardCounts(annotated=15), live_counts=ShardCounts()))
    assert value("legrad_samples", outcome="annotated") == 15


def test_metrics_are_published_at_most_once_per_interval_and_always_at_the_end(metrics, monkeypatch):
    monkeypatch.setattr("pipeline.run.prometheus.INTERVAL_S", 3600.0)
    metrics.update(STATE)
    metrics.update(replace(STATE, workers_ready=5))
    assert value("legrad_workers") == 2
    metrics.update(replace(STATE, shards_done=7, workers_ready=6))
    assert value("legrad_workers") == 6


@pytest.mark.parametrize(
    ("out", "tag"),
    [
        ("/data/é/漢字", "/data/%C3%A9/%E6%BC%A2%E5%AD%97"),
        ("/data/100% [a] #1", "/data/100%25 [a] #1"),
        ("/data/\udce9", "/data/?"),
    ],
)
def test_any_output_folder_can_be_a_tag(metrics, out, tag):
    RunMetrics(out, Recorder, Recorder).update(
        replace(STATE, counts=ShardCounts(errors_by_kind={"décode": 1}))
    )
    assert Recorder.made["legrad_workers"].values == {frozenset({("output", tag)}): 2}
    assert frozenset({("output", tag), ("kind", "d%C3%A9code")}) in Recorder.made["legrad_errors"].values


def test_metrics_that_cannot_be_created_do_not_end_a_run():
    def broken(*_args):
        raise RuntimeError("no agent")

    metrics = RunMetrics("out", broken, broken)
    SharedProgress([metrics]).update(STATE)
