"""Check arguments of callers, and convert them to the form that the method computes with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from legrad.errors import InputError
from legrad.heatmaps import minmax_normalise
from legrad.images import Fit, ImageTransform
from legrad.method.affinity import Affinity
from legrad.method.stages import accumulation_dtype
from legrad.method.towers import Scoring, Tower
from legrad.method.trace import Pool, Trace, pool_of


@dataclass(frozen=True)
class Options:
    """Options of an explainer, as the caller passed them; `legrad.LeGrad` describes them."""

    layers: int | Literal["all"]
    pool: Pool
    affinity: Affinity
    image_size: int | tuple[int, int] | None
    fit: Fit

    def transform_for(self, tower: Tower, own_transform: ImageTransform) -> ImageTransform:
        """Return the preprocessing for a tower, given the model's own.

        Raises:
            InputError: `fit` is unknown, or the tower cannot take images of several sizes.
        """
        return fitted_transform(own_transform, tower, self.image_size, self.fit)


def fitted_transform(
    own_transform: ImageTransform, tower: Tower, image_size: int | tuple[int, int] | None, fit: Fit
) -> ImageTransform:
    """Return the preprocessing for a tower, given the model's own.

    Args:
        own_transform: the model's own preprocessing.
        tower: its vision tower.
        image_size: see `legrad.LeGrad`.
        fit: see `legrad.LeGrad`.

    Raises:
        InputError: `fit` is unknown, or the tower cannot take images of several sizes.
    """
    patch = tower.patch_size
    if image_size is None:
        # Some models are configured for sizes that their patches do not cover completely.
        own_size = (own_transform.height, own_transform.width)
        height, width = (side - side % patch for side in own_size)
    else:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return replace(own_transform, height=height, width=width, fit=check_fit(fit, tower), patch_size=patch)


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
    image_features: Float[Tensor, "batch embed_dim"], text_embeddings: Tensor, image_index: Tensor | None
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
        checked = _check_image_index(image_index, text_embeddings, batch).contiguous()
        one_by_one = checked.device.type == "cpu" and torch.equal(checked, torch.arange(batch))
        return RaggedPrompts(unit_rows, checked.to(device), (len(checked),), one_by_one)
    prompts = unit_rows.shape[-2]
    rows = unit_rows.expand(batch, -1, -1).flatten(0, 1)
    every_image = torch.arange(batch, device=device).repeat_interleave(prompts)
    return RaggedPrompts(rows, every_image, (batch, prompts), one_by_one=prompts == 1)


def check_images(tower: Tower, images: Tensor) -> None:
    """Raise an InputError if images do not fit the tower."""
    parameter = tower.parameter()
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images: expected [batch, 3, height, width], received {_shape(images)}")
    if images.dtype != parameter.dtype:
        raise InputError(
            f"images: expected {parameter.dtype}, as the model's weights, received {images.dtype}"
        )
    if images.device != parameter.device:
        raise InputError(
            f"images: expected device {parameter.device}, as the model, received {images.device}"
        )
    check_image_size(tower, images.shape[2], images.shape[3], "images")


def check_image_size(tower: Tower, height: int, width: int, where: str) -> None:
    """Raise an InputError if a size in pixels is not a whole number of patches, or the tower cannot take it.

    Args:
        tower: description of the tower.
        height: in pixels.
        width: in pixels.
        where: what has this size; the message begins with it.
    """
    patch = tower.patch_size
    if height < patch or width < patch or height % patch or width % patch:
        raise InputError(
            f"{where}: expected height and width as multiples of {patch}, received {height} x {width}"
        )
    native_height, native_width = (patch * cells for cells in tower.native_grid)
    if not tower.takes_any_grid and (height, width) != (native_height, native_width):
        raise InputError(
            f"{where}: the positions of this tower ({tower.family}) are bound to {native_height} x "
            f"{native_width} pixels, received {height} x {width}"
        )


def check_fit(fit: Fit, tower: Tower) -> Fit:
    """Return `fit` if the tower supports it; otherwise raise an InputError."""
    if fit not in ("stretch", "keep"):
        raise InputError(f"fit: expected 'stretch' or 'keep', received {fit!r}")
    if fit == "keep" and not tower.takes_any_grid:
        raise InputError(f"fit='keep': the positions of this tower ({tower.family}) are bound to one size")
    return fit


def common_input_size(transform: ImageTransform, images: Sequence[Image.Image]) -> tuple[int, int]:
    """Return the (height, width) that all images are resized to; raise an InputError if there are several."""
    sizes = {transform.input_size(image.height, image.width) for image in images}
    if len(sizes) > 1:
        raise InputError(
            "images: expected images of one input size, as a batch is one tensor; with fit='keep' these get "
            + ", ".join(f"{height} x {width}" for height, width in sorted(sizes))
        )
    return sizes.pop() if sizes else (transform.height, transform.width)


def check_layers(layers: int | Literal["all"], tower: Tower) -> int:
    """Return the number of blocks to explain; raise an InputError if the tower does not have them."""
    available = len(tower.blocks)
    if layers == "all":
        return available
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= available:
        raise InputError(f"layers: expected 'all' or a number from 1 to {available}, received {layers!r}")
    return layers


def check_pool(pool: str) -> Literal["reference", "model"]:
    """Return `pool` if it is a public choice; otherwise raise an InputError."""
    if pool not in ("reference", "model"):
        raise InputError(f"pool: expected 'reference' or 'model', received {pool!r}")
    return "reference" if pool == "reference" else "model"


def check_affinity(affinity: str) -> Affinity:
    """Return `affinity` if it is a choice; otherwise raise an InputError."""
    if affinity not in ("none", "keys"):
        raise InputError(f"affinity: expected 'none' or 'keys', received {affinity!r}")
    return "keys" if affinity == "keys" else "none"


def check_resize(resize: str) -> None:
    """Raise an InputError if `resize` is not a public choice."""
    if resize not in ("exact", "fast"):
        raise InputError(f"resize: expected 'exact' or 'fast', received {resize!r}")


def neutral_patches(
    neutral_grids: Float[Tensor, "batch 1 grid_height grid_width"], threshold: float
) -> Bool[Tensor, "batch grid_height grid_width"]:
    """Mark the patches where the min-max normalised map of a neutral text exceeds a threshold.

    Args:
        neutral_grids: raw relevance of the neutral text for each image.
        threshold: from 0 to 1.

    Raises:
        InputError: the threshold is out of range.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"neutral_threshold: expected a value from 0 to 1, received {threshold!r}")
    return minmax_normalise(neutral_grids)[:, 0] > threshold


