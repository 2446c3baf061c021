"""Render the demo's sample shards with ground truth: `python -m pipeline.demo.making.make_shards`.

Two sets: "heldout" has the artists of the training on backgrounds never trained on; "newartist" has an artist
never trained on as well.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.demo.assets import demo_shard_folder, write_checksums
from pipeline.demo.making.art import HELDOUT_PHOTOS, TRAIN_ARTISTS, UNSEEN_ARTISTS, ArtBox, Artist, load_art
from pipeline.demo.making.backgrounds import HELDOUT_PATTERNS
from pipeline.demo.making.captions import canonical_caption
from pipeline.demo.making.concepts import CONCEPTS
from pipeline.demo.making.scenes import Scene, SceneStyle, SpriteMips, render, render_seg, sample_scene

LONG_SIDE_PIXELS = 256
# What is smaller than 40 px of the model's 96 x 96 cannot be judged on a grid of patches of 8 px.
MIN_VISIBLE_SHARE = 40 / 96**2
JPEG_QUALITY = 85


@dataclass(frozen=True)
class ShardSet:
    """A set of shards: artists, number of scenes, and seed."""

    name: str
    artists: Mapping[str, Artist]
    shard_count: int
    scenes_per_shard: int
    seed: int


SETS = (
    ShardSet("heldout", TRAIN_ARTISTS, shard_count=4, scenes_per_shard=56, seed=20_001),
    ShardSet("newartist", UNSEEN_ARTISTS, shard_count=3, scenes_per_shard=48, seed=20_002),
)


@dataclass(frozen=True)
class Sample:
    """A scene of a shard: image, ground truth at the size of the image, named concepts."""

    pixels: np.ndarray
    seg: np.ndarray
    class_ids: tuple[int, ...]


def sample_scenes(shard_set: ShardSet, art: ArtBox) -> Iterator[Sample]:
    """Yield the samples of a set without end; the same for the same seed and art.

    Args:
        shard_set: Its seed decides every scene.
        art: Sprites of the set's artists and the held-out photos.
    """
    rng, mips = np.random.default_rng(shard_set.seed), SpriteMips(art)
    style = SceneStyle(
        artists=tuple(shard_set.artists),
        # Photos twice: they are harder and more informative.
        backgrounds=(*art.photos, *art.photos, *HELDOUT_PATTERNS),
        aspects=(1.0, 4 / 3, 3 / 4),
    )
    while True:
        scene = sample_scene(rng, style, mips)
        height, width = _canvas_size(scene)
        seg = render_seg(scene, mips, height, width, min_visible_share=MIN_VISIBLE_SHARE)
        visible = tuple(class_id for class_id in scene.class_ids if (seg == class_id).any())
        if visible:
            yield Sample(render(scene, mips, art.photos, height, width), seg, visible)


def _canvas_size(scene: Scene) -> tuple[int, int]:
    height, width = min(1.0, 1 / scene.aspect), min(1.0, scene.aspect)
    return round(height * LONG_SIDE_PIXELS), round(width * LONG_SIDE_PIXELS)


def sample_members(sample: Sample) -> dict[str, bytes]:
    """Return the files of a sample by extension."""
    phrases = [canonical_caption(class_id) for class_id in sample.class_ids]
    description = {
        "caption": " and ".join([*[", ".join(phrases[:-1])] * (len(phrases) > 1), phrases[-1]]),
        "captions": phrases,
        "class_ids": list(sample.class_ids),
        "class_names": [CONCEPTS[class_id - 1].name for class_id in sample.class_ids],
    }
    return {
        "jpg": _encoded(sample.pixels, "JPEG", quality=JPEG_QUALITY),
        "json": json.dumps(description).encode(),
        "seg.png": _encoded(sample.seg, "PNG", optimize=True),
    }


def _encoded(pixels: np.ndarray, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def write_shards(shard_set: ShardSet, art: ArtBox, folder: Path) -> list[Path]:
    """Write the shards of a set into a folder; return their paths in order."""
    samples, paths = sample_scenes(shard_set, art), []
    for shard in range(shard_set.shard_count):
        paths.append(folder / f"{shard_set.name}-{shard:06d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(shard_set.scenes_per_shard):
                key = f"{shard_set.name}-{shard * shard_set.scenes_per_shard + index:05d}"
                for extension, content in sample_members(next(samples)).items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size, member.mode = len(content), 0o644
                    tar.addfile(member, io.BytesIO(content))
    return paths


def main() -> None:
    """Render and write both sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--art", type=Path, default=Path(".cache/demo-art"), help="folder for the fetched packages"
    )
    parser.add_argument("--out", type=Path, default=demo_shard_folder(), help="folder to write the shards to")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for shard_set in SETS:
        art = load_art(options.art, shard_set.artists, HELDOUT_PHOTOS)
        for path in write_shards(shard_set, art, options.out):
            print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    write_checksums()


if __name__ == "__main__":
    main()
