"""Refinement on the way from a shard to its rows."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import legrad
from legrad.heatmaps import heatmaps_of, minmax_normalise
from legrad.masks.rle import decode_rle
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.engine import Engine
from pipeline.annotate.maps import refined_maps, refinement_of
from pipeline.annotate.sample_states import PreparedSample
from pipeline.config.masks import MasksConfig
from pipeline.demo import assets
from pipeline.errors import UserError
from pipeline.prompts.sample_prompts import Companions, Prompt
from tests.helpers.corpus import demo_job, write_shard

PAR = refinement_of(MasksConfig(refine="par"), 8)
SCENES = 8


@pytest.fixture(scope="module")
def explainer():
    name = assets.register_demo_model()
    return legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=2)


@pytest.fixture(scope="module")
def demo_scenes():
    """The members of the first scenes of the demo's held-out set, scene by scene."""
    with tarfile.open(assets.demo_shard_paths("heldout")[0]) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()[: 3 * SCENES]}
    keys = sorted({name.partition(".")[0] for name in members})
    return [[(name, data) for name, data in members.items() if name.startswith(f"{key}.")] for key in keys]


@pytest.fixture
def annotate(explainer, demo_scenes, tmp_path):
    """Annotates the scenes and returns their rows."""

    def run(**masks):
        shard = write_shard(tmp_path / "scenes.tar", demo_scenes)
        out = tmp_path / f"out-{masks.get('refine')}"
        config = demo_job(
            [shard], out, input={"caption": "json:captions"}, prompts={"source": "captions"}, masks=masks
        )
        annotator = ShardAnnotator(config, explainer, decode_threads=2, metadata={"config_hash": "h"})
        try:
            for source in storage.list_shards(config.input.shards):
                annotator.annotate(source)
                rows = pq.read_table(out / "annotations" / f"{source.shard_id}.parquet").to_pylist()
        finally:
            annotator.close()
        return rows

    return run


def scene_samples(scenes):
    """Scenes of one size as the engine takes them, with different numbers of prompts."""
    samples = []
    for index, members in enumerate(scenes):
        fields = {name.partition(".")[2]: data for name, data in members}
        image = Image.open(io.BytesIO(fields["jpg"])).convert("RGB").resize((96, 96))
        texts = [*json.loads(fields["json"])["captions"], "a dog"][: 1 + index % 3]
        prompts = tuple(Prompt(position, text) for position, text in enumerate(texts))
        samples.append(PreparedSample(index, f"{index}", 256, 256, (np.array(image),), prompts))
    return samples


def mean_iou(rows, scenes):
    truth_by_key = {}
    for members in scenes:
        fields = {name.partition(".")[2]: data for name, data in members}
        document = json.loads(fields["json"])
        labels = np.array(Image.open(io.BytesIO(fields["seg.png"])))
        for position, class_id in enumerate(document["class_ids"]):
            truth_by_key[members[0][0].partition(".")[0], position] = labels == class_id
    ious = []
    for row in rows:
        mask, truth = decode_rle(row["mask"]), truth_by_key[row["key"], row["prompt_index"]]
        ious.append((mask & truth).sum() / (mask | truth).sum())
    return float(np.mean(ious))


@pytest.mark.parametrize("rule", ["fixed", "otsu"])
def test_refined_masks_lie_closer_to_the_truth(annotate, demo_scenes, rule):
    plain = annotate(rule=rule)
    iou_by_kernel = {kernel: annotate(rule=rule, refine=kernel) for kernel in ("par", "pamr")}
    for rows in iou_by_kernel.values():
        assert [row["mask"]["size"] for row in rows] == [row["mask"]["size"] for row in plain]
        assert [row["peak"] for row in rows] == [row["peak"] for row in plain]
        assert mean_iou(rows, demo_scenes) > mean_iou(plain, demo_scenes) + 0.08


def test_a_batch_is_refined_as_its_samples_alone(explainer, demo_scenes):
    samples = scene_samples(demo_scenes)
    engine = Engine(explainer, 32, 8, refinement=PAR)
    for sample, result in zip(samples, engine.explain(samples), strict=True):
        alone = engine.explain([sample])[0].maps.mask_maps
        refined = result.maps.mask_maps
        assert refined.shape == (len(sample.prompts), 96, 96)
        np.testing.assert_allclose(refined, alone, rtol=0, atol=1e-3)
        assert refined.min() == 0
        assert refined.max((1, 2)).tolist() == [1] * len(sample.prompts)


