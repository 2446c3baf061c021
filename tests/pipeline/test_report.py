"""The report: one page about an output folder, whatever the folder contains."""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from legrad.heatmaps import heatmap_columns
from pipeline.cli import main as cli
from pipeline.errors import UserError
from pipeline.output.folder import OutputFolder
from pipeline.report import write_report
from pipeline.report.charts import class_bars, histogram, throughput_chart
from pipeline.report.level_maps import SIDES, LevelMap, level_map
from pipeline.report.pictures import (
    DARK_RGB,
    MASK_RGB,
    TRUTH_RGB,
    RowParts,
    draw_pictures,
    mask_picture,
    paled,
)
from pipeline.report.scores import read_scores
from pipeline.report.selection import choose_rows
from pipeline.report.write import MAX_SAMPLES, PICTURE_BYTES
from tests.helpers.corpus import image_bytes
from tests.helpers.report_jobs import HOSTILE, box_rle, error, record_run, row, varied_rows, write_job
from tests.helpers.report_pages import Page

PAGE_BYTES = 5_000_000


def page_of(out, *shards, **options):
    path = out.parent / "page.html"
    report = write_report(str(out), shards, to=str(path), **options)
    assert report.size_bytes == path.stat().st_size < PAGE_BYTES
    return report, Page(path.read_text(encoding="utf-8"))


def listed_shards(out):
    return pq.read_table(out / "shards.parquet").column("shard_id").to_pylist()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    rows = varied_rows(30)
    return write_job(
        tmp_path_factory.mktemp("job"), [rows[:20], rows[20:]], errors=[error(i) for i in range(40, 47)]
    )


def test_a_page_shows_rows_pictures_errors_runs_and_provenance(job):
    report, page = page_of(job)
    assert (report.rows_shown, report.pictures, report.unread_shards) == (30, 30, {})
    for text in (
        "complete",
        "2 / 2",
        "30 annotated, 0 empty, 7 failed",
        "thing number 29",
        "rejected: similarity",
        "All 30 rows.",
        "decode/truncated",
        "the image ends early",
        "mean 20",
        "legrad_demo_clip, demo",
        "batch_size: 8",
        "sha256:",
        "torch",
    ):
        assert text in page.text, text
    pictures = [image for image in page.having("src") if image.get("class") != "chart"]
    assert len(pictures) == 30 * 3, "a photo, a mask and a heat map each"


def test_every_chart_has_its_figures_in_words(job):
    _, page = page_of(job)
    charts = [image for image in page.having("src") if image.get("class") == "chart"]
    assert len(charts) == 5, "similarity, peak, area, threshold, and the run"
    for chart in charts:
        svg = base64.b64decode(chart["src"].removeprefix("data:image/svg+xml;base64,"))
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert len(chart["src"]) < 20_000
    assert "30 rows by cosine of image and prompt: 24 accepted, 6 rejected" in charts[0]["alt"]
    assert all(figure in charts[0]["alt"] for figure in ("median", "middle half"))
    assert "mean 20.0" in charts[-1]["alt"]


