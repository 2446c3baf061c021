"""Find mask settings on stored maps: chosen on one part of the ground truth, confirmed on the other."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from legrad.canvases import Views
from legrad.quality.metrics import Estimate
from pipeline import storage
from pipeline.annotate.model import transform_of_facts
from pipeline.annotate.rows import annotation_rows
from pipeline.annotate.sample_states import ExplainedSample
from pipeline.annotate.sample_work import WorkSettings
from pipeline.annotate.stored_maps import StoredMaps, facts_of, reads_images, stored_items
from pipeline.annotate.stored_samples import StoredItem, StoredSample, StoredWork
from pipeline.config.schema import JobConfig
from pipeline.config.yaml_text import parse_yaml
from pipeline.errors import ShardError, UserError
from pipeline.evaluation.mask_scores import SummedMetric, WrittenMasks, summed_metrics
from pipeline.evaluation.scene_masks import SceneScores, score_scene
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.output.image_shards import match_annotations, require_annotated_version
from pipeline.output.records import ModelFacts
from pipeline.run.remask import StoredJob, remask_config
from pipeline.shards.ground_truth import INSTANCE_MAP_FIELD, LABEL_MAP_FIELD, Scene, scene_of
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage import ShardSource
from pipeline.text import first_few, printable, received

# The keys that are tried unless others are named, in this order: first what changes maps, then where they
# are cut, because the best cut depends on the maps.
DEFAULT_TRIALS: Mapping[str, tuple[Any, ...]] = {
    "contrast": (0, 0.3, 0.6, 0.8),
    "smooth": (0, 0.4, 0.6, 0.8),
    "combine": ("independent", "argmax"),
    "value": (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6),
    "quantile": (0.6, 0.7, 0.75, 0.8, 0.85, 0.9),
}
METRICS = (
    *("mean_iou", "mean_iou_with_background", "iou", "boundary_f", "pixel_accuracy", "point_mean_iou"),
)
CUT_KEYS = {"value": "fixed", "quantile": "quantile"}
# after so many passes over the keys, or one that changes nothing, the search ends
MAX_PASSES = 2
SAMPLES_AT_ONCE = 32
# with fewer scenes in a part, an interval says nothing
MIN_SCENES = 5

Values = Mapping[str, Any]
Trials = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, with 95 % intervals over scenes.

    Attributes:
        values: the keys of `masks` that differ from the job's.
        chosen_on: the metric on the part on which settings are chosen.
        difference: difference to the job's own settings there, scenes resampled in pairs.
    """

    values: Values
    chosen_on: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class Tuning:
    """The outcome of a search.

    Attributes:
        metric: name of the metric.
        trials: all settings that were tried, the job's own first.
        best: the values of the best trial; none where no other settings were better.
        before: the metric of the job's own settings on the part on which the choice is confirmed.
        after: that of the best trial there.
        confirmed: difference of the two, scenes resampled in pairs.
        scenes: number of scenes of each part: those on which settings are chosen, and the others.
        omitted: number of samples that could not be scored, by stage and kind of the reason.
    """

    metric: str
    trials: tuple[Trial, ...]
    best: Values
    before: Estimate | None
    after: Estimate | None
    confirmed: Estimate | None
    scenes: tuple[int, int]
    omitted: Mapping[str, int]

    @property
    def is_confirmed(self) -> bool:
        """Whether the best settings are better on the other part too, beyond its interval."""
        return bool(self.best) and self.confirmed is not None and self.confirmed.low > 0


