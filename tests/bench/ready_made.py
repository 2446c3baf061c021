"""Replace what a device computes by ready-made tensors, for `host_ceiling.py`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import legrad
from legrad.images import ImageTransform

MOST_MAPS = 512
# memory for stacked arrays, of each device thread
_STAGED = threading.local()


@dataclass(frozen=True)
class ReadyMadeTransform(ImageTransform):
    """Resizes as the real one does; normalising, which the device does, is skipped."""

    def normalise(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(pixels), 0, dtype=dtype)


class ReadyMadeLeGrad(legrad.LeGrad):
    """Returns the same image features and relevance grids for every batch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.transform = ReadyMadeTransform(**vars(self.transform))

    def encode(self, images: Tensor, **_: Any) -> Any:
        """Return ready-made features of as many images."""
        return SimpleNamespace(image_features=_rows(MOST_MAPS)[: len(images)])

    def relevance(self, images: Any, text_embeddings: Any, image_index: Any = None, **_: Any) -> Tensor:
        """Return ready-made grids of as many texts."""
        side = self.transform.height // self.patch_size
        return _smooth(len(text_embeddings.unit_rows), side, side)


def ready_made_rows(_model: Any, _tower: Any, token_ids: Tensor, _context: int) -> Tensor:
    """Return unit rows of as many texts, in place of the text tower."""
    return _rows(MOST_MAPS)[: len(token_ids)]


def ready_made_maps(maps: int, height: int, width: int) -> Tensor:
    """Return smooth maps in [0, 1], in half precision as they come from a GPU."""
    return _halves(height, width)[:maps]


def stacked(arrays: Sequence[np.ndarray], _device: torch.device) -> Tensor:
    """Stack arrays in memory that is used again, as page-locked memory is, without a copy to a device."""
    shape, dtype = (len(arrays), *arrays[0].shape), torch.from_numpy(arrays[0][:0]).dtype
    staged: dict[Any, Tensor] = vars(_STAGED).setdefault("by_shape", {})
    if (shape, dtype) not in staged:
        staged[shape, dtype] = torch.empty(shape, dtype=dtype)
    np.stack(arrays, out=staged[shape, dtype].numpy())
    return staged[shape, dtype]


def as_they_are(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Return what would have to be copied from a device."""
    return [tensor.numpy() for tensor in tensors]


@lru_cache
def _halves(height: int, width: int) -> Tensor:
    return _all_smooth(height, width).half()


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
