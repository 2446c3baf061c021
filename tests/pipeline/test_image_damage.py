"""Damage that an image file itself shows is an error, and what only looks odd is none."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import SampleFailure
from pipeline.shards.images import open_image
from tests.helpers.pictures import png_chunk

LIMIT = 10**7
# a pixel is wrong where it is further off than this, of 255; a file is where more of them are wrong
WRONG_BY, WRONG_SHARE = 24, 0.1


def noisy(height: int = 188, width: int = 250, seed: int = 0, noise: float = 12) -> Image.Image:
    """Waves with noise over them, which fills a file with bits."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / (13 + c) + c) + np.cos(y / (15 - c)) for c in range(3)], axis=-1)
    values = 128 + 50 * waves + np.random.default_rng(seed).normal(0, noise, waves.shape)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def smooth(height: int = 188, width: int = 250) -> Image.Image:
    """Slow changes of colour alone, which leave few bits to a file."""
    return noisy(12, 16).resize((width, height), Image.Resampling.BICUBIC)


def plain_with_corner(height: int = 1500, width: int = 2000) -> Image.Image:
    """White but for a corner, such as a product on a page."""
    image = Image.new("RGB", (width, height), "white")
    image.paste(noisy(200, 200), (0, 0))
    return image


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data, max_image_pixels=LIMIT).convert("RGB"))


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def failure_of(data: bytes) -> SampleFailure:
    with pytest.raises(SampleFailure) as caught:
        open_image(data, max_image_pixels=LIMIT)
    return caught.value


def segment(mark: int, content: bytes) -> bytes:
    return bytes([0xFF, mark]) + struct.pack(">H", len(content) + 2) + content


# ---------------------------------------------------------------- healthy files

PNG = encoded(noisy(), "PNG")
JPEG = encoded(noisy(), "JPEG")
WEBP = encoded(noisy(), "WEBP")
BMP = encoded(noisy(), "BMP")
WORKFLOW = b'{"prompt": "a cat, masterpiece", "nodes": [1, 2, 3]}' * 60_000
THUMBNAIL = encoded(noisy(90, 120), "JPEG")
EXIF = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"


def png_with(*chunks: bytes, last: bool = False) -> bytes:
    at = len(PNG) - 12 if last else 33
    return PNG[:at] + b"".join(chunks) + PNG[at:]


def jpeg_with(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def png_of_small_chunks() -> bytes:
    start = PNG.index(b"IDAT") - 4
    size = int.from_bytes(PNG[start : start + 4], "big")
    pixels = PNG[start + 8 : start + 8 + size]
    pieces = [png_chunk(b"IDAT", pixels[at : at + 100]) for at in range(0, size, 100)]
    return PNG[:start] + b"".join([*pieces, png_chunk(b"IDAT", b"")]) + PNG[start + 12 + size :]


def interlaced_png() -> bytes:
    """Grey, in Adam7's seven passes, unfiltered."""
    values = np.asarray(noisy().convert("L"))
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    rows = [
        b"\0" + row.tobytes() for top, left, down, across in passes for row in values[top::down, left::across]
    ]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 8, 0, 0, 0, 1)
    chunks = (
        png_chunk(b"IHDR", header),
        png_chunk(b"IDAT", zlib.compress(b"".join(rows))),
        png_chunk(b"IEND", b""),
    )
    return PNG[:8] + b"".join(chunks)


def webp_of_one_frame() -> bytes:
    """An animation of a single frame, which no encoder of Pillow's makes."""
    width, height = noisy().size
    frame = bytes(6) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + bytes(4)

    def part(kind: bytes, content: bytes) -> bytes:
        return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    parts = part(b"VP8X", b"\x02\0\0\0" + canvas) + part(b"ANIM", bytes(6)) + part(b"ANMF", frame + WEBP[12:])
    return b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WEBP" + parts


def run_length_bmp() -> bytes:
    rows = b"\x04\x07\0\0" * 3 + b"\x04\x09\0\1"
    sizes = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 8, 1, len(rows), 0, 0, 256, 0)
    palette = bytes(value for grey in range(256) for value in (grey, grey, grey, 0))
    return b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + sizes + palette + rows


