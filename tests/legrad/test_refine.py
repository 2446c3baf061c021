import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import legrad
from legrad import Refinement, refine_heatmaps
from legrad.masks.refine import dilations_for_patch

SMALL = Refinement(iterations=2, dilations=(1, 2))


def naive_refinement(image, heatmap, refinement):
    """One map of one image, pixel by pixel in float64, straight from the papers' formulas."""
    _, height, width = image.shape
    offsets = [
        (step * down, step * right)
        for step in refinement.dilations
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if (down, right) != (0, 0)
    ]
    distances = np.array([math.hypot(*offset) for offset in offsets])

    def at(frame, row, column):
        return frame[..., min(max(row, 0), height - 1), min(max(column, 0), width - 1)]

    def softmax(exponents):
        weights = np.exp(exponents - exponents.max())
        return weights / weights.sum()

    affinities = np.empty((height, width, len(offsets)))
    for row in range(height):
        for column in range(width):
            colours = np.stack([at(image, row + down, column + right) for down, right in offsets])
            unit = refinement.sharpness * colours.std(axis=0) + 1e-8
            ratios = np.abs(colours - image[:, row, column]) / unit
            if refinement.kernel == "pamr":
                weights = softmax(-ratios.mean(axis=1))
            else:
                near = softmax(-((distances / (refinement.sharpness * distances.std() + 1e-8)) ** 2))
                weights = softmax(-(ratios**2).mean(axis=1)) + refinement.position_weight * near
            affinities[row, column] = weights / weights.sum()
    for _ in range(refinement.iterations):
        before = heatmap
        heatmap = np.empty((height, width))
        for row in range(height):
            for column in range(width):
                values = [at(before, row + down, column + right) for down, right in offsets]
                heatmap[row, column] = affinities[row, column] @ values
    return heatmap


def scenes(seed, images, maps, height=9, width=12):
    generator = torch.Generator().manual_seed(seed)
    # a few surfaces with texture, as photos have them
    surfaces = torch.randint(0, 3, (images, 1, height, width), generator=generator) * 70
    texture = torch.randint(0, 20, (images, 3, height, width), generator=generator)
    return (surfaces + texture).to(torch.uint8), torch.rand(maps, height, width, generator=generator)


