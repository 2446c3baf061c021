"""Verify that the description of a model computes what the model computes, and notice later changes of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from jaxtyping import Float
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.transformer import QuickGELU
from timm.layers import activations
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from legrad.errors import LeGradError, UnsupportedModelError
from legrad.families import describe_tower
from legrad.families.modules import ACTIVATION_NAMES, GLOBAL_HOOKS, way_out, written_out
from legrad.families.parts import qualified_name
from legrad.method.towers import Tower
from legrad.method.trace import trace_images

# Largest distance of unit features. The structural check comes first, so remaining differences are large;
# float32 allows for TF32, half precision for deep towers.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# The original methods of open_clip's models, which apply `visual` and at most a normalisation.
_ENCODE_IMAGE: tuple[Callable[..., Any], ...] = (
    CLIP.encode_image,
    CustomTextCLIP.encode_image,
    CoCa.encode_image,
)
_ELEMENTWISE = (
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    QuickGELU,
    activations.GELU,
    activations.GELUTanh,
    activations.QuickGELU,
)

_GLOBAL_HOOKS = tuple(getattr(torch_module, name) for name in GLOBAL_HOOKS)
_UNKNOWN = object()


def describe_model(model: nn.Module) -> Tower:
    """Describe the vision tower of an open_clip model, and verify that the description matches the model.

    The classes of its modules are compared with those that are covered. Then one seeded image of noise, of
    the tower's own size, is encoded both by `model.encode_image` and by the closed form, which costs two
    forward passes of one image. For a tower on the meta device, or one whose features are not finite, only
    the classes are compared. The model is not changed.

    Raises:
        UnsupportedModelError: description and model differ; the message names the module, its class, and the
            way out.
    """
    tower = describe_tower(model)
    _check_encode_image(model)
    if not any(tensor.is_meta for tensor in (*model.visual.parameters(), *model.visual.buffers())):  # type: ignore[union-attr]
        with _as_if_evaluated(model):
            _check_activations(model, tower)
            _check_features(model, tower)
    return tower


def _check_encode_image(model: nn.Module) -> None:
    own = [name for name in ("encode_image", "_encode_image") if name in vars(model)]
    changed = getattr(type(model), "encode_image", None) not in _ENCODE_IMAGE
    if own or changed:
        raise UnsupportedModelError(
            f"{qualified_name(type(model))}: expected a model with the `encode_image` of open_clip's CLIP, "
            f"CustomTextCLIP or CoCa, received a replaced one. Way out: {way_out(model)}, or explain the "
            "open_clip model inside"
        )


def _check_features(model: Any, tower: Tower) -> None:
    parameter = tower.parameter()
    noise = torch.randn(1, 3, *tower.native_size, generator=_seeded(), device="cpu")
    images = noise.to(parameter.device, parameter.dtype)
    own = _own_features(model, images)
    if not bool(own.isfinite().all()):
        return
    try:
        received = _closed_form(tower, images, 1).image_features
    except (LeGradError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a module that does not match its description may raise anything
        raise UnsupportedModelError(
            f"{qualified_name(type(model))}: the model encodes an image, its description does not "
            f"({type(error).__name__}: {error}). Way out: put the model's own modules back"
        ) from error
    distance = float((received.to(own.dtype) - own).norm())
    tolerance = TOLERANCES.get(parameter.dtype, max(TOLERANCES.values()))
    if not distance <= tolerance:
        raise UnsupportedModelError(
            f"{qualified_name(type(model))}: the model's own features of a test image differ by "
            f"{distance:.2g} from those that would be explained; the limit is {tolerance:g}; "
            f"{_first_difference(model, tower, images)}. A module does not compute what its class defines. "
            "Way out: explain the model that open_clip.create_model returns"
        )


def _closed_form(tower: Tower, images: Tensor, layers: int) -> Any:
    height, width = (cells * tower.patch_size for cells in tower.native_grid)
    return trace_images(tower, images[..., :height, :width], layers, tower.own)


def _own_features(model: Any, images: Tensor) -> Float[Tensor, "1 embed_dim"]:
    dtypes = {parameter.dtype for parameter in model.visual.parameters()}
    # In half precision open_clip keeps some parameters in float32, and dtypes do not always match.
    autocast = len(dtypes) > 1 and images.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(images.device.type, dtype=images.dtype if autocast else None, enabled=autocast):
        features = model.encode_image(images)
    features = features[0] if isinstance(features, tuple) else features
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _first_difference(model: Any, tower: Tower, images: Tensor) -> str:
    """Name the first module in which the model's own pass differs from the closed form."""
    trunk, path = (
        (model.visual.trunk, "visual.trunk.blocks")
        if hasattr(model.visual, "trunk")
        else (model.visual.transformer, "visual.transformer.resblocks")
    )
    blocks = list(trunk.blocks if hasattr(trunk, "blocks") else trunk.resblocks)
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for block in blocks]
    try:
        _own_features(model, images)
    finally:
        for handle in handles:
            handle.remove()
    expected = [layer.block_outputs for layer in _closed_form(tower, images, len(blocks)).layers]
    tolerance = TOLERANCES.get(images.dtype, 1.0)
    for index, (block, own, other) in enumerate(zip(blocks, outputs, expected, strict=False)):
        if own.shape != other.shape or float((own - other).norm() / own.norm()) > tolerance:
            return f"they first differ in {path}.{index}, a {qualified_name(type(block))}"
    return f"they differ outside of its blocks, in visual, a {qualified_name(type(model.visual))}"


