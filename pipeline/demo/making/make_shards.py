"""Render the demo's sample shards with ground truth: `python -m pipeline.demo.making.make_shards`.

"heldout" has the artists of the training on backgrounds never trained on; "newartist" has an artist never
trained on as well, "thirdartist" yet another one. "stuff" has backgrounds that captions name, with ground
truth; "duplicates" has two or three objects of a concept in each scene. The last three sets have a map of
instances.
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
from pipeline.demo.making.art import (
    HELDOUT_PHOTOS,
    THIRD_ARTISTS,
    TRAIN_ARTISTS,
    UNSEEN_ARTISTS,
    ArtBox,
    Artist,
    load_art,
    with_stuff,
)
from pipeline.demo.making.backgrounds import HELDOUT_PATTERNS
from pipeline.demo.making.captions import canonical_caption
from pipeline.demo.making.concepts import NAMED
from pipeline.demo.making.scenes import (
    Scene,
    SceneStyle,
    SpriteMips,
    render,
    render_instances,
    render_seg,
    sample_scene,
)

LONG_SIDE_PIXELS = 256
# What is smaller than 40 px of the model's 96 x 96 cannot be judged on a grid of patches of 8 px.
MIN_VISIBLE_SHARE = 40 / 96**2
# Of the further sets, so that they take little room; the first two sets stay as they are.
FURTHER_JPEG_QUALITY = 68


@dataclass(frozen=True)
class ShardSet:
    """A set of shards: artists, number of scenes, and seed.

    The rest is as in `SceneStyle`. Sets with instances have a file more for each scene.
    """

    name: str
    artists: Mapping[str, Artist]
    shard_count: int
    scenes_per_shard: int
    seed: int
    has_instances: bool = False
    jpeg_quality: int = 85
    stuff_share: float = 0.0
    neutral_share: float = 0.0
    single_share: float = 0.0
    copy_counts: tuple[int, ...] = ()


SETS = (
    ShardSet("heldout", TRAIN_ARTISTS, shard_count=4, scenes_per_shard=56, seed=20_001),
    ShardSet("newartist", UNSEEN_ARTISTS, shard_count=3, scenes_per_shard=48, seed=20_002),
    ShardSet(
        "stuff",
        TRAIN_ARTISTS,
        shard_count=2,
        scenes_per_shard=48,
        seed=20_003,
        has_instances=True,
        jpeg_quality=FURTHER_JPEG_QUALITY,
        stuff_share=1.0,
        neutral_share=0.2,
    ),
    ShardSet(
        "thirdartist",
        THIRD_ARTISTS,
        shard_count=2,
        scenes_per_shard=48,
        seed=20_004,
        has_instances=True,
        jpeg_quality=FURTHER_JPEG_QUALITY,
    ),
    ShardSet(
        "duplicates",
        TRAIN_ARTISTS,
        shard_count=1,
        scenes_per_shard=48,
        seed=20_005,
        has_instances=True,
        jpeg_quality=FURTHER_JPEG_QUALITY,
        single_share=0.5,
        copy_counts=(2, 3),
    ),
)
HELDOUT_TEXTURES_PER_CLASS = 6


@dataclass(frozen=True)
class Sample:
    """A scene of a shard: image, ground truth at the size of the image, named concepts, perhaps instances."""

    pixels: np.ndarray
    seg: np.ndarray
    class_ids: tuple[int, ...]
    instances: np.ndarray | None = None


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
        neutral_share=shard_set.neutral_share,
        single_share=shard_set.single_share,
        stuff_share=shard_set.stuff_share,
        stuff=art.stuff,
        copy_counts=shard_set.copy_counts,
    )
    pictures = art.pictures
    while True:
        scene = sample_scene(rng, style, mips)
        height, width = _canvas_size(scene)
        seg = render_seg(scene, mips, height, width, min_visible_share=MIN_VISIBLE_SHARE)
        visible = tuple(class_id for class_id in scene.class_ids if (seg == class_id).any())
        if not visible or (shard_set.copy_counts and not _shows_copies(scene, mips, height, width)):
            continue
        instances = None
        if shard_set.has_instances:
            instances = render_instances(scene, mips, height, width, min_visible_share=MIN_VISIBLE_SHARE)
            instances[seg == 255] = 255
        yield Sample(render(scene, mips, pictures, height, width), seg, visible, instances)


def _shows_copies(scene: Scene, mips: SpriteMips, height: int, width: int) -> bool:
    """Return whether at least two objects of one concept can be seen well."""
    instances = render_instances(scene, mips, height, width, min_visible_share=MIN_VISIBLE_SHARE)
    seen = [
        scene.objects[number - 1].class_id for number in np.unique(instances).tolist() if 0 < number < 255
    ]
    return len(set(seen)) < len(seen)


def _canvas_size(scene: Scene) -> tuple[int, int]:
    height, width = min(1.0, 1 / scene.aspect), min(1.0, scene.aspect)
    return round(height * LONG_SIDE_PIXELS), round(width * LONG_SIDE_PIXELS)


def sample_members(sample: Sample, jpeg_quality: int = 85) -> dict[str, bytes]:
    """Return the files of a sample by extension."""
    phrases = [canonical_caption(class_id) for class_id in sample.class_ids]
    description = {
        "caption": " and ".join([*[", ".join(phrases[:-1])] * (len(phrases) > 1), phrases[-1]]),
        "captions": phrases,
        "class_ids": list(sample.class_ids),
        "class_names": [NAMED[class_id - 1].name for class_id in sample.class_ids],
    }
    members = {
        "jpg": _encoded(sample.pixels, "JPEG", quality=jpeg_quality),
        "json": json.dumps(description).encode(),
        "seg.png": _encoded(sample.seg, "PNG", optimize=True),
    }
    if sample.instances is not None:
        members["inst.png"] = _encoded(sample.instances, "PNG", optimize=True)
    return members


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
                for extension, content in sample_members(next(samples), shard_set.jpeg_quality).items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size, member.mode = len(content), 0o644
                    tar.addfile(member, io.BytesIO(content))
    return paths


def set_art(shard_set: ShardSet, cache_dir: Path) -> ArtBox:
    """Return the sprites, photos and textures of a set's scenes; see `load_art`."""
    art = load_art(cache_dir, shard_set.artists, HELDOUT_PHOTOS)
    if shard_set.stuff_share == 0:
        return art
    return with_stuff(art, per_class=HELDOUT_TEXTURES_PER_CLASS, seed=shard_set.seed, is_heldout=True)


def main() -> None:
    """Render and write all sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--art", type=Path, default=Path(".cache/demo-art"), help="folder for the fetched packages"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=demo_shard_folder("heldout").parent,
        help="folder that the folders of shards are written into",
    )
    options = parser.parse_args()
    for shard_set in SETS:
        folder = options.out / demo_shard_folder(shard_set.name).name
        folder.mkdir(parents=True, exist_ok=True)
        for path in write_shards(shard_set, set_art(shard_set, options.art), folder):
            print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    write_checksums()


if __name__ == "__main__":
    main()
