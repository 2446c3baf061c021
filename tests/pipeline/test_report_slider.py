"""The slider's masks are those of the job at its thresholds: every rule, combination and refinement."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from legrad.heatmaps import heatmap_columns
from legrad.masks.rle import decode_rle
from pipeline.annotate.model import load_explainer
from pipeline.config.schema import ModelConfig
from pipeline.demo.assets import DEMO_MODEL_NAME, demo_shard_paths
from pipeline.report import mask_maps, write_report
from pipeline.report.level_maps import STEPS, LevelMap
from pipeline.shards.samples import read_samples
from tests.helpers.corpus import captions_json, sample, write_shard
from tests.helpers.remasking import annotated, remasked, rows_in, scenes_job
from tests.helpers.report_pages import NODE, Page, run_script

SCENES = 6


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """OUT of some scenes of the demo, the last one with equal captions; all rows, with their maps."""
    folder = tmp_path_factory.mktemp("stored")
    with Path(demo_shard_paths("heldout")[0]).open("rb") as tar:
        found = read_samples(tar, max_member_bytes=1 << 24)
        scenes = [scene.fields for _, scene in zip(range(SCENES), found, strict=False)]
    captions = json.loads(scenes[0]["json"])["captions"]
    samples = [
        sample(f"scene{number}", jpg=fields["jpg"], json=fields["json"], txt=None)
        for number, fields in enumerate(scenes)
    ]
    repeated = captions_json([captions[0], captions[1], captions[0]])
    samples.append(sample("repeated", jpg=scenes[0]["jpg"], json=repeated, txt=None))
    shard = write_shard(folder / "scenes.tar", samples)
    explainer = load_explainer(ModelConfig(name=DEMO_MODEL_NAME, pretrained="demo", precision="fp32"), "cpu")
    return annotated(explainer, scenes_job([shard], folder / "out"))


def page_of(out, **options):
    write_report(str(out), to=f"{out}.html", **options)
    return Page(Path(f"{out}.html").read_text(encoding="utf-8"))


def previews(out, page):
    """Of each row with a mask: the map that the slider gets, the threshold on its card, the job's mask."""
    keys = re.findall(r'class="sample-key" dir="auto">(.*?)<', page.html)
    cuts = re.findall(r"<dt>threshold</dt><dd>(.*?)</dd>", page.html)
    rows = {(row["key"], row["prompt_index"]): row for row in rows_in(out).values()}
    found = []
    for key, cut, card in zip(keys, cuts, page.cards, strict=True):
        mask = rows[key, int(card["data-prompt-index"])]["mask"]
        assert ("data-levels" in card) == (card["data-status"] in ("ok", "empty_mask", "rejected_area"))
        if "data-levels" in card and mask is not None:
            levels = LevelMap(
                card["data-levels"], int(card["data-level-height"]), int(card["data-level-width"])
            )
            found.append((levels, float(cut), decode_rle(mask)))
    return found


def iou(one, other):
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def ious(found):
    return [
        iou(cut < heatmap_columns(levels.values(), *mask.shape, None).T, mask) for levels, cut, mask in found
    ]


VARIANTS = {
    "fixed, competition, contrast, par": {"refine": "par"},
    "fixed, competition with backgrounds, pamr": {"refine": "pamr", "contrast": 0, "value": 0.5},
    "otsu, competition, contrast": {"rule": "otsu"},
    "otsu, contrast, par": {"rule": "otsu", "combine": "independent", "refine": "par"},
    "quantile, contrast": {"rule": "quantile", "combine": "independent"},
    "quantile, competition, par": {"rule": "quantile", "refine": "par"},
    "band, contrast, pamr": {"rule": "band", "combine": "independent", "refine": "pamr", "high": 0.6},
    "band on the scale of otsu, competition": {"rule": "band", "band_center": "otsu", "contrast": 0},
    "nothing": {"combine": "independent", "contrast": 0, "smooth": 0},
    "filters and a small frame": {"min_similarity": 0.1, "min_area": 0.05, "max_side": 64},
}


