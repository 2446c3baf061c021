"""Make shards of JPEGs and captions for benchmarks: smooth random pictures, captions of 13 random words."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = "a red dog cat house tree river boy girl under green sky wide street"
CAPTION_WORDS = 13


def jpeg(seed: int, width: int, height: int) -> bytes:
    """Return a picture as a JPEG of quality 90."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def captions(generator: np.random.Generator, count: int) -> bytes:
    """Return the JSON field of a sample: a list of captions."""
    texts = [" ".join(generator.choice(WORDS.split(), CAPTION_WORDS)) for _ in range(count)]
    return json.dumps({"captions": texts}).encode()


def write_shards(folder: Path, images: Sequence[bytes], *, shards: int, samples: int, prompts: int) -> None:
    """Write tars in which the images take turns, with as many captions a sample as there are prompts."""
    generator = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(samples):
                _add(tar, f"{number:06d}.jpg", images[number % len(images)])
                _add(tar, f"{number:06d}.json", captions(generator, prompts))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
