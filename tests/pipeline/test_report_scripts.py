"""The report's scripts that touch no page, run by Node.js: heat maps, thresholds, outlines, marks."""

import numpy as np
import pytest

from legrad.heatmaps import upsample_columns
from pipeline.config.marks import MarkEntry, read_mark_list
from pipeline.report.level_maps import STEPS, level_map
from pipeline.report.pictures import mask_picture
from tests.helpers.report_jobs import HOSTILE
from tests.helpers.report_pages import NODE
from tests.helpers.report_pages import run_script as run

pytestmark = pytest.mark.skipif(not NODE, reason="Node.js is not on PATH (apt-get install nodejs)")


def argument(levels):
    """A map as the script takes it."""
    return {"text": levels.text, "mapHeight": levels.height, "mapWidth": levels.width, "steps": STEPS}


HEATMAP = "async (maps, ...rest) => [...await maps.heatmap(...rest)]"
CUT = (
    "async (maps, cut, ...rest) => { const found = maps.inside(await maps.heatmap(...rest), cut);"
    "return [[...found], maps.share(found)]; }"
)


@pytest.fixture(scope="module")
def cases():
    """Maps of random sizes, frames and thresholds; starting Node.js for each would take long."""
    generator = np.random.default_rng(0)
    sizes = [(tuple(generator.integers(1, 10, 2)), tuple(generator.integers(1, 41, 2))) for _ in range(20)]
    return [
        (level_map(generator.random(map_size), 10_000), [int(length) for length in size], cut)
        for (map_size, size), cut in zip(sizes, generator.random(20).tolist(), strict=True)
    ]


def test_heat_maps_and_masks_in_the_browser_are_those_of_the_library(cases):
    calls = [(argument(levels), *size) for levels, size, _ in cases]
    heats = run("maps", "maps.js", *([HEATMAP, *call] for call in calls))
    cuts = [cut for _, _, cut in cases]
    masks = run("maps", "maps.js", *([CUT, cut, *call] for cut, call in zip(cuts, calls, strict=True)))
    for (levels, size, cut), heat, (mask, share) in zip(cases, heats, masks, strict=True):
        expected = upsample_columns(levels.values(), *size).T
        np.testing.assert_allclose(np.reshape(heat, size), expected, atol=2e-6)
        certain = np.abs(expected - cut) > 1e-5
        assert (np.reshape(mask, size)[certain] == (expected > cut)[certain]).all()
        assert share == pytest.approx(np.mean(mask))


def test_a_map_of_zeros_has_nothing_above_any_threshold():
    levels = level_map(np.zeros((3, 4)), 10_000)
    ((mask, share),) = run("maps", "maps.js", [CUT, 0, argument(levels), 12, 16])
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


READ = """(marking, name, text, prompts = {}) => {
  try {
    return marking.read(name, text, (row) => prompts[row.key]);
  } catch (error) {
    return error.message;
  }
}"""


@pytest.mark.parametrize("form", ["csv", "json"])
def test_marks_that_the_page_saves_are_loaded_as_they_were(form):
    saved_and_loaded = f"(marking, rows) => marking.read('m.{form.upper()}', marking.{form}(rows))"
    assert run("marking", "marks.js", [saved_and_loaded, ROWS]) == [ROWS]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # as a spreadsheet saves it
        ("m.csv", "mark;key;prompt_index;shard;note\r\ngood;a;3;s3://b/1.tar;x\r\n;b;4;s3://b/1.tar;\r\n"),
        ("m.csv", 'shard,key,prompt_index,mark\ns3://b/1.tar,"a",3, GOOD '),
        ("m.json", '[{"shard": "s3://b/1.tar", "key": "a", "prompt_index": 3, "mark": "Good", "more": 1}]'),
        (
            "m.json",
            '[{"shard": "s3://b/1.tar", "key": "a", "prompt_index": 3, "mark": "good"}, {"mark": ""}]',
        ),
    ],
)
def test_files_that_the_pipeline_reads_are_loaded_as_it_reads_them(tmp_path, name, text):
    (loaded,) = run("marking", "marks.js", [READ, name, text])
    (tmp_path / name).write_bytes(text.encode())
    assert tuple(MarkEntry(**{**row, "prompt": row["prompt"] or None}) for row in loaded) == read_mark_list(
        str(tmp_path / name)
    )
    assert [row["key"] for row in loaded] == ["a"]