HEALTHY = {
    "PNG, a workflow as plain text": lambda: png_with(png_chunk(b"tEXt", b"workflow\0" + WORKFLOW)),
    "PNG, a workflow as international text": lambda: png_with(
        png_chunk(b"iTXt", b"workflow\0\0\0\0\0" + WORKFLOW)
    ),
    "PNG, a workflow as compressed text": lambda: png_with(
        png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW))
    ),
    "PNG, hundred texts of a megabyte": lambda: png_with(
        *[png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20)))] * 100
    ),
    "PNG, a profile of 8 megabytes": lambda: png_with(
        png_chunk(b"iCCP", b"p\0\0" + zlib.compress(np.random.default_rng(0).bytes(2**23)))
    ),
    "PNG, a text that is no text": lambda: png_with(png_chunk(b"zTXt", b"\xff\xfe no zero, no zlib")),
    "PNG, a text behind the pixels": lambda: png_with(
        png_chunk(b"tEXt", b"workflow\0" + WORKFLOW), last=True
    ),
    "PNG, private chunks": lambda: png_with(png_chunk(b"vpAg", bytes(9)), png_chunk(b"prVt", bytes(5000))),
    "PNG, bytes behind its end": lambda: PNG + b"\0" * 5000 + b"IDAT",
    "PNG, pixels in small chunks": png_of_small_chunks,
    "PNG, interlaced": interlaced_png,
    "PNG, 16 bits": lambda: encoded(
        Image.fromarray(np.arange(9000, dtype=np.uint16).reshape(90, 100)), "PNG"
    ),
    "PNG, an animation of one frame": lambda: png_with(
        png_chunk(b"acTL", struct.pack(">II", 1, 0)),
        png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, *noisy().size, 0, 0, 1, 1, 0, 0)),
    ),
    "PNG, plain": lambda: encoded(Image.new("RGB", (2000, 1500), "white"), "PNG"),
    "JPEG, zeros behind its end": lambda: JPEG + bytes(10_000),
    "JPEG, a film behind its end": lambda: (
        JPEG + b"\0\0\0\x18ftypmp42" + np.random.default_rng(0).bytes(10**6)
    ),
    "JPEG, several pictures": lambda: encoded(noisy(), "MPO", save_all=True, append_images=[smooth()]),
    "JPEG, a thumbnail in EXIF": lambda: jpeg_with(segment(0xE1, EXIF + THUMBNAIL)),
    "JPEG, a thumbnail in Photoshop's data": lambda: jpeg_with(segment(0xED, THUMBNAIL)),
    "JPEG, a profile in many segments": lambda: encoded(
        noisy(), "JPEG", icc_profile=np.random.default_rng(0).bytes(10**6)
    ),
    "JPEG, a comment of marks": lambda: jpeg_with(segment(0xFE, b"\xff\xd9\xff\xda\xff\xd0" * 900)),
    "JPEG, rubbish between segments": lambda: jpeg_with(segment(0xFE, b"x"), b"\0\0rubbish"),
    "JPEG, padding before segments": lambda: jpeg_with(b"\xff\xff\xff", segment(0xFE, b"x"), b"\xff"),
    "JPEG, padding before its end": lambda: JPEG[:-2] + b"\xff\xff\xff" + JPEG[-2:],
    "JPEG, two spare bytes before its end": lambda: JPEG[:-2] + b"\0\0" + JPEG[-2:],
    "JPEG, restart marks in each row": lambda: encoded(noisy(), "JPEG", restart_marker_rows=1),
    "JPEG, restart marks at each block": lambda: encoded(noisy(), "JPEG", restart_marker_blocks=1),
    "JPEG, one restart mark too many": lambda: (
        encoded(noisy(16, 64), "JPEG", restart_marker_blocks=2)[:-2] + b"\xff\xd1\xff\xd9"
    ),
    "JPEG, progressive": lambda: encoded(noisy(), "JPEG", progressive=True),
    "JPEG, progressive, restart marks": lambda: encoded(
        noisy(), "JPEG", progressive=True, restart_marker_blocks=3
    ),
    "JPEG, progressive, grey, restart marks": lambda: encoded(
        noisy(41, 59).convert("L"), "JPEG", progressive=True, restart_marker_blocks=1
    ),
    "JPEG, CMYK by Adobe": lambda: encoded(noisy().convert("CMYK"), "JPEG"),
    "JPEG, kept in RGB": lambda: encoded(noisy(), "JPEG", keep_rgb=True),
    "JPEG, grey": lambda: encoded(noisy().convert("L"), "JPEG", optimize=True),
    "JPEG, plain": lambda: encoded(Image.new("RGB", (2000, 1500), "white"), "JPEG"),
    "JPEG, plain, optimal tables": lambda: encoded(Image.new("L", (2000, 1500)), "JPEG", optimize=True),
    "JPEG, plain, progressive": lambda: encoded(Image.new("RGB", (2000, 1500)), "JPEG", progressive=True),
    "JPEG, plain but for a corner": lambda: encoded(plain_with_corner(), "JPEG", optimize=True),
    "JPEG, plain but for a corner, progressive": lambda: encoded(
        plain_with_corner(), "JPEG", progressive=True
    ),
    "WebP, plain": lambda: encoded(Image.new("RGB", (4000, 3000), "grey"), "WEBP"),
    "WebP, plain but for a corner": lambda: encoded(plain_with_corner(), "WEBP"),
    "WebP, plain, fastest": lambda: encoded(Image.new("RGB", (2000, 1500), "red"), "WEBP", method=0),
    "WebP, plain, lossless": lambda: encoded(Image.new("RGB", (4000, 3000), "grey"), "WEBP", lossless=True),
    "WebP, a transparent half": lambda: encoded(noisy().convert("RGBA"), "WEBP", quality=40),
    "WebP, metadata": lambda: encoded(noisy(), "WEBP", exif=EXIF, icc_profile=bytes(3001), xmp=b"<x/>" * 999),
    "WebP, bytes behind its end": lambda: WEBP + bytes(999),
    "WebP, an animation of one frame": webp_of_one_frame,
    "GIF": lambda: encoded(noisy().quantize(64), "GIF", comment=b"x" * 999),
    "GIF, not interlaced": lambda: encoded(noisy().quantize(64), "GIF", interlace=0),
    "GIF, bytes behind its end": lambda: encoded(noisy().quantize(64), "GIF") + bytes(99),
    "BMP": lambda: BMP,
    "BMP, black": lambda: encoded(Image.new("RGB", (300, 200)), "BMP"),
    "BMP that does not say its size": lambda: BMP[:2] + bytes(4) + BMP[6:],
    "BMP, run lengths": run_length_bmp,
    "BMP, bytes behind its end": lambda: BMP + bytes(99),
}
# by what they look like without that which Pillow has limits on
WITHOUT_TEXTS = ("PNG, a workflow", "PNG, hundred", "PNG, a profile", "PNG, a text")


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_file_passes_however_odd_it_looks(name):
    data = HEALTHY[name]()
    found = open_image(data, max_image_pixels=LIMIT * 2)
    truth = Image.open(io.BytesIO(PNG if name.startswith(WITHOUT_TEXTS) else data))
    if truth.mode.startswith("I"):
        truth = Image.fromarray((np.asarray(truth) >> 8).astype(np.uint8))
    np.testing.assert_array_equal(np.asarray(found.convert("RGB")), np.asarray(truth.convert("RGB")))


