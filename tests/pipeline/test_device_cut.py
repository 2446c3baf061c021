"""Masks cut for a whole batch on the device give the rows of masks cut sample by sample on the CPU."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import legrad
from legrad.masks.rle import decode_rle
from legrad.masks.thresholds import MaskRule
from pipeline.annotate import maps as maps_of_batch
from pipeline.annotate.cutting import DeviceCut, device_cut_of
from pipeline.annotate.engine import Engine
from pipeline.annotate.maps import refinement_of
from pipeline.annotate.rows import sample_rows
from pipeline.annotate.sample_states import PreparedSample
from pipeline.config.masks import MasksConfig
from pipeline.demo import assets
from pipeline.prompts.sample_prompts import Companions, Prompt
from tests.helpers.corpus import demo_job
from tests.helpers.device_work import DeviceWork

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = [(96, 96), (375, 500), (31, 57), (120, 80), (1, 40)]
COMPANIONS = Companions((("sky",), ("a wall",)), 2, "a photo of a", 0.6)
PAR = refinement_of(MasksConfig(refine="par"), 8)


@pytest.fixture(scope="module")
def explainer():
    return legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers=2
    )


def samples():
    generator = np.random.default_rng(0)
    return [
        PreparedSample(
            index,
            f"k{index}",
            *size,
            (generator.integers(0, 256, (96, 96, 3), dtype=np.uint8),),
            (Prompt(0, "a dog"), Prompt(1, f"text {index}"), Prompt(2, "a dog"))[: 1 + index % 3],
        )
        for index, size in enumerate(SIZES)
    ]


def rows_of(explained, config):
    return [row for sample in explained for row in sample_rows(sample, config).rows]


def iou(left, right):
    left, right = decode_rle(left), decode_rle(right)
    return (left & right).sum() / (left | right).sum() if (left | right).any() else 1.0


@pytest.mark.parametrize(
    "masks",
    [{"rule": "fixed", "value": 0.6}, {"rule": "otsu", "max_side": 70}, {"rule": "band"}],
    ids=["fixed", "otsu", "band"],
)
@pytest.mark.parametrize("is_refined", [False, True], ids=["grids", "refined"])
@pytest.mark.parametrize("companions", [Companions(), COMPANIONS], ids=["alone", "companions"])
def test_rows_are_those_of_masks_cut_on_the_cpu(explainer, masks, is_refined, companions):
    config = demo_job(["a.tar"], "out", masks={"combine": "independent", **masks}, output={"heatmap": True})
    cut = device_cut_of(config.masks, CUDA)
    settings = {"companions": companions, "refinement": PAR if is_refined else None}
    on_cpu = Engine(explainer, 32, 8, **settings).explain(samples())
    on_device = Engine(explainer, 32, 8, **settings, cut=cut).explain(samples())
    assert all(sample.maps.runs is not None and sample.maps.mask_maps is None for sample in on_device)
    for left, right in zip(rows_of(on_cpu, config), rows_of(on_device, config), strict=True):
        for column in left.keys() - {"mask", "ignore", "threshold", "threshold_low", "area", "bbox_xywh"}:
            assert left[column] == right[column]
        assert right["threshold"] == pytest.approx(left["threshold"], abs=1e-6)
        assert right["area"] == decode_rle(right["mask"]).sum()
        assert iou(left["mask"], right["mask"]) >= 0.999
        if left["ignore"] is not None:
            assert iou(left["ignore"], right["ignore"]) >= 0.999


def test_masks_too_large_for_a_chunk_are_cut_on_the_cpu_and_no_others(explainer, monkeypatch):
    monkeypatch.setattr(maps_of_batch, "MAX_CHUNK_PIXELS", 20_000)
    config = demo_job(["a.tar"], "out", masks={"combine": "independent", "rule": "fixed"})
    engine = Engine(explainer, 32, 8, refinement=PAR, cut=DeviceCut(MaskRule("fixed")))
    explained = engine.explain(samples())
    assert [sample.maps.runs is not None for sample in explained] == [True, False, True, True, True]
    assert [sample.maps.mask_maps is None for sample in explained] == [True, False, True, True, True]
    on_cpu = Engine(explainer, 32, 8, refinement=PAR).explain(samples())
    for left, right in zip(rows_of(on_cpu, config), rows_of(explained, config), strict=True):
        assert iou(left["mask"], right["mask"]) >= 0.999


def test_the_device_is_waited_for_as_often_with_many_samples_as_with_few(explainer):
    engine = Engine(explainer, 32, 8, refinement=PAR, cut=DeviceCut(MaskRule("band")))
    with DeviceWork(explainer.model).counted():
        engine.explain(samples())  # texts are embedded once
    waits = []
    for count in (3, 5):
        device = DeviceWork(explainer.model)
        with device.counted():
            engine.explain(samples()[:count])
        waits.append(device.total.waits)
    assert waits[0] == waits[1] <= 10


def test_a_sample_sent_to_another_process_takes_none_of_its_neighbours_maps_along(explainer):
    for settings in ({"refinement": PAR}, {"cut": DeviceCut(MaskRule("fixed"))}):
        for sample in Engine(explainer, 32, 8, **settings).explain(samples()):
            buffers: list[pickle.PickleBuffer] = []
            data = pickle.dumps(sample.maps, 5, buffer_callback=buffers.append)
            maps = sample.maps
            runs = [] if maps.runs is None else [each.mask for each in maps.runs]
            arrays = [maps.relevance_grids, maps.peaks, maps.map_of_prompt, *runs]
            arrays += [] if maps.mask_maps is None else [maps.mask_maps]
            assert sum(buffer.raw().nbytes for buffer in buffers) == sum(array.nbytes for array in arrays)
            assert len(data) < 3000


def test_masks_of_maps_in_half_precision_are_those_of_the_rounded_values(explainer):
    config = demo_job(["a.tar"], "out", masks={"combine": "independent", "rule": "fixed"})
    for sample in Engine(explainer, 32, 8, refinement=PAR).explain(samples()):
        half = sample.maps.mask_maps.astype(np.float16)
        rounded = half.astype(np.float32)
        assert np.abs(rounded - sample.maps.mask_maps).max() <= 2**-12
        rows, same = (
            rows_of([replace(sample, maps=replace(sample.maps, mask_maps=maps))], config)
            for maps in (half, rounded)
        )
        assert repr(rows) == repr(same)
        exact = rows_of([sample], config)
        assert min(iou(left["mask"], right["mask"]) for left, right in zip(rows, exact, strict=True)) > 0.97


@pytest.mark.parametrize(
    ("masks", "device", "is_cut_there"),
    [
        ({"rule": "fixed"}, CPU, False),
        ({"rule": "fixed"}, CUDA, True),
        ({"rule": "otsu"}, CUDA, True),
        ({"rule": "band"}, CUDA, True),
        ({"rule": "quantile"}, CUDA, False),
        ({"combine": "argmax"}, CUDA, False),
        ({"smooth": 1.0, "contrast": 0.5}, CUDA, True),
        ({"min_component": 0.1}, CUDA, False),
        ({"max_hole": 0.1}, CUDA, False),
    ],
)
def test_where_masks_are_cut_follows_from_the_device_and_the_configuration(masks, device, is_cut_there):
    config = MasksConfig(**{"combine": "independent", **masks})
    assert (device_cut_of(config, device) is not None) == is_cut_there


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", ["fixed", "otsu", "band"])
def test_masks_cut_on_a_gpu_are_those_cut_on_the_cpu_from_the_same_maps(rule):
    generator = torch.Generator().manual_seed(0)
    grids = torch.rand(6, 14, 14, generator=generator)
    masks = legrad.grid_to_masks(grids, 375, 500, MaskRule(rule))
    on_gpu = legrad.grid_to_masks(grids.cuda(), 375, 500, MaskRule(rule), max_chunk_pixels=400_000)
    np.testing.assert_allclose(on_gpu.thresholds, masks.thresholds, atol=1e-5)
    for left, right in zip(masks.rles, on_gpu.rles, strict=True):
        assert iou(left, right) >= 0.999
