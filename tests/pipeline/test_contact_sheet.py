"""The contact sheet shows what the job wrote; unusual jobs give a sheet or a clear error."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from PIL import Image

from legrad.masks.rle import encode_rle
from pipeline.errors import UserError
from pipeline.output.schema import ANNOTATION_SCHEMA
from pipeline.report.contact_sheet import (
    FRAME,
    MASK_COLOUR,
    PANEL_SIDE,
    TRUTH_COLOUR,
    Card,
    draw_sheet,
    write_contact_sheet,
)
from pipeline.storage import list_shards
from tests.helpers.ground_truth_shards import job_document, label_map, scene_fields, write_shard

LABELS = label_map({1: (2, 12, 2, 14), 2: (12, 22, 22, 36)})


def annotation(
    index: int, prompt: int, mask: np.ndarray | None, *, heat: bool = True, **columns: Any
) -> dict[str, Any]:
    grid = np.arange(12, dtype=np.uint8) * 20
    stored = {"heatmap": grid.tobytes(), "heatmap_height": 3, "heatmap_width": 4} if heat else {}
    rle = None if mask is None else encode_rle(torch.from_numpy(mask[None]))[0]
    return {
        "key": f"scene{index}",
        "sample_index": index,
        "prompt_index": prompt,
        "prompt": f"object {prompt}",
        "similarity": 0.25,
        "peak": 0.5,
        "mask": rle,
        **stored,
        **columns,
    }


def write_job(
    folder: Path, rows: list[dict[str, Any]], *, truth: bool = True, scenes: int = 3
) -> tuple[str, Path]:
    folder.mkdir(parents=True)
    fields = scene_fields(LABELS, ["a dog", "a car"], [1, 2])
    if not truth:
        fields = {"png": fields["png"]}
    shard = write_shard(folder / "truth.tar", {f"scene{index}": fields for index in range(scenes)})
    out = folder / "out"
    (out / "annotations").mkdir(parents=True)
    (out / "job.json").write_text(json.dumps(job_document(out, folder / "unused.pt")))
    columns = [{name: row.get(name) for name in ANNOTATION_SCHEMA.names} for row in rows]
    table = pa.Table.from_pylist(columns, schema=ANNOTATION_SCHEMA)
    pq.write_table(table, out / "annotations" / f"{list_shards(str(shard))[0].shard_id}.parquet")
    return str(out), shard


def sheet(out: str, shard: Path, **options: Any) -> np.ndarray:
    path = write_contact_sheet(out, shard, Path(out) / "pictures" / "sheet.png", **options)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def drawn(*cards: Card) -> np.ndarray:
    with Image.open(io.BytesIO(draw_sheet(cards, note=""))) as image:
        return np.array(image.convert("RGB"))


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    return bool((pixels == np.rint(255 * np.array(to_rgb(colour)))).all(axis=-1).any())


def test_a_sheet_outlines_the_mask_and_the_ground_truth(tmp_path):
    pixels = sheet(
        *write_job(tmp_path / "job", [annotation(0, 0, LABELS == 1), annotation(0, 1, LABELS == 2)])
    )
    assert has_colour(pixels, MASK_COLOUR)
    assert has_colour(pixels, TRUTH_COLOUR)
    assert pixels.shape[1] > 8 * PANEL_SIDE, "two prompts side by side, four panels each"


def test_panels_that_no_card_has_are_omitted(tmp_path):
    rows = [annotation(0, 0, LABELS == 1), annotation(0, 1, LABELS == 2)]
    full = sheet(*write_job(tmp_path / "full", rows))
    no_truth = sheet(*write_job(tmp_path / "no-truth", rows, truth=False))
    bare_rows = [annotation(0, prompt, prompt + 1 == LABELS, heat=False) for prompt in (0, 1)]
    bare = sheet(*write_job(tmp_path / "bare", bare_rows, truth=False))
    assert full.shape[1] - no_truth.shape[1] == no_truth.shape[1] - bare.shape[1] > 2 * PANEL_SIDE
    assert not has_colour(no_truth, TRUTH_COLOUR)


def test_the_same_seed_draws_the_same_sheet(tmp_path):
    generator = np.random.default_rng(0)
    rows = [annotation(index, 0, generator.random(LABELS.shape) < 0.5) for index in range(3)]
    out, shard = write_job(tmp_path / "job", rows)
    first, again = (sheet(out, shard, rows=1, seed=5) for _ in range(2))
    assert np.array_equal(first, again)
    others = [sheet(out, shard, rows=1, seed=seed) for seed in range(6)]
    assert any(not np.array_equal(first, other) for other in others)


def test_prompts_of_one_sample_stay_on_one_line_and_rows_bounds_the_lines(tmp_path):
    rows = [annotation(index, prompt, prompt + 1 == LABELS) for index in range(3) for prompt in (0, 1)]
    out, shard = write_job(tmp_path / "job", rows)
    heights = [sheet(out, shard, rows=lines).shape[0] for lines in (1, 2, 3, 9)]
    assert heights[1] - heights[0] == heights[2] - heights[1] > PANEL_SIDE
    assert heights[3] == heights[2], "there are three samples, so never more than three lines"


def test_a_single_prompt_makes_a_sheet_of_one_column(tmp_path):
    pixels = sheet(*write_job(tmp_path / "job", [annotation(1, 0, LABELS == 1)]))
    assert pixels.shape[1] < 5 * PANEL_SIDE


def test_rejected_rows_and_rows_of_another_key_are_not_drawn(tmp_path):
    rejected = annotation(0, 0, None, status="rejected_peak")
    elsewhere = annotation(1, 0, LABELS == 1, key="another")
    out, shard = write_job(tmp_path / "job", [rejected, elsewhere])
    with pytest.raises(UserError, match="nothing to draw"):
        sheet(out, shard)


def test_a_folder_without_a_job_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"job\.json"):
        write_contact_sheet(str(tmp_path), "any.tar", tmp_path / "sheet.png")


def card(prompt: str = "a dog", size: tuple[int, int] = (40, 24), mask_fill: bool = True) -> Card:
    mask = np.full((24, 40), mask_fill)
    return Card(
        Image.new("RGB", size, (200, 10, 10)), prompt, 0.5, np.zeros((2, 2), np.float32), mask, None, None
    )


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return drawn(card())


@settings(max_examples=8, deadline=None)
@given(prompt=st.text(max_size=400), width=st.integers(1, 300), height=st.integers(1, 300))
@example(prompt=r"$\frac{1}{2}$ costs $5 \unknown{", width=40, height=24)
@example(prompt="犬と車 🐕 \ud800\x1b[31m\u202e\n\n", width=1, height=300)
@example(prompt="W" * 300, width=300, height=1)
def test_any_prompt_and_any_shape_of_image_fit_the_sheet(plain, prompt, width, height):
    pixels = drawn(card(prompt, (width, height)))
    assert pixels.shape[1] == plain.shape[1]
    assert pixels.shape[0] - plain.shape[0] in (0, 31), "one or two lines of text"
    assert (pixels[:, -16:] == 255).all(), "nothing runs over the right margin"


def test_a_long_caption_is_cut_after_two_lines():
    short, long = (drawn(card(" ".join(["word"] * count))) for count in (60, 600))
    assert short.shape == long.shape


def test_an_empty_mask_has_no_outline_and_one_of_the_whole_image_has():
    assert not has_colour(drawn(card(mask_fill=False)), MASK_COLOUR)
    assert has_colour(drawn(card(mask_fill=True)), MASK_COLOUR)


def test_images_that_are_not_square_keep_their_aspect():
    first_panel = drawn(card(size=(100, 50)))[:, 32 : 32 + PANEL_SIDE]
    photo_rows = (np.abs(first_panel.astype(int) - (200, 10, 10)).sum(axis=-1) < 10).all(axis=1)
    assert photo_rows.sum() == PANEL_SIDE // 2
    assert has_colour(first_panel, FRAME)
