"""Preprocessing, bit for bit against open_clip's own transform."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip import image_transform
from PIL import Image

import legrad
from legrad.checks import check_resize
from legrad.image_files.levels import as_8_bits
from legrad.images import ImageTransform, fast_resize, transform_of
from tests.helpers.tiny_models import tiny_clip, unit_texts

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _picture(width: int, height: int, mode: str) -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


def _open_clip(transform: ImageTransform):
    return image_transform(
        (transform.height, transform.width),
        is_train=False,
        mean=transform.mean,
        std=transform.std,
        resize_mode="squash",
        interpolation=transform.interpolation,
    )


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
@settings(deadline=None, max_examples=8)
@given(
    width=st.integers(1, 97), height=st.integers(1, 97), size=st.sampled_from([(32, 32), (24, 56), (1, 3)])
)
def test_resize_and_normalise_are_bit_equal_to_open_clip(mode, interpolation, width, height, size):
    transform = ImageTransform(*size, MEAN, STD, interpolation)
    picture = _picture(width, height, mode)
    pixels = torch.from_numpy(transform.resize(picture))
    received = transform.normalise(pixels[None], torch.float32)
    assert torch.equal(received[0], _open_clip(transform)(picture))


def test_palettes_with_transparency_are_bit_equal_to_open_clip():
    transform = ImageTransform(16, 24, MEAN, STD)
    picture = _picture(40, 30, "P")
    picture.info["transparency"] = 3
    pixels = torch.from_numpy(transform.resize(picture))
    assert torch.equal(transform.normalise(pixels[None], torch.float32)[0], _open_clip(transform)(picture))


def test_preprocess_equals_open_clip_for_a_batch_of_odd_sizes():
    explainer = legrad.LeGrad(tiny_clip())
    pictures = [_picture(31, 17, "RGB"), _picture(5, 90, "L"), _picture(20, 12, "RGBA")]
    expected = torch.stack([_open_clip(explainer.transform)(picture) for picture in pictures])
    assert torch.equal(explainer.preprocess(pictures), expected)
    assert explainer.preprocess([]).shape == (0, 3, 12, 20)


def test_preprocess_gives_the_dtype_of_the_model():
    explainer = legrad.LeGrad(tiny_clip().to(torch.bfloat16))
    images = explainer.preprocess([_picture(31, 17, "RGB")])
    assert images.dtype == torch.bfloat16
    assert explainer.encode(images).batch_size == 1


def test_the_models_own_preprocessing_is_followed():
    visual = tiny_clip().visual
    assert transform_of(visual) == ImageTransform(12, 20, MEAN, STD, "bicubic")
    visual.preprocess_cfg = {"size": 64, "mean": 0.5, "std": (0.1, 0.2, 0.3), "interpolation": "bilinear"}
    assert transform_of(visual) == ImageTransform(64, 64, (0.5, 0.5, 0.5), (0.1, 0.2, 0.3), "bilinear")


def test_another_image_size_can_be_asked_for():
    assert (legrad.LeGrad(tiny_clip(), image_size=16).transform.height) == 16
    transform = legrad.LeGrad(tiny_clip(), image_size=(8, 24)).transform
    assert (transform.height, transform.width) == (8, 24)
    with pytest.raises(legrad.InputError, match="multiples of 4, received 10 x 10"):
        legrad.LeGrad(tiny_clip(), image_size=10)


def test_a_size_that_leaves_a_margin_beyond_the_patches_is_rounded_down_to_whole_patches():
    explainer = legrad.LeGrad(tiny_clip(image_size=(14, 23)))
    assert (explainer.transform.height, explainer.transform.width) == (12, 20)
    images = explainer.preprocess([_picture(31, 17, "RGB")])
    assert explainer.relevance(images, unit_texts(1)).shape == (1, 1, 3, 5)
    with pytest.raises(legrad.InputError, match="multiples of 4, received 14 x 23"):
        legrad.LeGrad(tiny_clip(image_size=(14, 23)), image_size=(14, 23))


def keeping(height: int = 224, width: int = 224, patch_size: int = 16) -> ImageTransform:
    return ImageTransform(height, width, MEAN, STD, fit="keep", patch_size=patch_size)


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), side=st.sampled_from([64, 224, 384]))
@example(height=97, width=55, side=224)
def test_keep_makes_whole_patches_never_more_than_the_square_has_and_near_its_aspect_ratio(
    height, width, side
):
    input_height, input_width = keeping(side, side).input_size(height, width)
    assert input_height % 16 == input_width % 16 == 0
    patches = input_height * input_width // 256
    assert 1 <= patches <= (side // 16) ** 2
    assert (input_height - input_width) * (height - width) >= 0
    if max(height, width) <= 2 * min(height, width):
        # The shorter side is rounded by half a patch at most. At up to twice its length, the longer one then
        # loses at most one patch to keep the bound, and one by being whole.
        ideal_rows = (side // 16) * (height / width) ** 0.5
        assert abs(input_height / 16 - ideal_rows) <= 2


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_keep_treats_height_and_width_alike(height, width):
    input_height, input_width = keeping().input_size(height, width)
    assert keeping().input_size(width, height) == (input_width, input_height) or height == width


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
)
def test_keep_never_turns_portrait_into_landscape_for_any_number_of_patches(height, width, rows, columns):
    input_height, input_width = keeping(16 * rows, 16 * columns).input_size(height, width)
    assert input_height * input_width <= 256 * rows * columns
    assert (input_height - input_width) * (height - width) >= 0


def test_keep_leaves_a_square_image_at_the_native_size_and_a_sliver_with_one_row_of_patches():
    assert keeping().input_size(500, 500) == (224, 224)
    assert keeping().input_size(480, 640) == (192, 256)
    assert keeping().input_size(10, 10_000) == (16, 196 * 16)


def test_an_image_of_twice_the_width_is_explained_on_a_grid_of_about_twice_the_width():
    explainer = legrad.LeGrad(tiny_clip(), image_size=16, fit="keep")
    images = explainer.preprocess([Image.new("RGB", (80, 20), "red"), Image.new("RGB", (40, 10), "blue")])
    assert images.shape == (2, 3, 8, 32)
    grids = explainer.relevance(images, unit_texts(1))
    assert grids.shape == (2, 1, 2, 8)
    assert explainer.heatmaps(images, unit_texts(1)).shape == (2, 1, 8, 32)


def test_a_batch_of_images_of_several_input_sizes_is_refused_with_the_sizes():
    explainer = legrad.LeGrad(tiny_clip(), image_size=16, fit="keep")
    with pytest.raises(legrad.InputError, match=r"one input size.* 8 x 32, 16 x 16"):
        explainer.preprocess([Image.new("RGB", (80, 20)), Image.new("RGB", (20, 20))])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 97), height=st.integers(1, 97), size=st.sampled_from([(32, 32), (24, 56), (1, 3)])
)
@example(width=3, height=90, size=(24, 56))
@example(width=90, height=3, size=(24, 56))
def test_fast_resizing_is_exact_but_for_a_few_levels(mode, interpolation, width, height, size):
    transform = ImageTransform(*size, MEAN, STD, interpolation)
    smooth = _picture(1 + width // 8, 1 + height // 8, mode).resize((width, height))
    exact, fast = (transform.resize(smooth, way).astype(int) for way in ("exact", "fast"))
    assert fast.shape == (*size, 3)
    assert np.abs(exact - fast).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK", "YCbCr"])
def test_other_modes_are_resized_exactly_by_the_fast_way_too(mode):
    transform = ImageTransform(24, 56, MEAN, STD)
    picture = _picture(40, 30, mode)
    np.testing.assert_array_equal(transform.resize(picture, "fast"), transform.resize(picture))


def test_fast_resizing_follows_an_image_that_covers_its_last_pixels_in_part():
    rows = np.linspace(0, 200, 64).astype(np.uint8)
    ramp = np.repeat(np.repeat(rows[:, None, None], 64, 1), 3, 2)
    # 500 rows at an eighth are 62.5
    part = fast_resize(ramp[:63].copy(), 16, 16, "bicubic", extent=(62.5, 64.0))
    expected = 200 / 63 * (62.5 / 16 * (np.arange(16) + 0.5) - 0.5)
    assert np.abs(part[1:-1, 8, 0] - expected[1:-1]).max() < 1.5


def test_preprocess_resizes_exactly_unless_asked_to_be_fast():
    explainer = legrad.LeGrad(tiny_clip())
    pictures = [_picture(31, 17, "RGB"), _picture(5, 90, "L")]
    exact, fast = explainer.preprocess(pictures), explainer.preprocess(pictures, resize="fast")
    assert torch.equal(exact, explainer.preprocess(pictures, resize="exact"))
    expected = np.stack([explainer.transform.resize(picture, "fast") for picture in pictures])
    assert torch.equal(fast, explainer.transform.normalise(torch.from_numpy(expected), torch.float32))
    with pytest.raises(legrad.InputError, match="'exact' or 'fast', received 'cheap'"):
        check_resize("cheap")


LEVELS_16 = np.arange(12 * 20, dtype=np.uint16).reshape(12, 20) * 257 + 100


def _of_16_bits(mode: str) -> Image.Image:
    if mode == "I;16B":
        return Image.frombytes(mode, (20, 12), LEVELS_16.astype(">u2").tobytes())
    return Image.fromarray(LEVELS_16.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))


@pytest.mark.parametrize("resize", ["exact", "fast"])
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_grey_of_16_bits_is_scaled_to_8_bits_however_it_is_passed(mode, resize, tmp_path):
    explainer = legrad.LeGrad(tiny_clip())
    expected = explainer.preprocess([Image.fromarray((LEVELS_16 >> 8).astype(np.uint8))])
    image = _of_16_bits(mode)
    assert image.mode == mode
    assert torch.equal(explainer.preprocess([image], resize=resize), expected)
    assert torch.equal(
        torch.from_numpy(explainer.transform.resize(image))[None], _pixels(explainer, LEVELS_16)
    )
    Image.fromarray(LEVELS_16).save(tmp_path / "a.png")
    assert torch.equal(explainer.preprocess([tmp_path / "a.png"], resize=resize), expected)
    assert torch.equal(explainer.preprocess([LEVELS_16], resize=resize), expected)


def _pixels(explainer: legrad.LeGrad, levels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(explainer.transform.resize(Image.fromarray((levels >> 8).astype(np.uint8))))[None]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.linspace(0, 1, 256, dtype=np.float32), range(256)),
        (np.arange(256, dtype=np.float32), range(256)),
        (np.arange(256, dtype=np.int32), range(256)),
        (np.full(256, 65535, np.int32), [255] * 256),
        (np.zeros(256, np.float32), [0] * 256),
    ],
)
def test_grey_without_a_range_of_its_own_has_the_smallest_that_holds_all_values(values, expected):
    image = as_8_bits(Image.fromarray(values.reshape(16, 16)))
    assert image.mode == "L"
    assert np.asarray(image).flatten().tolist() == list(expected)
