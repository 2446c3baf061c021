"""Publish the state of a run as Prometheus metrics; the metric classes are passed in, so it needs no Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote

from pipeline.output.measures import STEPS, pace_setter
from pipeline.output.runs import RunState
from pipeline.run.progress import RecentPace

INTERVAL_S = 1.0
_ASCII = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

COUNTERS = {
    "legrad_samples": ("Samples processed, by outcome: annotated, empty or failed.", "outcome"),
    "legrad_rows": ("Annotation rows written.", None),
    "legrad_errors": ("Error rows written, by stage and kind.", "kind"),
    "legrad_images_decoded": ("Images decoded and resized.", None),
    "legrad_device_busy_seconds": ("Seconds in which a device step ran, summed over all workers.", None),
    "legrad_worker_seconds": ("Seconds since each worker loaded its model, summed over all workers.", None),
    "legrad_reading_seconds": ("Seconds in which threads waited for the bytes of a shard, added up.", None),
    "legrad_decoding_seconds": ("Seconds in which sample processes prepared samples, added up.", None),
    "legrad_masks_seconds": ("Seconds in which sample processes made masks and rows, added up.", None),
    "legrad_publishing_seconds": ("Seconds in which files of shards were published, added up.", None),
    "legrad_sample_process_seconds": ("Seconds that sample processes had, busy or not, added up.", None),
    "legrad_workers_lost": ("Workers whose process or machine was lost.", None),
}
GAUGES = {
    "legrad_shards": ("Shards of the job, by state: done, damaged, failed or left.", "state"),
    "legrad_workers": ("Workers ready: those that have loaded their model.", None),
    "legrad_workers_wanted": ("Workers that the run would have with all resources it asks for.", None),
    "legrad_places_left_alone": ("Machines and devices that get no further shards.", None),
    "legrad_pace_set_by": ("1 for the step that set the pace of the last minute, 0 for the others.", "step"),
}


class MetricKind(Protocol):
    """A class of metrics, such as ``ray.util.metrics.Counter``."""

    def __call__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        """Create a metric."""


@dataclass
class _Counter:
    """A counter that never falls: samples lost with their worker are not counted again when redone."""

    metric: Any
    counted: dict[tuple[str, ...], float] = field(default_factory=dict)

    def rise_to(self, total: float, tags: Mapping[str, str]) -> None:
        key = tuple(tags.values())
        rise = total - self.counted.get(key, 0.0)
        if rise > 0:
            self.metric.inc(rise, tags=dict(tags))
            self.counted[key] = total


class RunMetrics:
    """Publish the state of a run, at most once a second; every metric has the output folder as a tag.

    Args:
        output_dir: the output folder, without credentials.
        counter: class of metrics with ``inc(value, tags)``.
        gauge: class of metrics with ``set(value, tags)``.
    """

    def __init__(self, output_dir: str, counter: MetricKind, gauge: MetricKind) -> None:
        self._output = {"output": _tag_value(output_dir)}
        self._kinds = counter, gauge
        self._counters: dict[str, _Counter] = {}
        self._gauges: dict[str, Any] = {}
        self._recent = RecentPace()
        self._next_s = 0.0

    def update(self, state: RunState) -> None:
        """Publish the state, unless that was done less than a second ago and shards are left."""
        if time.monotonic() >= self._next_s or not state.shards_left:
            self._next_s = time.monotonic() + INTERVAL_S
            self._make_instruments()
            self._count(state)
            self._gauge(state)

    def say(self, message: str) -> None:
        """Ignore messages."""

    def _make_instruments(self) -> None:
        # created here and not in __init__, because an update that fails does not end the run
        if self._gauges:
            return
        counter, gauge = self._kinds
        self._counters = {
            name: _Counter(counter(name, text, _tag_keys(tag))) for name, (text, tag) in COUNTERS.items()
        }
        self._gauges = {name: gauge(name, text, _tag_keys(tag)) for name, (text, tag) in GAUGES.items()}

    def _count(self, state: RunState) -> None:
        counts, measures = state.counts_so_far, state.measures
        for outcome in ("annotated", "empty", "failed"):
            self._rise("legrad_samples", getattr(counts, outcome), outcome=outcome)
        for kind, rows in counts.errors_by_kind.items():
            self._rise("legrad_errors", rows, kind=kind)
        self._rise("legrad_rows", counts.rows)
        self._rise("legrad_images_decoded", measures.images_decoded)
        self._rise("legrad_device_busy_seconds", measures.device_busy_s)
        self._rise("legrad_worker_seconds", measures.ready_s)
        self._rise("legrad_reading_seconds", measures.reading_s)
        self._rise("legrad_decoding_seconds", measures.decoding_s)
        self._rise("legrad_masks_seconds", measures.masks_s)
        self._rise("legrad_publishing_seconds", measures.publishing_s)
        self._rise("legrad_sample_process_seconds", measures.sample_process_s)
        self._rise("legrad_workers_lost", state.workers_lost)

    def _gauge(self, state: RunState) -> None:
        shards = {
            "done": state.shards_skipped + state.shards_done,
            "damaged": state.shards_damaged,
            "failed": state.shards_failed,
            "left": state.shards_left,
        }
        for name, number in shards.items():
            self._gauges["legrad_shards"].set(number, tags={**self._output, "state": name})
        workers = {
            "legrad_workers": state.workers_ready,
            "legrad_workers_wanted": state.workers_wanted,
            "legrad_places_left_alone": len(state.left_alone),
        }
        for name, number in workers.items():
            self._gauges[name].set(number, tags=self._output)
        setter = pace_setter(self._recent.update(state).measures)
        for step in STEPS:
            self._gauges["legrad_pace_set_by"].set(int(step == setter), tags={**self._output, "step": step})

    def _rise(self, name: str, total: float, **tags: str) -> None:
        self._counters[name].rise_to(
            total, {**self._output, **{key: _tag_value(value) for key, value in tags.items()}}
        )


def _tag_value(text: str) -> str:
    """Return a text in ASCII, as Ray requires; other characters are escaped as in URLs."""
    return quote(text, safe=_ASCII, errors="replace")


def _tag_keys(tag: str | None) -> tuple[str, ...]:
    return ("output",) if tag is None else ("output", tag)
