"""From PIL images to the model's input, bit for bit as open_clip does with `resize_mode="squash"`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor, nn

Interpolation = Literal["bicubic", "bilinear"]
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class ImageTransform:
    """The preprocessing of one model: stretch to the model's size, never crop, then normalise.

    Attributes:
        height: of the model's input, in pixels.
        width: of the model's input, in pixels.
        mean: of each colour channel, for values from 0 to 1.
        std: of each colour channel.
        interpolation: how PIL resamples.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"

    def resize(self, image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
        """Stretch an image of any mode to the model's size, as RGB.

        Resampling comes before the conversion to RGB, as in open_clip: palette images are resampled by index.
        """
        resized = image.resize((self.width, self.height), _RESAMPLING[self.interpolation])
        return np.array(resized.convert("RGB"))

    def normalise(
        self, pixels: UInt8[Tensor, "batch height width 3"], dtype: torch.dtype
    ) -> Float[Tensor, "batch 3 height width"]:
        """Bring resized pixels to the model's range, on the device where they are.

        Args:
            pixels: RGB values from 0 to 255.
            dtype: of the result; the arithmetic is in float32.
        """
        # By a tensor: CUDA multiplies by the reciprocal of a plain number, which is off by a bit.
        most = torch.tensor(255, dtype=torch.float32, device=pixels.device)
        channels_first = pixels.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(most)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
            for values in (self.mean, self.std)
        )
        return channels_first.sub_(mean).div_(std).to(dtype)


def transform_of(visual: nn.Module) -> ImageTransform:
    """Read the preprocessing that an open_clip vision tower carries, or else open_clip's defaults."""
    defaults = PreprocessCfg(size=visual.image_size)
    config: Mapping[str, Any] = getattr(visual, "preprocess_cfg", None) or vars(defaults)
    height, width = _pair(config["size"])
    # open_clip's "random" is for training; it resamples bicubically otherwise.
    interpolation: Interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return ImageTransform(height, width, _triple(config["mean"]), _triple(config["std"]), interpolation)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _triple(values: int | float | Sequence[int | float]) -> tuple[float, float, float]:
    red, green, blue = values if isinstance(values, Sequence) else (values, values, values)
    return float(red), float(green), float(blue)
