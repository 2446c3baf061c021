"""Preprocessing of images as the processors of Hugging Face transformers configure it."""

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from legrad.errors import InputError
from legrad.images import ImageTransform, Interpolation

_INTERPOLATIONS: dict[int, Interpolation] = {
    Image.Resampling.BICUBIC: "bicubic",
    Image.Resampling.BILINEAR: "bilinear",
}
Triple = tuple[float, float, float]


def transform_of_processor(processor: Any, default: ImageTransform) -> ImageTransform:
    """Return the preprocessing of an image processor; images are stretched where it would crop them.

    Args:
        processor: a processor of transformers, or only its image processor; None: the default.
        default: for a model without processor; its size is also for a processor that gives none.

    Raises:
        InputError: it is no image processor, or it resamples in another way than those that are known.
    """
    if processor is None:
        return default
    images = getattr(processor, "image_processor", processor)
    if not hasattr(images, "image_mean") or not hasattr(images, "resample"):
        raise InputError(
            f"processor: expected the model's processor or image processor, received a "
            f"{type(processor).__name__}, which has no settings for images"
        )
    resample = int(images.resample) if images.resample is not None else -1
    if resample not in _INTERPOLATIONS:
        named = Image.Resampling(resample).name.lower() if resample >= 0 else "none"
        raise InputError(
            f"processor: its image processor resamples by {named}; expected bicubic or bilinear. "
            "Way out: set its `resample`"
        )
    mean, std = _of_unit_values(images)
    height, width = _size(images) or (default.height, default.width)
    return ImageTransform(height, width, mean, std, _INTERPOLATIONS[resample])


def _size(images: Any) -> tuple[int, int] | None:
    if most := getattr(images, "max_num_patches", None):  # NaFlex: images of any aspect ratio
        side = math.isqrt(most) * images.patch_size
        return side, side
    crops = bool(getattr(images, "do_center_crop", None)) and getattr(images, "crop_size", None)
    size = images.crop_size if crops else getattr(images, "size", None)
    if not crops and not getattr(images, "do_resize", True):
        return None
    named = dict(size) if size else {}
    if named.get("height") and named.get("width"):
        return int(named["height"]), int(named["width"])
    side = named.get("shortest_edge")
    return (int(side), int(side)) if side else None


def _of_unit_values(images: Any) -> tuple[Triple, Triple]:
    """Return mean and standard deviation for pixels from 0 to 1, whatever the processor scales them to."""
    factor = float(images.rescale_factor) if getattr(images, "do_rescale", True) else 1.0
    scale = 1.0 if math.isclose(factor * 255, 1.0) else factor * 255
    if not getattr(images, "do_normalize", True):
        return (0.0, 0.0, 0.0), _triple(1 / scale)
    return (
        _triple(images.image_mean, scale),
        _triple(images.image_std, scale),
    )


def _triple(values: float | Sequence[float], divisor: float = 1.0) -> Triple:
    red, green, blue = values if isinstance(values, Sequence) else (values, values, values)
    return float(red) / divisor, float(green) / divisor, float(blue) / divisor
