"""A model whose device takes no time: what it would compute is ready-made. For `host_ceiling.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import legrad
from legrad.images import ImageTransform

MOST_MAPS = 512


@dataclass(frozen=True)
class ReadyMadeTransform(ImageTransform):
    """Resizes as ever; what the device would normalise is left as it is."""

    def normalise(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(pixels), 0, dtype=dtype)


class ReadyMadeLeGrad(legrad.LeGrad):
    """Returns one answer to all questions about a batch; needs no computation."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.transform = ReadyMadeTransform(**vars(self.transform))
        self._batch = 0

    def encode(self, images: Tensor) -> Any:
        return len(images)

    def similarity(self, images: Any, text_embeddings: Tensor, image_index: Any = None) -> Tensor:
        return torch.zeros(images, len(text_embeddings))

    def relevance(self, images: Any, text_embeddings: Tensor, image_index: Any = None, **_: Any) -> Tensor:
        side = self.transform.height // self.patch_size
        return _smooth(len(text_embeddings), side, side)


def ready_made_rows(_model: Any, token_ids: Tensor, *_: Any) -> Tensor:
    """Unit rows of as many texts."""
    return _rows(MOST_MAPS)[: len(token_ids)]


def ready_made_maps(maps: int, height: int, width: int) -> Tensor:
    """Smooth maps in [0, 1], as refinement returns them."""
    return _smooth(maps, height, width)


@lru_cache
def _rows(texts: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(texts, 64, generator=generator), dim=1)


def _smooth(maps: int, height: int, width: int) -> Tensor:
    return _all_smooth(height, width)[:maps]


@lru_cache
def _all_smooth(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(MOST_MAPS, 1, 7, 7, generator=generator)
    maps = F.interpolate(coarse, size=(height, width), mode="bicubic").squeeze(1)
    lowest, highest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - lowest) / (highest - lowest)
