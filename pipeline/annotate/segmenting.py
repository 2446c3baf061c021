"""Sharpen the heat maps of a batch with a promptable segmenter, as the last part of the device step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from legrad.errors import LeGradError
from legrad.masks.instances import Splitting, require_scikit_image
from legrad.masks.promptable import PromptableSegmenter, Sharpening, sharpened_labels
from legrad.masks.sam import SamSegmenter, segmenter_digest
from pipeline import storage
from pipeline.config.masks import MasksConfig
from pipeline.errors import UserError

HeightWidth = tuple[int, int]


@dataclass(frozen=True)
class SharpenedMaps:
    """Heat maps of a batch after a segmenter.

    Attributes:
        heatmaps: from 0 to 1, above the threshold in the new masks and nowhere else.
        instance_labels: 0 or i + 1 at instance i of each map, uint8 [maps, rows, columns], on the CPU; None
            where masks are not split.
    """

    heatmaps: torch.Tensor
    instance_labels: np.ndarray | None


@dataclass(frozen=True)
class MapSharpener:
    """Replaces the masks of heat maps by those of a segmenter.

    Attributes:
        segmenter: the segmenter.
        level: threshold of the masks.
        masks: the configuration's section.
    """

    segmenter: PromptableSegmenter
    level: float
    masks: MasksConfig

    def sharpened(
        self,
        pixels: torch.Tensor,
        heatmaps: torch.Tensor,
        maps_of_images: Sequence[Sequence[int]],
        grid_size: HeightWidth,
    ) -> SharpenedMaps:
        """Give each image once to the segmenter, with the prompts of some of its maps.

        A map is moved away from the threshold: up within its new mask, by half of the way or more, and down
        outside. So whatever is done with maps later, such as competition, needs nothing but maps.

        Args:
            pixels: canvas of each image, uint8 [images, height, width, 3].
            heatmaps: from 0 to 1, [maps, height, width].
            maps_of_images: for each image the numbers of the maps to sharpen; others stay as they are.
            grid_size: patches of the model along height and width.
        """
        sharpening = Sharpening(
            grid_size,
            self.masks.segmenter_min_iou,
            is_split=self.masks.has_instances,
            splitting=Splitting(min_peak_drop=self.masks.min_peak_drop),
        )
        heat = heatmaps.detach().float().cpu().numpy().copy()
        labels = np.zeros(heat.shape, np.uint8)
        canvases = pixels.cpu().numpy()
        for canvas, numbers in zip(canvases, maps_of_images, strict=True):
            own = list(numbers)
            labels[own] = sharpened_labels(
                self.segmenter, canvas, heat[own] > np.float32(self.level), heat[own], sharpening
            )
            heat[own] = _moved(heat[own], labels[own], self.level)
        sharp = torch.from_numpy(heat).to(heatmaps.device)
        return SharpenedMaps(sharp, labels if self.masks.has_instances else None)


def load_sharpener(
    masks: MasksConfig, device: str | torch.device, precision: str, *, expected_digest: str | None = None
) -> MapSharpener | None:
    """Load the segmenter that a configuration names; None where it names none.

    Args:
        masks: the configuration's section.
        device: where it computes.
        precision: of its image encoder: fp32, bf16 or fp16.
        expected_digest: see `digest_of_segmenter`; files with another digest are refused.

    Raises:
        UserError: its files are missing, damaged or others, or an extra is not installed.
    """
    if masks.segmenter is None:
        return None
    with _as_user_error():
        segmenter = SamSegmenter.from_pretrained(
            masks.segmenter,
            revision=masks.segmenter_revision,
            device=device,
            precision=precision,
            expected_digest=expected_digest,
        )
    return MapSharpener(segmenter, masks.high if masks.rule == "band" else masks.value, masks)


def digest_of_segmenter(masks: MasksConfig) -> str | None:
    """Return the digest of the segmenter's files, None without one; check that what masks need is there.

    Raises:
        UserError: as `load_sharpener` does, but the weights are not read as such.
    """
    with _as_user_error():
        if masks.has_instances or masks.segmenter is not None:
            require_scikit_image()
        if masks.segmenter is None:
            return None
        return segmenter_digest(masks.segmenter, masks.segmenter_revision)


def resolved_segmenter(masks: MasksConfig) -> MasksConfig:
    """Return the section with an absolute path where the segmenter is a folder; workers run elsewhere."""
    if masks.segmenter is None or not Path(masks.segmenter).is_dir():
        return masks
    return masks.model_copy(update={"segmenter": storage.absolute(masks.segmenter)})


def _moved(
    heat: Float32[np.ndarray, "maps height width"],
    labels: UInt8[np.ndarray, "maps height width"],
    level: float,
) -> Float32[np.ndarray, "maps height width"]:
    """Move maps from 0 to 1 above a threshold where they have a label, and below it elsewhere."""
    inside = level + (1 - level) * (1 + heat) / 2
    moved: np.ndarray = np.where(labels > 0, inside, level * heat / 2).astype(np.float32)
    return moved


@contextmanager
def _as_user_error() -> Iterator[None]:
    try:
        yield
    except LeGradError as error:
        raise UserError(f"section masks: {error}") from error
