"""Estimates of what decoding takes, against the peak of memory of processes that decode such files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.pictures import encoded, exif_with
from tests.helpers.processes import REPOSITORY

needs_resident_memory = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="asks Linux for resident memory"
)

# decodes the files that it is given, and prints the growth of memory and the estimate for each
CHILD = """
import io, json, sys
from contextlib import nullcontext
from pathlib import Path
from PIL import Image
from legrad.images import ImageTransform
from pipeline.shards import decode_memory
from pipeline.shards.images import decode_image

decode_memory.LARGE_IMAGE_BYTES = 0
transform = ImageTransform(224, 224, (0.5,) * 3, (0.5,) * 3)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

def measured(data, resize):
    asked = []
    room = lambda needed_bytes: asked.append(needed_bytes) or nullcontext()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    decode_image(data, transform, max_image_pixels=10**9, resize=resize, room=room)
    return status("VmHWM") - before, max(asked)

warm = io.BytesIO()
Image.new("RGB", (300, 300)).save(warm, sys.argv[1])
for resize in ("exact", "fast"):
    measured(warm.getvalue(), resize)
print(json.dumps(measured(Path(sys.argv[2]).read_bytes(), sys.argv[3])))
"""


def waves(height: int, width: int) -> Image.Image:
    y, x = np.ogrid[:height, :width]
    channels = [(128 + 60 * np.sin(x / (50 + c)) + 40 * np.cos(y / (70 - c))) for c in range(3)]
    return Image.fromarray(np.stack([channel.astype(np.uint8) for channel in channels], axis=-1))


FILES = {
    "JPEG": ("JPEG", "RGB", {}),
    "JPEG, grey": ("JPEG", "L", {}),
    "JPEG, CMYK": ("JPEG", "CMYK", {}),
    "JPEG, progressive": ("JPEG", "RGB", {"progressive": True}),
    "JPEG, progressive, 4:4:4": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    "JPEG, turned": ("JPEG", "RGB", {"exif": exif_with(6)}),
    "PNG": ("PNG", "RGB", {"compress_level": 1}),
    "PNG, turned": ("PNG", "RGB", {"compress_level": 1, "exif": exif_with(6)}),
    "PNG, grey": ("PNG", "L", {"compress_level": 1}),
    "PNG, alpha": ("PNG", "RGBA", {"compress_level": 1}),
    "PNG, grey and alpha": ("PNG", "LA", {"compress_level": 1}),
    "BMP": ("BMP", "RGB", {}),
    "GIF": ("GIF", "P", {}),
    "WebP": ("WEBP", "RGB", {"method": 0}),
    "WebP, alpha": ("WEBP", "RGBA", {"method": 0}),
}


def growth_and_estimate(data: bytes, file_format: str, resize: str, folder: Path) -> tuple[int, int]:
    path = folder / "image"
    path.write_bytes(data)
    command = [sys.executable, "-c", CHILD, file_format, str(path), resize]
    ended = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    grown, estimate = json.loads(ended.stdout)
    return grown, estimate


@needs_resident_memory
@pytest.mark.slow
@pytest.mark.parametrize("resize", ["exact", "fast"])
@pytest.mark.parametrize("name", FILES)
def test_an_image_takes_no_more_memory_than_estimated_and_not_much_less(name, resize, tmp_path):
    file_format, mode, options = FILES[name]
    data = encoded(waves(3000, 4000).convert(mode), file_format, **options)
    grown, estimate = growth_and_estimate(data, file_format, resize, tmp_path)
    assert grown <= estimate
    # less where a reader keeps no copy of the file, and where a JPEG is reduced
    assert estimate <= 1.5 * grown + len(data) + 8 * 2**20


@needs_resident_memory
@pytest.mark.slow
@pytest.mark.parametrize("resize", ["exact", "fast"])
@pytest.mark.parametrize("name", ["JPEG", "JPEG, progressive", "PNG"])
def test_the_estimate_holds_for_a_hundred_million_pixels(name, resize, tmp_path):
    file_format, mode, options = FILES[name]
    data = encoded(waves(10_000, 10_000).convert(mode), file_format, **options)
    grown, estimate = growth_and_estimate(data, file_format, resize, tmp_path)
    assert grown <= estimate <= 1.5 * grown + len(data) + 8 * 2**20
