"""The report's scripts that touch no page, run by Node.js: heat maps, thresholds, outlines, marks."""

import base64
import json
import shutil
import subprocess
from importlib.resources import files

import numpy as np
import pytest

from legrad.heatmaps import heatmap_columns, upsample_columns
from pipeline.config.marks import MarkEntry, read_mark_list
from pipeline.report.pictures import mask_picture
from tests.helpers.report_jobs import HOSTILE

NODE = shutil.which("node") or shutil.which("nodejs")
pytestmark = pytest.mark.skipif(not NODE, reason="Node.js is not on PATH (apt-get install nodejs)")
HARNESS = """
const vm = require("vm");
const { source, name, calls } = JSON.parse(require("fs").readFileSync(0, "utf8"));
const api = vm.runInThisContext(`${source}; ${name}`);
console.log(JSON.stringify(calls.map((call) => vm.runInThisContext(`(${call[0]})`)(api, ...call.slice(1)))));
"""


def run(name, script, *calls):
    """Call functions of (api, ...arguments) on what a script of the page defines; return their results."""
    source = (files("pipeline.report") / "templates" / script).read_text(encoding="utf-8")
    done = subprocess.run(
        [NODE, "-e", HARNESS],
        input=json.dumps({"source": source, "name": name, "calls": calls}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_base64(grid):
    return base64.b64encode(np.rint(grid * 65535).astype("<u2").tobytes()).decode()


HEATMAP = "(maps, ...rest) => [...maps.heatmap(...rest)]"
CUT = (
    "(maps, cut, ...rest) => { const found = maps.inside(maps.heatmap(...rest), cut);"
    "return [[...found], maps.share(found)]; }"
)


@pytest.fixture(scope="module")
def cases():
    """Grids of random sizes, frames and thresholds; starting Node.js for each would take long."""
    generator = np.random.default_rng(0)
    sizes = [(tuple(generator.integers(1, 10, 2)), tuple(generator.integers(1, 41, 2))) for _ in range(20)]
    return [
        (np.rint(generator.random(grid_size) * 65535) / 65535, [int(length) for length in size], cut)
        for (grid_size, size), cut in zip(sizes, generator.random(20).tolist(), strict=True)
    ]


def test_heat_maps_and_masks_in_the_browser_are_those_of_the_library(cases):
    calls = [(in_base64(grid), *grid.shape, *size, "upsampled") for grid, size, _ in cases]
    heats = run("maps", "maps.js", *([HEATMAP, *call] for call in calls))
    cuts = [cut for _, _, cut in cases]
    masks = run("maps", "maps.js", *([CUT, cut, *call] for cut, call in zip(cuts, calls, strict=True)))
    for (grid, size, cut), heat, (mask, share) in zip(cases, heats, masks, strict=True):
        expected = heatmap_columns(grid.astype(np.float32), *size, "upsampled").T
        np.testing.assert_allclose(np.reshape(heat, size), expected, atol=2e-6)
        certain = np.abs(expected - cut) > 1e-5
        assert (np.reshape(mask, size)[certain] == (expected > cut)[certain]).all()
        assert share == pytest.approx(np.mean(mask))


def test_grids_that_are_normalised_are_only_enlarged(cases):
    calls = [(in_base64(grid), *grid.shape, *size, "grid") for grid, size, _ in cases]
    heats = run("maps", "maps.js", *([HEATMAP, *call] for call in calls))
    for (grid, size, _), heat in zip(cases, heats, strict=True):
        expected = upsample_columns(grid.astype(np.float32), *size).T
        np.testing.assert_allclose(np.reshape(heat, size), expected, atol=2e-6)


def test_a_constant_map_has_nothing_above_any_threshold():
    grid = np.full((3, 4), 0.7)
    ((mask, share),) = run("maps", "maps.js", [CUT, 0, in_base64(grid), 3, 4, 12, 16, "upsampled"])
    assert (sum(mask), share) == (0, 0)


DRAW = "(maps, pixels, mask, height, width) => maps.draw(pixels, mask, height, width)"


@pytest.mark.parametrize("box", [(8, 5, 20, 30), (0, 0, 40, 40), (0, 0, 0, 0), (30, 0, 40, 3)])
def test_a_mask_is_drawn_in_the_browser_as_on_the_page(box):
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    mask = np.zeros((40, 40), dtype=bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    rgba = np.dstack([photo, np.full((40, 40), 255)])
    (pixels,) = run(
        "maps", "maps.js", [DRAW, rgba.ravel().tolist(), mask.astype(int).ravel().tolist(), 40, 40]
    )
    # greys are rounded in two ways
    np.testing.assert_allclose(np.reshape(pixels, (40, 40, 4))[..., :3], mask_picture(photo, mask), atol=1)


ROWS = [
    {"shard": shard, "key": key, "prompt_index": prompt_index, "prompt": prompt, "mark": mark}
    for shard, key, prompt_index, prompt, mark in [
        (f"file:///{HOSTILE}/0.tar", HOSTILE, 3, 'a "b"\r\nc', "good"),
        ("s3://b/1.tar", "=1+1", 0, "-2", "bad"),
        ("s3://b/1.tar", "'@x, ü€", 32767, "'plain'", "bad"),
    ]
]


@pytest.mark.parametrize("form", ["csv", "json"])
def test_marks_that_the_page_saves_are_read_as_they_were(tmp_path, form):
    (text,) = run("marking", "marks.js", [f"(marking, rows) => marking.{form}(rows)", ROWS])
    path = tmp_path / f"marks.{form}"
    path.write_bytes(text.encode())
    assert read_mark_list(str(path)) == tuple(MarkEntry(**row) for row in ROWS)
    if form == "csv":
        assert '"\'=1+1"' in text, "a spreadsheet takes it for a text, not for a formula"


STORE = """(marking, rows, stored) => {
  const kept = new Map(stored === null ? [] : [["name", stored]]);
  const getItem = (name) => kept.get(name) ?? null;
  const storage = { getItem, setItem: (name, text) => kept.set(name, text) };
  const marks = marking.open(storage, "name");
  for (const row of rows) marks.set(row, row.mark);
  return [marking.open(storage, "name").all(), rows.map(marks.markOf), marks.isKept()];
}"""
REFUSING = """(marking, rows) => {
  const marks = marking.open(null, "name");
  for (const row of rows) marks.set(row, row.mark);
  return [marks.all().length, marks.isKept()];
}"""


def test_marks_are_kept_changed_and_removed():
    again = [{**ROWS[0], "mark": "bad"}, {**ROWS[1], "mark": ""}]
    ((kept, marks, is_kept),) = run("marking", "marks.js", [STORE, [*ROWS, *again], None])
    assert kept == [again[0], ROWS[2]]
    assert marks == ["bad", "", "bad", "bad", ""]
    assert is_kept


@pytest.mark.parametrize("stored", ["", "{", "null", "7", '[1, null, {"mark": "good"}]', '[{"shard": 3}]'])
def test_what_another_page_has_stored_under_the_same_name_is_no_obstacle(stored):
    ((kept, _, _),) = run("marking", "marks.js", [STORE, ROWS[:1], stored])
    assert kept == ROWS[:1]


def test_without_storage_marks_last_as_long_as_the_page():
    assert run("marking", "marks.js", [REFUSING, ROWS]) == [[3, False]]