def test_a_page_loads_nothing_from_elsewhere(job):
    _, page = page_of(job)
    addresses = [
        value
        for name in ("src", "href", "action", "srcset")
        for value in (attributes[name] for attributes in page.having(name))
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    style = re.search(r"<style>(.*?)</style>", page.html, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_what_is_on_the_page_and_nothing_else(job):
    _, page = page_of(job)
    (policy,) = (attributes["content"] for attributes in page.having("http-equiv"))
    for tag in ("style", "script"):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not page.having("style"), "the policy forbids style attributes"
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


@pytest.mark.parametrize("shown", ["with pictures", "without pictures"])
def test_texts_of_others_are_never_markup(tmp_path, shown):
    rows = [
        row(0, prompt=HOSTILE, key=HOSTILE.replace("/", "").replace(".", "")),
        row(1, prompt="\u202ereversed\x1b[31m"),
    ]
    out = write_job(tmp_path, [rows], errors=[error(5, kind=HOSTILE, message=HOSTILE, key=HOSTILE)])
    if shown == "without pictures":
        (tmp_path / "0.tar").unlink()
    plain = Page(page_of(write_job(tmp_path / "plain", [[row(0), row(1)]], errors=[error(5)]))[1].html)
    _, page = page_of(out, classes_file=str(write_classes(tmp_path)))
    kinds = Counter(tag for tag, _ in page.elements)
    if shown == "with pictures":
        assert kinds == Counter(tag for tag, _ in plain.elements)
    assert kinds["script"] == 1
    assert HOSTILE in page.text.replace("  ", " ")
    assert "\x1b" not in page.html
    assert "\u202e" not in page.html


def write_classes(folder):
    (folder / "classes.txt").write_text(f"{HOSTILE}\n")
    return folder / "classes.txt"


def test_rows_of_classes_are_counted_and_named_by_the_file_or_by_their_prompt(tmp_path):
    out = write_job(tmp_path, [varied_rows(20, classes=3)])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    _, page = page_of(out, classes_file=str(tmp_path / "classes.txt"))
    assert {"cat", "dog"} <= set(page.texts)
    assert any(text.startswith("thing number") for text in page.texts)
    assert {card["data-class"] for card in page.cards} == {"1", "2", "3"}
    figures = re.search(r"cat</th>.*?</tr>", page.html, re.DOTALL)[0]
    assert re.findall(r'class="num">([\d.]+)<', figures)[:2] == ["6", "1"]


def test_a_job_without_rows_gives_a_page(tmp_path):
    out = write_job(tmp_path, [[]], runs=False)
    report, page = page_of(out)
    assert report.rows_shown == 0
    assert "There are no rows" in page.text
    assert "There is no record of a run" in page.text


def test_a_job_of_errors_alone_gives_a_page(tmp_path):
    out = write_job(tmp_path, [[]], errors=[error(0), error(1, kind="empty")])
    _, page = page_of(out)
    assert "There are no rows" in page.text
    assert "decode/truncated" in page.text
    assert "decode/empty" in page.text


def test_the_page_of_an_unfinished_job_names_failed_and_remaining_shards(tmp_path):
    rows = [row(0)]
    out = write_job(tmp_path, [rows] * 4, done=1)
    given_up = listed_shards(out)[1]
    (out / "failed").mkdir()
    record = {
        "shard_id": given_up,
        "shard": "a.tar",
        "attempts": 3,
        "last_error": "it <b>kills</b> its worker",
    }
    (out / "failed" / f"{given_up}.json").write_text(json.dumps(record))
    _, page = page_of(out)
    for text in ("incomplete", "1 / 4", "1 failed, 2 left", "it <b>kills</b> its worker"):
        assert text in page.text, text


def test_the_first_screen_names_the_places_that_the_last_run_left_alone(tmp_path):
    out = write_job(tmp_path, [varied_rows(3)], runs=False)
    record_run(
        out, workers_wanted=8, workers_lost=3, left_alone=("10.0.0.7, GPU 3: 3 workers lost <b>", "10.0.0.9")
    )
    first_screen = page_of(out)[1].html.partition('id="gallery"')[0]
    assert "2 place(s) got no further shards" in first_screen
    assert "10.0.0.7, GPU 3: 3 workers lost &lt;b&gt;; 10.0.0.9." in first_screen
    assert "workers 1 of 8, 3 lost" in first_screen


def test_a_job_that_has_only_begun_gives_a_page(tmp_path):
    _, page = page_of(write_job(tmp_path, [[row(0)]], done=0))
    assert "0 / 1" in page.text


def test_without_its_shards_a_page_has_no_pictures_and_says_why(tmp_path):
    out = write_job(tmp_path, [[row(0), row(1)], [row(0)]])
    (tmp_path / "0.tar").unlink()
    report, page = page_of(out)
    assert (report.rows_shown, report.pictures) == (3, 1)
    assert "1 shard without pictures" in page.text
    (tmp_path / "1.tar").unlink()
    report, page = page_of(out)
    assert (report.rows_shown, report.pictures, len(report.unread_shards)) == (3, 0, 2)
    assert "No image could be read" in page.text
    assert "thing number 1" in page.text


@pytest.mark.parametrize("given_as", ["mapping", "pattern"])
def test_shards_that_moved_are_found_where_the_user_says(tmp_path, given_as):
    out = write_job(tmp_path / "old", [[row(0)], [row(1)]])
    (tmp_path / "new").mkdir()
    for name in ("0.tar", "1.tar"):
        shutil.move(tmp_path / "old" / name, tmp_path / "new" / name)
    place = f"{tmp_path}/old={tmp_path}/new" if given_as == "mapping" else f"{tmp_path}/new/*.tar"
    assert page_of(out, place)[0].pictures == 2


def test_a_shard_of_other_samples_under_the_same_name_gives_no_wrong_picture(tmp_path):
    out = write_job(tmp_path, [[row(0), row(1)]])
    write_job(tmp_path / "other", [[row(0, key="someone else"), row(1)]])
    report, page = page_of(out, f"{tmp_path}/other/*.tar")
    assert report.pictures == 1
    assert "has no such sample" in page.text
    shutil.copy(tmp_path / "other" / "0.tar", tmp_path / "0.tar")
    report, page = page_of(out)
    assert report.pictures == 0
    assert "changed since it was annotated" in page.text


def test_an_image_that_cannot_be_read_leaves_its_card_without_a_picture(tmp_path):
    report, page = page_of(write_job(tmp_path, [[row(0)]], images=b"no image"))
    assert (report.rows_shown, report.pictures) == (1, 0)
    assert "expected a JPEG" in page.text


def test_annotation_files_that_cannot_be_read_are_named_and_skipped(tmp_path):
    out = write_job(tmp_path, [[row(0)], [row(1)]])
    torn = listed_shards(out)[0]
    (out / "annotations" / f"{torn}.parquet").write_bytes(b"PAR1 torn")
    report, page = page_of(out)
    assert report.rows_shown == 1
    assert "1 to be annotated again" in page.text


@pytest.mark.slow
def test_noise_in_every_picture_keeps_the_page_within_its_bound(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (500, 400, 3), dtype=np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(noise).save(path)
    frame = {"image_height": 500, "image_width": 400, "mask": box_rle(0, 0, 500, 400, 500, 400)}
    grid = {"heatmap": noise.tobytes()[:900], "heatmap_height": 30, "heatmap_width": 30}
    rows = [row(index, **frame, **grid) for index in range(30)]
    report, page = page_of(write_job(tmp_path, [rows], images=path.read_bytes()), samples=30)
    assert report.pictures == 30
    pictures = [image for image in page.having("src") if image.get("class") != "chart"]
    assert sum(len(image["src"]) for image in pictures) <= PICTURE_BYTES


def test_as_many_and_as_long_texts_as_there_can_be_fit_beside_the_pictures(tmp_path):
    text = "<&" * 200
    rows = [row(index, prompt=text, key=f"{index}{text}") for index in range(MAX_SAMPLES)]
    errors = [error(index, kind=f"kind{index}", message="<" * 500, key="&" * 400) for index in range(300)]
    out = write_job(
        tmp_path,
        [rows],
        done=1,
        errors=errors,
        input={"shards": [f"/no/{number}{'<' * 200}.tar" for number in range(100)]},
    )
    report, _ = page_of(out, samples=MAX_SAMPLES)
    assert (report.rows_shown, report.pictures) == (MAX_SAMPLES, 0)
    assert report.size_bytes < PAGE_BYTES - PICTURE_BYTES


@pytest.mark.parametrize("samples", [-1, MAX_SAMPLES + 1])
def test_more_rows_than_a_page_holds_are_refused(job, samples):
    with pytest.raises(UserError, match="samples"):
        write_report(str(job), samples=samples)


def test_a_folder_without_a_job_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"job\.json"):
        write_report(str(tmp_path))


def test_the_command_prints_where_the_page_is(job, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["legrad", "report", str(job), "--samples", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == 0
    printed = capsys.readouterr().out
    assert str(job / "report.html") in printed
    assert "3 rows, 3 with pictures" in printed
    assert (job / "report.html").exists()
    (job / "report.html").unlink()


# --- what is read, and what is shown of it


def test_scores_are_those_in_the_files(job):
    scores = read_scores(OutputFolder(str(job)), listed_shards(job), np.random.default_rng(0))
    expected = {
        (path.stem, entry["sample_index"]): entry
        for path in (job / "annotations").iterdir()
        for entry in pq.read_table(path).to_pylist()
    }
    assert len(scores) == len(expected) == 30
    for number in range(30):
        entry = expected[scores.shard_id(number), scores.sample_index[number]]
        assert scores.status[number] == entry["status"]
        assert scores.similarity[number] == np.float32(entry["similarity"])
        if entry["mask"] is not None:
            assert scores.area_share[number] == pytest.approx(entry["area"] / (48 * 64))
        else:
            assert np.isnan(scores.area_share[number])


def test_what_prompts_that_competed_ignore_together_counts_once(tmp_path):
    shared = {"threshold": None, "ignore": box_rle(0, 0, 24, 64)}
    rows = [
        row(0, 0, status="rejected_peak"),
        *(row(0, prompt, **shared) for prompt in (1, 2)),
        row(1, 0, **shared),
        *(row(2, prompt, ignore=box_rle(0, 0, 12, 64)) for prompt in (0, 1)),
    ]
    out = write_job(tmp_path, [rows])
    scores = read_scores(OutputFolder(str(out)), listed_shards(out), np.random.default_rng(0))
    np.testing.assert_allclose(scores.ignored_share, [np.nan, 0.5, np.nan, 0.5, 0.25, 0.25])
    _, page = page_of(out)
    assert "4 rows: median 0.375" in page.text


def test_a_row_with_an_empty_mask_counts_as_accepted_and_is_mentioned(tmp_path):
    empty = {"area": 0, "mask": box_rle(0, 0, 0, 0), "bbox_xywh": [0.0] * 4, "threshold": 0.5}
    rows = [row(0), row(1, status="empty_mask", **empty), row(2, status="rejected_peak")]
    out = write_job(tmp_path, [rows])
    scores = read_scores(OutputFolder(str(out)), listed_shards(out), np.random.default_rng(0))
    assert scores.accepted.tolist() == [True, True, False]
    np.testing.assert_allclose(scores.area_share[1], 0)
    _, page = page_of(out)
    assert "1 rejected: peak, 1 with an empty mask" in page.texts
    assert "accepted: empty mask" in page.texts


def test_ignored_pixels_are_counted_where_rows_have_an_ignore_mask(tmp_path):
    rows = [
        row(0),
        row(1, ignore=box_rle(0, 0, 24, 64)),
        row(2, ignore=box_rle(0, 0, 12, 32)),
    ]
    out = write_job(tmp_path, [rows])
    scores = read_scores(OutputFolder(str(out)), listed_shards(out), np.random.default_rng(0))
    np.testing.assert_allclose(scores.ignored_share, [np.nan, 0.5, 0.125])
    _, page = page_of(out)
    assert "2 rows: median 0.312" in page.text
    assert "50.0 %" in page.texts
    assert "Ignored" in page.texts
    assert "Ignored" not in page_of(write_job(tmp_path / "none", [[row(0)]]))[1].texts


def test_reading_is_bounded_by_files_and_by_rows(tmp_path):
    out = write_job(tmp_path, [varied_rows(10)] * 6)
    shards = listed_shards(out)
    few_files = read_scores(OutputFolder(str(out)), shards, np.random.default_rng(1), max_files=2)
    assert (few_files.files_read, few_files.files_total, len(few_files)) == (2, 6, 20)
    few_rows = read_scores(OutputFolder(str(out)), shards, np.random.default_rng(1), max_rows=25)
    assert len(few_rows) == 30, "whole row groups"


def test_the_same_seed_shows_the_same_rows_and_another_seed_others(tmp_path):
    out = write_job(tmp_path, [varied_rows(12)])

    def shown(seed):
        return [card["data-similarity"] for card in page_of(out, samples=4, seed=seed)[1].cards]

    assert shown(1) == shown(1) != shown(2)


@settings(max_examples=60)
@given(count=st.integers(0, 40), rows=st.integers(0, 30), seed=st.integers(0, 99), data=st.data())
def test_chosen_rows_are_distinct_allowed_half_random_and_hold_the_extremes(count, rows, seed, data):
    generator = np.random.default_rng(seed)
    similarity = generator.permutation(rows).astype(float)
    scores = fake_scores(similarity, generator)
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), dtype=bool)
    chosen, at_random = choose_rows(scores, allowed, count, generator)
    assert len(set(chosen)) == len(chosen) == min(count, int(allowed.sum()))
    assert all(allowed[row] for row in chosen)
    assert at_random <= set(chosen)
    assert set(chosen[: len(at_random)]) == at_random
    assert len(at_random) <= max(1, round(count / 2))
    if count >= 14 and allowed.any():
        candidates = np.flatnonzero(allowed)
        assert candidates[similarity[candidates].argmax()] in chosen
        assert candidates[similarity[candidates].argmin()] in chosen


def fake_scores(similarity, generator):
    from pipeline.report.scores import ScoredRows

    count = len(similarity)
    status = np.array(["ok", "rejected_peak"], dtype=object)[generator.integers(0, 2, count)]
    numbers = generator.random((3, count))
    numbers[2][status != "ok"] = np.nan
    ordinals = np.arange(count)
    return ScoredRows(
        (("a", 0),),
        ordinals * 0,
        ordinals,
        ordinals,
        status,
        ordinals * 0 - 1,
        similarity,
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[1],
        1,
        1,
        (),
    )


# --- charts and pictures


@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), max_size=60),
    accepted=st.integers(0, 2**60),
)
def test_a_histogram_reports_every_finite_value(values, accepted):
    good = np.array([bool(accepted >> place & 1) for place in range(len(values))], dtype=bool)
    chart = histogram("Score", "unit", np.array(values, dtype=np.float64), good)
    finite = np.isfinite(np.array(values, dtype=np.float64))
    if not finite.any():
        assert chart is None
        return
    accepted_rows, rejected_rows = (finite & good).sum(), (finite & ~good).sum()
    assert (
        f"{finite.sum()} rows by unit: {accepted_rows} accepted, {rejected_rows} rejected"
        in chart.description
    )
    assert chart.has_rejected == bool(rejected_rows)
    assert ElementTree.fromstring(svg_of(chart)).get("viewBox") == "0 0 360 200"


