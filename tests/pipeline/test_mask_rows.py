"""From an explained sample to rows: which prompts are rejected, who competes, what is on which row."""

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import legrad
from legrad.errors import MaskError
from legrad.heatmaps import heatmaps_of
from legrad.masks import thresholds
from legrad.masks.rle import decode_rle
from legrad.masks.thresholds import RULES, MaskRule, cuts_of, otsu_threshold
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.filters import filters_of, rejections
from pipeline.annotate.rows import annotation_rows
from pipeline.annotate.sample_states import ExplainedPrompt, ExplainedSample, SampleMaps
from pipeline.config.load import load_config
from pipeline.config.masks import RULE_KEYS, MasksConfig
from pipeline.demo import assets
from pipeline.errors import UserError
from pipeline.output.label_map import label_map
from pipeline.output.schema import annotation_schema
from pipeline.shards.samples import RawSample, read_samples
from tests.helpers.corpus import demo_job, sample, write_shard

HEIGHT, WIDTH = 18, 30
LEFT, RIGHT, LAST = "left", "right", "last column"
GRIDS = {
    LEFT: torch.tensor([[9.0, 8.0, 3.0, 1.0, 0.0]]).repeat(3, 1),
    RIGHT: torch.tensor([[0.0, 1.0, 3.0, 4.0, 4.0]]).repeat(3, 1),
    LAST: torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0]]).repeat(3, 1),
}


def explained(*names, similarities=None, grids=None, backgrounds=None, claimed=None, refined=None):
    similarities = similarities or [0.3] * len(names)
    prompts = tuple(
        ExplainedPrompt(index, name, index + 1, False, similarity)
        for index, (name, similarity) in enumerate(zip(names, similarities, strict=True))
    )
    if grids is None:
        grids = torch.stack([GRIDS[name] for name in names])
    if backgrounds is None:
        backgrounds = grids.new_zeros(0, *grids.shape[1:])
    every = torch.cat([grids, backgrounds])
    zeroed = every if claimed is None else every.masked_fill(claimed, 0)
    maps = SampleMaps(
        every.numpy(),
        zeroed.amax((1, 2)).numpy(),
        None,
        (zeroed if refined is None else refined).numpy(),
        np.arange(len(names)),
        len(names),
        "upsampled" if refined is None else None,
    )
    return ExplainedSample(0, "a", HEIGHT, WIDTH, prompts, maps)


def rows_of(explained_sample, rows="all", heatmap=False, **masks):
    config = demo_job(["a.tar"], "out", masks=masks, output={"rows": rows, "heatmap": heatmap})
    return annotation_rows(filtered(explained_sample, filters_of(config.masks)), config)


def filtered(explained_sample, filters):
    """The sample with what the device step says of its filters."""
    if not filters.reject:
        return explained_sample
    maps = explained_sample.maps
    backgrounds = len(maps.relevance_grids) - maps.prompt_maps
    rejected = rejections(
        filters,
        torch.from_numpy(maps.relevance_grids.copy()),
        torch.tensor(
            [prompt.similarity for prompt in explained_sample.prompts] + [0.0] * backgrounds
        ).double(),
        torch.zeros(len(maps.relevance_grids), dtype=torch.int64),
        torch.arange(len(maps.relevance_grids)) >= maps.prompt_maps,
    )
    return replace(explained_sample, maps=replace(maps, rejections=rejected.numpy()))


def mask_of(row, column="mask"):
    return decode_rle(row[column])


# ---------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("masks", "statuses"),
    [
        ({"min_similarity": 0.25}, ["ok", "ok", "rejected_similarity"]),
        ({"min_peak": 3.0}, ["ok", "ok", "rejected_peak"]),
        ({"min_foreground_contrast": 3.5}, ["ok", "rejected_contrast", "rejected_contrast"]),
        ({"min_area": 0.3, "rule": "fixed"}, ["ok", "ok", "rejected_area"]),
        (
            {"min_similarity": 0.25, "min_foreground_contrast": 1e6},
            ["rejected_contrast"] * 2 + ["rejected_similarity"],
        ),
    ],
)
@pytest.mark.parametrize("combine", ["independent", "argmax"])
def test_a_prompt_below_a_limit_is_rejected_by_its_name(masks, statuses, combine):
    rows = rows_of(explained(LEFT, RIGHT, LAST, similarities=[0.3, 0.3, 0.2]), combine=combine, **masks)
    assert [row["status"] for row in rows] == statuses
    for row in rows:
        if row["status"] != "ok":
            assert (row["area"], row["mask"], row["bbox_xywh"], row["ignore"]) == (0, None, None, None)


