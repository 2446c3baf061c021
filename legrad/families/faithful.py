"""Whether the closed form computes what a model computes: by its modules, and by one image run both ways."""

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
from legrad.families.modules import ACTIVATION_NAMES, way_out, written_out
from legrad.families.parts import qualified_name
from legrad.method.towers import Tower
from legrad.method.trace import trace_images

# Of unit features. The structural check comes first, so that what is left to find is no matter of last bits;
# float32 leaves room for TF32, the others for deep towers.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Those of open_clip's models as they were imported: `visual`, and nothing after it but a normalisation.
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

_GLOBAL_HOOKS: tuple[Any, ...] = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_UNKNOWN = object()


def describe_model(model: nn.Module) -> Tower:
    """Describe the vision tower of an open_clip model, and make sure that the description is the model.

    The classes of its modules are compared with those that are covered, and one seeded image of noise, of
    the tower's own size, is encoded both by `model.encode_image` and by the closed form. That costs two
    forward passes of one image, once. A tower without values, on the meta device, is judged by its classes
    alone; so is one whose own features are not finite. The model is left bit for bit as it was.

    Raises:
        UnsupportedModelError: names the module, its class, and the way out.
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
            f"CustomTextCLIP or CoCa, received one of its own. Way out: {way_out(model)}, or explain the "
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
    except Exception as error:  # whatever a module that is not as described can raise
        raise UnsupportedModelError(
            f"{qualified_name(type(model))}: the model encodes an image, its description does not "
            f"({type(error).__name__}: {error}). Way out: put the model's own modules back"
        ) from error
    distance = float((received.to(own.dtype) - own).norm())
    tolerance = TOLERANCES.get(parameter.dtype, max(TOLERANCES.values()))
    if not distance <= tolerance:
        raise UnsupportedModelError(
            f"{qualified_name(type(model))}: the model's own features of a test image are {distance:.2g} "
            f"away from those that would be explained, and the limit is {tolerance:g}; "
            f"{_first_difference(model, tower, images)}. Something in it computes otherwise than its classes "
            "say. Way out: explain the model as open_clip.create_model makes it"
        )


def _closed_form(tower: Tower, images: Tensor, layers: int) -> Any:
    height, width = (cells * tower.patch_size for cells in tower.native_grid)
    return trace_images(tower, images[..., :height, :width], layers, tower.own)


def _own_features(model: Any, images: Tensor) -> Float[Tensor, "1 embed_dim"]:
    dtypes = {parameter.dtype for parameter in model.visual.parameters()}
    # What open_clip leaves in float32 does not always meet what it brings to half precision.
    autocast = len(dtypes) > 1 and images.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(images.device.type, dtype=images.dtype if autocast else None, enabled=autocast):
        features = model.encode_image(images)
    features = features[0] if isinstance(features, tuple) else features
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _first_difference(model: Any, tower: Tower, images: Tensor) -> str:
    """Say where the model's own pass leaves the closed form first."""
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
            return f"they part in {path}.{index}, a {qualified_name(type(block))}"
    return f"they part outside of its blocks, in visual, a {qualified_name(type(model.visual))}"


def _check_activations(model: Any, tower: Tower) -> None:
    """Refuse activations of classes not known here that are more than one function for every element."""
    parameter = tower.parameter()
    for path, module in written_out(model.visual):
        is_known = path.rpartition(".")[2] not in ACTIVATION_NAMES or type(module) in _ELEMENTWISE
        if not is_known and not _is_elementwise(module, parameter):
            raise UnsupportedModelError(
                f"{type(model).__name__}: visual.{path}, a {qualified_name(type(module))}, is no activation "
                f"that acts on each element alone, the same in training. Way out: {way_out(module)}"
            )


def _is_elementwise(activation: nn.Module, like: Tensor) -> bool:
    """Try whether elements in other places and another shape, in training and out of it, give the same."""
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
    """Run without gradients, dropout, autocast or compilation; flags and random state are put back."""
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
    """One module: its class, its children, and its plain attributes, which hold settings and own methods.

    Compared by identity, which is quick; the weights lie in dicts that stay.
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
    """The modules of a vision tower, their settings, hooks and classes, as they were.

    A comparison takes about a microsecond a module: no weight is read, and nothing is run.

    Attributes:
        identity: a number that other modules than these do not have.
    """

    identity: int
    model: _Part
    called: tuple[tuple[nn.Module, type[nn.Module]], ...]
    parts: tuple[_Part, ...]
    classes: tuple[tuple[type, dict[str, object]], ...]

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """Note what a model with a `visual` tower is made of."""
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
        """Whether a model is still made of the same, so that its description still holds."""
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
