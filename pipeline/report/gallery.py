"""The cards of the gallery: complete rows, with pictures of those whose images can be read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from legrad.errors import LeGradError
from legrad.heatmaps import Normalisation, heatmap_columns
from legrad.masks.rle import Rle
from pipeline.config.schema import JobConfig
from pipeline.errors import DamagedFileError, PipelineError, SampleFailure
from pipeline.evaluation.scene_masks import row_class, row_target
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.output.image_shards import LocatedShards, require_annotated_version
from pipeline.output.label_map import mask_frame, mask_of_image
from pipeline.output.schema import EMPTY_MASK, OK
from pipeline.output.tables import damage
from pipeline.report.mask_maps import MAP_SIDE, MaskMap, MaskMaps, rows_of_samples
from pipeline.report.pictures import Pictures, RowParts, draw_pictures
from pipeline.report.row_pictures import cut_of, mask_iou, preview_iou, read_samples_at, stored_heatmap
from pipeline.report.scores import ScoredRows
from pipeline.shards.fields import find_field
from pipeline.shards.ground_truth import Scene, scene_of
from pipeline.shards.images import open_image
from pipeline.shards.samples import RawSample
from pipeline.storage import ShardSource
from pipeline.text import printable

CARD_COLUMNS = (
    "key",
    "sample_index",
    "shard",
    "prompt_index",
    "prompt",
    "class_id",
    "status",
    "image_height",
    "image_width",
    "similarity",
    "peak",
    "threshold",
    "area",
    "mask",
    "ignore",
    "heatmap",
    "heatmap_height",
    "heatmap_width",
)
# characters of each text on a card; escaped, one takes up to five bytes
MAX_TEXT = 300
CARD_TEXTS = {"prompt": 240, "key": 120, "shard": 160}
MAX_REASON = 120
# rows whose mask depends on the threshold; the others are rejected whatever it is
BY_THRESHOLD = (OK, EMPTY_MASK, "rejected_area")


@dataclass(frozen=True)
class CardRow:
    """One row of the gallery.

    Attributes:
        row: columns of the annotations file; texts are printable and cut to CARD_TEXTS; ``whole_key`` and
            ``whole_shard`` are as written.
        shard_id: of the shard of the row.
        area_share: share of the mask in its frame; None without a mask.
        at_random: whether it was chosen at random, not for its scores.
        pictures: None where the image could not be read.
        iou: with the ground truth; None without.
        cut: threshold of the heat map by the job's rule; None where it is not known.
        has_mask_map: whether the slider's map is the one that the mask was cut from, or else the stored one.
        preview_iou: of the mask with the slider's map above the row's threshold; None without either.
        class_id: of the row, else of its ground truth; None without either.
        ignored_share: share of ignored pixels; None where the row has no ignore mask.
        no_picture: the reason for missing pictures; empty where there are pictures.
    """

    row: Mapping[str, Any]
    shard_id: str
    area_share: float | None
    at_random: bool
    pictures: Pictures | None = None
    iou: float | None = None
    cut: float | None = None
    has_mask_map: bool = False
    preview_iou: float | None = None
    class_id: int | None = None
    ignored_share: float | None = None
    no_picture: str = ""


@dataclass(frozen=True)
class Gallery:
    """Cards, and the shards without pictures: shard URL to the reason."""

    cards: tuple[CardRow, ...]
    unread_shards: Mapping[str, str] = field(default_factory=dict)


def read_cards(
    folder: OutputFolder, scores: ScoredRows, chosen: Sequence[int], at_random: set[int]
) -> tuple[tuple[CardRow, ...], tuple[str, ...]]:
    """Read all columns of the chosen rows.

    Returns:
        The cards, in the order chosen; and a line for each file that cannot be read, whose rows are omitted.
    """
    by_group: dict[int, list[int]] = defaultdict(list)
    for row in chosen:
        by_group[int(scores.group[row])].append(row)
    read: dict[int, dict[str, Any]] = {}
    damaged: list[str] = []
    for group, rows in by_group.items():
        try:
            read |= _whole_rows(folder, scores, group, rows)
        except DamagedFileError as error:
            damaged.append(str(error))
    cards = (_card(read[row], scores, row, at_random=row in at_random) for row in chosen if row in read)
    return tuple(cards), tuple(damaged)


def _whole_rows(
    folder: OutputFolder, scores: ScoredRows, group: int, rows: Sequence[int]
) -> dict[int, dict[str, Any]]:
    shard_id, number = scores.groups[group]
    offsets = [int(scores.offset[row]) for row in rows]
    with folder.open(ANNOTATIONS, shard_id) as table, damage(table.url):
        found = table.read_group(number, CARD_COLUMNS, offsets)
        return dict(zip(rows, found.to_pylist(), strict=True))


def _card(row: dict[str, Any], scores: ScoredRows, number: int, *, at_random: bool) -> CardRow:
    share = float(scores.area_share[number])
    texts = {name: shortened(row[name], most) for name, most in CARD_TEXTS.items()}
    return CardRow(
        row={**row, **texts, "whole_key": row["key"], "whole_shard": row["shard"]},
        shard_id=scores.shard_id(number),
        area_share=share if np.isfinite(share) else None,
        at_random=at_random,
        class_id=row["class_id"],
    )


def shortened(text: str | None, most: int = MAX_TEXT) -> str:
    """Return a printable text of at most so many characters; an ellipsis replaces the rest."""
    whole = printable(text or "")
    return whole if len(whole) <= most else f"{whole[: most - 1]}…"


def with_pictures(
    folder: OutputFolder,
    cards: Sequence[CardRow],
    located: LocatedShards,
    config: JobConfig,
    max_bytes: int,
    *,
    normalisation: Normalisation,
    mask_maps: MaskMaps | None = None,
) -> Gallery:
    """Read the cards' images from their shards and draw them.

    Args:
        folder: the job's output folder.
        cards: the rows.
        located: places of the shards.
        config: configuration of the job.
        max_bytes: limit for the data URIs of one card.
        normalisation: when the job's model normalises its maps.
        mask_maps: makes the maps that masks were cut from; None: the slider takes the stored heat maps.
    """
    drawing = _Drawing(config, max_bytes, normalisation, mask_maps)
    by_shard: dict[str, list[int]] = defaultdict(list)
    for position, card in enumerate(cards):
        by_shard[card.shard_id].append(position)
    drawn = list(cards)
    unread: dict[str, str] = {}
    for shard_id, positions in by_shard.items():
        own = {position: cards[position] for position in positions}
        source = located.sources.get(shard_id)
        reason = located.missing.get(shard_id, "its location is unknown")
        if source is not None:
            reason = ""
            try:
                require_annotated_version(source, folder.footer(shard_id))
                for position, card in _drawn(folder, source, own, drawing):
                    drawn[position] = card
            except PipelineError as error:
                reason = shortened(str(error))
        if reason:
            unread[own[positions[0]].row["shard"]] = reason
        for position in positions:
            if drawn[position].pictures is None and not drawn[position].no_picture:
                missing = reason or "the shard has no such sample"
                drawn[position] = replace(drawn[position], no_picture=shortened(missing, MAX_REASON))
    return Gallery(tuple(drawn), unread)


@dataclass(frozen=True)
class _Drawing:
    """How cards are drawn: the arguments of `with_pictures`."""

    config: JobConfig
    max_bytes: int
    normalisation: Normalisation
    mask_maps: MaskMaps | None


def _drawn(
    folder: OutputFolder, source: ShardSource, cards: Mapping[int, CardRow], drawing: _Drawing
) -> Iterator[tuple[int, CardRow]]:
    wanted: dict[int, list[int]] = defaultdict(list)
    for position, card in cards.items():
        wanted[card.row["sample_index"]].append(position)
    shard_id = next(iter(cards.values())).shard_id
    rows = rows_of_samples(folder, shard_id, wanted.keys()) if drawing.mask_maps else {}
    for sample in read_samples_at(source, wanted.keys(), drawing.config.input):
        own = [
            position for position in wanted[sample.index] if sample.key == cards[position].row["whole_key"]
        ]
        maps: Mapping[int, MaskMap] = {}
        if drawing.mask_maps is not None and sample.index in rows:
            to_cut = [cards[each].row for each in own if cards[each].row["status"] in BY_THRESHOLD]
            prompts = {row["prompt_index"] for row in to_cut}
            maps = drawing.mask_maps.of_sample(rows[sample.index], sample, prompts)
        for position in own:
            card = cards[position]
            yield position, _illustrated(card, sample, drawing, maps.get(card.row["prompt_index"]))


def _illustrated(card: CardRow, sample: RawSample, drawing: _Drawing, mask_map: MaskMap | None) -> CardRow:
    row, config = card.row, drawing.config
    try:
        data = find_field(sample.fields, config.input.image)
        image = open_image(data, max_image_pixels=config.input.max_image_pixels)
        mask, ignored = (_decoded(row[name], image.height, image.width) for name in ("mask", "ignore"))
        truth, valid, class_id = _truth(sample, row, config)
        heatmap, cut = stored_heatmap(row), cut_of(row["threshold"], config.masks)
        if cut is None and mask_map is not None:
            cut = mask_map.cut
        slider_map = None
        if row["status"] in BY_THRESHOLD and heatmap is not None:
            frame = mask_frame(image.height, image.width, MAP_SIDE)
            slider_map = (
                heatmap_columns(heatmap, *frame, drawing.normalisation).T
                if mask_map is None
                else mask_map.heatmap
            )
        parts = RowParts(image, heatmap, mask, ignored, truth, slider_map)
        pictures, previewed = draw_pictures(parts, drawing.max_bytes), None
        if pictures is not None and pictures.levels is not None and mask is not None and cut is not None:
            previewed = preview_iou(pictures.levels.values(), mask, cut)
    # counts and sizes of an untrusted file may be anything
    except (SampleFailure, LeGradError, ValueError) as error:
        return replace(card, no_picture=shortened(f"{type(error).__name__}: {error}", MAX_REASON))
    return replace(
        card,
        pictures=pictures,
        iou=None if mask is None or truth is None or valid is None else mask_iou(mask, truth, valid),
        cut=cut,
        has_mask_map=mask_map is not None,
        preview_iou=previewed,
        class_id=card.class_id if card.class_id is not None else class_id,
        ignored_share=None if ignored is None else float(ignored.mean()),
        no_picture="" if pictures is not None else "the picture exceeds the size limit of the page",
    )


def _decoded(rle: Rle | None, height: int, width: int) -> Bool[np.ndarray, "rows columns"] | None:
    return None if rle is None else mask_of_image(rle, height, width)


def _truth(
    sample: RawSample, row: Mapping[str, Any], config: JobConfig
) -> tuple[Bool[np.ndarray, "height width"] | None, Bool[np.ndarray, "height width"] | None, int | None]:
    """Return the pixels of the prompt's object, the valid pixels, the class; None without ground truth."""
    scene = scene_of(sample, config.input.image)
    if not isinstance(scene, Scene) or scene.label_map is None:
        return None, None, None
    source = config.prompts.source
    # a whole caption is about all objects together, which have no class in common
    class_id = None if source == "caption" else row_class(scene, row, source)
    return row_target(scene, row, source), scene.valid, class_id
