"""Views of the training scenes: crops, label maps of both teachers, and what the frozen tower sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from pipeline.demo.making.segmenter import INPUT_SIDE, Segmenter, TowerFeatures
from pipeline.output.label_map import IGNORED_LABEL
from pipeline.training import MaskDataset

PSEUDO_MASKS, GROUND_TRUTH = "pseudo_masks", "label_map"


class Views(NamedTuple):
    """Views along the first axis; the tower is frozen, so its features are computed once for all epochs.

    Attributes:
        images: normalised, in half precision.
        grids: see TowerFeatures.
        similarities: see TowerFeatures.
        pseudo_masks: label map that the student learns from.
        ground_truth: label map that its twin learns from.
    """

    images: Tensor
    grids: Tensor
    similarities: Tensor
    pseudo_masks: Tensor
    ground_truth: Tensor


class ViewTransform:
    """Crop, mirror and recolour an image, and crop and mirror its two label maps alike.

    Args:
        pseudo_masks: label map of each scene by key; nothing is learnt from a scene that has none.
        smallest_crop: smallest share of the image that a crop covers.
    """

    def __init__(self, pseudo_masks: Mapping[str, np.ndarray], smallest_crop: float) -> None:
        self._pseudo_masks = pseudo_masks
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop((INPUT_SIDE, INPUT_SIDE), scale=(smallest_crop, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
                *_to_input(),
            ]
        )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return a view of a sample with ground truth."""
        everything_ignored = np.full(sample[GROUND_TRUTH].shape, IGNORED_LABEL, dtype=np.uint8)
        labels = torch.from_numpy(self._pseudo_masks.get(sample["key"], everything_ignored))
        view: dict[str, Any] = self._transform({**sample, PSEUDO_MASKS: tv_tensors.Mask(labels)})
        return view


def whole_image_transform(side: int) -> v2.Transform:
    """Return the whole image, stretched to a square, normalised."""
    return v2.Compose([v2.Resize((side, side), antialias=True), *_to_input()])


def _to_input() -> list[v2.Transform]:
    return [
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
    ]


def make_views(dataset: MaskDataset, segmenter: Segmenter, views_per_scene: int) -> Views:
    """Return views of every scene of a dataset whose transform is a ViewTransform."""
    segmenter.eval()
    batches = [_views_of(batch, segmenter) for batch in _batches(dataset, views_per_scene)]
    return Views(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def _batches(dataset: MaskDataset, epochs: int) -> Iterator[list[dict[str, Any]]]:
    loader = DataLoader(dataset, batch_size=32, num_workers=1, collate_fn=list, persistent_workers=True)

    def pass_of(epoch: int) -> Iterator[list[dict[str, Any]]]:
        dataset.set_epoch(epoch)
        return iter(loader)

    return chain.from_iterable(pass_of(epoch) for epoch in range(epochs))


def _views_of(batch: list[dict[str, Any]], segmenter: Segmenter) -> Views:
    images, pseudo_masks, ground_truth = (
        torch.stack([sample[name].as_subclass(Tensor) for sample in batch])
        for name in ("image", PSEUDO_MASKS, GROUND_TRUTH)
    )
    features: TowerFeatures = segmenter.features(images)
    return Views(images.half(), *features, pseudo_masks, ground_truth)
