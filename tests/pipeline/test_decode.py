"""Untrusted images and captions, against Pillow, open_clip's own transform, and faults put in on purpose."""

import io
import json
import struct
import tarfile
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image, ImageOps, PngImagePlugin

from legrad.images import ImageTransform
from pipeline.errors import SampleFailure
from pipeline.shards.captions import (
    MAX_CAPTION_CHARACTERS,
    MAX_CAPTIONS,
    MAX_JSON_BYTES,
    MAX_LETTERS_IN_A_ROW,
    MAX_MARKS_IN_A_ROW,
    read_captions,
)
from pipeline.shards.fields import find_field
from pipeline.shards.image_files.jpeg import MAX_JPEG_SCANS
from pipeline.shards.images import decode_image, open_image
from pipeline.shards.samples import read_samples

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.26, 0.27)
TRANSFORM = ImageTransform(32, 48, MEAN, STD, "bicubic")
LIMIT = 10**6


def picture(height: int, width: int, *, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth structure with some noise, so that compression and resampling have something to do."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / (3 + c) + c) + np.cos(y / (5 - c)) for c in range(channels)], axis=-1)
    return np.clip(128 + 50 * waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


def rgb(height: int = 41, width: int = 59, seed: int = 0) -> Image.Image:
    return Image.fromarray(picture(height, width, seed=seed))


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif_with(orientation: int, byte_order: str = "<") -> bytes:
    magic = b"II" if byte_order == "<" else b"MM"
    entry = struct.pack(f"{byte_order}HHIHH", 0x0112, 3, 1, orientation, 0)
    other = struct.pack(f"{byte_order}HHII", 0x0100, 4, 1, 9)
    head = magic + struct.pack(f"{byte_order}HIH", 42, 8, 2)
    return b"Exif\0\0" + head + other + entry + bytes(4)


def by_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


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


def failure_of(data: bytes, **options) -> SampleFailure:
    with pytest.raises(SampleFailure) as caught:
        open_image(data, max_image_pixels=options.get("max_image_pixels", LIMIT))
    assert caught.value.stage == "decode"
    return caught.value


# ---------------------------------------------------------------- equality with Pillow and open_clip


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


MODES = {
    "JPEG of colour": encoded(rgb(), "JPEG"),
    "JPEG of grey": encoded(rgb().convert("L"), "JPEG"),
    "JPEG of CMYK": encoded(rgb().convert("CMYK"), "JPEG"),
    "PNG of colour": encoded(rgb(), "PNG"),
    "PNG of one bit": encoded(rgb().convert("1"), "PNG"),
    "PNG of grey": encoded(rgb().convert("L"), "PNG"),
    "PNG of grey and alpha": encoded(rgb().convert("LA"), "PNG"),
    "PNG of colour and alpha": encoded(Image.fromarray(picture(41, 59, channels=4)), "PNG"),
    "PNG of a palette": encoded(rgb().quantize(64), "PNG"),
    "PNG of a palette with one transparent index": encoded(rgb().quantize(64), "PNG", transparency=3),
    "PNG of a palette with graded transparency": encoded(
        rgb().quantize(64), "PNG", transparency=bytes(range(64))
    ),
    "PNG of colour with a transparent colour": encoded(rgb(), "PNG", transparency=(1, 2, 3)),
    "PNG of grey with a transparent level": encoded(rgb().convert("L"), "PNG", transparency=7),
    "WebP with losses": encoded(rgb(), "WEBP"),
    "WebP without losses": encoded(rgb(), "WEBP", lossless=True),
    "WebP with alpha": encoded(Image.fromarray(picture(41, 59, channels=4)), "WEBP"),
    "BMP of colour": encoded(rgb(), "BMP"),
    "BMP of a palette": encoded(rgb().quantize(16), "BMP"),
    "GIF of a palette": encoded(rgb().quantize(64), "GIF"),
    "GIF with transparency": encoded(rgb().quantize(64), "GIF", transparency=2),
}


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


# ---------------------------------------------------------------- orientation


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


# ---------------------------------------------------------------- content that is refused

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
PSD = b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 10, 10, 8, 3) + bytes(200)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.mark.parametrize(
    "data",
    [
        EPS,
        PSD,
        SVG,
        b"<!doctype html>",
        b"RIFF\0\0\0\0AVI ",
        encoded(rgb(), "TIFF"),
        encoded(rgb(), "PPM"),
        b"\0",
    ],
    ids=["EPS", "PSD", "SVG", "HTML", "AVI", "TIFF", "PPM", "a zero byte"],
)
def test_formats_that_are_not_on_the_list_are_never_opened(data):
    assert failure_of(data).kind == "format_not_allowed"


def test_no_bytes_are_told_apart_from_wrong_bytes():
    assert failure_of(b"").kind == "empty"


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused(file_format):
    frames = [rgb(seed=seed) for seed in range(3)]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert failure_of(data).kind == "animated"


def test_a_jpeg_of_several_pictures_counts_as_its_first():
    data = encoded(rgb(), "MPO", save_all=True, append_images=[rgb(seed=1)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    expected = np.asarray(by_pillow(data))
    np.testing.assert_array_equal(np.asarray(open_image(data, max_image_pixels=LIMIT)), expected)


def test_the_limit_on_pixels_is_inclusive():
    data = encoded(rgb(10, 20), "PNG")
    assert open_image(data, max_image_pixels=200).size == (20, 10)
    assert failure_of(data, max_image_pixels=199).kind == "too_many_pixels"


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(height: int, width: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


@pytest.mark.parametrize("size", [(9_600, 9_600), (12_000, 12_000), (60_000, 60_000)])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_small_file_of_many_pixels_is_refused_by_its_header_without_memory_or_warnings(file_format, size):
    height, width = min(size[0], 16_383 if file_format == "WEBP" else size[0]), size[1]
    width = min(width, 16_383) if file_format == "WEBP" else width
    small = encoded(rgb(8, 8), file_format, **({"lossless": False} if file_format == "WEBP" else {}))
    data = {
        "PNG": lambda: png_header(height, width) + png_chunk(b"IDAT", zlib.compress(bytes(1000))),
        "JPEG": lambda: _with_jpeg_size(small, height, width),
        "GIF": lambda: small[:6] + struct.pack("<HH", width, height) + small[10:],
        "BMP": lambda: small[:18] + struct.pack("<ii", width, height) + small[26:],
        "WEBP": lambda: small[:26] + struct.pack("<HH", width, height) + small[30:],
    }[file_format]()
    tracemalloc.start()
    failure = failure_of(data, max_image_pixels=5_000_000)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert failure.kind == "too_many_pixels"
    assert peak_bytes < 2 * 2**20


def _with_jpeg_size(data: bytes, height: int, width: int) -> bytes:
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_text_or_profile_that_swells_is_never_inflated(kind):
    swollen = zlib.compress(bytes(24 * 2**20))
    head = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    whole = encoded(rgb(), "PNG")
    data = whole[:33] + png_chunk(kind, head + swollen) + whole[33:]
    tracemalloc.start()
    image = open_image(data, max_image_pixels=LIMIT)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(np.asarray(image), np.asarray(by_pillow(whole)))
    assert peak_bytes < PngImagePlugin.MAX_TEXT_CHUNK


def png_with(chunks: bytes) -> bytes:
    whole = encoded(rgb(), "PNG")
    return whole[:33] + chunks + whole[33:]


def jpeg_with(segments: bytes) -> bytes:
    whole = encoded(rgb(), "JPEG")
    return whole[:2] + segments + whole[2:]


def jpeg_segment(mark: int, content: bytes) -> bytes:
    return bytes([0xFF, mark]) + struct.pack(">H", len(content) + 2) + content


GIF = encoded(rgb().quantize(16), "GIF")
GIF_BODY = 13 + 3 * 2 ** ((GIF[10] & 7) + 1)
MANY = 300_000


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "make",
    [
        lambda: jpeg_with(jpeg_segment(0xE1, b"Exif\0\0x") * MANY),
        lambda: jpeg_with(jpeg_segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 900),
        lambda: jpeg_with(jpeg_segment(0xFE, b"") * MANY),
        lambda: jpeg_with(b"\xff" * MANY),
        lambda: png_with(png_chunk(b"tEXt", b"k\0") * MANY),
        lambda: png_with(b"".join(png_chunk(b"eXIf", b"") for _ in range(MANY))),
        lambda: png_with(png_chunk(b"IDAT", b"") * MANY),
        lambda: GIF[:GIF_BODY] + b"\x21\xfe" + b"\x01c" * MANY + b"\0" + GIF[GIF_BODY:],
        lambda: GIF[:GIF_BODY] + b"a" * MANY + GIF[GIF_BODY:],
        lambda: _run_length_bmp(b"\x01\x01" * MANY),
    ],
    ids=[
        *(
            "many EXIF segments",
            "megabytes of EXIF",
            "JPEG comments",
            "JPEG padding",
            "PNG texts",
            "PNG EXIF",
        ),
        *("empty PNG data", "GIF comments", "rubbish in a GIF", "run-length BMP"),
    ],
)
def test_a_file_in_too_many_parts_is_given_up(make):
    assert failure_of(make()).kind == "too_many_parts"


def _run_length_bmp(runs: bytes) -> bytes:
    sizes = struct.pack("<IiiHHIIiiII", 40, 1000, 1000, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + sizes + bytes(1024) + runs


def progressive_with_scans(scans: int) -> bytes:
    """A JPEG that repeats its last scan until it has so many."""
    data = encoded(rgb(8, 8), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


def test_the_scans_of_a_jpeg_are_bounded():
    assert open_image(progressive_with_scans(MAX_JPEG_SCANS), max_image_pixels=LIMIT).size == (8, 8)
    assert failure_of(progressive_with_scans(MAX_JPEG_SCANS + 1)).kind == "too_many_parts"
    assert failure_of(progressive_with_scans(50_000)).kind == "too_many_parts"
    comments = jpeg_segment(0xFE, b"") * 5000
    many = progressive_with_scans(MAX_JPEG_SCANS)
    assert failure_of(many[:-2] + comments + b"\xff\xda" * 100).kind == "too_many_parts"


@pytest.mark.parametrize("where", ["in metadata", "behind the picture"])
def test_what_looks_like_scans_but_is_none_is_no_matter(where):
    whole = encoded(rgb(), "JPEG")
    lookalike = b"\xff\xda" * 1000
    data = whole + lookalike if where == "behind the picture" else jpeg_with(jpeg_segment(0xE5, lookalike))
    np.testing.assert_array_equal(
        np.asarray(open_image(data, max_image_pixels=LIMIT)), np.asarray(by_pillow(whole))
    )


@pytest.mark.parametrize("size", [(1, 65_536), (65_536, 1)])
def test_a_side_is_bounded_whatever_the_number_of_pixels(size):
    assert failure_of(encoded(Image.new("L", size), "PNG")).kind == "side_too_long"
    longest = tuple(min(side, 65_535) for side in size)
    assert open_image(encoded(Image.new("L", longest), "PNG"), max_image_pixels=LIMIT).size == longest


RESIDENT_MEMORY = Path("/proc/self/clear_refs")
needs_resident_memory = pytest.mark.skipif(
    not RESIDENT_MEMORY.exists(), reason="asks Linux for resident memory"
)


def growth_of_resident_memory_bytes(act) -> int:
    """By how much memory, decoders' own included, grew at its peak."""

    def peak_bytes() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

    RESIDENT_MEMORY.write_text("5")
    before_bytes = peak_bytes()
    act()
    return peak_bytes() - before_bytes


@needs_resident_memory
def test_what_a_png_inflates_to_beyond_its_pixels_is_never_held():
    bomb = zlib.compress(bytes(128 * 2**20))
    data = png_header(1, 1) + png_chunk(b"IDAT", bomb) + png_chunk(b"IEND", b"")
    assert growth_of_resident_memory_bytes(lambda: open_image(data, max_image_pixels=LIMIT)) < 32 * 2**20


@needs_resident_memory
def test_a_webp_that_claims_the_largest_size_costs_no_memory():
    small = encoded(rgb(8, 8), "WEBP", lossless=False)
    data = small[:26] + struct.pack("<HH", 16_383, 16_383) + small[30:]
    assert growth_of_resident_memory_bytes(lambda: failure_of(data)) < 32 * 2**20


@pytest.mark.parametrize("file_format", ["GIF", "WEBP"])
def test_an_animation_of_thousands_of_frames_is_refused_without_decoding_them(file_format):
    frames = [Image.new("L", (4, 4), 37 * frame % 256) for frame in range(2000)]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], duration=1)
    assert failure_of(data).kind == "animated"


def test_a_gif_whose_frame_is_larger_than_its_screen_is_measured_by_the_frame():
    frame_sizes = GIF.index(b"\x2c", GIF_BODY) + 5
    data = GIF[:frame_sizes] + struct.pack("<HH", 9000, 9000) + GIF[frame_sizes + 4 :]
    assert failure_of(data).kind == "too_many_pixels"


@pytest.mark.parametrize("frames", [2, 2**31 - 1])
def test_an_animated_png_is_refused_by_what_it_claims(frames):
    data = png_with(png_chunk(b"acTL", struct.pack(">II", frames, 0)))
    assert failure_of(data).kind == "animated"


def test_many_texts_that_swell_are_never_inflated():
    swollen = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK - 1)))
    data = png_with(swollen * 100)
    tracemalloc.start()
    assert open_image(data, max_image_pixels=LIMIT).size == (59, 41)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < len(data) + PngImagePlugin.MAX_TEXT_CHUNK