@settings(deadline=None, max_examples=150)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    mode=st.sampled_from(["L", "RGB", "CMYK"]),
    noise=st.sampled_from([0.0, 3.0, 60.0]),
    options=st.fixed_dictionaries(
        {
            "quality": st.integers(1, 100),
            "optimize": st.booleans(),
            "progressive": st.booleans(),
            "restart_marker_blocks": st.integers(0, 9),
        }
    ),
    subsampling=st.sampled_from([0, 1, 2]),
    spare_bytes=st.integers(0, 2),
)
def test_any_jpeg_of_an_encoder_passes(size, mode, noise, options, subsampling, spare_bytes):
    image = noisy(*size, noise=noise).convert(mode)
    data = encoded(image, "JPEG", **options, **({} if mode == "L" else {"subsampling": subsampling}))
    data = data[:-2] + bytes(spare_bytes) + data[-2:]
    np.testing.assert_array_equal(decoded(data), by_pillow(data))


def test_exif_data_behind_the_pixels_of_a_png_turn_it_upright():
    turned = EXIF[:14] + struct.pack("<HHHIHH", 1, 0x0112, 3, 1, 6, 0) + bytes(4)
    data = png_with(png_chunk(b"eXIf", turned[6:]), last=True)
    assert open_image(data, max_image_pixels=LIMIT).size == noisy().size[::-1]