def svg_of(chart):
    return base64.b64decode(chart.uri.partition(",")[2])


def levels(chart, colour):
    """The heights of the steps that are drawn in a colour, in pixels above the axis."""
    paths = re.findall(rf'd="([^"]*)"[^>]*style="fill: {colour}', svg_of(chart).decode())
    points = [tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", paths[0])]
    floor = max(y for _, y in points)
    return [floor - y for _, y in points]


def test_a_histogram_draws_bars_in_proportion_to_their_rows():
    values = np.repeat([0.05, 0.95], [10, 40])
    chart = histogram("Score", "unit", values, np.ones(50, dtype=bool), (0.0, 1.0))
    heights = sorted({round(height, 2) for height in levels(chart, "#2f6fb7")} - {0.0})
    assert len(heights) == 2
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.05)


def test_the_same_chart_has_the_same_bytes():
    values, accepted = np.linspace(0, 1, 50), np.ones(50, dtype=bool)
    assert histogram("Score", "unit", values, accepted) == histogram("Score", "unit", values, accepted)


def test_a_long_tail_is_gathered_in_the_last_bar_and_the_summary_says_so():
    values = np.concatenate([np.linspace(0, 1, 1000), [50.0]])
    chart = histogram("Peak", "unit", values, np.ones(1001, dtype=bool))
    assert re.search(r"last bar also holds \d rows beyond", chart.summary)
    assert len([height for height in levels(chart, "#2f6fb7") if height > 0]) > 20