@pytest.mark.parametrize("limit", ["min_similarity", "min_peak", "min_foreground_contrast"])
@pytest.mark.parametrize(("rounding", "status"), [(-1e-6, "ok"), (1e-6, "ok"), (-1e-3, "rejected")])
def test_a_score_that_is_at_its_limit_but_for_rounding_is_within_it(limit, rounding, status):
    similarity = 0.25 * (1 + rounding)
    at_limit = {"min_similarity": 0.25, "min_peak": 9.0, "min_foreground_contrast": 7.1666665}
    grids = GRIDS[LEFT][None] * (1 + rounding)
    (row,) = rows_of(explained(LEFT, similarities=[similarity], grids=grids), **{limit: at_limit[limit]})
    assert row["status"].split("_")[0] == status


def test_contrast_separates_noise_from_an_object_where_min_maxed_maps_do_not():
    noise = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    thing = torch.full((1, 6, 6), 0.1)
    thing[0, 1:4, 1:4] = 5.0
    rows = rows_of(explained("noise", "thing", grids=torch.cat([noise, thing])), min_foreground_contrast=1.0)
    assert [row["status"] for row in rows] == ["rejected_contrast", "ok"]


def test_a_prompt_that_was_not_cut_has_no_threshold_and_one_too_small_has():
    masks = {"min_peak": 3.0, "min_area": 0.9, "rule": "fixed", "value": 0.25}
    left, last = rows_of(explained(LEFT, LAST), **masks)
    assert (left["status"], left["threshold"]) == ("rejected_area", 0.25)
    assert (last["status"], last["threshold"], last["threshold_low"]) == ("rejected_peak", None, None)


# ---------------------------------------------------------------- competition


def test_under_argmax_masks_are_disjoint_and_have_no_threshold():
    rows = rows_of(explained(LEFT, RIGHT), combine="argmax", rule="fixed", value=0.2)
    assert not (mask_of(rows[0]) & mask_of(rows[1])).any()
    assert all(row["area"] == mask_of(row).sum() > 0 for row in rows)
    assert [(row["threshold"], row["threshold_low"], row["ignore"]) for row in rows] == [(None,) * 3] * 2
    labels = label_map(rows, HEIGHT, WIDTH)
    np.testing.assert_array_equal(labels, mask_of(rows[0]) + 2 * mask_of(rows[1]))


@pytest.mark.parametrize(
    "limit",
    [{"min_similarity": 0.25}, {"min_peak": 3.0}, {"min_area": 0.3}, {"min_foreground_contrast": 2.9}],
)
def test_a_rejected_prompt_takes_no_pixel_from_the_others(limit):
    masks = {"combine": "argmax", "rule": "fixed", "value": 0.3}
    alone = rows_of(explained(RIGHT), **masks)[0]
    contested = rows_of(explained(RIGHT, LAST), **masks)[0]
    both = rows_of(explained(RIGHT, LAST, similarities=[0.3, 0.2]), **(masks | limit))
    if limit == {"min_foreground_contrast": 2.9}:
        assert [row["status"] for row in both] == ["ok", "rejected_contrast"]
    assert both[1]["status"].startswith("rejected")
    assert both[0]["mask"] == alone["mask"]
    assert contested["area"] <= alone["area"]


def test_the_images_ignore_mask_is_on_every_accepted_row_and_on_no_other():
    masks = {"combine": "argmax", "rule": "band", "low": 0.2, "high": 0.6, "min_similarity": 0.25}
    sample_of_three = explained(LEFT, RIGHT, LAST, similarities=[0.1, 0.3, 0.3])
    rejected, first, second = rows_of(sample_of_three, **masks)
    assert (rejected["status"], rejected["mask"], rejected["ignore"]) == ("rejected_similarity", None, None)
    assert first["ignore"] == second["ignore"]
    assert mask_of(first, "ignore").any()
    assert not (mask_of(first, "ignore") & (mask_of(first) | mask_of(second))).any()
    assert rows_of(sample_of_three, rows="accepted", **masks) == [first, second]
    for rows in ([rejected, first, second], [first, second], [first], [second]):
        labels = label_map(rows, HEIGHT, WIDTH)
        np.testing.assert_array_equal(labels == 255, mask_of(first, "ignore"))
    np.testing.assert_array_equal(label_map([first], HEIGHT, WIDTH) == 2, mask_of(first))