@pytest.mark.parametrize("kernel", ["pamr", "par"])
@pytest.mark.parametrize(("height", "width", "dilations"), [(5, 7, (1, 2)), (4, 3, (1, 6)), (1, 4, (2,))])
def test_every_pixel_is_what_the_papers_formulas_say(kernel, height, width, dilations):
    images, heatmaps = scenes(1, 1, 1, height, width)
    refinement = Refinement(kernel, iterations=3, dilations=dilations, sharpness=0.4, position_weight=0.2)
    refined = refine_heatmaps(images, heatmaps, refinement=refinement)
    expected = naive_refinement(images[0].double().numpy(), heatmaps[0].double().numpy(), refinement)
    np.testing.assert_allclose(refined[0].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("kernel", ["pamr", "par"])
@settings(max_examples=20)
@given(st.integers(0, 2**20), st.floats(-3, 3), st.floats(0.001, 5))
def test_a_map_never_leaves_its_own_range(kernel, seed, offset, span):
    images, heatmaps = scenes(seed, 2, 2)
    heatmaps = heatmaps * span + offset
    refined = refine_heatmaps(images, heatmaps, refinement=replace(SMALL, kernel=kernel))
    for before, after in zip(heatmaps, refined, strict=True):
        assert before.min() <= after.min() and after.max() <= before.max()


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kernel", ["pamr", "par"])
def test_a_constant_map_stays_as_it_is(kernel, level):
    images, _ = scenes(2, 1, 1)
    constant = torch.full((1, 9, 12), level)
    assert torch.equal(refine_heatmaps(images, constant, refinement=replace(SMALL, kernel=kernel)), constant)


def test_an_image_of_one_colour_averages_a_map_without_regard_to_colour():
    plain = torch.full((1, 3, 7, 7), 128, dtype=torch.uint8)
    peak = torch.zeros(1, 7, 7)
    peak[0, 3, 3] = 1
    refined = refine_heatmaps(plain, peak, refinement=Refinement("pamr", iterations=1, dilations=(1,)))
    expected = torch.zeros(7, 7)
    expected[2:5, 2:5] = 1 / 8
    expected[3, 3] = 0
    torch.testing.assert_close(refined[0], expected)


@pytest.mark.parametrize("axes", [(-1,), (-2,), (-2, -1)])
def test_a_mirrored_image_gives_the_mirrored_map(axes):
    images, heatmaps = scenes(3, 2, 2)
    mirrored = refine_heatmaps(images.flip(axes), heatmaps.flip(axes), refinement=SMALL)
    torch.testing.assert_close(
        mirrored.flip(axes), refine_heatmaps(images, heatmaps, refinement=SMALL), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("max_bytes", [1, 40_000, 100_000, 2**28])
def test_a_batch_equals_its_singles_however_much_memory_there_is(max_bytes):
    images, heatmaps = scenes(4, 4, 7)
    # image 1 has no map, the others different numbers, out of order
    index = torch.tensor([2, 0, 3, 2, 0, 2, 3])
    refined = refine_heatmaps(images, heatmaps, index, SMALL, max_bytes=max_bytes)
    for row, image in enumerate(index.tolist()):
        single = refine_heatmaps(images[image : image + 1], heatmaps[row : row + 1], refinement=SMALL)
        torch.testing.assert_close(refined[row : row + 1], single, rtol=0, atol=1e-6)


def test_maps_as_the_explainer_gives_them_need_no_index():
    images, heatmaps = scenes(11, 2, 6)
    by_image = refine_heatmaps(images, heatmaps.reshape(2, 3, 9, 12), refinement=SMALL)
    flat = refine_heatmaps(images, heatmaps, torch.tensor([0, 0, 0, 1, 1, 1]), SMALL)
    assert torch.equal(by_image, flat.reshape(2, 3, 9, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_arithmetic_is_in_float32_for_maps_of_any_dtype(dtype):
    images, heatmaps = scenes(5, 2, 2)
    heatmaps = heatmaps.to(dtype)
    refined = refine_heatmaps(images, heatmaps, refinement=SMALL)
    assert refined.dtype == torch.float32
    torch.testing.assert_close(refined, refine_heatmaps(images, heatmaps.float(), refinement=SMALL))


def test_normalised_pixels_do_as_well_as_raw_ones():
    images, heatmaps = scenes(6, 2, 2)
    normalised = (images / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.27
    torch.testing.assert_close(
        refine_heatmaps(normalised, heatmaps, refinement=SMALL),
        refine_heatmaps(images, heatmaps, refinement=SMALL),
        rtol=0,
        atol=1e-4,
    )


def iou(mask, truth):
    return float((mask & truth).sum() / (mask | truth).sum())


@pytest.mark.parametrize("kernel", ["pamr", "par"])
def test_a_blurred_map_takes_the_shape_of_the_thing_in_the_picture(kernel):
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    # up to the border, so that the frame's edge takes part
    truth = (rows < 26) & (columns >= 10) & (columns < 38)
    image = torch.where(truth, 200, 60).expand(3, 48, 48).to(torch.uint8)
    off_centre = torch.exp(-((rows - 16) ** 2 + (columns - 20) ** 2) / 200.0)
    refinement = Refinement(kernel, iterations=10, dilations=(1, 2, 4, 8))
    refined = refine_heatmaps(image[None], off_centre[None], refinement=refinement)[0]
    before, after = (iou(heatmap > 0.5 * heatmap.max(), truth) for heatmap in (off_centre, refined))
    assert before < 0.55
    assert after > 0.85


def test_nan_stays_in_its_own_map():
    images, heatmaps = scenes(7, 1, 2)
    broken = heatmaps.clone()
    broken[0, 4, 4] = math.nan
    index = torch.tensor([0, 0])
    refined = refine_heatmaps(images, broken, index, SMALL)
    torch.testing.assert_close(refined[1], refine_heatmaps(images, heatmaps, index, SMALL)[1])


def test_no_maps_give_no_maps():
    images, _ = scenes(8, 2, 1)
    empty = torch.zeros(0, 9, 12)
    assert refine_heatmaps(images, empty, torch.zeros(0, dtype=torch.int64)).shape == (0, 9, 12)


@pytest.mark.parametrize(
    ("heatmaps", "index", "message"),
    [
        (torch.zeros(2, 9, 11), None, "frame"),
        (torch.zeros(3, 9, 12), None, "each of 2 images"),
        (torch.zeros(9, 12), None, "each of 2 images"),
        (torch.zeros(2, 9, 12), torch.tensor([0, 2]), "image_index"),
        (torch.zeros(2, 9, 12), torch.tensor([-1, 0]), "image_index"),
        (torch.zeros(2, 9, 12), torch.tensor([0]), "image_index"),
        (torch.zeros(2, 1, 9, 12), torch.tensor([0, 1]), "image_index"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(heatmaps, index, message):
    images, _ = scenes(9, 2, 1)
    with pytest.raises(legrad.InputError, match=message):
        refine_heatmaps(images, heatmaps, index)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kernel", "gauss"),
        ("iterations", 0),
        ("dilations", ()),
        ("dilations", (0, 1)),
        ("dilations", (2, 2)),
        ("sharpness", 0.0),
        ("sharpness", math.nan),
        ("position_weight", -0.1),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(setting, value):
    with pytest.raises(legrad.InputError, match=setting):
        replace(SMALL, **{setting: value})


@pytest.mark.parametrize(
    ("patch", "steps"), [(8, (2, 4, 8, 16)), (14, (3, 7, 14, 28)), (1, (1, 2)), (2, (1, 2, 4))]
)
def test_steps_follow_the_patch_and_never_repeat(patch, steps):
    assert dilations_for_patch(patch) == steps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_computes_the_same_as_the_cpu():
    images, heatmaps = scenes(10, 4, 7)
    index = torch.tensor([2, 0, 3, 2, 0, 2, 3])
    on_cpu = refine_heatmaps(images, heatmaps, index, SMALL)
    on_gpu = refine_heatmaps(images.cuda(), heatmaps.cuda(), index.cuda(), SMALL)
    # With Triton, affinities are in float16.
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=2e-4)