def test_the_throughput_between_two_points_is_a_step():
    chart = throughput_chart("today", [(0.0, 0), (10.0, 0), (20.0, 100)])
    assert "mean 5.0, highest 10.0" in chart.summary
    heights = levels(chart, "#2f6fb7")
    assert heights.count(max(heights)) == 2
    assert heights.count(0.0) > 2


def test_a_long_history_is_drawn_in_few_steps_and_keeps_its_end():
    chart = throughput_chart("today", [(float(second), 10 * second) for second in range(200)])
    heights = levels(chart, "#2f6fb7")
    assert 30 < len(heights) <= 46
    assert chart.description == "Samples per second over 3.32 minutes."
    assert len({round(height, 3) for height in heights}) == 2, "a steady throughput is a level line"


@pytest.mark.parametrize("history", [[], [(0.0, 0)], [(0.0, 0), (0.0, 5)], [(0.0, 0), (float("nan"), 5)]])
def test_a_history_without_throughput_gives_no_chart(history):
    assert throughput_chart("today", history) is None


def test_the_most_frequent_classes_come_first_and_the_others_are_counted():
    class_ids = np.repeat(np.arange(40), np.arange(1, 41))
    accepted = np.arange(len(class_ids)) % 2 == 0
    bars, omitted = class_bars({39: "last"}, class_ids, accepted, np.ones(len(class_ids)))
    assert (len(bars), omitted) == (30, 10)
    assert (bars[0].name, bars[1].name) == ("last", "class 38")
    assert [bar.accepted + bar.rejected for bar in bars] == list(range(40, 10, -1))


