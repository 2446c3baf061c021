"""Check text embeddings of callers, and convert them to the flat form that the method computes with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from legrad.arguments import as_index, check_rows_of_images, check_share, kind_of
from legrad.errors import InputError
from legrad.heatmaps import minmax_normalise
from legrad.method.stages import accumulation_dtype


@dataclass(frozen=True)
class RaggedPrompts:
    """Prompts in flat form, each with the image it belongs to.

    Attributes:
        unit_rows: one unit text embedding for each prompt.
        image_index: for each prompt, the row of its image.
        leading: shape in which the caller passed the prompts: (batch, prompts) or (prompts,).
        one_by_one: whether prompt i belongs to image i, for every image.
    """

    unit_rows: Float[Tensor, "prompts embed_dim"]
    image_index: Int[Tensor, " prompts"]
    leading: tuple[int, ...]
    one_by_one: bool


def ragged_unit_rows(
    unit_rows: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
    *,
    one_by_one: bool,
) -> RaggedPrompts:
    """Return prompts whose rows and index are known to be right, so that nothing waits for their device.

    Args:
        unit_rows: unit text embeddings, as `TextEmbedder` returns them.
        image_index: for each prompt the row of its image, on the device of the rows.
        one_by_one: see `RaggedPrompts`.
    """
    return RaggedPrompts(unit_rows, image_index, (len(unit_rows),), one_by_one)


def as_ragged(
    image_features: Float[Tensor, "batch embed_dim"],
    text_embeddings: Tensor,
    image_index: Tensor | Sequence[int] | None,
) -> RaggedPrompts:
    """Convert the three accepted forms of text embeddings to `RaggedPrompts`.

    Args:
        image_features: features of the images, or a tensor of the same shape, dtype and device.
        text_embeddings: [batch, prompts, embed_dim], [prompts, embed_dim], or the latter with `image_index`.
        image_index: for each prompt the row of its image, on any device, or None.

    Raises:
        InputError: shapes, dtypes, devices or indices do not fit.
    """
    unit_rows = as_unit_rows(image_features, text_embeddings)
    device, batch = unit_rows.device, len(image_features)
    if image_index is not None:
        # Kernels assume contiguous memory, and the index may be a column of a table of pairs.
        checked = check_image_index(image_index, text_embeddings, batch).contiguous()
        one_by_one = checked.device.type == "cpu" and torch.equal(checked, torch.arange(batch))
        return RaggedPrompts(unit_rows, checked.to(device), (len(checked),), one_by_one)
    prompts = unit_rows.shape[-2]
    rows = unit_rows.expand(batch, -1, -1).flatten(0, 1)
    every_image = torch.arange(batch, device=device).repeat_interleave(prompts)
    return RaggedPrompts(rows, every_image, (batch, prompts), one_by_one=prompts == 1)


def neutral_patches(
    neutral_grids: Float[Tensor, "batch 1 grid_height grid_width"], threshold: float
) -> Bool[Tensor, "batch grid_height grid_width"]:
    """Mark the patches where the min-max normalised map of a neutral text exceeds a threshold.

    Args:
        neutral_grids: raw relevance of the neutral text for each image.
        threshold: from 0 to 1, as `check_neutral` returns it.
    """
    return minmax_normalise(neutral_grids)[:, 0] > threshold


def as_unit_rows(features: Float[Tensor, "batch embed_dim"], text_embeddings: Tensor) -> Tensor:
    """Normalise text embeddings to unit length, in float32 or float64.

    Args:
        features: features of the images, or a tensor of the same shape, dtype and device.
        text_embeddings: [batch, prompts, embed_dim] or [prompts, embed_dim].

    Raises:
        InputError: kind, shape, dtype or device do not fit, or a row has no direction.
    """
    check_text_embeddings(features, text_embeddings)
    rows = text_embeddings.detach().to(accumulation_dtype(features.dtype))
    return rows.div(torch.linalg.vector_norm(rows, dim=-1, keepdim=True))


def check_text_embeddings(features: Float[Tensor, "batch embed_dim"], text_embeddings: Any) -> None:
    """Raise an InputError if text embeddings do not fit image features; see `as_unit_rows`."""
    embed_dim = features.shape[-1]
    expected = f"text_embeddings: expected [batch, prompts, {embed_dim}] or [prompts, {embed_dim}]"
    if not isinstance(text_embeddings, Tensor):
        raise InputError(f"{expected}, received {kind_of(text_embeddings)}; {_way_to_embed(text_embeddings)}")
    if text_embeddings.ndim not in (2, 3) or text_embeddings.shape[-1] != embed_dim:
        raise InputError(f"{expected}, received {_shape(text_embeddings)}")
    if text_embeddings.ndim == 3 and len(text_embeddings) != len(features):
        raise InputError(
            f"text_embeddings [batch, prompts, embed_dim]: expected {len(features)} images, as encoded, "
            f"received {_shape(text_embeddings)}"
        )
    if not text_embeddings.is_floating_point():
        raise InputError(
            f"text_embeddings: expected a floating-point dtype, received {text_embeddings.dtype}"
        )
    if text_embeddings.device != features.device:
        raise InputError(
            f"text_embeddings: expected device {features.device}, as the images, "
            f"received {text_embeddings.device}"
        )
    dtype = accumulation_dtype(features.dtype)
    lengths = torch.linalg.vector_norm(text_embeddings.detach().to(dtype), dim=-1)
    has_direction = (lengths > 0) & lengths.isfinite()
    if not bool(has_direction.all()):
        rows = (~has_direction).nonzero().tolist()
        raise InputError(
            f"text_embeddings: expected rows of finite length above zero, received others: row "
            f"{', '.join(map(str, rows[0]))} and {len(rows) - 1} more"
        )


def check_neutral(
    neutral_embedding: Any, threshold: Any, embed_dim: int
) -> tuple[Float[Tensor, "1 embed_dim"] | None, float]:
    """Return the embedding of a neutral text as a row, and its threshold.

    Args:
        neutral_embedding: one embedding of the caller, or None.
        threshold: from 0 to 1.
        embed_dim: dimension of the joint space.

    Raises:
        InputError: there are several embeddings, or none; or the threshold is out of range.
    """
    share = check_share(threshold, "neutral_threshold")
    if neutral_embedding is None:
        return None, share
    expected = f"neutral_embedding: expected one embedding [{embed_dim}] or [1, {embed_dim}]"
    if not isinstance(neutral_embedding, Tensor):
        kind, way = kind_of(neutral_embedding), _way_to_embed(neutral_embedding)
        raise InputError(f"{expected}, received {kind}; {way}")
    if neutral_embedding.numel() != embed_dim or neutral_embedding.shape[-1:] != (embed_dim,):
        raise InputError(f"{expected}, received {_shape(neutral_embedding)}")
    return neutral_embedding.reshape(1, -1), share


def cosines(
    image_features: Float[Tensor, "batch embed_dim"],
    text_embeddings: Tensor,
    image_index: Tensor | Sequence[int] | None,
) -> Tensor:
    """Compute cosine similarities of images and texts.

    Args:
        image_features: one row for each image.
        text_embeddings: as `as_ragged` takes them.
        image_index: as `as_ragged` takes it.

    Returns:
        [batch, prompts], or with `image_index` [prompts].

    Raises:
        InputError: shapes, dtypes, devices or indices do not fit.
    """
    features = _unit_features(image_features)
    if image_index is not None:
        prompts = as_ragged(image_features, text_embeddings, image_index)
        return (features[prompts.image_index] * prompts.unit_rows).sum(dim=-1)
    unit_rows = as_unit_rows(image_features, text_embeddings)
    if unit_rows.ndim == 2:
        return features @ unit_rows.T
    return (unit_rows @ features.unsqueeze(-1)).squeeze(-1)


def unit_row_cosines(
    image_features: Float[Tensor, "batch embed_dim"], unit_rows: Float[Tensor, "prompts embed_dim"]
) -> Float[Tensor, "batch prompts"]:
    """Compute `cosines` of rows that are known to be unit, so that nothing waits for their device."""
    return _unit_features(image_features) @ unit_rows.T


def _unit_features(image_features: Float[Tensor, "batch embed_dim"]) -> Float[Tensor, "batch embed_dim"]:
    return F.normalize(image_features.to(accumulation_dtype(image_features.dtype)), dim=-1)


def check_image_index(image_index: Any, text_embeddings: Tensor, batch: int) -> Int[Tensor, " prompts"]:
    """Return, for each prompt, the row of its image; lists and arrays of whole numbers are converted.

    Raises:
        InputError: the index does not have one row for each prompt, or names an image that does not exist.
    """
    index = as_index(image_index)
    if index is None or text_embeddings.ndim != 2 or index.shape != text_embeddings.shape[:1]:
        raise InputError(
            "image_index: expected text_embeddings [prompts, embed_dim] and image_index [prompts], "
            f"received {_shape(text_embeddings)} and {None if index is None else _shape(index)}"
        )
    check_rows_of_images(index, batch)
    return index.to(torch.int64)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _way_to_embed(value: Any) -> str:
    first = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(first, str):
        return "pass explainer.embed_text(texts)"
    return "pass torch.from_numpy(array)" if isinstance(value, np.ndarray) else "pass a tensor"
