"""Draw a picture of a job's results: samples chosen at random, their heat maps, masks and ground truth."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from legrad.errors import RleError
from legrad.pictures import fitted, overlay
from pipeline import storage
from pipeline.config.schema import JobConfig
from pipeline.errors import ShardError, UserError
from pipeline.evaluation.scene_masks import row_target
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.output.image_shards import match_annotations
from pipeline.output.label_map import mask_of_image
from pipeline.report.pictures import paled
from pipeline.report.row_pictures import mask_iou, read_samples_at, stored_heatmap
from pipeline.shards.fields import find_field
from pipeline.shards.ground_truth import Scene, list_truth_shards, scene_of
from pipeline.shards.images import open_image
from pipeline.shards.samples import RawSample
from pipeline.storage import ShardSource
from pipeline.text import printable

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
CARDS_PER_LINE = 2
# in pixels: at this resolution a point of a font is one
DOTS_PER_INCH = 72
PANEL_SIDE, PANEL_GAP, CARD_GAP, MARGIN = 208, 8, 48, 32
HEADING_HEIGHT, PROMPT_LINE_HEIGHT, DETAIL_HEIGHT, NOTE_HEIGHT = 40, 31, 64, 17
PROMPT_SIZE, DETAIL_SIZE, NOTE_SIZE = 24, 19, 17
PROMPT_LINES = 2
MAX_PROMPT = 1000  # characters; only the first few fit in any case
CAPITAL_WIDTH = 0.77 * PROMPT_SIZE  # mean width of a capital letter, the widest common ones
FRAME, INK, FAINT = "#f1f3f6", "#111827", "#6b7280"
MASK_COLOUR, TRUTH_COLOUR = "#ff7a00", "#00b894"

Row = Mapping[str, Any]
SampleRows = tuple[Row, ...]


@dataclass(frozen=True)
class Card:
    """One (sample, prompt) of the sheet.

    Attributes:
        image: the original image.
        prompt: the text.
        similarity: cosine of image and prompt.
        relevance: normalised relevance grid, 0 to 1; None where the job did not store it.
        mask: the mask, in any frame of the image's aspect.
        truth: pixels of the object; None without ground truth.
        iou: foreground IoU of mask and truth; None without ground truth.
    """

    image: Image.Image
    prompt: str
    similarity: float
    relevance: Float[np.ndarray, "grid_height grid_width"] | None
    mask: Bool[np.ndarray, "mask_height mask_width"]
    truth: Bool[np.ndarray, "truth_height truth_width"] | None
    iou: float | None


def write_contact_sheet(
    out_dir: str,
    shard_patterns: str | Sequence[str],
    destination: str | Path,
    *,
    rows: int = 6,
    seed: int = 0,
) -> Path:
    """Draw samples of a job, chosen at random, into a PNG.

    Two prompts of one sample share a line; samples with a single prompt are paired.

    Args:
        out_dir: the job's output folder.
        shard_patterns: the tars that the job annotated.
        destination: path of the PNG; its folder is created.
        rows: lines of the sheet, two prompts each.
        seed: of the random choice; nothing else decides which samples are drawn.

    Returns:
        The path of the PNG.

    Raises:
        UserError: no job in the folder, or no accepted mask in the given shards.
        ShardError: a tar cannot be read, or a mask is damaged.
        DamagedFileError: job.json or an annotations file is damaged.
    """
    folder = OutputFolder(out_dir)
    config = folder.config()
    shards = list_truth_shards(shard_patterns)
    candidates = _candidates(folder, shards, 2 * rows, np.random.default_rng(seed))
    cards = _cards(_fill_lines(candidates, rows), config)
    if not cards:
        raise UserError(
            f"{storage.shown_url(out_dir)}: nothing to draw: no accepted mask belongs to the "
            "given shards; name the shards that this job annotated"
        )
    target = Path(destination)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(draw_sheet(cards, note=f"Samples chosen at random, seed {seed}."))
    return target


def _candidates(
    folder: OutputFolder, shards: Sequence[ShardSource], max_shards: int, generator: np.random.Generator
) -> list[tuple[ShardSource, SampleRows]]:
    """Return samples with accepted masks from at most `max_shards` shards, both in random order."""
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
    """Return the rows in drawing order; the prompts of a sample share a line."""
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
    )
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


def draw_sheet(cards: Sequence[Card], *, note: str) -> bytes:
    """Draw the cards, two on a line, in their order.

    Args:
        cards: at least one. A kind of panel that no card has is omitted.
        note: a small line at the bottom.

    Returns:
        The bytes of a PNG.
    """
    has_heat = any(card.relevance is not None for card in cards)
    has_truth = any(card.truth is not None for card in cards)
    panels = ["image", *["heat map"] * has_heat, "mask", *["ground truth"] * has_truth]
    card_width = len(panels) * (PANEL_SIDE + PANEL_GAP) - PANEL_GAP
    columns = min(CARDS_PER_LINE, len(cards))
    lines = -(-len(cards) // CARDS_PER_LINE)
    width = 2 * MARGIN + columns * (card_width + CARD_GAP) - CARD_GAP
    prompts = [_wrapped(card.prompt, card_width) for card in cards]
    text_height = max(map(len, prompts)) * PROMPT_LINE_HEIGHT + DETAIL_HEIGHT
    height = 2 * MARGIN + HEADING_HEIGHT + lines * (PANEL_SIDE + text_height) + NOTE_HEIGHT
    figure = Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH), dpi=DOTS_PER_INCH)
    for number, card in enumerate(cards):
        left = MARGIN + number % CARDS_PER_LINE * (card_width + CARD_GAP)
        bottom = height - MARGIN - HEADING_HEIGHT - PANEL_SIDE
        bottom -= number // CARDS_PER_LINE * (PANEL_SIDE + text_height)
        for place, panel in enumerate(panels):
            axes = _axes_at(figure, left + place * (PANEL_SIDE + PANEL_GAP), bottom, PANEL_SIDE, PANEL_SIDE)
            _draw_panel(axes, panel, card)
            if number < columns:
                axes.set_title(panel, loc="left", fontsize=DETAIL_SIZE, color=FAINT, pad=12)
        text_axes = _axes_at(figure, left, bottom - text_height, card_width, text_height)
        _write_text(text_axes, prompts[number], card)
    figure.text(MARGIN / width, MARGIN / height, note, fontsize=NOTE_SIZE, color=FAINT)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # a letter that the font lacks is drawn as a box
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        figure.savefig(buffer, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def _draw_panel(axes: Axes, panel: str, card: Card) -> None:
    photo = fitted(card.image, PANEL_SIDE)
    half = PANEL_SIDE / 2
    axes.set_facecolor(FRAME)
    axes.spines[:].set_visible(False)
    axes.set(xticks=[], yticks=[])
    if panel == "image":
        axes.imshow(photo)
    elif panel == "heat map" and card.relevance is not None:
        axes.imshow(overlay(photo, card.relevance))
    elif panel == "mask":
        _draw_mask(axes, photo, card.mask, MASK_COLOUR)
    elif panel == "ground truth" and card.truth is not None:
        _draw_mask(axes, photo, card.truth, TRUTH_COLOUR)
    axes.set(
        xlim=(photo.width / 2 - half - 0.5, photo.width / 2 + half - 0.5),
        ylim=(photo.height / 2 + half - 0.5, photo.height / 2 - half - 0.5),
    )


def _draw_mask(axes: Axes, photo: Image.Image, mask: Bool[np.ndarray, "rows columns"], colour: str) -> None:
    """Draw the object in its colours within a thick outline, the rest grey and pale."""
    smooth = np.array(Image.fromarray(mask).convert("L").resize(photo.size, Image.Resampling.BICUBIC))
    pixels = np.asarray(photo)
    axes.imshow(np.where(smooth[..., None] >= 128, pixels, paled(pixels)))
    if (smooth >= 128).any():
        # a rim of background gives a mask of the whole image an outline too
        columns, rows = (np.arange(-1, length + 1) for length in photo.size)
        axes.contour(columns, rows, np.pad(smooth, 1), levels=[127.5], colors=[colour], linewidths=2.5)


def _write_text(axes: Axes, prompt: Sequence[str], card: Card) -> None:
    """Write the prompt and the card's scores; what is wider than the card is cut."""
    details = [f"similarity {card.similarity:.2f}", f"mask {100 * card.mask.mean():.0f} % of the image"]
    details += [] if card.iou is None else [f"IoU {card.iou:.2f}"]
    height = axes.bbox.height
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(-height, 0))
    shared: dict[str, Any] = {"verticalalignment": "top", "parse_math": False, "clip_on": True}
    axes.text(0, -10, "\n".join(prompt), fontsize=PROMPT_SIZE, fontweight="bold", color=INK, **shared)
    below_prompt = -10 - len(prompt) * PROMPT_LINE_HEIGHT
    axes.text(0, below_prompt, "   ".join(details), fontsize=DETAIL_SIZE, color=FAINT, **shared)


def _wrapped(prompt: str, width: float) -> list[str]:
    """Break a prompt into lines for a width in pixels; an ellipsis replaces what does not fit."""
    one_line = printable(" ".join(prompt[:MAX_PROMPT].split()))
    characters = int(width / CAPITAL_WIDTH)
    return textwrap.wrap(one_line, characters, max_lines=PROMPT_LINES, placeholder=" …") or [""]


def _axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place in pixels."""
    figure_width, figure_height = figure.get_size_inches() * DOTS_PER_INCH
    return figure.add_axes(
        (left / figure_width, bottom / figure_height, width / figure_width, height / figure_height)
    )