def read_trials(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read ``masks.KEY=VALUE,VALUE,...`` strings.

    Raises:
        UserError: a string is no such list, or names a key twice.
    """
    trials: dict[str, list[Any]] = {}
    for text in texts:
        dotted, separator, values = text.partition("=")
        section, _, key = dotted.partition(".")
        if section != "masks" or not key or not separator or not values.strip():
            raise UserError(f"--try: expected masks.KEY=VALUE,VALUE,..., got {received(text)}")
        if key in trials:
            raise UserError(f"--try: {dotted} is named twice")
        found = parse_yaml(f"[{values}]", f"--try {dotted}")
        trials[key] = list(found) if isinstance(found, list) else [found]
    return trials


def default_trials(config: JobConfig) -> dict[str, list[Any]]:
    """Return the values to try for a job: of contrast, smooth, combine, and the threshold of its rule."""
    return {
        key: list(values)
        for key, values in DEFAULT_TRIALS.items()
        if CUT_KEYS.get(key, config.masks.rule) == config.masks.rule
    }


def tune(
    source: StoredJob,
    shards: Sequence[ShardSource],
    trials: Trials,
    *,
    metric: str = "mean_iou",
    processes: int | None = None,
    on_pass: Callable[[str], None] = lambda _: None,
) -> Tuning:
    """Search settings key by key: of each key the best value is kept, then the next key is tried.

    Args:
        source: the job whose stored maps are used.
        shards: shards with ground truth, some or all of the job's.
        trials: values to try for each key of `masks`; the job's own are always among them.
        metric: one of `METRICS`, of `pipeline.evaluation.mask_scores.summed_metrics`.
        processes: that shards are shared out to; default: one for each core.
        on_pass: receives a line on what is tried next.

    Raises:
        UserError: a key or value is invalid or needs what is not stored; shards are not the job's; or there
            is too little ground truth.
        ShardError, DamagedFileError: a shard, or its annotations, cannot be read.
    """
    _require_valid(source, trials)
    pairs = _annotated_shards(source, shards)
    with _scorer(source, pairs, processes or len(os.sched_getaffinity(0))) as scorer:
        search = _Search(source, scorer, metric)
        on_pass(f"Scoring the job's own settings on {len(pairs):,} shard(s)")
        search.score([{}])
        _require_scenes(search)
        best: Values = {}
        for number in range(1, MAX_PASSES + 1):
            before = best
            for key, values in trials.items():
                on_pass(f"Pass {number} of at most {MAX_PASSES}: trying {trial_text(key, values)}")
                best = search.best_of([best, *({**best, key: value} for value in values)])
            if best == before:
                break
        return search.outcome(best)


def _require_valid(source: StoredJob, trials: Trials) -> None:
    for key, values in trials.items():
        for value in values:
            settings_of(source, {key: value})


def settings_of(source: StoredJob, values: Values) -> JobConfig:
    """Return the configuration of a job with other values of some keys of `masks`."""
    overrides = [f"masks.{key}={json.dumps(value)}" for key, value in values.items()]
    # never made: nothing is written
    return remask_config(source, f"{source.folder.url.rstrip('/')}-tuned", overrides)


def _annotated_shards(source: StoredJob, shards: Sequence[ShardSource]) -> list[tuple[ShardSource, str]]:
    matched = match_annotations(shards, source.published)
    foreign = [shard.canonical_url for shard in shards if shard.canonical_url not in matched]
    if foreign:
        raise UserError(
            f"{storage.shown_url(source.folder.url)}: has no maps of {len(foreign):,} of the {len(shards):,} "
            f"shard(s) given: {first_few(foreign)}. Name shards that this job has annotated"
        )
    return [(shard, matched[shard.canonical_url]) for shard in shards]


def _require_scenes(search: _Search) -> None:
    counts = search.scene_counts
    if min(counts) < MIN_SCENES:
        skipped = f". Skipped samples: {skipped_text(search.omitted)}" if search.omitted else ""
        raise UserError(
            f"{sum(counts)} samples of these shards have ground truth; tune needs {2 * MIN_SCENES} or more: "
            f"one half to choose settings, the other to confirm them{skipped}. Ground truth is a label map "
            "in the field `seg.png`, with captions and class_ids in the field `json`, as legrad shards voc "
            "or coco writes it"
        )
    if search.metric_of({}, is_confirming=False) is None:
        defined = [name for name in METRICS if search.metric_of({}, is_confirming=False, metric=name)]
        raise UserError(
            f"--metric {search.metric}: needs other ground truth than these shards have; possible here: "
            f"{', '.join(defined) or 'none'}"
        )


def trial_text(key: str, values: Sequence[Any]) -> str:
    """Return a key with the values that are tried, as `--try` takes them."""
    shown = (value if isinstance(value, str) else json.dumps(value) for value in values)
    return f"masks.{key}={','.join(shown)}"


def skipped_text(omitted: Mapping[str, int]) -> str:
    """Return the counts of samples that could not be scored, as in ``read/no_ground_truth 56``."""
    return ", ".join(f"{why} {count:,}" for why, count in sorted(omitted.items()))


@dataclass
class ScoredShard:
    """Scores of the samples of one shard.

    Attributes:
        scenes: for each setting, the scores of all scenes, in one order.
        keys: sample key of each scene.
        omitted: number of samples that could not be scored, by stage and kind of the reason.
    """

    scenes: list[list[SceneScores]]
    keys: list[str] = field(default_factory=list)
    omitted: Counter[str] = field(default_factory=Counter)


Scorer = Callable[[Sequence[JobConfig]], list[ScoredShard]]


class _Search:
    """Scores settings, each once, and compares them."""

    def __init__(self, source: StoredJob, scorer: Scorer, metric: str) -> None:
        self.metric = metric
        self.omitted: Counter[str] = Counter()
        self.confirms: list[bool] = []
        self._source = source
        self._scorer = scorer
        self._scenes: dict[str, list[SceneScores]] = {}
        self._values: dict[str, Values] = {}

    def score(self, settings: Sequence[Values]) -> None:
        """Score the settings that have not been scored yet."""
        new = {self._name(values): values for values in settings}
        new = {name: values for name, values in new.items() if name not in self._scenes}
        if not new:
            return
        found = self._scorer([settings_of(self._source, values) for values in new.values()])
        for number, (name, values) in enumerate(new.items()):
            self._scenes[name] = [scene for shard in found for scene in shard.scenes[number]]
            self._values[name] = values
        self.confirms = confirming_half([key for shard in found for key in shard.keys])
        self.omitted = sum((shard.omitted for shard in found), Counter())

    def best_of(self, settings: Sequence[Values]) -> Values:
        """Return the settings with the highest metric where settings are chosen; the first of equal ones."""
        self.score(settings)

        def height(values: Values) -> float:
            estimate = self.metric_of(values, is_confirming=False)
            return float("-inf") if estimate is None else estimate.value

        return self._values[self._name(max(settings, key=height))]

    @property
    def scene_counts(self) -> tuple[int, int]:
        """Number of scenes of both parts."""
        confirming = sum(self.confirms)
        return len(self.confirms) - confirming, confirming

    def metric_of(self, values: Values, *, is_confirming: bool, metric: str | None = None) -> Estimate | None:
        """Return a metric of settings on one of the parts; by default the one that is searched by."""
        return self._metric(values, is_confirming, metric).estimate(seed=0)

    def outcome(self, best: Values) -> Tuning:
        """Return the outcome of the search."""
        start: Values = {}
        reference = self._metric(start, is_confirming=False)
        return Tuning(
            metric=self.metric,
            trials=tuple(
                Trial(
                    values,
                    self.metric_of(values, is_confirming=False),
                    self._metric(values, is_confirming=False).difference(reference, seed=0),
                )
                for values in self._values.values()
            ),
            best=best,
            before=self.metric_of(start, is_confirming=True),
            after=self.metric_of(best, is_confirming=True),
            confirmed=self._metric(best, is_confirming=True).difference(
                self._metric(start, is_confirming=True), seed=0
            ),
            scenes=self.scene_counts,
            omitted=self.omitted,
        )

    def _metric(self, values: Values, is_confirming: bool, metric: str | None = None) -> SummedMetric:
        scenes = self._scenes[self._name(values)]
        chosen = [
            scene for scene, confirms in zip(scenes, self.confirms, strict=True) if confirms == is_confirming
        ]
        return summed_metrics(WrittenMasks(tuple(chosen), 0, 0, ()))[metric or self.metric]

    def _name(self, values: Values) -> str:
        """Return a name that settings share if they are equal: keys at the job's own value do not count."""
        return settings_of(self._source, values).masks.model_dump_json()


@contextmanager
def _scorer(source: StoredJob, pairs: Sequence[tuple[ShardSource, str]], processes: int) -> Iterator[Scorer]:
    """Yield a function that scores settings on all shards; shards are shared out to processes."""
    facts = facts_of(source.folder, source.record)
    workers = min(processes, len(pairs))

    def tasks(configs: Sequence[JobConfig]) -> list[ShardTask]:
        url, maps_hash = source.folder.url, source.record.config_hash
        return [
            ShardTask(url, maps_hash, facts, shard, shard_id, tuple(configs)) for shard, shard_id in pairs
        ]

    if workers < 2:
        yield lambda configs: [score_shard(task) for task in tasks(configs)]
        return
    # a fork would copy the locks of torch's threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_use_one_thread) as pool:
        yield lambda configs: list(pool.map(score_shard, tasks(configs)))


def _use_one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class ShardTask:
    """A shard, and the settings to score on it; picklable.

    Attributes:
        folder_url: the output folder with the maps.
        maps_hash: hash of the configuration by which it was made.
        facts: of its model.
        shard: the shard with ground truth.
        shard_id: the folder's id of that shard.
        configs: of each of the settings.
    """

    folder_url: str
    maps_hash: str
    facts: ModelFacts
    shard: ShardSource
    shard_id: str
    configs: tuple[JobConfig, ...]


def score_shard(task: ShardTask) -> ScoredShard:
    """Score the masks that each of some settings makes from the stored maps of a shard."""
    found = ScoredShard([[] for _ in task.configs])
    makers = _makers(task)
    for chunk in _chunks(_scenes_with_maps(task, found.omitted), SAMPLES_AT_ONCE):
        found.keys += [scene.key for scene, _ in chunk]
        for number, scores in _scores_of(chunk, makers, task):
            found.scenes[number] += scores
    return found


def _makers(task: ShardTask) -> list[tuple[StoredMaps, list[int]]]:
    """Return what makes maps, each with the numbers of the settings that cut masks from the same maps."""
    makers: list[tuple[StoredMaps, list[int]]] = []
    for number, config in enumerate(task.configs):
        maker = StoredMaps(config, task.facts, torch.device("cpu"))
        for known, numbers in makers:
            if known.settings == maker.settings:
                numbers.append(number)
                break
        else:
            makers.append((maker, [number]))
    return makers


def _scenes_with_maps(task: ShardTask, omitted: Counter[str]) -> Iterator[tuple[Scene, StoredItem]]:
    """Yield the scenes of a shard with their stored maps, with images where they are refined."""
    needs_images = any(reads_images(config) for config in task.configs)
    folder, settings = OutputFolder(task.folder_url), task.configs[0].input
    footer = folder.own_footer(task.shard_id, task.maps_hash)
    require_annotated_version(task.shard, footer)
    wanted = [*settings.image.lower().split(";"), LABEL_MAP_FIELD, INSTANCE_MAP_FIELD, "json"]
    with (
        folder.open(ANNOTATIONS, task.shard_id) as table,
        storage.open_shard(task.shard) as stream,
    ):
        items = stored_items(table, {})
        item = next(items, None)
        for sample in read_samples(stream, max_member_bytes=settings.max_member_bytes, wanted_fields=wanted):
            scene = sample if isinstance(sample, SampleError) else scene_of(sample, settings.image)
            if isinstance(scene, SampleError):
                omitted[f"{scene.stage}/{scene.kind}"] += 1
            elif isinstance(sample, RawSample):
                # both are in the order of their ordinals
                while item is not None and item.index < scene.sample_index:
                    item = next(items, None)
                yield scene, _item_of(item, scene, sample if needs_images else None, task.shard)


def _item_of(
    item: StoredItem | None, scene: Scene, image: RawSample | None, shard: ShardSource
) -> StoredItem:
    """Return the stored maps of a scene, without rows if there are none; raise ShardError if keys differ."""
    if item is None or item.index != scene.sample_index:
        return StoredItem(scene.key, scene.sample_index)
    if item.key != scene.key:
        raise ShardError(
            f"{shard.canonical_url}: sample number {scene.sample_index} is {printable(scene.key)}, and the "
            f"job has annotated {printable(str(item.key))} there: name the shards that were annotated"
        )
    return StoredItem(item.key, item.index, item.rows, image=image)


def _scores_of(
    chunk: Sequence[tuple[Scene, StoredItem]], makers: Sequence[tuple[StoredMaps, list[int]]], task: ShardTask
) -> Iterator[tuple[int, list[SceneScores]]]:
    """Yield for each of the settings the scores of the scenes of a chunk."""
    config = task.configs[0]
    views = Views(tile=config.model.fit == "tile", **config.views.model_dump())
    work = StoredWork(WorkSettings(config, transform_of_facts(task.facts), views, None))
    prepared = work.prepare([item for _, item in chunk])
    by_shape: defaultdict[Any, list[tuple[int, StoredSample]]] = defaultdict(list)
    for place, sample in enumerate(prepared):
        if isinstance(sample, StoredSample):
            by_shape[sample.shape].append((place, sample))
    for maker, numbers in makers:
        explained: dict[int, ExplainedSample] = {}
        for group in by_shape.values():
            places, samples = zip(*group, strict=True)
            explained |= dict(zip(places, maker.explain(samples), strict=True))
        for number in numbers:
            source = task.configs[number].prompts.source
            yield (
                number,
                [
                    score_scene(
                        scene,
                        annotation_rows(explained[place], task.configs[number]) if place in explained else [],
                        source,
                    )
                    for place, (scene, _) in enumerate(chunk)
                ],
            )


def confirming_half(keys: Sequence[str]) -> list[bool]:
    """Return for each sample whether a choice is confirmed on it: for every second one, by digests of keys.

    Args:
        keys: of the samples, in the order of their shards.
    """
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    confirms = [False] * len(keys)
    for place in sorted(range(len(keys)), key=lambda place: digests[place])[1::2]:
        confirms[place] = True
    return confirms


def _chunks(items: Iterable[tuple[Scene, StoredItem]], size: int) -> Iterator[list[tuple[Scene, StoredItem]]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