def test_an_exif_directory_of_every_entry_that_fits_is_harmless():
    entries = struct.pack("<H", 0xFFFF) + struct.pack("<HHII", 0x0100, 4, 0xFFFFFFFF, 0xFFFFFFFF) * 5000
    exif = b"Exif\0\0II" + struct.pack("<HI", 42, 8) + entries
    assert open_image(jpeg_with(jpeg_segment(0xE1, exif)), max_image_pixels=LIMIT).size == (59, 41)


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


# ---------------------------------------------------------------- fields and captions


def test_the_first_field_by_preference_is_found_in_any_case():
    fields = {"png": b"p", "jpg": b"j"}
    assert find_field(fields, "jpg;png;webp") == b"j"
    assert find_field(fields, "webp;PNG") == b"p"


def test_a_missing_field_names_what_was_expected_and_what_there_is():
    with pytest.raises(SampleFailure) as caught:
        find_field({"txt": b"", "json": b""}, "jpg;png")
    assert (caught.value.stage, caught.value.kind) == ("decode", "missing_field")
    assert caught.value.message == "sample has no field `jpg` or `png`; fields present: json, txt"


def fields_of(*names: str, wanted=("jpg", "txt")):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    (found,) = read_samples(io.BytesIO(sink.getvalue()), max_member_bytes=10, wanted_fields=wanted)
    return found.fields


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg"], "sample has no field `txt`; fields present: jpg"),
        (["a.jpg", "a.json", "a.CLS"], "sample has no field `txt`; fields present: cls, jpg, json"),
        (["a.json"], "sample has no field `txt`; fields present: json"),
        (
            ["22.05.jpg", "22.05.txt"],
            "sample has no field `txt`; fields present: 05.jpg, 05.txt (a key ends at the first dot of the "
            "base name, and all that follows is the field)",
        ),
        (["a.jpg", "a.\x1b[2J"], r"sample has no field `txt`; fields present: \x1b[2j, jpg"),
        (
            [f"a.{'x' * 90}{number:02d}" for number in range(40)],
            f"sample has no field `txt`; fields present: {'x' * 30}",
        ),
        (
            [f"a.f{number:02d}" for number in range(14)],
            "sample has no field `txt`; fields present: f00, f01, f02, f03, f04, f05, f06, f07, f08, f09, "
            "f10, f11 and 2 more",
        ),
    ],
)
def test_a_missing_field_names_what_is_there_even_if_nobody_wants_it(names, message):
    with pytest.raises(SampleFailure) as caught:
        find_field(fields_of(*names), "txt", stage="caption")
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("document", "keys"),
    [
        ({}, "none"),
        ({"text": "a dog", "url": 1}, "text, url"),
        ({"a\n\u202eb": 1}, r"a\x0a\u202eb"),
        (
            {f"k{number}": 1 for number in range(100_000)},
            "k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11 and",
        ),
        ({"x" * 100_000: 1}, "x" * 30),
    ],
)
def test_a_missing_json_key_names_the_keys_that_are_there(document, keys):
    with pytest.raises(SampleFailure) as caught:
        captions_of(document, "json:caption", several=False)
    assert f"no key `caption`; keys present: {keys}" in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