def test_the_maps_are_what_the_library_makes_of_grid_and_pixels(explainer, demo_scenes):
    (sample,) = scene_samples(demo_scenes[:1])
    maps = Engine(explainer, 32, 8, refinement=PAR).explain([sample])[0].maps
    grids = torch.from_numpy(maps.relevance_grids)
    heatmaps = heatmaps_of(grids, 96, 96, explainer.tower.normalisation)
    image = torch.from_numpy(sample.canvases[0]).permute(2, 0, 1)[None]
    expected = minmax_normalise(legrad.refine_heatmaps(image, heatmaps[None], refinement=PAR)[0])
    torch.testing.assert_close(torch.from_numpy(maps.mask_maps), expected)
    assert maps.normalisation is None


def refined_alone(explainer, sample, grids):
    """The refined maps of one sample's grids."""
    grids = torch.from_numpy(grids)
    owners = torch.zeros(len(grids), dtype=torch.int64)
    pixels = torch.from_numpy(sample.canvases[0])[None]
    return refined_maps(pixels, grids, owners, PAR, explainer.tower.normalisation).numpy()


def test_backgrounds_are_refined_too_and_a_neutral_text_zeroes_its_patches_first(explainer, demo_scenes):
    (sample,) = scene_samples(demo_scenes[:1])
    companions = Companions((("sky",), ("a wall",), ("a very old wall",)), 2, "a photo of a", 0.3)
    unrefined = Engine(explainer, 32, 8, companions=companions).explain([sample])[0].maps
    refined = Engine(explainer, 32, 8, companions=companions, refinement=PAR).explain([sample])[0].maps
    assert unrefined.prompt_maps == len(sample.prompts)
    zeroed = unrefined.mask_maps
    assert len(zeroed) == len(sample.prompts) + 2
    assert (zeroed != unrefined.relevance_grids).any()
    np.testing.assert_array_equal(refined.relevance_grids, unrefined.relevance_grids)
    np.testing.assert_array_equal(refined.peaks, zeroed.max((1, 2)))
    alone = refined_alone(explainer, sample, zeroed)
    np.testing.assert_allclose(refined.mask_maps, alone, rtol=1.3e-6, atol=1e-5)
    uncorrected = refined_alone(explainer, sample, unrefined.relevance_grids)
    assert np.abs(uncorrected - refined.mask_maps).max() > 0.05


@pytest.mark.parametrize("normalisation", ["upsampled", "grid"])
def test_a_map_that_is_not_finite_and_a_constant_one_spoil_no_other(normalisation):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8))
    grids = torch.rand(4, 2, 3)
    grids[1], grids[2, 0, 0] = 0.5, torch.nan
    refinement = replace(PAR, dilations=(1, 4))
    owners = torch.zeros(4, dtype=torch.int64)
    maps = refined_maps(pixels, grids, owners, refinement, normalisation)
    good = refined_maps(pixels, grids[[0, 3]], owners[:2], refinement, normalisation)
    assert (maps[1] == 0).all()
    torch.testing.assert_close(maps[[0, 3]], good)


def test_prompts_of_equal_texts_share_one_map(explainer, demo_scenes):
    (first, second) = scene_samples(demo_scenes[:2])
    texts = ("a dog", "a red cactus", "a dog", "sky", "a dog", "a red cactus")
    repeated = replace(first, prompts=tuple(Prompt(index, text) for index, text in enumerate(texts)))
    maps = Engine(explainer, 32, 8, refinement=PAR).explain([second, repeated])[1].maps
    assert maps.map_of_prompt.tolist() == [0, 1, 0, 2, 0, 1]
    assert [len(own) for own in (maps.relevance_grids, maps.peaks, maps.mask_maps)] == [3, 3, 3]
    assert (maps.mask_maps[0] != maps.mask_maps[1]).any()


def test_steps_follow_the_patch_unless_they_are_given():
    assert refinement_of(MasksConfig(refine="none"), 16) is None
    assert refinement_of(MasksConfig(refine="pamr"), 16).dilations == (4, 8, 16, 32)
    given = MasksConfig(refine="pamr", refine_dilations=[1, 5], refine_sharpness=0.7, refine_iterations=3)
    assert refinement_of(given, 16) == legrad.Refinement("pamr", 3, (1, 5), 0.7)


@pytest.mark.parametrize(
    ("key", "value"), [("refine", "crf"), ("refine_dilations", [3, 3]), ("refine_dilations", [])]
)
def test_a_setting_that_makes_no_sense_is_refused_by_its_key(tmp_path, key, value):
    with pytest.raises(UserError, match=rf"masks\.{key}"):
        demo_job(["0.tar"], tmp_path, masks={key: value})
