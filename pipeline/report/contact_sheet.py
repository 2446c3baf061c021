"""One picture of a job's results: which samples it shows, and where their parts come from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from legrad.errors import RleError
from pipeline import storage
from pipeline.config.schema import JobConfig
from pipeline.errors import ShardError, UserError
from pipeline.evaluation.scene_scores import row_target
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.output.image_shards import match_annotations
from pipeline.output.label_map import mask_of_image
from pipeline.report.row_pictures import mask_iou, read_samples_at, stored_heatmap
from pipeline.report.sheet_drawing import CARDS_PER_LINE, Card, draw_sheet
from pipeline.shards.fields import find_field
from pipeline.shards.ground_truth import Scene, list_truth_shards, scene_of
from pipeline.shards.images import open_image
from pipeline.shards.samples import RawSample
from pipeline.storage import ShardSource

COLUMNS = [
    "key",
    "sample_index",
    "prompt_index",
    "prompt",
    "class_id",
    "similarity",
    "peak",
    "mask",
    "heatmap",
    "heatmap_height",
    "heatmap_width",
]

Row = Mapping[str, Any]
SampleRows = tuple[Row, ...]


def write_contact_sheet(
    out_dir: str,
    shard_patterns: str | Sequence[str],
    destination: str | Path,
    *,
    rows: int = 6,
    seed: int = 0,
) -> Path:
    """Draw samples of a job, chosen at random, into a PNG.

    Two prompts of one sample stand side by side; samples of a single prompt are put together in pairs.

    Args:
        out_dir: the job's output folder.
        shard_patterns: the tars that the job annotated.
        destination: path of the PNG; its folder is made.
        rows: lines of the sheet, two prompts each.
        seed: of the choice; nothing else decides what is shown.

    Returns:
        The path of the PNG.

    Raises:
        UserError: no job in the folder, or no accepted mask in the given shards.
        ShardError: a tar cannot be read, or a mask is damaged.
        DamagedFileError: an annotations file or job.json is none.
    """
    folder = OutputFolder(out_dir)
    config = folder.config()
    shards = list_truth_shards(shard_patterns)
    candidates = _candidates(folder, shards, 2 * rows, np.random.default_rng(seed))
    cards = _cards(_fill_lines(candidates, rows), config)
    if not cards:
        raise UserError(
            f"{storage.shown_url(out_dir)}: no accepted mask belongs to the given shards, so there is "
            "nothing to draw"
        )
    target = Path(destination)
    target.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(cards, note=f"Samples chosen at random, seed {seed}.").save(target, optimize=True)
    return target


def _candidates(
    folder: OutputFolder, shards: Sequence[ShardSource], max_shards: int, generator: np.random.Generator
) -> list[tuple[ShardSource, SampleRows]]:
    """Samples with accepted masks, shuffled, from as many shards as are needed at most."""
    matched = match_annotations(shards, folder.ids(ANNOTATIONS))
    known = [shard for shard in shards if shard.canonical_url in matched]
    candidates: list[tuple[ShardSource, SampleRows]] = []
    for position in generator.permutation(len(known))[:max_shards]:
        shard = known[position]
        by_sample: dict[int, list[Row]] = defaultdict(list)
        with folder.open(ANNOTATIONS, matched[shard.canonical_url]) as table:
            for row in table.rows(COLUMNS):
                if row["mask"] is not None:
                    by_sample[row["sample_index"]].append(row)
        candidates += [(shard, tuple(rows)) for rows in by_sample.values()]
    return [candidates[position] for position in generator.permutation(len(candidates))]


def _fill_lines(
    candidates: Sequence[tuple[ShardSource, SampleRows]], line_count: int
) -> list[tuple[ShardSource, Row]]:
    """Rows in the order in which they are drawn, a sample's prompts never broken over two lines."""
    lines: list[list[tuple[ShardSource, Row]]] = []
    open_line: list[tuple[ShardSource, Row]] = []
    for shard, rows in candidates:
        if len(lines) == line_count:
            break
        shown = [(shard, row) for row in sorted(rows, key=lambda row: row["prompt_index"])[:CARDS_PER_LINE]]
        if len(shown) == CARDS_PER_LINE:
            lines.append(shown)
            continue
        open_line += shown
        if len(open_line) == CARDS_PER_LINE:
            lines.append(open_line)
            open_line = []
    if len(lines) < line_count:
        lines.append(open_line)
    return [pair for line in lines for pair in line]


def _cards(chosen: Sequence[tuple[ShardSource, Row]], config: JobConfig) -> list[Card]:
    wanted: dict[str, set[int]] = defaultdict(set)
    for shard, row in chosen:
        wanted[shard.canonical_url].add(row["sample_index"])
    sources = {shard.canonical_url: shard for shard, _ in chosen}
    samples = {
        (url, sample.index): sample
        for url, indices in wanted.items()
        for sample in read_samples_at(sources[url], indices, config.input)
    }
    found = [(samples.get((shard.canonical_url, row["sample_index"])), row) for shard, row in chosen]
    return [
        _card(sample, row, config) for sample, row in found if sample is not None and sample.key == row["key"]
    ]


def _card(sample: RawSample, row: Row, config: JobConfig) -> Card:
    image = open_image(
        find_field(sample.fields, config.input.image), max_image_pixels=config.input.max_image_pixels
    ).convert("RGB")
    try:
        mask = mask_of_image(row["mask"], image.height, image.width)
    except RleError as error:
        raise ShardError(f"sample {sample.key}: {error}") from error
    scene = scene_of(sample, config.input.image)
    truth, iou = None, None
    if isinstance(scene, Scene):
        truth = row_target(scene, row, config.prompts.source)
        iou = None if truth is None else mask_iou(mask, truth, scene.valid)
    return Card(image, row["prompt"], row["similarity"], stored_heatmap(row), mask, truth, iou)