@settings(max_examples=15)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    max_bytes=st.integers(0, 60_000),
    noisy=st.booleans(),
    parts=st.sets(st.sampled_from(["heatmap", "mask", "ignored", "truth", "slider_map"])),
)
def test_pictures_never_take_more_bytes_than_they_may(width, height, max_bytes, noisy, parts):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256 if noisy else 1, (height, width, 3), dtype=np.uint8)
    drawn = draw_pictures(
        RowParts(
            Image.fromarray(pixels),
            generator.random((7, 9), dtype=np.float32) if "heatmap" in parts else None,
            *(
                generator.random((20, 30)) < 0.5 if name in parts else None
                for name in ("mask", "ignored", "truth")
            ),
            generator.random((50, 70), dtype=np.float32) if "slider_map" in parts else None,
        ),
        max_bytes,
    )
    if drawn is None:
        assert max_bytes < 12_000
        return
    texts = [drawn.photo, drawn.mask, drawn.heat, drawn.layer, drawn.levels and drawn.levels.text]
    assert sum(len(text) for text in texts if text is not None) <= max_bytes
    assert (drawn.heat is not None) == ("heatmap" in parts)
    assert (drawn.levels is not None) == ("slider_map" in parts)
    assert (drawn.layer is not None) == bool(parts & {"ignored", "truth"})