HEADER = "shard,key,prompt_index,prompt,mark\n"
INVALID = {
    "another kind of file": ("marks.txt", "", "expected a file named .csv or .json"),
    "an empty file": (
        "m.csv",
        "",
        "the first line does not name shard, key, prompt_index, mark; expected shard",
    ),
    "an open quotation mark": ("m.csv", f'{HEADER}s,"a,0,,good\n', "line 2: a quotation mark is not closed"),
    "another mark": (
        "m.csv",
        f"{HEADER}s,a,0,,good\ns,b,0,,maybe\n",
        "line 3: mark is “maybe”; expected good or bad",
    ),
    "no number": (
        "m.csv",
        f"{HEADER}s,a,-1,,good\n",
        "line 2: prompt_index is “-1”; expected a number from 0 to 32767",
    ),
    "no shard": ("m.csv", f"{HEADER},a,0,,good\n", "line 2: shard is “”; expected the URL of a shard"),
    "a line after one of several": (
        "m.csv",
        f'{HEADER}s,"a\nb",0,,good\ns,a,x,,bad',
        "line 4: prompt_index is “x”",
    ),
    "no JSON": ("m.json", "[", "is not valid JSON"),
    "no list": ("m.json", '{"mark": "good"}', "expected a list of marks"),
    "no object": (
        "m.json",
        "[[]]",
        "entry 1: expected an object with shard, key, prompt_index, prompt, mark",
    ),
    "a number as key": (
        "m.json",
        '[{"shard": "s", "key": 7, "prompt_index": 0, "mark": "bad"}]',
        "entry 1: key is “7”; expected the key of a sample",
    ),
    "both marks": (
        "m.csv",
        f"{HEADER}s,a,0,,good\ns,a,0,,bad\n",
        "line 3: prompt 0 of sample “a” is marked both good",
    ),
    "another prompt": (
        "m.csv",
        f"{HEADER}s,shown,0,a cat,good\n",
        "line 2: prompt 0 of sample “shown” was marked as “a cat”, and is “a dog” here: these are",
    ),
    "characters that turn text around": (
        "m.csv",
        f"{HEADER}s,a,0,,\u202e<b>{'x' * 99}\n",
        "line 2: mark is “\\u202e<b>xxx",
    ),
    "many problems": ("m.csv", HEADER + "s,a,0,,x\n" * 9, "and 4 more problems"),
}


@pytest.mark.parametrize(("name", "text", "message"), INVALID.values(), ids=INVALID.keys())
def test_a_file_that_is_not_of_marks_is_refused_with_the_place_and_the_reason(name, text, message):
    (found,) = run("marking", "marks.js", [READ, name, text, {"shown": "a dog"}])
    assert isinstance(found, str)
    assert message in found
    assert len(found) < 600


def test_a_prompt_that_either_side_has_cut_is_the_same_prompt():
    text = HEADER + "".join(f"s,{key},0,{prompt},good\n" for key, prompt in (("a", "a dog…"), ("b", "a dog")))
    (found,) = run("marking", "marks.js", [READ, "m.csv", text, {"a": "a dog on grass", "b": "a d…"}])
    assert len(found) == 2


MERGE = """(marking, before, loaded) => {
  const kept = new Map();
  const getItem = (name) => kept.get(name) ?? null;
  const storage = { getItem, setItem: (name, text) => kept.set(name, text) };
  const marks = marking.open(storage, "name");
  for (const row of before) marks.set(row, row.mark);
  return [marks.merge(loaded), marking.open(storage, "name").all()];
}"""


def test_loaded_marks_are_added_and_replace_those_of_the_same_rows():
    loaded = [ROWS[0], {**ROWS[1], "mark": "good", "prompt": ""}, ROWS[2]]
    ((counts, kept),) = run("marking", "marks.js", [MERGE, ROWS[:2], loaded])
    assert counts == {"added": 1, "changed": 1}
    assert kept == [ROWS[0], {**ROWS[1], "mark": "good"}, ROWS[2]]