@pytest.mark.parametrize("rows", ["all", "accepted"])
def test_an_accepted_prompt_that_won_no_pixel_has_a_status_and_an_empty_mask_of_its_own(rows):
    grids = torch.stack([GRIDS[RIGHT], GRIDS[RIGHT] * 0.5])
    masks = {"combine": "argmax", "rule": "band", "low": 0.2, "high": 0.6}
    winner, empty = rows_of(explained(LEFT, RIGHT, grids=grids), rows=rows, **masks)
    assert (winner["status"], empty["status"]) == ("ok", "empty_mask")
    assert (empty["area"], empty["bbox_xywh"], mask_of(empty).any()) == (0, [0.0] * 4, False)
    assert mask_of(empty).shape == (HEIGHT, WIDTH)
    assert empty["ignore"] == winner["ignore"]
    (rejected,) = rows_of(explained(LEFT, RIGHT, grids=grids), rows="all", min_area=0.01, **masks)[1:]
    assert (rejected["status"], rejected["mask"], rejected["ignore"]) == ("rejected_area", None, None)


@pytest.mark.parametrize(
    ("grid", "masks"),
    [
        (torch.zeros(3, 5), {"rule": "otsu"}),
        (GRIDS[LEFT], {"rule": "fixed", "value": 1.0}),
        (GRIDS[LEFT], {"rule": "fixed", "min_component": 1.0}),
        (GRIDS[LEFT], {"rule": "band", "low": 0.2, "high": 1.0}),
        (GRIDS[LEFT], {"rule": "quantile", "quantile": 1.0}),
    ],
    ids=["no relevance", "cut at the peak", "only specks", "all unsure", "nothing inside"],
)
@pytest.mark.parametrize("combine", ["independent", "argmax"])
def test_a_mask_of_which_nothing_is_left_is_accepted_and_empty(grid, masks, combine):
    (row,) = rows_of(explained(LEFT, grids=grid[None]), combine=combine, **masks)
    assert (row["status"], row["area"], row["bbox_xywh"]) == ("empty_mask", 0, [0.0] * 4)
    assert not mask_of(row).any()
    assert (row["threshold"] is None) == (combine == "argmax")
    assert (row["ignore"] is None) == (masks["rule"] != "band")


@settings(max_examples=60)
@given(
    grids=hnp.arrays(np.float32, (3, 3, 5), elements=st.floats(0, 8, width=16)),
    similarities=st.lists(st.sampled_from([0.1, 0.3]), min_size=3, max_size=3),
    masks=st.fixed_dictionaries(
        {
            "combine": st.sampled_from(["argmax", "independent"]),
            "rule": st.sampled_from(["fixed", "band", "quantile", "otsu"]),
            "min_area": st.sampled_from([None, 0.2]),
            "min_peak": st.sampled_from([None, 3.0]),
            "min_component": st.sampled_from([0.0, 0.1]),
        }
    ),
)
def test_what_the_rows_that_are_ok_say_of_an_image_is_what_all_rows_say(grids, similarities, masks):
    sample_of_three = explained(LEFT, RIGHT, LAST, similarities=similarities, grids=torch.from_numpy(grids))
    rows = rows_of(sample_of_three, min_similarity=0.2, **masks)
    fine = [row for row in rows if row["status"] == "ok"]
    for row in rows:
        assert (row["mask"] is None) == row["status"].startswith("rejected_")
        assert (
            (row["area"] > 0) == (row["status"] == "ok") == (row["mask"] is not None and mask_of(row).any())
        )
    if fine and masks["combine"] == "argmax":
        np.testing.assert_array_equal(label_map(fine, HEIGHT, WIDTH), label_map(rows, HEIGHT, WIDTH))


def test_where_every_prompt_is_rejected_no_pixel_is_anybodys():
    rows = rows_of(explained(LEFT, RIGHT), combine="argmax", rule="band", min_peak=1e6)
    assert [row["mask"] for row in rows] == [None, None]
    assert not label_map(rows, HEIGHT, WIDTH).any()
    assert rows_of(explained(LEFT), rows="accepted", combine="argmax", min_peak=1e6) == []