def test_a_mask_keeps_its_colours_within_an_outline_of_two_tones_and_the_rest_is_pale():
    photo = np.full((40, 40, 3), (200, 60, 20), dtype=np.uint8)
    inside = np.zeros((40, 40), dtype=bool)
    inside[10:30, 20:40] = True
    picture = mask_picture(photo, inside)
    assert (picture[12:28, 22:38] == (200, 60, 20)).all()
    for outermost in (picture[10:12, 20:], picture[10:30, 20:22], picture[10:30, 38:]):
        assert (outermost == MASK_RGB).all()
    assert (picture[9, 19:] == DARK_RGB).all()
    assert (picture[:, :19] == paled(photo)[:, :19]).all()
    assert (np.ptp(paled(photo), axis=2) == 0).all()
    assert (mask_picture(photo, None) == paled(photo)).all()


def test_ground_truth_is_outlined_and_ignored_pixels_are_hatched_on_a_layer_of_their_own():
    image = Image.open(io.BytesIO(image_bytes(0, 40, 40)))
    truth, ignored = np.zeros((2, 40, 40), dtype=bool)
    truth[10:30, 20:40], ignored[:, :10] = True, True
    drawn = draw_pictures(RowParts(image, None, truth, ignored, truth), 50_000)
    layer = Image.open(io.BytesIO(base64.b64decode(drawn.layer.partition(",")[2]))).convert("RGBA")
    pixels = np.asarray(layer)
    assert (pixels[10, 20:40] == (*TRUTH_RGB, 255)).all()
    assert (pixels[12:28, 22:38, 3] == 0).all()
    assert 0.2 < (pixels[:, :10, 3] == 255).mean() < 0.5
    assert (pixels[:, 12:18, 3] == 0).all()


