"""Collate samples to batches, also samples with different numbers of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.errors import UserError

STACKED = ("image", "label_map", "label_weights")
JOINED = ("masks", "class_ids", "similarities", "weights")


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Make a batch of samples as MaskDataset hands them out.

    Args:
        samples: after transforms that bring all images to one size.

    Returns:
        `image`, `label_map` and `label_weights` stacked along a new first axis. What belongs to prompts is
        joined along the prompts of all images: `masks` [prompts, height, width], `class_ids`,
        `similarities`, `weights` [prompts] and `prompts`, a list of texts, with `image_index` [prompts], the
        image that each belongs to. Everything else: a list with one element a sample.

    Raises:
        UserError: the images, or what is stacked with them, are of different sizes.
    """
    names = samples[0].keys()
    batch: dict[str, Any] = {name: _stacked(name, samples) for name in STACKED if name in names}
    batch |= {
        name: torch.cat([sample[name].as_subclass(torch.Tensor) for sample in samples])
        for name in JOINED
        if name in names
    }
    if "prompts" in names:
        counts = torch.tensor([len(sample["prompts"]) for sample in samples])
        batch["prompts"] = [text for sample in samples for text in sample["prompts"]]
        batch["image_index"] = torch.arange(len(samples)).repeat_interleave(counts)
    for name in names - batch.keys():
        batch[name] = [sample[name] for sample in samples]
    return batch


def _stacked(name: str, samples: Sequence[dict[str, Any]]) -> torch.Tensor:
    values = [sample[name].as_subclass(torch.Tensor) for sample in samples]
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) > 1:
        raise UserError(
            f"collate: expected every {name} of a batch to have one size, got {shapes[0]} and {shapes[-1]}; "
            "let the transform end with a resize or a crop to a fixed size"
        )
    return torch.stack(values)