def test_a_background_text_takes_pixels_under_argmax_alone():
    backgrounds = torch.stack([GRIDS[LEFT] * 1.5, torch.full((3, 5), torch.nan)])
    competing = {"combine": "argmax", "rule": "fixed", "value": 0.3}
    without = rows_of(explained(LEFT, RIGHT), **competing)
    with_them = rows_of(explained(LEFT, RIGHT, backgrounds=backgrounds), **competing)
    assert len(with_them) == 2
    assert with_them[0]["area"] == 0 < without[0]["area"]
    plain = rows_of(explained(LEFT, RIGHT))
    assert rows_of(explained(LEFT, RIGHT, backgrounds=backgrounds)) == plain


# ---------------------------------------------------------------- bands, neutral patches, refined maps


def test_a_band_has_two_thresholds_and_an_ignore_mask_on_every_accepted_row():
    rows = rows_of(explained(LEFT, RIGHT, LAST), rule="band", low=0.3, high=0.7, min_peak=3.0)
    assert [row["threshold"] for row in rows] == [pytest.approx(0.7)] * 2 + [None]
    assert [row["threshold_low"] for row in rows] == [pytest.approx(0.3)] * 2 + [None]
    for row, name in zip(rows[:2], (LEFT, RIGHT), strict=True):
        heatmap = heatmaps_of(GRIDS[name], HEIGHT, WIDTH, "upsampled").numpy()
        np.testing.assert_array_equal(mask_of(row), heatmap > np.float32(0.7))
        between = (heatmap > np.float32(0.3)) & (heatmap <= np.float32(0.7))
        np.testing.assert_array_equal(mask_of(row, "ignore"), between)
    assert rows[2]["ignore"] is None


def test_neutral_patches_are_zeroed_in_the_mask_and_kept_in_peak_and_heat_map():
    neutral = torch.zeros(3, 5, dtype=torch.bool)
    neutral[:, 0] = True
    plain = explained(LEFT)
    corrected = explained(LEFT, claimed=neutral)
    (before,), (after,) = rows_of(plain, heatmap=True), rows_of(corrected, heatmap=True)
    assert (after["peak"], after["heatmap"]) == (before["peak"], before["heatmap"])
    heatmap = heatmaps_of(GRIDS[LEFT].masked_fill(neutral, 0), HEIGHT, WIDTH, "upsampled")
    np.testing.assert_array_equal(mask_of(after), (heatmap > otsu_threshold(heatmap)).numpy())
    assert before["mask"] != after["mask"]


def test_refined_maps_take_the_place_of_grids_and_the_backgrounds_come_after_the_prompts():
    refined = torch.zeros(3, 12, 20)
    refined[0, :, 10:] = 0.9
    refined[1, :6] = 0.8
    refined[2, :, 15:] = 1.0
    fields = {"refined": refined, "backgrounds": GRIDS[LEFT][None]}
    right, top = rows_of(explained(LEFT, RIGHT, **fields), rule="fixed")
    assert mask_of(right)[:, 16:].all()
    assert not mask_of(right)[:, :14].any()
    assert mask_of(top)[:8].all()
    competing = rows_of(explained(LEFT, RIGHT, **fields), rule="fixed", combine="argmax")
    assert not any(mask_of(row)[:, 23:].any() for row in competing)
    assert mask_of(competing[0])[:, 17:21].all()


