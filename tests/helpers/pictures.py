"""Pictures, encoded in each format, and the failures of files that are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import SampleFailure
from pipeline.shards.images import open_image

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


def failure_of(data: bytes, **options) -> SampleFailure:
    with pytest.raises(SampleFailure) as caught:
        open_image(data, max_image_pixels=options.get("max_image_pixels", LIMIT))
    assert caught.value.stage == "decode"
    return caught.value


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


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(height: int, width: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


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


def grey_png_without_its_last_row(values: np.ndarray) -> bytes:
    """A PNG of correct checksums, whose compressed data end a row too early."""
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in values[:-1])
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in parts)
