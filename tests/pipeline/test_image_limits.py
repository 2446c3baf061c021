"""Images that are refused: formats that are not read, animations, and files that cost too much to open."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from legrad.image_files.jpeg import MAX_JPEG_SCANS
from pipeline.shards.images import open_image
from tests.helpers.pictures import (
    GIF,
    GIF_BODY,
    LIMIT,
    by_pillow,
    encoded,
    failure_of,
    jpeg_segment,
    jpeg_with,
    png_chunk,
    png_header,
    png_with,
    rgb,
)

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


def test_no_bytes_are_distinguished_from_wrong_bytes():
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