def _check_activations(model: Any, tower: Tower) -> None:
    """Raise an error for an activation of an unknown class that does not act on each element separately."""
    parameter = tower.parameter()
    for path, module in written_out(model.visual):
        is_known = path.rpartition(".")[2] not in ACTIVATION_NAMES or type(module) in _ELEMENTWISE
        if not is_known and not _is_elementwise(module, parameter):
            raise UnsupportedModelError(
                f"{type(model).__name__}: visual.{path}, a {qualified_name(type(module))}, does not act on "
                f"each element separately, or acts differently in training. Way out: {way_out(module)}"
            )


def _is_elementwise(activation: nn.Module, like: Tensor) -> bool:
    """Test whether the output for an element depends on its position, on the shape, or on training mode."""
    generator = _seeded()
    inputs = torch.randn(2, 3, 16, generator=generator, device="cpu").to(like.device, like.dtype)
    places = torch.randperm(inputs.numel(), generator=generator, device="cpu").to(like.device)[:40]
    outputs = activation(inputs.clone())
    _train(activation, True)
    others = activation(inputs.flatten()[places].reshape(1, 5, 8).clone())
    _train(activation, False)
    if outputs.shape != inputs.shape or others.shape != (1, 5, 8):
        return False
    slack = 8 * torch.finfo(like.dtype).eps
    return torch.allclose(outputs.flatten()[places], others.flatten(), rtol=slack, atol=slack, equal_nan=True)


def _seeded() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _train(module: nn.Module, mode: bool) -> None:
    for part in module.modules():
        part.training = mode


@contextmanager
def _as_if_evaluated(model: Any) -> Iterator[None]:
    """Disable gradients, dropout, autocast and compilation, then restore flags and random state."""
    flags = {module: module.training for module in model.visual.modules()}
    device = next(model.visual.parameters()).device
    compiled = any(module._compiled_call_impl is not None for module in flags)
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.random.fork_rng(cuda), eager:
            _train(model.visual, False)
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@dataclass(frozen=True)
class _Part:
    """One module with its class, children and plain attributes, which include settings and replaced methods.

    Attributes are compared by identity, which is fast; weights are in dicts that remain the same objects.
    """

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, object]
    values: tuple[object, ...]
    children: tuple[nn.Module | None, ...]

    @classmethod
    def of(cls, module: nn.Module) -> "_Part":
        attributes = dict(vars(module))
        return cls(
            module, type(module), attributes, tuple(attributes.values()), tuple(module._modules.values())
        )

    def is_as_it_was(self) -> bool:
        now = vars(self.module)
        children = now["_modules"].values()
        return (
            type(self.module) is self.kind
            and len(now) == len(self.values)
            and (all(map(is_, now.values(), self.values)) or self._differs_in_training_alone(now))
            and len(children) == len(self.children)
            and all(map(is_, children, self.children))
        )

    def has_hooks(self) -> bool:
        now = vars(self.module)
        return bool(
            now["_forward_hooks"]
            or now["_forward_pre_hooks"]
            or now["_backward_hooks"]
            or now["_backward_pre_hooks"]
        )

    def _differs_in_training_alone(self, now: dict[str, object]) -> bool:
        then = self.attributes
        return all(value is then.get(name, _UNKNOWN) or name == "training" for name, value in now.items())


@dataclass(frozen=True)
class Snapshot:
    """State of the modules of a vision tower, except weights: settings, hooks and classes.

    A comparison takes about a microsecond per module: no weight is read, and nothing is run.

    Attributes:
        identity: number that identifies these modules.
    """

    identity: int
    model: _Part
    called: tuple[tuple[nn.Module, type[nn.Module]], ...]
    parts: tuple[_Part, ...]
    classes: tuple[tuple[type, dict[str, object]], ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """Record the state of a model with a `visual` tower."""
        visual: Any = model.visual
        parts = tuple(
            _Part.of(module) for module in dict.fromkeys(module for _, module in written_out(visual))
        )
        own = {part.module for part in parts}
        called = tuple((module, type(module)) for module in visual.modules() if module not in own)
        kinds = dict.fromkeys(kind for part in parts for kind in part.kind.__mro__ if kind is not object)
        kinds |= dict.fromkeys(kind for kind in type(model).__mro__ if kind is not object)
        return cls(
            hash(tuple(id(part.module) for part in parts)),
            _Part.of(model),
            called,
            parts,
            tuple((kind, dict(vars(kind))) for kind in kinds),
        )

    def is_of(self, model: nn.Module) -> bool:
        """Return whether a model is still in this state, so that its description is still valid."""
        return (
            model is self.model.module
            and not any(_GLOBAL_HOOKS)
            and self.model.is_as_it_was()
            and all(part.is_as_it_was() and not part.has_hooks() for part in self.parts)
            and all(type(module) is kind for module, kind in self.called)
            and all(_is_same_class(kind, names) for kind, names in self.classes)
        )


def _is_same_class(kind: type, names: dict[str, object]) -> bool:
    now = vars(kind)
    return len(now) == len(names) and all(map(is_, now.values(), names.values()))