def captions_of(content: bytes | object, spec: str = "json:captions", *, several: bool = True):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_captions({"txt": data, "json": data}, spec, several=several)


def kind_of(content: bytes | object, spec: str, *, several: bool = False) -> str:
    with pytest.raises(SampleFailure) as caught:
        captions_of(content, spec, several=several)
    assert caught.value.stage == "caption"
    assert caught.value.message.encode()
    return caught.value.kind


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b"a dog", "a dog"),
        (b"  a dog\r\n", "a dog"),
        ("\ufeffein H\u00fcndchen".encode(), "ein H\u00fcndchen"),
        ("\u72ac \U0001f436".encode(), "\u72ac \U0001f436"),
        (b"two\nlines", "two\nlines"),
    ],
)
def test_a_text_field_is_one_caption(content, caption):
    assert captions_of(content, "txt", several=False) == [caption]


@pytest.mark.parametrize("content", [b"", b" \n\t", "\ufeff".encode(), "\u2003\u00a0".encode()])
def test_a_caption_of_white_space_is_empty(content):
    assert kind_of(content, "txt") == "empty"


@pytest.mark.parametrize("content", [b"caf\xe9", "text".encode("utf-16"), b"\xed\xa0\x80", b"\xc0\xaf"])
def test_text_that_is_not_utf8_is_refused(content):
    assert kind_of(content, "txt") == "not_utf8"
    assert kind_of(content, "json:caption") == "not_utf8"


