"""Convert PIL images to the model's input: resize and normalise, without cropping.

Exact resizing, the default, with `fit="stretch"` is bit for bit that of open_clip with
`resize_mode="squash"`. Fast resizing computes the same antialiased filter in whole numbers, with vector
instructions; levels differ by one here and there. tests/bench/README.md says what that changes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from legrad.arguments import ImageInput, each_image
from legrad.errors import InputError
from legrad.image_files.levels import as_8_bits

Interpolation = Literal["bicubic", "bilinear"]
Fit = Literal["stretch", "keep"]
Resize = Literal["exact", "fast"]
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# What F.interpolate(antialias=True) calls. These forms write into memory that they are given, in its layout,
# while F.interpolate separates the channels, and interleaving them again would take half as long as resizing.
_FAST_RESAMPLING = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}
# palette, alpha and CMYK are resampled before they are converted
_FAST_MODES = ("RGB", "L")


@dataclass(frozen=True)
class ImageTransform:
    """The preprocessing of one model: resize, never crop, then normalise.

    Attributes:
        height: of the model's input, in pixels.
        width: of the model's input, in pixels.
        mean: mean of each colour channel, for values from 0 to 1.
        std: standard deviation of each colour channel, for values from 0 to 1.
        interpolation: resampling filter of PIL.
        fit: "stretch": every image becomes height x width; "keep": an image keeps its aspect ratio, rounded
            to whole patches, and gets about as many patches as height x width has.
        patch_size: side of a patch in pixels; "keep" rounds to its multiples.

    Example:
        >>> half = (0.5, 0.5, 0.5)
        >>> transform = legrad.ImageTransform(224, 224, half, half, fit="keep", patch_size=16)
        >>> transform.input_size(480, 640)  # height and width
        (192, 256)
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    fit: Fit = "stretch"
    patch_size: int = 1

    def input_size(self, image_height: int, image_width: int) -> tuple[int, int]:
        """Return the (height, width) in pixels to which an image of this size is resized.

        With "keep", the result never has more patches than height x width; a very elongated image gets at
        least one patch along its shorter side, and correspondingly fewer along the longer one.
        """
        if self.fit == "stretch":
            return self.height, self.width
        patch = self.patch_size
        patches = (self.height // patch) * (self.width // patch)
        rows = math.sqrt(patches * image_height / image_width)
        shorter = max(1, min(round(min(rows, patches / rows)), math.isqrt(patches)))
        longer = max(1, min(round(max(rows, patches / rows)), patches // shorter))
        grid_height, grid_width = (longer, shorter) if image_height > image_width else (shorter, longer)
        return grid_height * patch, grid_width * patch

    def resize(self, image: Image.Image, resize: Resize = "exact") -> UInt8[np.ndarray, "height width 3"]:
        """Resize an image of any mode to its `input_size`, as RGB.

        Resampling comes before the conversion to RGB, as in open_clip: palette images are resampled by index.
        Grey of more than 8 bits is scaled to 8 before, see `legrad.image_files.levels.as_8_bits`.

        Args:
            image: of any size and mode.
            resize: see `LeGrad.preprocess`.
        """
        size = self.input_size(image.height, image.width)
        if resize == "fast" and (pixels := fast_pixels(image)) is not None:
            return fast_resize(pixels, *size, self.interpolation)
        return self.resize_to(image, *size)

    def resize_to(self, image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
        """Resize an image exactly to a given size, as RGB; see `resize`.

        Args:
            image: of any size and mode.
            height: in pixels.
            width: in pixels.

        Returns:
            Values from 0 to 255.
        """
        resized = as_8_bits(image).resize((width, height), _RESAMPLING[self.interpolation])
        return np.array(resized.convert("RGB"))

    def normalise(
        self, pixels: UInt8[Tensor, "batch height width 3"], dtype: torch.dtype
    ) -> Float[Tensor, "batch 3 height width"]:
        """Scale and normalise resized pixels, on their own device.

        Args:
            pixels: RGB values from 0 to 255.
            dtype: dtype of the result; the arithmetic is in float32.
        """
        # Divide by a tensor: given a Python number, CUDA multiplies by its rounded reciprocal instead.
        most, mean, std = _constants(self.mean, self.std, pixels.device)
        batch, height, width, _ = pixels.shape
        channels_first = torch.empty(batch, 3, height, width, device=pixels.device)
        torch.div(pixels.permute(0, 3, 1, 2), most, out=channels_first)
        return channels_first.sub_(mean).div_(std).to(dtype)


@lru_cache(maxsize=16)
def _constants(
    mean: tuple[float, float, float], std: tuple[float, float, float], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return 255, mean and std as tensors; a device would be waited for if they were sent for every batch."""
    with torch.inference_mode(False):
        most, *by_channel = (
            torch.tensor(values, dtype=torch.float32, device=device) for values in (255, mean, std)
        )
    return most, by_channel[0].view(3, 1, 1), by_channel[1].view(3, 1, 1)


def resized_batch(
    images: Iterable[ImageInput], transform: ImageTransform, resize: Resize
) -> UInt8[Tensor, "batch height width 3"]:
    """Resize images of any kind that `legrad.arguments.as_image` takes, one by one, to one input size.

    Raises:
        InputError: an element is no image, or images get different input sizes.
    """
    pixels = [transform.resize(image, resize) for image in each_image(images)]
    sizes = sorted({each.shape[:2] for each in pixels})
    if len(sizes) > 1:
        raise InputError(
            "images: expected images of one input size, as a batch is one tensor; with fit='keep' these get "
            + ", ".join(f"{height} x {width}" for height, width in sizes)
        )
    if not pixels:
        return torch.empty(0, transform.height, transform.width, 3, dtype=torch.uint8)
    return torch.from_numpy(np.stack(pixels))


def fast_pixels(image: Image.Image) -> np.ndarray | None:
    """Return a copy of the pixels for `fast_resize`; None for modes that are always resized exactly."""
    return np.array(image) if image.mode in _FAST_MODES else None


def fast_resize(
    pixels: UInt8[np.ndarray, "rows columns *channels"],
    height: int,
    width: int,
    interpolation: Interpolation,
    *,
    extent: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "height width 3"]:
    """Resize pixels with antialiasing, in whole numbers.

    Args:
        pixels: grey, or RGB with a last axis of 3; writable, contiguous.
        height: in pixels.
        width: in pixels.
        interpolation: filter, antialiased where it shrinks an image.
        extent: how many rows and columns of `pixels` the image covers, where its last ones cover only a part
            of a pixel; None: all.

    Returns:
        RGB.
    """
    rows, columns = pixels.shape[:2]
    covered_rows, covered_columns = extent or (rows, columns)
    if height < rows and width > columns:
        # Pillow, too, shrinks rows first here; the order shows where values are clipped between the passes.
        pixels = _resized(pixels, height, columns, interpolation, (height / covered_rows, 1.0))
        covered_rows = height
    scales = (height / covered_rows, width / covered_columns)
    resized = _resized(pixels, height, width, interpolation, scales)
    return resized if resized.ndim == 3 else np.repeat(resized[..., None], 3, axis=2)


def _resized(
    pixels: np.ndarray, height: int, width: int, interpolation: Interpolation, scales: tuple[float, float]
) -> np.ndarray:
    resized = np.empty((height, width, *pixels.shape[2:]), np.uint8)
    source, target = (
        torch.from_numpy(values).reshape(1, *values.shape[:2], -1).permute(0, 3, 1, 2)
        for values in (pixels, resized)
    )
    _FAST_RESAMPLING[interpolation](source, [height, width], False, *scales, out=target)
    return resized


def transform_of(visual: nn.Module) -> ImageTransform:
    """Return the preprocessing stored in an open_clip vision tower, otherwise open_clip's default."""
    image_size: Any = visual.image_size
    return transform_from(image_size, getattr(visual, "preprocess_cfg", None) or {})


def transform_from(image_size: int | Sequence[int], preprocess_config: Mapping[str, Any]) -> ImageTransform:
    """Return the preprocessing of an open_clip model.

    Args:
        image_size: side of its input in pixels, or height and width.
        preprocess_config: its `preprocess_cfg`; what is missing is open_clip's default.
    """
    # Imported here because it is slow, and needless where images are only resized.
    from open_clip.transform import PreprocessCfg

    config = {**vars(PreprocessCfg(size=image_size)), **preprocess_config}
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    # open_clip's "random" is for training; for inference it resamples bicubically.
    interpolation: Interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return ImageTransform(height, width, _triple(config["mean"]), _triple(config["std"]), interpolation)


def _triple(values: int | float | Sequence[int | float]) -> tuple[float, float, float]:
    red, green, blue = values if isinstance(values, Sequence) else (values, values, values)
    return float(red), float(green), float(blue)
