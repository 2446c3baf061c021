"""Fast decoding and resizing: nearly the pixels of the exact way, and the same files refused, alike."""

import io
import struct
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from legrad.canvases import Views
from legrad.images import ImageTransform
from pipeline.errors import SampleFailure
from pipeline.shards.decode_memory import LARGE_IMAGE_BYTES
from pipeline.shards.fast_jpeg import decode_jpeg, reduction_of
from pipeline.shards.images import decode_image
from tests.helpers.pictures import LIMIT, MODES, encoded, exif_with, jpeg_segment, picture, rgb

MEAN = STD = (0.5, 0.5, 0.5)
TRANSFORM = ImageTransform(32, 48, MEAN, STD, patch_size=8)


def both(data: bytes, transform: ImageTransform = TRANSFORM, **options):
    ways = ("exact", "fast")
    return tuple(decode_image(data, transform, max_image_pixels=LIMIT, resize=way, **options) for way in ways)


def difference(exact: np.ndarray, fast: np.ndarray) -> np.ndarray:
    assert (fast.shape, fast.dtype, fast.flags.c_contiguous) == (exact.shape, exact.dtype, True)
    return np.abs(exact.astype(int) - fast)


def photo(height: int, width: int) -> Image.Image:
    """A picture with the slow changes and the little noise of a photograph."""
    small = picture(max(2, height // 8), max(2, width // 8))
    grown = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noise = np.random.default_rng(0).normal(0, 3, grown.shape)
    return Image.fromarray(np.clip(grown + noise, 0, 255).astype(np.uint8))


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_every_mode_is_within_two_levels_of_the_exact_pixels(name, interpolation):
    exact, fast = both(MODES[name], ImageTransform(32, 48, MEAN, STD, interpolation))
    assert (fast.image_height, fast.image_width) == (41, 59)
    assert difference(exact.pixels, fast.pixels).max() <= 2


@pytest.mark.parametrize("name", [name for name in MODES if "palette" in name or "alpha" in name])
def test_palettes_and_alpha_are_resized_exactly(name):
    exact, fast = both(MODES[name])
    np.testing.assert_array_equal(fast.pixels, exact.pixels)


def test_a_jpeg_of_cmyk_is_resized_exactly():
    exact, fast = both(MODES["JPEG of CMYK"])
    np.testing.assert_array_equal(fast.pixels, exact.pixels)


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    quality=st.sampled_from([30, 75, 95, 100]),
)
def test_jpegs_decode_at_full_size_bit_for_bit_as_with_pillow(size, subsampling, progressive, quality):
    image = rgb(*size)
    data = encoded(image, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_jpeg(data, *size, reduction=1), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_turns_the_pixels_upright(orientation, file_format):
    exact, fast = both(encoded(rgb(), file_format, exif=exif_with(orientation)))
    assert (fast.image_height, fast.image_width) == (exact.image_height, exact.image_width)
    # passes of resizing change places with the sides of the stored image
    assert difference(exact.pixels, fast.pixels).max() <= 2


def test_every_canvas_of_views_is_resized_for_itself_and_upright():
    views = Views(scales=(1.0, 0.5), tile=True, tile_zoom=2.0)
    transform = ImageTransform(32, 48, MEAN, STD, fit="keep", patch_size=8)
    exact, fast = both(encoded(photo(90, 210), "JPEG", exif=exif_with(6)), transform, views=views)
    assert len(fast.canvases) == 3
    for one, other in zip(exact.canvases, fast.canvases, strict=True):
        assert difference(one, other).max() <= 2


# ---------------------------------------------------------------- reduced decoding


@pytest.mark.parametrize(
    ("size", "canvases", "reduction"),
    [
        ((447, 2000), [(224, 224)], 1),
        ((895, 2000), [(224, 224)], 1),
        ((896, 2000), [(224, 224)], 2),
        ((1200, 1600), [(224, 224)], 2),
        ((3000, 4000), [(224, 224)], 4),
        ((9000, 9000), [(224, 224)], 8),
        ((3000, 4000), [(224, 224), (448, 448)], 2),
        ((3000, 4000), [(100, 800), (700, 100)], 2),
    ],
)
def test_a_reduced_image_keeps_twice_the_pixels_of_every_canvas(size, canvases, reduction):
    assert reduction_of(*size, canvases) == reduction


@pytest.mark.parametrize("size", [(131, 197), (257, 391), (513, 801)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_reduced_decoding_changes_few_levels(size, options):
    data = encoded(photo(*size), "JPEG", quality=90, **options)
    reduction = reduction_of(*size, [(32, 48)])
    assert reduction > 1
    assert decode_jpeg(data, *size, reduction).shape[:2] == tuple(-(-side // reduction) for side in size)
    exact, fast = both(data)
    off = difference(exact.pixels, fast.pixels)
    assert off.mean() < 1
    assert off.max() <= 8
    assert (fast.image_height, fast.image_width) == size


# ---------------------------------------------------------------- damage


def outcome(data: bytes, resize: str) -> tuple[str, str]:
    try:
        decode_image(data, TRANSFORM, max_image_pixels=LIMIT, resize=resize)
    except SampleFailure as failure:
        assert failure.stage == "decode"
        return failure.kind, failure.message
    return "decoded", ""


JPEGS = {
    "baseline": encoded(rgb(94, 125), "JPEG"),
    "4:4:4": encoded(rgb(94, 125), "JPEG", subsampling=0),
    "grey": encoded(rgb(94, 125).convert("L"), "JPEG"),
    "progressive": encoded(rgb(94, 125), "JPEG", progressive=True),
    "restart marks": encoded(rgb(94, 125), "JPEG", restart_marker_blocks=5),
    "progressive, restart marks": encoded(rgb(94, 125), "JPEG", progressive=True, restart_marker_blocks=3),
    "optimal tables": encoded(rgb(94, 125), "JPEG", optimize=True),
    "smooth": encoded(photo(94, 125), "JPEG", quality=95),
    "large enough to be reduced": encoded(photo(188, 250), "JPEG"),
}
DAMAGES = {
    "cut": lambda data, at, size, junk: data[:at],
    "zeros inserted": lambda data, at, size, junk: data[:at] + bytes(size) + data[at:],
    "zeros instead": lambda data, at, size, junk: data[:at] + bytes(size) + data[at + size :],
    "junk inserted": lambda data, at, size, junk: data[:at] + junk + data[at:],
    "junk instead": lambda data, at, size, junk: data[:at] + junk + data[at + len(junk) :],
    "a piece lost": lambda data, at, size, junk: data[:at] + data[at + size :],
    "a bit turned": lambda data, at, size, junk: (
        data[:at] + bytes([data[at] ^ (1 << size % 8)]) + data[at + 1 :]
    ),
    "bytes before the end": lambda data, at, size, junk: data[:-2] + junk[:12] + data[-2:],
    "no end": lambda data, at, size, junk: data[:-2] + junk,
}


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("damage", DAMAGES)
@settings(deadline=None, max_examples=15)
@given(
    share=st.floats(0, 1, exclude_max=True),
    size=st.integers(1, 400),
    junk=st.binary(min_size=1, max_size=40),
    in_headers=st.booleans(),
)
def test_a_damaged_jpeg_fails_with_the_same_kind_and_message_or_in_neither_way(
    name, damage, share, size, junk, in_headers
):
    data = JPEGS[name]
    scan = data.index(b"\xff\xda") + 14
    start, stop = (3, scan) if in_headers and size < 40 else (scan, len(data))
    damaged = DAMAGES[damage](data, start + int(share * (stop - start)), size, junk)
    assert outcome(damaged, "fast") == outcome(damaged, "exact")


@pytest.mark.parametrize("spare", range(1, 17))
def test_spare_bytes_behind_the_last_row_count_alike(spare):
    for data in JPEGS.values():
        for filler in (b"\0", b"\x55", b"\xaa"):
            padded = data[:-2] + filler * spare + data[-2:]
            assert outcome(padded, "fast") == outcome(padded, "exact")


ODD = {
    "no data": lambda data: data[: data.index(b"\xff\xda")] + b"\xff\xd9",
    "no frame": lambda data: data.replace(b"\xff\xc0", b"\xff\xe5", 1),
    "two frames": lambda data: data[:2] + data[data.index(b"\xff\xc0") :],
    "no height": lambda data: _with_frame_bytes(data, 5, b"\0\0"),
    "another height": lambda data: _with_frame_bytes(data, 5, struct.pack(">H", 300)),
    "sampling factors of zero": lambda data: _with_frame_bytes(data, 11, b"\0"),
    "five components": lambda data: _with_frame_bytes(data, 9, b"\5"),
    "twelve bits": lambda data: _with_frame_bytes(data, 4, b"\x0c"),
    "a profile that is too short": lambda data: data[:2] + jpeg_segment(0xE2, b"ICC_PROFILE\0") + data[2:],
    "a picture behind the picture": lambda data: data + data,
    "a comment of marks": lambda data: data[:2] + jpeg_segment(0xFE, b"\xff\xd9\xff\xda" * 99) + data[2:],
}


def _with_frame_bytes(data: bytes, offset: int, content: bytes) -> bytes:
    at = data.index(b"\xff\xc0") + offset
    return data[:at] + content + data[at + len(content) :]


@pytest.mark.parametrize("name", ODD)
def test_an_odd_jpeg_is_decoded_or_refused_alike(name):
    data = ODD[name](JPEGS["baseline"])
    assert outcome(data, "fast") == outcome(data, "exact")


@pytest.mark.parametrize("name", [name for name in MODES if not name.startswith("JPEG")])
@settings(deadline=None, max_examples=10)
@given(share=st.floats(0, 1, exclude_max=True))
def test_other_formats_that_are_cut_fail_alike(name, share):
    damaged = MODES[name][: int(share * len(MODES[name]))]
    assert outcome(damaged, "fast") == outcome(damaged, "exact")


# ---------------------------------------------------------------- room


def test_room_is_asked_for_only_where_an_image_takes_much_memory_and_is_held_while_it_is_decoded():
    asked, held = [], []

    @contextmanager
    def room(needed_bytes):
        asked.append(needed_bytes)
        held.append(True)
        yield
        held.append(False)

    small = encoded(rgb(), "JPEG")
    large = encoded(Image.new("RGB", (4000, 3000), "red"), "PNG", compress_level=1)
    for resize in ("exact", "fast"):
        decode_image(small, TRANSFORM, max_image_pixels=10**9, resize=resize, room=room)
        assert not asked
        decode_image(large, TRANSFORM, max_image_pixels=10**9, resize=resize, room=room)
        assert asked.pop() >= 4 * 4000 * 3000 > LARGE_IMAGE_BYTES
        assert (held.pop(), held.pop()) == (False, True)


def test_a_large_jpeg_that_is_reduced_asks_for_no_room():
    data = encoded(Image.new("RGB", (4000, 3000), "red"), "JPEG")
    asked = []
    with pytest.raises(ZeroDivisionError):
        decode_image(
            data, TRANSFORM, max_image_pixels=10**9, room=lambda needed: asked.append(needed) or 1 / 0
        )
    assert asked == [pytest.approx(4 * 4000 * 3000, rel=0.2)]
    decode_image(data, TRANSFORM, max_image_pixels=10**9, resize="fast", room=lambda _: 1 / 0)


def test_what_room_raises_is_no_failure_of_the_sample():
    def refuse(needed_bytes):
        raise ConnectionError("the worker is gone")

    data = encoded(Image.new("RGB", (4000, 3000), "red"), "JPEG", progressive=True)
    for resize in ("exact", "fast"):
        with pytest.raises(ConnectionError):
            decode_image(data, TRANSFORM, max_image_pixels=10**9, resize=resize, room=refuse)