# ---------------------------------------------------------------- damaged files

FILES = {
    f"{name}, {what}": encoded(image.quantize(64) if palette else image.convert(mode), file_format, **options)
    for what, image in (("noisy", noisy()), ("smooth", smooth()))
    for name, file_format, mode, palette, options in (
        ("JPEG", "JPEG", "RGB", False, {}),
        ("JPEG, grey", "JPEG", "L", False, {}),
        ("JPEG, optimal tables", "JPEG", "RGB", False, {"optimize": True}),
        ("JPEG, restart marks", "JPEG", "RGB", False, {"restart_marker_rows": 1}),
        ("JPEG, progressive", "JPEG", "RGB", False, {"progressive": True}),
        ("PNG", "PNG", "RGB", False, {}),
        ("PNG, palette", "PNG", "RGB", True, {}),
        ("WebP", "WEBP", "RGB", False, {}),
        ("WebP, lossless", "WEBP", "RGB", False, {"lossless": True}),
        ("GIF", "GIF", "RGB", True, {}),
        ("BMP", "BMP", "RGB", False, {}),
        ("BMP, palette", "BMP", "RGB", True, {}),
    )
}
TRUTHS = {name: by_pillow(data).astype(int) for name, data in FILES.items()}


def named(*formats: str) -> list[str]:
    return [name for name in FILES if name.startswith(formats)]


def check_failed_or_right(name: str, damaged: bytes) -> bool:
    """Whether the file fails; where not, its pixels are right but for a few."""
    try:
        found = decoded(damaged).astype(int)
    except SampleFailure as failure:
        assert failure.stage == "decode"
        assert failure.message
        return True
    assert found.shape == TRUTHS[name].shape
    wrong = np.abs(found - TRUTHS[name]).max(axis=-1) > WRONG_BY
    assert wrong.mean() <= WRONG_SHARE
    return False


shares = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize("name", FILES)
@settings(deadline=None, max_examples=40)
@given(share=shares)
def test_a_file_cut_anywhere_fails_or_lacks_only_its_end_mark(name, share):
    data = FILES[name]
    damaged = data[: int(share * len(data))]
    assert check_failed_or_right(name, damaged) or name.startswith("GIF")


# that zeros are no pixels cannot be known of a BMP, which is not compressed
@pytest.mark.parametrize("name", named("JPEG", "PNG", "WebP", "GIF"))
@settings(deadline=None, max_examples=40)
@given(share=shares)
def test_zeros_in_place_of_a_files_end_fail_or_spare_nearly_all_pixels(name, share):
    data = FILES[name]
    kept = int(share * len(data))
    check_failed_or_right(name, data[:kept] + bytes(len(data) - kept))


# zeros in a progressive JPEG may encode many plain blocks, which nothing contradicts
@pytest.mark.parametrize(
    "name", [name for name in named("JPEG", "PNG", "WebP", "GIF") if "progressive" not in name]
)
@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.2, 0.95), size_share=st.floats(0.06, 0.3))
def test_a_hole_of_zeros_fails_or_spares_nearly_all_pixels(name, share, size_share):
    data = FILES[name]
    start, size = int(share * len(data)), int(size_share * len(data))
    damaged = data[:start] + bytes(size) + data[start + size :]
    check_failed_or_right(name, damaged[: len(data)])


@pytest.mark.parametrize("name", named("PNG"))
@settings(deadline=None, max_examples=40)
@given(share=shares, junk=st.binary(min_size=1, max_size=40))
def test_other_bytes_anywhere_in_a_png_fail(name, share, junk):
    data = FILES[name]
    start = int(share * (len(data) - len(junk)))
    damaged = data[:start] + junk + data[start + len(junk) :]
    assert check_failed_or_right(name, damaged) or damaged == data


# no block of these files takes more
LAST_BLOCK_BYTES = 64