# --- thresholds, marks, keys of errors


def test_every_value_of_a_map_stays_on_its_side_of_the_positions_of_the_slider():
    values = np.random.default_rng(0).random((90, 110), dtype=np.float32)
    read = level_map(values, 1_000_000).values()
    for cut in np.arange(101, dtype=np.float32) / 100:
        np.testing.assert_array_equal(read > cut, values > cut)


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    max_bytes=st.integers(0, 4000),
    seed=st.integers(0, 9),
)
def test_a_map_is_as_large_as_its_limit_allows_and_keeps_its_values(height, width, max_bytes, seed):
    values = np.random.default_rng(seed).random((height, width), dtype=np.float32)
    encoded = level_map(values, max_bytes)
    if encoded is None:
        assert max_bytes < 400
        return
    assert len(encoded.text) <= max_bytes
    if (encoded.height, encoded.width) == values.shape:
        np.testing.assert_allclose(encoded.values(), values, atol=0.0026)
    else:
        assert len(level_map(values, 1_000_000).text) > max_bytes
        assert max(encoded.height, encoded.width) in SIDES


def card_of(page, **wanted):
    return next(card for card in page.cards if all(card[name] == value for name, value in wanted.items()))


def slider_of(page):
    (slider,) = page.having("data-start")
    return slider


def test_the_slider_starts_at_the_threshold_of_the_job(tmp_path):
    out = write_job(tmp_path / "fixed", [varied_rows(8)], masks={"rule": "fixed", "value": 0.38})
    slider = slider_of(page_of(out)[1])
    assert (slider["value"], slider["data-rule"]) == ("0.38", "fixed")
    rows = [row(index, threshold=0.2 + 0.1 * index) for index in range(3)]
    _, page = page_of(write_job(tmp_path / "otsu", [rows], masks={"rule": "otsu"}))
    assert (slider_of(page)["value"], slider_of(page)["data-rule"]) == ("0.3", "otsu")
    assert "masks.rule=otsu has chosen thresholds from 0.20 to 0.40, and each row shows its own" in page.text


