"""Compare the masks that a job wrote with ground truth, joined by shard and sample; count every row."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from legrad.errors import RleError
from legrad.quality import label_metrics
from legrad.quality.label_metrics import (
    OverlapTable,
    bootstrap_difference,
    bootstrap_sums,
    class_iou,
    mean_iou,
    tabulate_overlaps,
)
from legrad.quality.metrics import Estimate, bootstrap_statistic, presence_auroc
from pipeline import storage
from pipeline.config.schema import InputConfig
from pipeline.errors import DamagedFileError
from pipeline.evaluation.instance_scores import score_instances
from pipeline.evaluation.result import WrittenMaskScores
from pipeline.evaluation.scene_masks import SceneScores, score_scene
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.output.image_shards import match_annotations, require_annotated_version
from pipeline.output.schema import INSTANCES
from pipeline.shards.ground_truth import Scene, read_scenes
from pipeline.storage import ShardSource

COLUMNS = [
    *("key", "sample_index", "prompt_index", "prompt", "class_id", "status"),
    *("image_height", "image_width", "similarity", "mask", "ignore"),
]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class WrittenMasks:
    """Scores of every scene, and counts of rows without a scene.

    Attributes:
        scenes: every scene with ground truth, also those without rows, in the order of the shards.
        rows_without_scene: rows whose sample has no readable ground truth in the shard.
        rows_of_other_shards: rows of shards that were not given.
        shards_without_annotations: given shards without an annotations file in the output folder.
        damaged_files: annotations files that are skipped, and why.
    """

    scenes: tuple[SceneScores, ...]
    rows_without_scene: int
    rows_of_other_shards: int
    shards_without_annotations: tuple[str, ...]
    damaged_files: tuple[str, ...] = ()


def collect_written_masks(
    folder: OutputFolder,
    shards: Sequence[ShardSource],
    settings: InputConfig,
    prompt_source: str,
    config_hash: str | None = None,
) -> WrittenMasks:
    """Compare every written mask with its object, joined by shard, sample ordinal, key and prompt.

    Prompt i of source ``captions`` belongs to object i, a prompt of ``classes`` to the class of its row, the
    prompt of ``caption`` to all objects together. Masks in a smaller frame are enlarged to the size of the
    label map, nearest pixel.

    Args:
        folder: the job's output folder.
        shards: the tars with ground truth.
        settings: the job's input section.
        prompt_source: the job's ``prompts.source``.
        config_hash: of the job; files of another job or of two attempts count as damaged. None: no check.

    Raises:
        ShardError: a tar cannot be read.
    """
    annotated = folder.ids(ANNOTATIONS)
    matched = match_annotations(shards, annotated)
    scenes: list[SceneScores] = []
    damaged: list[str] = []
    rows_without_scene = rows_of_other_shards = 0
    for shard in shards:
        if (shard_id := matched.get(shard.canonical_url)) is not None:
            try:
                if config_hash is not None:
                    folder.own_footer(shard_id, config_hash)
                with folder.open(ANNOTATIONS, shard_id) as table:
                    require_annotated_version(shard, table.footer())
                    rows = list(table.rows([*COLUMNS, *({INSTANCES} & set(table.column_names))]))
                own_scenes, left_over = _score_shard(shard, rows, settings, prompt_source)
            except DamagedFileError as error:
                damaged.append(str(error))
            except RleError as error:
                damaged.append(f"{storage.shown_url(folder.files.file_url(ANNOTATIONS, shard_id))}: {error}")
            else:
                scenes += own_scenes
                rows_without_scene += left_over
    for shard_id in sorted(annotated - set(matched.values())):
        try:
            with folder.open(ANNOTATIONS, shard_id) as table:
                rows_of_other_shards += table.row_count
        except DamagedFileError as error:
            damaged.append(str(error))
    return WrittenMasks(
        scenes=tuple(scenes),
        rows_without_scene=rows_without_scene,
        rows_of_other_shards=rows_of_other_shards,
        shards_without_annotations=tuple(
            shard.canonical_url for shard in shards if shard.canonical_url not in matched
        ),
        damaged_files=tuple(damaged),
    )


@dataclass(frozen=True)
class SummedMetric:
    """A metric that follows from sums over scenes.

    Attributes:
        counts: one row for each scene with the ground truth that the metric needs.
        statistic: computes the metric from sums over the rows.
    """

    counts: np.ndarray | csr_array
    statistic: Callable[[np.ndarray], np.ndarray]

    def estimate(self, seed: int) -> Estimate | None:
        """Return the metric with its interval; None where it is undefined."""
        return bootstrap_sums(self.counts, self.statistic, seed=seed)

    def difference(self, other: SummedMetric, seed: int) -> Estimate | None:
        """Return the difference to other masks of the same scenes; scenes are resampled in pairs."""
        return bootstrap_difference(self.counts, other.counts, self.statistic, other.statistic, seed=seed)


def summed_metrics(written: WrittenMasks) -> dict[str, SummedMetric]:
    """Return the metrics that follow from sums over scenes, by their names in `WrittenMaskScores`."""
    table, kept, points = (_table(written.scenes, name) for name in ("overlap", "kept_overlap", "points"))
    pixels = [scene.pixels for scene in written.scenes if scene.pixels is not None]
    tallies = np.stack(pixels) if pixels else np.zeros((0, 7))

    def share(part: int, whole: int) -> SummedMetric:
        return SummedMetric(tallies, label_metrics.share(part, whole))

    return {
        "iou": _mean_over_rows(scene.ious for scene in written.scenes),
        "boundary_f": _mean_over_rows(scene.boundary_fs for scene in written.scenes),
        "mean_iou": SummedMetric(table.counts, mean_iou(table, background=False)),
        "mean_iou_with_background": SummedMetric(table.counts, mean_iou(table, background=True)),
        "mean_iou_kept": SummedMetric(kept.counts, mean_iou(kept, background=False)),
        "point_mean_iou": SummedMetric(points.counts, mean_iou(points, background=False)),
        "pixel_accuracy": share(label_metrics.CORRECT, label_metrics.COUNTED),
        "precision": share(label_metrics.HIT, label_metrics.MASKED),
        "recall": share(label_metrics.HIT, label_metrics.TRUE),
        "coverage": share(label_metrics.KEPT, label_metrics.COUNTED),
        "kept_accuracy": share(label_metrics.CORRECT_KEPT, label_metrics.KEPT),
    }


def score_written_masks(written: WrittenMasks, *, seed: int = 0) -> WrittenMaskScores:
    """Return the metrics of the masks of a job with 95 % intervals; whole scenes are resampled.

    Args:
        written: counts of every scene.
        seed: of the bootstrap.
    """
    counts = sum((Counter(scene.counts) for scene in written.scenes), Counter())
    return WrittenMaskScores(
        **{name: metric.estimate(seed) for name, metric in summed_metrics(written).items()},
        presence_auroc=_presence_auroc(written.scenes, seed),
        class_iou=class_iou(_table(written.scenes, "overlap")),
        scenes=len(written.scenes),
        rows_scored=counts["accepted"],
        rows_without_object=counts["accepted_absent"],
        rows_rejected=counts["rejected_present"] + counts["rejected_absent"],
        rows_rejected_rightly=counts["rejected_absent"],
        rows_unjudged=counts["unjudged"],
        rows_without_scene=written.rows_without_scene,
        rows_of_other_shards=written.rows_of_other_shards,
        objects_without_row=counts["objects_without_row"],
        shards_without_annotations=written.shards_without_annotations,
        damaged_files=written.damaged_files,
        instances=score_instances([scene.instances for scene in written.scenes], seed),
    )


def _mean_over_rows(values_of_scenes: Iterable[Sequence[float]]) -> SummedMetric:
    sums = [(sum(values), float(len(values))) for values in values_of_scenes]
    return SummedMetric(np.array(sums, dtype=np.float64).reshape(-1, 2), label_metrics.share(0, 1))


def _table(scenes: Sequence[SceneScores], name: str) -> OverlapTable:
    return tabulate_overlaps([overlap for scene in scenes if (overlap := getattr(scene, name)) is not None])


def _presence_auroc(scenes: Sequence[SceneScores], seed: int) -> Estimate | None:
    """Return the AUROC of the cosine as a test of presence; None where all or no objects are present."""
    present = [np.array(scene.present, dtype=bool) for scene in scenes]
    similarities = [np.array(scene.similarities, dtype=np.float64) for scene in scenes]

    def auroc(rows: np.ndarray) -> float:
        return presence_auroc(
            np.concatenate([similarities[row] for row in rows])[:, None],
            np.concatenate([present[row] for row in rows])[:, None],
        )

    everything = np.concatenate(present) if present else np.zeros(0, dtype=bool)
    if everything.all() or not everything.any():
        return None
    return bootstrap_statistic(auroc, len(scenes), seed=seed)


def _score_shard(
    shard: ShardSource, rows: Sequence[Row], settings: InputConfig, prompt_source: str
) -> tuple[list[SceneScores], int]:
    """Return the scores of the scenes of a shard, and the number of rows that belong to none of them."""
    waiting: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        waiting[row["sample_index"]].append(row)
    scores: list[SceneScores] = []
    joined = 0
    for scene in read_scenes(shard, settings):
        if isinstance(scene, Scene):
            own_rows = [row for row in waiting[scene.sample_index] if row["key"] == scene.key]
            scores.append(score_scene(scene, own_rows, prompt_source))
            joined += len(own_rows)
    return scores, len(rows) - joined
