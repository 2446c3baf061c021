"""Training batches: scenes with captions; a batch depends on seed, step and process only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.demo.making.art import ArtBox
from pipeline.demo.making.backgrounds import TRAIN_PATTERNS
from pipeline.demo.making.captions import named_subset, neutral_caption, one_concept_caption, scene_caption
from pipeline.demo.making.concepts import NAMED
from pipeline.demo.making.curriculum import Phase, Plan
from pipeline.demo.making.losses import concept_labels
from pipeline.demo.making.scenes import SceneStyle, SpriteMips, render, sample_scene
from pipeline.demo.making.vocabulary import CompactVocabulary


@dataclass(frozen=True)
class Batch:
    """Images with their captions, and the one-concept captions that all images are compared with."""

    images: Tensor
    labels: Tensor
    caption_labels: Tensor
    caption_rows: Tensor
    concept_rows: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on a device."""
        return Batch(
            self.images.to(device),
            self.labels.to(device),
            self.caption_labels.to(device),
            self.caption_rows.to(device),
            self.concept_rows.to(device),
        )


@dataclass(frozen=True)
class StepBatches(Dataset[tuple[Batch, tuple[int, int]]]):
    """The batches of one process by step, independent of where and in which order they are rendered."""

    plan: Plan
    rank: int
    mips: SpriteMips
    art: ArtBox
    vocabulary: CompactVocabulary
    native_grid_side: int
    patch_size: int

    def __getitem__(self, step: int) -> tuple[Batch, tuple[int, int]]:
        phase = self.plan.phase_of(step)
        rng = np.random.default_rng((self.plan.seed, step, self.rank))
        batch = make_batch(rng, phase, self.mips, self.art, self.vocabulary)
        spare = self.native_grid_side - phase.image_side // self.patch_size + 1
        return batch, (int(rng.integers(spare)), int(rng.integers(spare)))


def make_batch(
    rng: np.random.Generator, phase: Phase, mips: SpriteMips, art: ArtBox, vocabulary: CompactVocabulary
) -> Batch:
    """Render a batch of scenes and write its captions."""
    scenes = [sample_scene(rng, _style(phase, art), mips) for _ in range(phase.batch_size)]
    side, pictures = phase.image_side, art.pictures
    pixels = np.stack([render(scene, mips, pictures, side, side) for scene in scenes])
    named = [named_subset(rng, scene.class_ids) for scene in scenes]
    captions = [
        scene_caption(rng, class_ids, [scene.is_several(i) for i in class_ids])
        for scene, class_ids in zip(scenes, named, strict=True)
    ]
    concepts = [one_concept_caption(rng, class_id) for class_id in range(1, len(NAMED) + 1)]
    return Batch(
        images=_normalise(torch.from_numpy(pixels)),
        labels=concept_labels([scene.class_ids for scene in scenes], len(NAMED)),
        caption_labels=concept_labels(named, len(NAMED)),
        caption_rows=vocabulary.rows(captions),
        concept_rows=vocabulary.rows([*concepts, neutral_caption(rng)]),
    )


def _style(phase: Phase, art: ArtBox) -> SceneStyle:
    return SceneStyle(
        artists=tuple(sorted({artist for artist, _ in art.sprites})),
        backgrounds=(*art.photos, *TRAIN_PATTERNS),
        single_share=phase.single_share,
        neutral_share=phase.neutral_share,
        clutter_share=phase.clutter_share,
        stuff_share=phase.stuff_share,
        stuff=art.stuff,
    )


def _normalise(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor(OPENAI_DATASET_MEAN) * 255, torch.tensor(OPENAI_DATASET_STD) * 255
    return ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous()