def test_a_missing_caption_field_is_a_fault_of_the_caption():
    with pytest.raises(SampleFailure) as caught:
        read_captions({"jpg": b""}, "txt", several=False)
    assert (caught.value.stage, caught.value.kind) == ("caption", "missing_field")


def test_a_key_of_a_json_object_is_one_caption():
    assert captions_of({"caption": " a dog "}, "json:caption", several=False) == ["a dog"]
    assert captions_of(b'\xef\xbb\xbf{"caption": "a dog"}', "json:caption", several=False) == ["a dog"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"text": "a dog"}, "missing_key"),
        ({"caption": None}, "wrong_type"),
        ({"caption": ["a dog"]}, "wrong_type"),
        ({"caption": 7}, "wrong_type"),
        ({"caption": " "}, "empty"),
        (["caption"], "wrong_type"),
        (b"null", "wrong_type"),
        (b'{"caption": "a dog"', "not_json"),
        (b"", "not_json"),
        (b'{"caption": ' + b"9" * 4_000_000 + b"}", "wrong_type"),
        (b'{"caption": -1e999999999}', "wrong_type"),
        (b'{"caption": "\\ud83d"}', "not_utf8"),
        (b"[" * 1_000_000, "not_json"),
        (b'{"a":' * 500_000, "not_json"),
        (b" " * (MAX_JSON_BYTES + 1), "too_long"),
        ({"caption": "x " * MAX_CAPTION_CHARACTERS}, "too_long"),
        ({"caption": "a dog " + "x" * (MAX_LETTERS_IN_A_ROW + 1)}, "too_long"),
        ({"caption": "a" + "\u0301\u0323" * (MAX_MARKS_IN_A_ROW // 2) + "\u0301"}, "too_long"),
    ],
)
def test_json_that_holds_no_caption_fails_the_sample(content, kind):
    assert kind_of(content, "json:caption") == kind


def test_a_caption_may_be_long_but_not_of_any_length():
    longest = ("a dog " * MAX_CAPTION_CHARACTERS)[: MAX_CAPTION_CHARACTERS - 1] + "."
    assert captions_of(longest.encode(), "txt", several=False) == [longest]
    assert kind_of(b"a dog " * MAX_CAPTION_CHARACTERS, "txt") == "too_long"


def test_marks_on_a_letter_may_be_many_but_not_of_any_number():
    caption = "a" + "\u0301\u0323" * (MAX_MARKS_IN_A_ROW // 2) + " dog"
    assert captions_of(caption.encode(), "txt", several=False) == [caption]


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\u72ac"])
def test_a_run_of_letters_is_bounded_since_tokenizing_it_takes_quadratic_time(letter):
    word = letter * MAX_LETTERS_IN_A_ROW
    for caption in (f"{word} {word}", f"{word}.{word}", f"{word}7{word}"):
        assert captions_of(caption.encode(), "txt", several=False) == [caption]
    assert kind_of(f"a dog {word}{letter}".encode(), "txt") == "too_long"


def test_a_list_keeps_the_place_of_every_caption_and_gives_each_fault_its_own_failure():
    found = captions_of({"captions": ["a dog", "", " a car ", None, "a dog"]})
    assert [item if isinstance(item, str) else item.kind for item in found] == [
        "a dog",
        "empty",
        "a car",
        "wrong_type",
        "a dog",
    ]


def test_an_empty_list_is_no_fault():
    assert captions_of({"captions": []}) == []


@pytest.mark.parametrize(
    ("content", "spec", "kind"),
    [
        ({"captions": "a dog"}, "json:captions", "wrong_type"),
        ({"captions": {"0": "a dog"}}, "json:captions", "wrong_type"),
        (b"a dog", "txt", "wrong_type"),
        ({"captions": ["x"] * (MAX_CAPTIONS + 1)}, "json:captions", "too_many"),
    ],
)
def test_several_captions_need_a_list_of_bounded_length(content, spec, kind):
    assert kind_of(content, spec, several=True) == kind


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["txt", "json:caption"]), st.booleans())
def test_arbitrary_bytes_are_captions_that_can_be_written_or_failures(content, spec, several):
    try:
        captions = captions_of(content, spec, several=several)
    except SampleFailure as failure:
        assert failure.stage == "caption"
    else:
        assert all(caption.strip() and caption.encode() for caption in captions)


@pytest.mark.parametrize(
    ("value", "several", "remedy"),
    [(["a", "b"], False, "prompts.source=captions"), ("a", True, "prompts.source=caption takes one text")],
)
def test_a_caption_of_the_other_kind_is_told_with_the_way_out(value, several, remedy):
    with pytest.raises(SampleFailure, match=remedy) as failure:
        read_captions({"json": json.dumps({"c": value}).encode()}, "json:c", several=several)
    assert (failure.value.stage, failure.value.kind) == ("caption", "wrong_type")
