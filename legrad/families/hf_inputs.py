"""Preprocessing and tokens as the processors of Hugging Face transformers make them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from legrad.errors import InputError
from legrad.images import ImageTransform, Interpolation
from legrad.tokens import Tokenizer

_INTERPOLATIONS: dict[int, Interpolation] = {
    Image.Resampling.BICUBIC: "bicubic",
    Image.Resampling.BILINEAR: "bilinear",
}
Triple = tuple[float, float, float]


class ProcessorTokenizer:
    """Tokenise texts with a tokenizer of transformers, padded and truncated to a model's context length.

    Args:
        tokenizer: a tokenizer of transformers.
        context_length: number of tokens of each text.
        lower_case: whether texts are put in lower case first, unless the tokenizer's own `do_lower_case` is
            False. The tokenizer does all other cleaning.

    Attributes:
        tokenizer: the same.
        context_length: the same.
        clean_fn: what is done to a text before it is tokenised.
    """

    def __init__(self, tokenizer: Any, context_length: int, *, lower_case: bool) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        lowers = lower_case and tokenizer.init_kwargs.get("do_lower_case", True)
        self.clean_fn = str.lower if lowers else str

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "texts context"]:
        """Return the token ids of texts."""
        rows = self.tokenizer(
            [self.clean_fn(text) for text in texts],
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=False,
        )["input_ids"]
        return torch.tensor(rows)


def as_tokenizer(
    tokenizer: Tokenizer | None, processor: Any, context_length: int, *, lower_case: bool
) -> Tokenizer | None:
    """Return a callable that makes the token ids of a model, or None.

    Args:
        tokenizer: a tokenizer of transformers, or a callable that gives token ids; None: that of the
            processor, if it has one.
        processor: of transformers, or None.
        context_length: of the model.
        lower_case: whether the model was trained with texts in lower case.
    """
    found = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
    is_of_transformers = hasattr(found, "model_max_length") and hasattr(found, "pad_token_id")
    if not is_of_transformers:
        return found
    return ProcessorTokenizer(found, context_length, lower_case=lower_case)


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