def test_a_prompt_that_is_not_finite_has_no_row_and_shifts_no_other():
    grids = torch.stack([torch.full((3, 5), torch.nan), GRIDS[RIGHT]])
    (row,) = rows_of(explained(LEFT, RIGHT, grids=grids), combine="argmax")
    assert (row["prompt"], row["class_id"]) == (RIGHT, 2)
    assert row["mask"] == rows_of(explained(RIGHT), combine="argmax")[0]["mask"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("combine", ["independent", "argmax"])
def test_maps_in_memory_that_must_not_be_written_to_give_the_same_rows(dtype, combine):
    refined = torch.rand(2, 12, 20, generator=torch.Generator().manual_seed(0))
    sample = explained(LEFT, RIGHT, refined=refined)
    sample = replace(sample, maps=replace(sample.maps, mask_maps=sample.maps.mask_maps.astype(dtype)))
    masks = {"combine": combine, "rule": "otsu", "min_foreground_contrast": 0.1}
    expected = rows_of(sample, heatmap=True, **masks)
    for array in (sample.maps.relevance_grids, sample.maps.peaks, sample.maps.mask_maps):
        array.flags.writeable = False
    assert rows_of(sample, heatmap=True, **masks) == expected


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["masks.low=0.8"], "masks.high.*above masks.low, which is 0.8"),
        (["masks.low=0.5", "masks.high=0.5"], "masks.high.*above masks.low"),
        (["masks.rule=median"], "masks.rule.*'median'"),
        (["masks.quantile=1.2"], "masks.quantile.*1.2"),
        (["masks.band_center=mean"], "masks.band_center.*'mean'"),
        (["masks.combine=sum"], "masks.combine.*'sum'"),
        (["masks.min_foreground_contrast=-1"], "masks.min_foreground_contrast.*-1"),
        (["masks.smooth=-0.5"], "masks.smooth.*-0.5"),
        (["masks.contrast=1.5"], "masks.contrast.*1.5"),
        (["masks.contrast_with=prompts"], "masks.contrast_with.*'prompts'"),
        (["masks.min_lead=-3"], "masks.min_lead.*-3"),
        (["masks.min_component=2"], "masks.min_component.*2"),
        (["masks.max_hole=-1"], "masks.max_hole.*-1"),
    ],
)
def test_a_wrong_setting_is_reported_by_its_key(tmp_path, overrides, message):
    path = tmp_path / "job.yaml"
    path.write_text("{input: {shards: a.tar}, model: {name: ViT-B-32, pretrained: x}, output: {dir: out}}")
    with pytest.raises(UserError, match=message):
        load_config(path, overrides)


# ---------------------------------------------------------------- through Parquet


@pytest.fixture(scope="module")
def scene():
    """A scene of two objects that the demo model never saw."""
    with assets.demo_shard_paths("heldout")[0].open("rb") as tar:
        for item in read_samples(tar, max_member_bytes=1 << 24):
            if isinstance(item, RawSample) and len(json.loads(item.fields["json"])["class_ids"]) == 2:
                return item.fields["jpg"], json.loads(item.fields["json"])
    raise AssertionError("the demo has scenes of two objects")


@pytest.mark.parametrize("combine", ["independent", "argmax"])
def test_a_shard_by_classes_becomes_label_maps_with_ignored_pixels(tmp_path, scene, combine):
    jpg, document = scene
    shard = write_shard(tmp_path / "0.tar", [sample("a", jpg=jpg, txt=document["caption"].encode())])
    classes = [
        {"id": class_id, "name": name}
        for class_id, name in zip(document["class_ids"], document["class_names"], strict=True)
    ]
    config = demo_job(
        [shard],
        tmp_path / "out",
        prompts={"source": "classes", "classes": [*classes, {"id": 200, "name": "nothing of the kind"}]},
        masks={"combine": combine, "rule": "band", "min_similarity": 0.0},
        output={"rows": "all"},
    )
    name = assets.register_demo_model()
    explainer = legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=1)
    annotator = ShardAnnotator(config, explainer, decode_threads=1, metadata={"config_hash": "h"})
    annotator.annotate(storage.list_shards(config.input.shards)[0])
    annotator.close()
    table = pq.read_table(tmp_path / "out" / "annotations")
    assert table.schema.equals(annotation_schema(with_maps=True))
    rows = table.to_pylist()
    assert {row["class_id"] for row in rows} == {*document["class_ids"], 200}
    accepted = [row for row in rows if row["status"] in ("ok", "empty_mask")]
    ignoring = [row for row in rows if row["ignore"] is not None]
    assert ignoring == accepted
    assert all((row["threshold"] is None) == (combine == "argmax") for row in accepted)
    labels = label_map(rows, rows[0]["image_height"], rows[0]["image_width"])
    assert {0, 255, *(row["class_id"] for row in accepted if row["area"])} == set(np.unique(labels))


def test_the_library_the_configuration_and_the_keys_of_rules_name_the_same_rules():
    named = set(get_args(MasksConfig.model_fields["rule"].annotation))
    assert named == set(RULES) == set(RULE_KEYS)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_thresholds_of_its_own_or_is_an_error(rule, monkeypatch):
    columns = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    low, high = cuts_of(columns, MaskRule(rule))
    assert 0 <= low <= high <= 1
    monkeypatch.setattr(thresholds, "RULES", (*RULES, "unheard of"))
    with pytest.raises(MaskError, match="has no threshold"):
        cuts_of(columns, MaskRule("unheard of"))