def test_the_page_holds_a_map_of_each_row_whose_mask_depends_on_the_threshold(tmp_path):
    statuses = ["ok", "empty_mask", "rejected_area", "rejected_similarity", "rejected_peak", "rejected_lead"]
    out = write_job(tmp_path, [[row(index, status=status) for index, status in enumerate(statuses)]])
    _, page = page_of(out)
    assert {card["data-status"] for card in page.cards if "data-levels" in card} == set(statuses[:3])
    card = card_of(page, **{"data-status": "ok"})
    levels = LevelMap(card["data-levels"], int(card["data-level-height"]), int(card["data-level-width"]))
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_allclose(levels.values(), heatmap_columns(grid, 48, 64, "upsampled").T, atol=0.0026)


def test_the_page_says_how_far_the_slider_is_from_the_masks_of_the_job(tmp_path):
    """The stored map of a row rises from the top left; above 0.5 it is the lower half."""
    above = box_rle(24, 0, 48, 64)
    out = write_job(tmp_path, [[row(0, mask=above, threshold=0.5), row(1, mask=above, threshold=0.5)]],
                    masks={"refine": "none", "smooth": 0})  # fmt: skip
    _, page = page_of(out)
    assert "Shows the stored heat map above the threshold." in page.text
    (value,) = re.findall(r"have an IoU of ([\d.]+), on average of 2 rows", page.text)
    assert 0.7 < float(value) <= 1
    refined = write_job(tmp_path / "refined", [[row(0)]], masks={"refine": "par", "smooth": 1})
    text = page_of(refined)[1].text
    assert "Shows the stored heat map above the threshold, without masks.smooth, masks.refine." in text


def test_a_job_without_stored_maps_has_no_slider(tmp_path):
    _, page = page_of(write_job(tmp_path, [[row(0, heat=False)]]))
    assert not page.having("data-start")
    assert not page.having("data-levels")


def test_each_card_names_its_row_exactly_for_marks(tmp_path):
    keys = ["plain", HOSTILE.replace("/", "").replace(".", ""), "\u202e\x1b[31m", "long" * 100]
    out = write_job(tmp_path, [[row(index, index + 3, key=key) for index, key in enumerate(keys)]])
    _, page = page_of(out)
    (cards,) = (attributes for attributes in page.having("data-shards"))
    shards = json.loads(cards["data-shards"])
    assert shards == [f"file://{tmp_path}/0.tar"]
    named = {
        json.loads(card["data-key"]) if "data-key" in card else None: int(card["data-prompt-index"])
        for card in page.cards
    }
    assert all(card["data-shard"] == "0" for card in page.cards)
    assert {None: named[None], keys[2]: 5, keys[3]: 6} == named
    assert OutputFolder(str(out)).job().config_hash in cards["data-job"]


def test_a_key_too_long_for_a_page_cannot_be_marked(tmp_path):
    _, page = page_of(write_job(tmp_path, [[row(0, key="k" * 600)]]))
    (card,) = page.cards
    assert "data-unmarkable" in card
    assert "data-prompt-index" not in card


def test_the_keys_of_each_kind_of_error_are_listed_with_their_shards(tmp_path):
    errors = [error(index, key=f"broken{index:03d}") for index in range(120)]
    errors += [error(200, kind="empty", key="<b>empty</b>\u202e"), error(201, kind="empty", key=None)]
    _, page = page_of(write_job(tmp_path, [[row(0)]], errors=errors))
    assert "The first 100 by sample key and shard" in page.text
    listed = re.search(r'aria-label="Keys of decode/truncated">(.*?)</pre>', page.html, re.DOTALL)[1]
    lines = [line.split("\t") for line in listed.split("\n") if line]
    assert [key for key, _ in lines] == [f"broken{index:03d}" for index in range(100)]
    assert {shard for _, shard in lines} == {f"file://{tmp_path}/0.tar"}
    assert "<b>empty</b>\\u202e" in page.text
    ids = {attributes["id"] for attributes in page.having("id")}
    assert {attributes["data-copies"] for attributes in page.having("data-copies")} <= ids
