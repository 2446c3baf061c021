"""Smoothing and contrast on the way from raw grids to masks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import legrad
from legrad.masks.contrast import contrasted_grids, text_distances
from legrad.masks.rle import decode_rle
from legrad.masks.smoothing import smoothed_grids
from legrad.text_cache import TextEmbedder
from pipeline.annotate.cutting import device_cut_of
from pipeline.annotate.engine import Engine
from pipeline.annotate.grid_steps import GridTexts, grid_steps_of
from pipeline.annotate.maps import MapSettings, refined_maps, refinement_of, sample_maps
from pipeline.annotate.rows import sample_rows
from pipeline.annotate.sample_states import ExplainedPrompt, ExplainedSample, PreparedSample
from pipeline.annotate.texts import ImageMaps
from pipeline.config.masks import MasksConfig
from pipeline.demo import assets
from pipeline.prompts.sample_prompts import Companions, Prompt, default_background
from tests.helpers.corpus import demo_job

CUDA = torch.device("cuda")
PAR = refinement_of(MasksConfig(refine="par"), 8)
TEXTS = ("a dog", "a dog and a banana", "a panda", "a dog", "a fish")
CENTRE = tuple((text,) for text in default_background())
BACKGROUNDS = Companions((("a guitar",), ("a basketball",)), 2, centre=CENTRE)
ALONE = Companions(centre=CENTRE)


@pytest.fixture(scope="module")
def explainer():
    return legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers=2
    )


def steps_of(**masks):
    masks = MasksConfig(**{"combine": "argmax", "smooth": 0.0, **masks})
    return grid_steps_of(masks, masks.contrast or 0.0, stores_maps=True)


def samples():
    """Samples of noise with one to five prompts, of which the first and the fourth are equal."""
    generator = np.random.default_rng(0)
    return [
        PreparedSample(
            index,
            f"k{index}",
            120,
            90,
            (generator.integers(0, 256, (96, 96, 3), dtype=np.uint8),),
            tuple(Prompt(position, text) for position, text in enumerate(TEXTS[:count])),
        )
        for index, count in enumerate((1, 5, 3))
    ]


def explained(explainer, companions=BACKGROUNDS, batch=None, refinement=None, cut=None, **masks):
    steps = steps_of(**masks)
    engine = Engine(explainer, 32, 8, companions=companions, grid_steps=steps, refinement=refinement, cut=cut)
    return engine.explain(batch or samples())


def rows_of(results, **masks):
    config = demo_job(["a.tar"], "out", masks=masks, output={"heatmap": True})
    return [row for result in results for row in sample_rows(result, config).rows]


def contrasted_alone(explainer, grids, texts, share=0.5):
    """The contrasted grids of one image, by the library alone."""
    rows = TextEmbedder(explainer).embed_ensembles([(text,) for text in texts]).unit_rows
    centre = TextEmbedder(explainer).embed_ensembles(CENTRE).unit_rows.double().mean(dim=0)
    return contrasted_grids(torch.from_numpy(grids), text_distances(rows, centre), share=share).numpy()


def test_prompts_and_backgrounds_take_from_prompts_and_backgrounds_then_need_no_maps(explainer):
    result = explained(explainer, contrast=0.5)[1].maps
    raw = explained(explainer)[1].maps
    np.testing.assert_allclose(result.relevance_grids, raw.relevance_grids[:4])
    np.testing.assert_array_equal(result.peaks, result.relevance_grids.max((1, 2)))
    texts = [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[4], "a guitar", "a basketball"]
    expected = contrasted_alone(explainer, raw.relevance_grids, texts)
    np.testing.assert_allclose(result.mask_maps, expected[:4], rtol=1e-4, atol=1e-9)
    assert (result.mask_maps != result.relevance_grids).any((1, 2)).all()


def test_with_backgrounds_alone_prompts_take_nothing_from_each_other(explainer):
    by_backgrounds = explained(explainer, contrast=0.5, contrast_with="background")
    batch = samples()
    for position in range(3):
        only = replace(batch[1], prompts=batch[1].prompts[position : position + 1])
        (alone,) = explained(explainer, batch=[only], contrast=0.5)
        np.testing.assert_allclose(
            by_backgrounds[1].maps.mask_maps[position], alone.maps.mask_maps[0], rtol=1e-3, atol=1e-8
        )
    without = explained(explainer, companions=ALONE, contrast=0.5, contrast_with="background")
    for result in without:
        np.testing.assert_array_equal(result.maps.mask_maps, result.maps.relevance_grids)


def test_one_prompt_without_backgrounds_keeps_its_rows_whatever_the_contrast(explainer):
    batch = [replace(sample, prompts=sample.prompts[:1]) for sample in samples()]
    for refinement in (None, PAR):
        plain, contrasted = (
            explained(explainer, companions=ALONE, batch=batch, refinement=refinement, contrast=share)
            for share in (0.0, 0.7)
        )
        assert rows_of(contrasted) == rows_of(plain)


def test_smoothing_comes_before_contrast_and_contrast_before_refinement(explainer):
    plain = explained(explainer)[1].maps
    texts = [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[4], "a guitar", "a basketball"]
    smooth = smoothed_grids(torch.from_numpy(plain.relevance_grids), 0.6).numpy()
    expected = contrasted_alone(explainer, smooth, texts)[:4]
    found = explained(explainer, contrast=0.5, smooth=0.6)[1].maps
    np.testing.assert_allclose(found.mask_maps, expected, rtol=1e-3, atol=1e-8)
    in_another_order = contrasted_alone(explainer, plain.relevance_grids, texts)[:4]
    assert np.abs(smoothed_grids(torch.from_numpy(in_another_order), 0.6).numpy() - expected).max() > 1e-6
    refined = explained(explainer, contrast=0.5, smooth=0.6, refinement=PAR)[1].maps
    pixels = torch.from_numpy(samples()[1].canvases[0])[None]
    owners = torch.zeros(4, dtype=torch.int64)
    by_hand = refined_maps(pixels, torch.from_numpy(expected), owners, PAR, explainer.tower.normalisation)
    np.testing.assert_allclose(refined.mask_maps, by_hand, atol=2e-3)


@pytest.mark.parametrize("combine", ["independent", "argmax"])
def test_a_prompt_that_is_rejected_takes_nothing_from_the_others(explainer, combine):
    sample = samples()[1]
    pair = replace(sample, prompts=sample.prompts[1:3])
    (both,) = explained(explainer, batch=[pair], contrast=0.5)
    limit = float(np.mean([prompt.similarity for prompt in both.prompts]))
    order = np.argsort([-prompt.similarity for prompt in both.prompts])
    only = replace(pair, prompts=(pair.prompts[order[0]],))
    masks = {"combine": combine, "contrast": 0.5, "min_similarity": limit}
    (filtered,), (alone,) = (explained(explainer, batch=[each], **masks) for each in (pair, only))
    rows = rows_of([filtered], **masks)
    assert sorted(row["status"] for row in rows) == ["ok", "rejected_similarity"]
    np.testing.assert_allclose(filtered.maps.mask_maps[order[0]], alone.maps.mask_maps[0], rtol=1e-3)
    assert not np.allclose(filtered.maps.mask_maps[order[0]], both.maps.mask_maps[order[0]], rtol=1e-3)
    (kept,) = (row for row in rows if row["status"] == "ok")
    (expected,) = rows_of([alone], **masks)
    assert kept["area"] == pytest.approx(expected["area"], rel=0.01)


@pytest.mark.parametrize("companions", [ALONE, BACKGROUNDS], ids=["alone", "backgrounds"])
def test_a_lead_is_over_the_most_similar_of_the_other_prompts_and_the_backgrounds(explainer, companions):
    masks = {"combine": "independent", "min_lead": 0.0}
    for sample, result in zip(samples(), explained(explainer, companions=companions, **masks), strict=True):
        texts = [*dict.fromkeys(prompt.text for prompt in sample.prompts)]
        texts += [text for (text,) in companions.background]
        trace = explainer.encode(
            explainer.transform.normalise(torch.from_numpy(sample.canvases[0])[None], explainer.dtype)
        )
        similarity_of = dict(
            zip(texts, explainer.similarity(trace, explainer.embed_text(texts))[0].tolist(), strict=True)
        )
        best = max(similarity_of.values())
        assert [row["status"] for row in rows_of([result], **masks)] == [
            "ok" if similarity_of[prompt.text] == best else "rejected_lead" for prompt in sample.prompts
        ]


@pytest.mark.parametrize("is_refined", [False, True], ids=["grids", "refined"])
@pytest.mark.parametrize("rule", ["fixed", "otsu", "band", "quantile"])
def test_masks_that_are_smoothed_and_contrasted_are_cut_on_the_device_as_on_the_cpu(
    explainer, rule, is_refined
):
    masks = {"combine": "independent", "rule": rule, "smooth": 0.6, "contrast": 0.5, "min_peak": 1e-9}
    refinement = PAR if is_refined else None
    cut = device_cut_of(MasksConfig(**masks), CUDA)
    assert (cut is None) == (rule == "quantile")
    on_cpu = explained(explainer, refinement=refinement, **masks)
    on_device = explained(explainer, refinement=refinement, cut=cut, **masks)
    for result in (*on_cpu, *on_device):
        # backgrounds have done their part
        assert len(result.maps.relevance_grids) == result.maps.prompt_maps
    for left, right in zip(rows_of(on_cpu, **masks), rows_of(on_device, **masks), strict=True):
        assert left["status"] == right["status"]
        first, second = decode_rle(left["mask"]), decode_rle(right["mask"])
        assert (first & second).sum() >= 0.999 * (first | second).sum()


@pytest.mark.parametrize("where", ["CPU", "device"])
@pytest.mark.parametrize("refinement", [None, PAR], ids=["grids", "refined"])
@pytest.mark.parametrize("rule", ["fixed", "otsu", "band"])
def test_a_map_of_which_nothing_is_left_is_an_empty_mask(where, refinement, rule):
    masks = {"combine": "independent", "rule": rule, "contrast": 1.0}
    weak = torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
    cut = device_cut_of(MasksConfig(**masks), CUDA) if where == "device" else None
    (maps,) = sample_maps(
        torch.stack([weak, 2 * weak + 1]),
        [ImageMaps(np.arange(2), np.arange(2), np.arange(2), 0)],
        GridTexts(torch.eye(2), np.full(2, 0.3)),
        MapSettings("upsampled", None, steps_of(**masks), refinement, cut=cut),
        pixels=torch.from_numpy(samples()[0].canvases[0])[None],
        image_sizes=[(120, 90)],
    )
    prompts = tuple(ExplainedPrompt(index, TEXTS[index], None, False, 0.3) for index in range(2))
    empty, full = rows_of([ExplainedSample(0, "k", 120, 90, prompts, maps)], **masks)
    assert (empty["status"], empty["area"], full["status"]) == ("empty_mask", 0, "ok")
    assert empty["peak"] == pytest.approx(float(weak.max()))
    assert not decode_rle(empty["mask"]).any()


def test_a_batch_has_the_rows_of_its_samples_alone(explainer):
    masks = {"combine": "independent", "smooth": 0.6, "contrast": 0.5, "min_lead": -0.5}
    batch = explained(explainer, **masks)
    for sample, result in zip(samples(), batch, strict=True):
        (alone,) = explained(explainer, batch=[sample], **masks)
        np.testing.assert_allclose(result.maps.mask_maps, alone.maps.mask_maps, rtol=1e-3, atol=1e-8)
        np.testing.assert_array_equal(result.maps.rejections, alone.maps.rejections)


def test_a_neutral_text_takes_nothing_and_its_patches_stay_zero(explainer):
    companions = replace(BACKGROUNDS, neutral="a photo of a", neutral_threshold=0.5)
    zeroed = explained(explainer, companions=companions)[1].maps
    found = explained(explainer, companions=companions, contrast=0.5)[1].maps
    texts = [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[4], "a guitar", "a basketball"]
    expected = contrasted_alone(explainer, zeroed.mask_maps, texts)[:4]
    np.testing.assert_allclose(found.mask_maps[:4], expected, rtol=1e-3, atol=1e-8)
    assert (found.mask_maps[:4][zeroed.mask_maps[:4] == 0] == 0).all()
    np.testing.assert_array_equal(found.peaks, zeroed.mask_maps.max((1, 2))[:4])
