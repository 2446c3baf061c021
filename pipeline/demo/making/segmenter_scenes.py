"""Training scenes of the segmenter: rendered if sprites are available, else a part of the shipped ones."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.demo import assets
from pipeline.demo.making.art import TRAIN_ARTISTS, TRAIN_PHOTOS, ArtBox, load_art
from pipeline.demo.making.backgrounds import TRAIN_PATTERNS
from pipeline.demo.making.make_shards import MIN_VISIBLE_SHARE, Sample, sample_members
from pipeline.demo.making.scenes import SceneStyle, SpriteMips, render, render_seg, sample_scene

LONG_SIDE_PIXELS = 128
SCENES_PER_SHARD = 200


@dataclass(frozen=True)
class SceneSplit:
    """Shards to train on and shards to evaluate on, without a scene in common.

    Attributes:
        train: with seg.png, which only the supervised twin sees.
        heldout: with seg.png.
        origin: where the scenes to train on come from, for people.
    """

    train: tuple[Path, ...]
    heldout: tuple[Path, ...]
    origin: str


def scene_split(scenes: int, art_folder: Path, folder: Path, seed: int) -> SceneSplit:
    """Return training scenes, rendered unless they exist, and the shipped held-out scenes for the evaluation.

    Args:
        scenes: how many to draw.
        art_folder: the fetched sprites, see `load_art`.
        folder: takes the shards.
        seed: decides every scene.
    """
    heldout = assets.demo_shard_paths("heldout")
    try:
        art = load_art(art_folder, TRAIN_ARTISTS, TRAIN_PHOTOS)
    except (RuntimeError, ImportError) as error:
        train = (*assets.demo_shard_paths("newartist"), *heldout[:2])
        return SceneSplit(train, tuple(heldout[2:]), f"a part of the shipped scenes, because {error}")
    drawn = tuple(draw_shards(scenes, art, folder / f"scenes-{scenes}-seed-{seed}", seed))
    return SceneSplit(
        drawn, tuple(heldout), "drawn with the artists and backgrounds of the demo model's training"
    )


def draw_shards(scenes: int, art: ArtBox, folder: Path, seed: int) -> Iterator[Path]:
    """Write shards of scenes with ground truth, unless they exist; yield their paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    mips = SpriteMips(art)
    for shard, start in enumerate(range(0, scenes, SCENES_PER_SHARD)):
        path = folder / f"train-{shard:06d}.tar"
        if not path.exists():
            samples = _samples(np.random.default_rng((seed, shard)), art, mips)
            partial = path.with_suffix(".partial")
            _write(partial, samples, range(start, min(scenes, start + SCENES_PER_SHARD)))
            partial.rename(path)
        yield path


def _samples(rng: np.random.Generator, art: ArtBox, mips: SpriteMips) -> Iterator[Sample]:
    style = SceneStyle(
        artists=tuple(TRAIN_ARTISTS), backgrounds=(*art.photos, *TRAIN_PATTERNS), aspects=(1.0, 4 / 3, 3 / 4)
    )
    while True:
        scene = sample_scene(rng, style, mips)
        height = round(min(1.0, 1 / scene.aspect) * LONG_SIDE_PIXELS)
        width = round(min(1.0, scene.aspect) * LONG_SIDE_PIXELS)
        seg = render_seg(scene, mips, height, width, min_visible_share=MIN_VISIBLE_SHARE)
        visible = tuple(class_id for class_id in scene.class_ids if (seg == class_id).any())
        if visible:
            yield Sample(render(scene, mips, art.photos, height, width), seg, visible)


def _write(path: Path, samples: Iterator[Sample], numbers: range) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in numbers:
            for extension, content in sample_members(next(samples)).items():
                member = tarfile.TarInfo(f"train-{number:06d}.{extension}")
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
