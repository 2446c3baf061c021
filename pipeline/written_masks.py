"""The masks of a finished job against ground truth, row by row, with an account of every row."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool

from legrad.masks import decode_rle
from legrad.metrics import bootstrap_mean, foreground_iou
from pipeline import storage
from pipeline.config import InputConfig
from pipeline.evaluation_result import WrittenMaskScores
from pipeline.ground_truth import Scene, read_scenes
from pipeline.label_map import in_frame
from pipeline.storage import ShardSource

COLUMNS = ["key", "sample_index", "prompt_index", "status", "mask"]
DIGEST = re.compile(r"-[0-9a-f]{8}$")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Tally:
    """What became of the rows of one shard; ``ious`` has one (scene ordinal, IoU) for each scored row."""

    ious: tuple[tuple[int, float], ...]
    counts: Mapping[str, int]


def score_written_masks(
    out_dir: str, shards: Sequence[ShardSource], settings: InputConfig, prompt_source: str, *, seed: int = 0
) -> WrittenMaskScores:
    """Hold every written mask against its object, joined by shard, sample ordinal, key and prompt ordinal.

    Pixels with label 255 take part in nothing. With prompt source ``captions`` prompt i belongs to object i;
    with ``caption`` the one prompt belongs to all the objects together. Masks in a smaller frame are enlarged
    to the label map's, nearest pixel.

    Args:
        out_dir: the job's output folder.
        shards: the tars with ground truth.
        settings: the job's input section.
        prompt_source: the job's ``prompts.source``.
        seed: of the bootstrap.

    Raises:
        ShardError: a tar cannot be read.
    """
    folder = storage.join_url(out_dir, "annotations")
    names = {name for name in storage.list_names(folder) if name.endswith(".parquet")}
    matched = match_annotations(shards, names)
    tallies = [
        _tally(shard, read_rows(storage.join_url(folder, name), COLUMNS), settings, prompt_source)
        for shard in shards
        if (name := matched.get(shard.canonical_url)) is not None
    ]
    counts: Counter[str] = Counter()
    for tally in tallies:
        counts.update(tally.counts)
    ious = np.array([iou for tally in tallies for _, iou in tally.ious])
    scenes = [(ordinal, scene) for ordinal, tally in enumerate(tallies) for scene, _ in tally.ious]
    scene_numbers = {scene: number for number, scene in enumerate(dict.fromkeys(scenes))}
    scene_of_row = np.array([scene_numbers[scene] for scene in scenes], dtype=np.int64)
    return WrittenMaskScores(
        iou=bootstrap_mean(ious, scene_of_row, seed=seed) if len(ious) else None,
        rows_scored=len(ious),
        rows_rejected=counts["rejected"],
        rows_without_object=counts["without_object"],
        rows_without_scene=counts["without_scene"],
        rows_of_other_shards=sum(
            _row_count(storage.join_url(folder, name)) for name in sorted(names - set(matched.values()))
        ),
        objects_without_row=counts["object_without_row"],
        shards_without_annotations=tuple(
            shard.canonical_url for shard in shards if shard.canonical_url not in matched
        ),
    )


def match_annotations(shards: Sequence[ShardSource], names: Collection[str]) -> dict[str, str]:
    """Find each shard's annotations file: by its URL, else by its stem where that leaves no doubt.

    Args:
        shards: the tars.
        names: names of the annotations files.

    Returns:
        Canonical URL of a shard to the name of its file; shards without one are left out.
    """
    exact = {shard.canonical_url: f"{shard.shard_id}.parquet" for shard in shards}
    exact = {url: name for url, name in exact.items() if name in names}
    moved = [shard for shard in shards if shard.canonical_url not in exact]
    free_stems = Counter(_stem(name.removesuffix(".parquet")) for name in set(names) - set(exact.values()))
    moved_stems = Counter(_stem(shard.shard_id) for shard in moved)
    by_stem = {_stem(name.removesuffix(".parquet")): name for name in set(names) - set(exact.values())}
    return exact | {
        shard.canonical_url: by_stem[stem]
        for shard in moved
        if free_stems[stem := _stem(shard.shard_id)] == 1 and moved_stems[stem] == 1
    }


def read_rows(url: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of one annotations file, as dictionaries of the given columns."""
    filesystem, path = storage.resolve(url)
    with filesystem.open_input_file(path) as file:
        rows: list[dict[str, Any]] = pq.read_table(file, columns=list(columns)).to_pylist()
    return rows


def _stem(shard_id: str) -> str:
    return DIGEST.sub("", shard_id)


def _row_count(url: str) -> int:
    filesystem, path = storage.resolve(url)
    with filesystem.open_input_file(path) as file:
        return int(pq.ParquetFile(file).metadata.num_rows)


def _tally(shard: ShardSource, rows: Sequence[Row], settings: InputConfig, prompt_source: str) -> _Tally:
    waiting: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        waiting[row["sample_index"]].append(row)
    ious: list[tuple[int, float]] = []
    counts: Counter[str] = Counter()
    for ordinal, scene in enumerate(read_scenes(shard, settings)):
        if isinstance(scene, Scene):
            own_rows = [row for row in waiting[scene.sample_index] if row["key"] == scene.key]
            waiting[scene.sample_index] = [
                row for row in waiting[scene.sample_index] if row["key"] != scene.key
            ]
            scene_ious, scene_counts = _score_scene(scene, own_rows, prompt_targets(scene, prompt_source))
            ious += [(ordinal, iou) for iou in scene_ious]
            counts.update(scene_counts)
    counts["without_scene"] = sum(len(left) for left in waiting.values())
    return _Tally(tuple(ious), counts)


def prompt_targets(scene: Scene, prompt_source: str) -> dict[int, Bool[np.ndarray, "height width"]]:
    """Prompt ordinal to the pixels that the prompt is about; left out where no such pixel is visible.

    Args:
        scene: the ground truth.
        prompt_source: the job's ``prompts.source``.
    """
    visible = scene.visible_objects()
    if prompt_source == "captions":
        return {index: scene.object_mask(index) for index in visible}
    return {0: scene.foreground()} if visible else {}


def _score_scene(
    scene: Scene, rows: Sequence[Row], targets: Mapping[int, Bool[np.ndarray, "height width"]]
) -> tuple[list[float], Counter[str]]:
    ious: list[float] = []
    without_row = targets.keys() - {row["prompt_index"] for row in rows}
    counts: Counter[str] = Counter(object_without_row=len(without_row))
    for row in rows:
        if row["mask"] is None:
            counts["rejected"] += 1
        elif row["prompt_index"] not in targets:
            counts["without_object"] += 1
        else:
            mask = in_frame(decode_rle(row["mask"]), scene.labels.shape)
            truth = targets[row["prompt_index"]]
            ious.append(float(foreground_iou(mask[None], truth[None], scene.valid[None])[0]))
    return ious, counts
