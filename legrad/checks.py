"""Check options, images and traces of callers against the tower that they are for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from legrad.arguments import kind_of, sides_of
from legrad.errors import InputError
from legrad.images import Fit, ImageTransform
from legrad.layers import Layers
from legrad.method.affinity import Affinity
from legrad.method.towers import Scoring, Tower
from legrad.method.trace import Pool, Trace, in_words, pool_of


@dataclass(frozen=True)
class Options:
    """Options of an explainer, as the caller passed them; `legrad.LeGrad` describes them."""

    layers: Layers
    layer_weights: Sequence[float] | None
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
        height, width = sides_of(image_size, "image_size")
    return replace(own_transform, height=height, width=width, fit=check_fit(fit, tower), patch_size=patch)


def check_images(tower: Tower, images: Tensor, *, check_pixels: bool = True) -> None:
    """Raise an InputError if images do not fit the tower.

    Args:
        tower: description of the tower.
        images: preprocessed images of the caller.
        check_pixels: look for NaN and infinity, for which a GPU is waited for.
    """
    parameter = tower.parameter()
    if not isinstance(images, Tensor):
        raise InputError(
            f"images: expected a tensor [batch, 3, height, width] or a trace, received {kind_of(images)}; "
            "pass preprocess(images), with a list of PIL images, paths or arrays"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images: expected [batch, 3, height, width], received {list(images.shape)}")
    if images.dtype != parameter.dtype:
        raise InputError(
            f"images: expected {parameter.dtype}, as the model's weights, received {images.dtype}"
        )
    if images.device != parameter.device:
        raise InputError(
            f"images: expected device {parameter.device}, as the model, received {images.device}"
        )
    check_image_size(tower, images.shape[2], images.shape[3], "images")
    if check_pixels and images.numel() and not all(end.isfinite() for end in images.aminmax()):
        finite = images.isfinite()
        image = int((~finite).flatten(1).any(dim=1).nonzero()[0])
        count = int((~finite[image]).sum())
        raise InputError(
            f"images[{image}]: expected finite pixels, received {count} that are NaN or infinite"
        )


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


def check_trace(
    trace: Trace,
    tower: Tower,
    scoring: Scoring,
    *,
    structure: int,
    layers: Sequence[int],
    affinity: Affinity = "none",
) -> Trace:
    """Return a trace with the explained layers alone, if it was made by this tower for this scoring.

    Args:
        trace: encoded images.
        tower: description of the tower.
        scoring: how its layers are scored.
        structure: identity of the tower's modules.
        layers: indices of the explained blocks.
        affinity: what spreads the relevance, for which the trace must hold the keys.

    Raises:
        InputError: the trace was made by other modules, in another way, or is on another device.
    """
    if trace.structure not in (None, structure) or trace.image_features.shape[-1] != tower.embed_dim:
        raise InputError(
            "trace: made by another model, or before modules of this one were replaced; encode the "
            "images again"
        )
    parameter = tower.parameter()
    if trace.image_features.device != parameter.device:
        raise InputError(
            f"trace: expected device {parameter.device}, as the model, "
            f"received {trace.image_features.device}; pass trace.to({str(parameter.device)!r})"
        )
    if trace.image_features.dtype != parameter.dtype:
        raise InputError(
            f"trace: expected {parameter.dtype}, as the model's weights, "
            f"received {trace.image_features.dtype}; encode the images again"
        )
    if not set(layers) <= set(trace.layer_indices):
        raise InputError(
            f"trace: expected {in_words(layers)}, received {in_words(trace.layer_indices)}; "
            "encode the images with this explainer"
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
            f"received one made with pool={trace.pool!r}; pass the images instead of their trace"
        )
    return trace if trace.layer_indices == tuple(layers) else trace.only(layers)


def require_model(model: object, tokenizer: object) -> None:
    """Raise an InputError if a model is neither a module nor a state, or a tokenizer cannot be called."""
    if not isinstance(model, nn.Module | Mapping):
        way = (
            "legrad.LeGrad.from_open_clip(name, pretrained)" if isinstance(model, str) else "the model alone"
        )
        raise InputError(f"model: expected a torch module, received {kind_of(model)}; pass {way}")
    if tokenizer is not None and not callable(tokenizer):
        raise InputError(
            f"tokenizer: expected a callable, received {kind_of(tokenizer)}; pass "
            "open_clip.get_tokenizer(model_name)"
        )