@pytest.mark.parametrize("name", [name for name in named("JPEG") if "progressive" not in name])
@settings(deadline=None, max_examples=40)
@given(share=shares, code=st.integers(1, 254))
@example(share=0.0, code=0xD3)
@example(share=0.99999, code=0xD9)
def test_a_mark_that_strays_into_a_jpegs_data_fails_before_the_last_block(name, share, code):
    data = FILES[name]
    first = data.index(b"\xff\xda") + 14
    start = first + int(share * (len(data) - 4 - first))
    damaged = data[:start] + bytes([0xFF, code]) + data[start + 2 :]
    has_failed = check_failed_or_right(name, damaged)
    if start < len(data) - LAST_BLOCK_BYTES:
        assert has_failed or damaged == data
    elif not has_failed:
        # decoders fill up the end of a block: what comes before it is whole
        wrong = np.abs(decoded(damaged).astype(int) - decoded(data)).max(axis=-1) > 0
        height, width = wrong.shape
        wrong[(height - 1) // 16 * 16 - 1 :, (width - 1) // 16 * 16 - 1 :] = False
        assert not wrong.any()


@pytest.mark.parametrize("name", ["JPEG, noisy", "JPEG, optimal tables, noisy", "JPEG, grey, noisy"])
def test_data_of_a_jpeg_that_are_too_few_or_too_many_fail(name):
    data = FILES[name]
    middle = data.index(b"\xff\xda") + len(data) // 3
    piece = data[middle : middle + 200]
    for damaged in (
        data[:middle] + data[middle + 200 :],
        data[: middle + 200] + piece + data[middle + 200 :],
    ):
        assert failure_of(damaged).kind == "corrupt"


BROKEN = {
    "a PNG's sum": (lambda: PNG[:40] + bytes([PNG[40] ^ 1]) + PNG[41:], "corrupt", "checksum"),
    "a PNG without end": (lambda: PNG[:-12], "truncated", "IEND"),
    "a JPEG without end": (lambda: JPEG[:-2], "truncated", "EOI"),
    "zeros for a JPEG's end": (lambda: JPEG[:-2] + bytes(2), "truncated", "EOI"),
    "a JPEG within a JPEG's data": (lambda: JPEG[:5000] + JPEG, "corrupt", "FFD8"),
    "a WebP that says more": (lambda: WEBP[:-9], "truncated", "bytes"),
    "a BMP that says more": (lambda: BMP[:-1], "truncated", "bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_message_names_what_is_broken(name):
    make, kind, words = BROKEN[name]
    failure = failure_of(make())
    assert (failure.kind, words in failure.message) == (kind, True), failure.message


def png_of(raw: bytes, kind: int = 2, interlace: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", 20, 30, 8, kind, 0, 0, interlace)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, content) for name, content in parts)


def test_a_png_of_sound_checksums_that_lacks_rows_or_its_palette_is_damaged():
    rows = bytes(30 * (1 + 20 * 3))
    assert decoded(png_of(rows)).shape == (30, 20, 3)
    assert failure_of(png_of(rows[:-1])).kind == "truncated"
    assert failure_of(png_of(rows[: len(rows) // 2])).kind == "truncated"
    assert failure_of(png_of(bytes(30 * 21), kind=3)).kind == "corrupt"


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
def test_a_png_with_a_second_header_is_damaged_and_not_inflated_to_the_size_that_it_claims(place):
    sound = png_of(bytes(30 * 61))
    huge = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
    at = sound.index(b"IDAT" if place == "before the pixels" else b"IEND") - 4
    with pytest.raises(SampleFailure, match=r"not its only one|limit"):
        decoded(sound[:at] + huge + sound[at:])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (5, 9), (188, 250)])
def test_a_png_of_any_mode_and_size_is_sound(mode, height, width):
    image = Image.new("I;16", (width, height)) if mode == "I;16" else noisy(height, width).convert(mode)
    assert decoded(encoded(image, "PNG")).shape == (height, width, 3)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (4, 5), (9, 8), (30, 20)])
def test_an_interlaced_png_has_the_rows_of_its_passes(height, width):
    # the sizes of the seven passes, counted pixel by pixel: the table of the specification, section 8.2
    table = ["16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777"]
    raw = b""
    for number in "1234567":
        lines = [sum(table[y % 8][x % 8] == number for x in range(width)) for y in range(height)]
        raw += b"".join(bytes(1 + 3 * columns) for columns in lines if columns)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, content) for name, content in parts)
    assert decoded(data).shape == (height, width, 3)