@pytest.mark.parametrize("masks", VARIANTS.values(), ids=VARIANTS.keys())
def test_at_the_thresholds_of_the_job_the_slider_shows_its_masks(masks, stored, tmp_path):
    out = remasked(stored, tmp_path / "new", *(f"masks.{key}={value}" for key, value in masks.items()))
    page = page_of(out)
    (slider,) = page.having("data-start")
    found = previews(out, page)
    agreement = ious(found)
    assert len(found) >= 10
    assert np.median(agreement) >= 0.97
    assert np.mean(agreement) >= 0.95
    skipped = ", without masks.min_area" if "min_area" in masks else ""
    note = f"Shows what lies above the threshold in the heat maps that the masks were cut from{skipped}."
    assert note in page.text
    assert f"have an IoU of {np.mean(agreement):.2f}, on average of {len(found)} rows" in page.text
    if slider["data-rule"] == "fixed":
        assert float(slider["value"]) == masks.get("value", 0.4)
        assert {cut for _, cut, _ in found} == {masks.get("value", 0.4)}
    else:
        assert float(slider["value"]) == pytest.approx(np.median([cut for _, cut, _ in found]), abs=0.05)
        assert f"masks.rule={slider['data-rule']} has chosen thresholds from" in page.text


CUT = "async (maps, cut, map, ...size) => [...maps.inside(await maps.heatmap(map, ...size), cut)]"


@pytest.mark.skipif(not NODE, reason="Node.js is not on PATH (apt-get install nodejs)")
def test_the_script_of_the_page_makes_the_masks_of_the_job(stored, tmp_path):
    out = remasked(stored, tmp_path / "new", "masks.refine=par")
    found = previews(out, page_of(out))
    calls = [
        [
            CUT,
            cut,
            {"text": levels.text, "mapHeight": levels.height, "mapWidth": levels.width, "steps": STEPS},
        ]
        for levels, cut, _ in found
    ]
    shapes = [mask.shape for _, _, mask in found]
    masks = run_script(
        "maps", "maps.js", *([*call, *shape] for call, shape in zip(calls, shapes, strict=True))
    )
    by_script = [
        iou(np.reshape(mask, shape).astype(bool), own)
        for mask, shape, (_, _, own) in zip(masks, shapes, found, strict=True)
    ]
    assert np.median(by_script) >= 0.97
    np.testing.assert_allclose(by_script, ious(found), atol=0.01)


def test_under_competition_the_slider_shows_the_masks_of_any_other_threshold(stored, tmp_path):
    """Which text wins a pixel does not depend on the threshold."""
    found = previews(stored, page_of(stored))
    other = remasked(stored, tmp_path / "new", "masks.value=0.6")
    masks = [mask for _, _, mask in previews(other, page_of(other))]
    assert len(masks) == len(found)
    moved = [(levels, 0.6, mask) for (levels, _, _), mask in zip(found, masks, strict=True)]
    assert np.median(ious(moved)) >= 0.97


def test_steps_after_the_threshold_are_named(stored, tmp_path):
    out = remasked(stored, tmp_path / "new", "masks.min_component=0.01", "masks.max_hole=0.01")
    assert "were cut from, without masks.min_component, masks.max_hole." in page_of(out).text


def test_rows_whose_maps_would_take_too_long_show_the_stored_ones_and_the_page_says_so(
    stored, tmp_path, monkeypatch
):
    out = remasked(stored, tmp_path / "new", "masks.refine=par")
    monkeypatch.setattr(mask_maps, "MAX_REFINED_VALUES", 150_000)
    page = page_of(out)
    note = r"For \d+ of \d+ rows, shows the stored heat map instead, without masks.smooth, masks.contrast"
    assert re.search(note, page.text)
    monkeypatch.setattr(mask_maps, "MAX_REFINED_VALUES", 0)
    assert "Shows the stored heat map above the threshold, without masks.smooth" in page_of(out).text
