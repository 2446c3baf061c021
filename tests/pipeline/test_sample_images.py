"""Images decode as with Pillow and open_clip, in every mode and orientation, or are reported as damaged."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image, ImageOps

from legrad.images import ImageTransform
from pipeline.errors import SampleFailure
from pipeline.shards.images import decode_image, open_image
from tests.helpers.pictures import LIMIT, MODES, by_pillow, encoded, exif_with, failure_of, rgb

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.26, 0.27)

TRANSFORM = ImageTransform(32, 48, MEAN, STD, "bicubic")


def by_open_clip(image: Image.Image, interpolation: str = "bicubic") -> torch.Tensor:
    transform = image_transform(
        (TRANSFORM.height, TRANSFORM.width),
        is_train=False,
        mean=MEAN,
        std=STD,
        resize_mode="squash",
        interpolation=interpolation,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transform(image)


def model_input(data: bytes, transform: ImageTransform = TRANSFORM) -> torch.Tensor:
    pixels = decode_image(data, transform, max_image_pixels=LIMIT).pixels
    return transform.normalise(torch.from_numpy(pixels)[None], torch.float32)[0]


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    quality=st.sampled_from([30, 75, 95, 100]),
)
def test_jpegs_decode_bit_for_bit_as_with_pillow(size, subsampling, progressive, quality):
    data = encoded(
        rgb(*size),
        "JPEG",
        quality=quality,
        subsampling=subsampling,
        progressive=progressive,
    )
    ours = open_image(data, max_image_pixels=LIMIT)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(by_pillow(data)))


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_every_mode_reaches_the_model_bit_for_bit_as_with_open_clip(name, interpolation):
    transform = ImageTransform(TRANSFORM.height, TRANSFORM.width, MEAN, STD, interpolation)
    expected = by_open_clip(Image.open(io.BytesIO(MODES[name])), interpolation)
    assert torch.equal(model_input(MODES[name], transform), expected)


@pytest.mark.parametrize("name", MODES)
def test_the_original_size_is_reported(name):
    decoded = decode_image(MODES[name], TRANSFORM, max_image_pixels=LIMIT)
    assert (decoded.image_height, decoded.image_width) == (41, 59)
    assert decoded.pixels.shape == (32, 48, 3)
    assert decoded.pixels.dtype == np.uint8


def test_grey_of_16_bits_is_scaled_to_8():
    values = np.arange(41 * 59, dtype=np.uint16).reshape(41, 59) * 27
    image = open_image(encoded(Image.fromarray(values), "PNG"), max_image_pixels=LIMIT)
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), values // 256)


def test_many_threads_decode_the_same_pixels():
    files = [encoded(rgb(seed=seed), "JPEG") for seed in range(24)]
    alone = [decode_image(data, TRANSFORM, max_image_pixels=LIMIT).pixels for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(
            pool.map(lambda data: decode_image(data, TRANSFORM, max_image_pixels=LIMIT).pixels, files)
        )
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("byte_order", ["<", ">"])
def test_exif_orientation_is_applied_before_anything_else(orientation, file_format, byte_order):
    data = encoded(rgb(), file_format, exif=exif_with(orientation, byte_order))
    upright = ImageOps.exif_transpose(by_pillow(data))
    decoded = decode_image(data, TRANSFORM, max_image_pixels=LIMIT)
    assert (decoded.image_height, decoded.image_width) == (upright.height, upright.width)
    assert (upright.height, upright.width) == ((59, 41) if orientation > 4 else (41, 59))
    assert torch.equal(model_input(data), by_open_clip(upright))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_corrupt_exif_is_no_error_and_warns_nobody(file_format, data):
    whole = exif_with(1)
    cut = data.draw(st.integers(6, len(whole)))
    position = data.draw(st.integers(6, len(whole) - 1))
    exif = bytearray(whole)
    exif[position] = data.draw(st.integers(0, 255))
    options = {} if file_format != "JPEG" else {"subsampling": 0}
    image = open_image(encoded(rgb(), file_format, exif=bytes(exif[:cut]), **options), max_image_pixels=LIMIT)
    assert sorted(image.size) == [41, 59]


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II", b"Exif\0\0XX*\0", exif_with(0), exif_with(9)])
def test_exif_without_a_valid_orientation_leaves_the_image_upright(exif):
    image = open_image(encoded(rgb(), "JPEG", exif=exif), max_image_pixels=LIMIT)
    assert image.size == (59, 41)


CUTTABLE = {
    **{name: MODES[name] for name in ("JPEG of grey", "JPEG of CMYK", "PNG of colour", "PNG of a palette")},
    **{name: MODES[name] for name in ("WebP with losses", "WebP without losses", "BMP of colour")},
    "GIF of a palette": MODES["GIF of a palette"],
    "JPEG, baseline": encoded(rgb(), "JPEG", subsampling=2),
    "JPEG, progressive": encoded(rgb(), "JPEG", progressive=True),
}


@pytest.mark.parametrize("name", CUTTABLE)
@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_an_error_unless_only_its_trailer_is_gone(name, share):
    whole = CUTTABLE[name]
    cut = whole[: int(share * len(whole))]
    try:
        image = open_image(cut, max_image_pixels=LIMIT)
    except SampleFailure as failure:
        assert failure.kind in ("truncated", "unreadable", "empty", "format_not_allowed")
    else:
        # nothing but a GIF's end mark is dispensable
        assert name.startswith("GIF")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(by_pillow(whole)))


@pytest.mark.parametrize("name", ["JPEG, baseline", "JPEG, progressive", "JPEG of grey", "PNG of colour"])
def test_a_file_cut_in_the_middle_is_called_truncated(name):
    assert failure_of(CUTTABLE[name][: len(CUTTABLE[name]) // 2]).kind == "truncated"


@pytest.mark.parametrize("name", CUTTABLE)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_damaged_bytes_are_decoded_as_pillow_does_or_fail(name, data):
    damaged = bytearray(CUTTABLE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(damaged), max_image_pixels=LIMIT)
    except SampleFailure as failure:
        assert failure.stage == "decode"
    else:
        assert image.width * image.height <= LIMIT
        image.convert("RGB")


@pytest.mark.parametrize(
    "magic", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"BM", b"GIF89a"]
)
@settings(deadline=None, max_examples=60)
@given(tail=st.binary(max_size=200))
def test_a_magic_number_with_rubbish_behind_it_fails(magic, tail):
    assert failure_of(magic + tail).kind in ("unreadable", "truncated", "too_many_pixels", "animated")