def as_unit_rows(features: Float[Tensor, "batch embed_dim"], text_embeddings: Tensor) -> Tensor:
    """Normalise text embeddings to unit length, in float32 or float64.

    Args:
        features: features of the images, or a tensor of the same shape, dtype and device.
        text_embeddings: [batch, prompts, embed_dim] or [prompts, embed_dim].

    Raises:
        InputError: shape, dtype or device do not fit.
    """
    embed_dim = features.shape[-1]
    if text_embeddings.ndim not in (2, 3) or text_embeddings.shape[-1] != embed_dim:
        raise InputError(
            f"text_embeddings: expected [batch, prompts, {embed_dim}] or [prompts, {embed_dim}], "
            f"received {_shape(text_embeddings)}"
        )
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
    rows = text_embeddings.detach().to(accumulation_dtype(features.dtype))
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    if not bool(((lengths > 0) & lengths.isfinite()).all()):
        raise InputError("text_embeddings: expected rows of finite length above zero, received others")
    return rows.div(lengths)


def cosines(
    image_features: Float[Tensor, "batch embed_dim"], text_embeddings: Tensor, image_index: Tensor | None
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


def check_trace(
    trace: Trace, tower: Tower, scoring: Scoring, structure: int, affinity: Affinity = "none"
) -> Trace:
    """Return a trace if it was made by this tower for this scoring; otherwise raise an InputError.

    Args:
        trace: encoded images.
        tower: description of the tower.
        scoring: how its layers are scored.
        structure: identity of the tower's modules.
        affinity: what spreads the relevance, for which the trace must hold the keys.
    """
    if trace.structure not in (None, structure):
        raise InputError(
            "trace: made by another model, or before modules of this one were replaced; encode the "
            "images again"
        )
    if affinity == "keys" and trace.unit_keys is None:
        raise InputError(
            "trace: expected one with the keys of the last blocks, for affinity='keys'; encode the images "
            "with this explainer"
        )
    expected = pool_of(tower, scoring)
    # Without a pooler a trace is the same for every way of scoring.
    if scoring.pooler is not None and trace.pool != expected:
        raise InputError(
            f"trace: expected one made with pool={expected!r}, as this tower pools by attention, "
            f"received one made with pool={trace.pool!r}"
        )
    return trace


def _check_image_index(image_index: Tensor, text_embeddings: Tensor, batch: int) -> Tensor:
    if text_embeddings.ndim != 2 or image_index.shape != text_embeddings.shape[:1]:
        raise InputError(
            "image_index: expected text_embeddings [prompts, embed_dim] and image_index [prompts], "
            f"received {_shape(text_embeddings)} and {_shape(image_index)}"
        )
    if image_index.is_floating_point() or image_index.is_complex() or image_index.dtype == torch.bool:
        raise InputError(f"image_index: expected an integer dtype, received {image_index.dtype}")
    if not len(image_index):
        return image_index.to(torch.int64)
    lowest, highest = (int(extreme) for extreme in image_index.aminmax())
    if lowest < 0 or highest >= batch:
        raise InputError(f"image_index: expected rows from 0 to {batch - 1}, received {lowest} to {highest}")
    return image_index.to(torch.int64)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
