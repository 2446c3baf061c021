"""Verify that the description of a model computes what the model computes, and notice later changes of it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from jaxtyping import Float
from open_clip.transformer import QuickGELU
from timm.layers import activations
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from legrad.errors import LeGradError, UnsupportedModelError
from legrad.families import describe_source
from legrad.families.modules import (
    GLOBAL_HOOKS,
    HOOKS,
    KnownModules,
    acting_hooks,
    way_out,
    written_out,
)
from legrad.families.parts import qualified_name
from legrad.families.source import Source
from legrad.memory import is_out_of_memory
from legrad.method.stages import Activation, Norm
from legrad.method.towers import Tower
from legrad.method.trace import Trace, trace_images

# Largest distance of unit features. The structural check comes first, so remaining differences are large;
# float32 allows for TF32, which the model's own pass may use, half precision for deep towers.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Tokens are not normalised, so rounding adds up to more than in unit features.
TOKEN_SLACK = 5
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


def describe_model(source: Source) -> Tower:
    """Describe the vision tower of a model, and verify that the description matches the model.

    The classes of its modules are compared with those that are covered. Then one seeded image of noise, of
    the tower's own size, is encoded both by the model itself and by the closed form, which costs two
    forward passes of one image; features and the tokens after every block are compared. The derivatives of
    norms and activations are compared with those of autograd. For a tower on the meta device, or one whose
    features are not finite, only the classes are compared. The model is not changed.

    Raises:
        UnsupportedModelError: description and model differ; the message names the module, its class, and the
            way out.
    """
    tower = describe_source(source)
    _check_entry(source)
    if not any(tensor.is_meta for tensor in (*source.visual.parameters(), *source.visual.buffers())):
        with _as_if_evaluated(source):
            _check_activations(source, tower)
            _check_features(source, tower)
            _check_derivatives(source)
    return tower


def _check_entry(source: Source) -> None:
    names, functions = source.entry
    model = source.model
    own = [name for name in names if name in vars(model)]
    changed = getattr(type(model), names[0], None) not in functions
    if own or changed:
        kinds = " or ".join(dict.fromkeys(qualified_name(function) for function in functions))
        raise UnsupportedModelError(
            f"{qualified_name(type(model))}: expected a model whose `{names[0]}` is {kinds}, received a "
            f"replaced one. Way out: {way_out(model, source.known)}, or explain the {source.library} model "
            "inside"
        )


def _check_features(source: Source, tower: Tower) -> None:
    parameter = tower.parameter()
    noise = torch.randn(1, 3, *tower.native_size, generator=_seeded(), device="cpu")
    images = noise.to(parameter.device, parameter.dtype)
    name = qualified_name(type(source.model))
    own = _own_pass(source, images, is_unit=tower.own.is_unit)
    if not bool(own.features.isfinite().all()):
        return
    try:
        received = _closed_form(tower, images)
    except LeGradError:
        raise
    except Exception as error:  # a module that does not match its description may raise anything
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{name}: the model encodes an image, its description does not "
            f"({type(error).__name__}: {error}). Way out: put the model's own modules back"
        ) from error
    tolerance = TOLERANCES.get(parameter.dtype, max(TOLERANCES.values()))
    distance = _relative_distance(own.features, received.image_features)
    block = _first_different_block(own, received, TOKEN_SLACK * tolerance)
    if distance <= tolerance and block is None:
        return
    tokens_only = distance <= tolerance
    what = "tokens differ" if tokens_only else f"features differ by {distance:.2g} (limit {tolerance:g})"
    tower_name = f"{source.visual_path or 'the model'}, a {qualified_name(type(source.visual))}"
    raise UnsupportedModelError(
        f"{name}: for a test image, the model's own {what} from those that would be explained. They first "
        f"differ in {block or f'outside of its blocks, in {tower_name}'}. A module does not compute what its "
        f"class defines. Way out: {source.expected}"
    )


def _closed_form(tower: Tower, images: Tensor) -> Trace:
    height, width = (cells * tower.patch_size for cells in tower.native_grid)
    return trace_images(tower, images[..., :height, :width], len(tower.blocks), tower.own)


@dataclass(frozen=True)
class _OwnPass:
    """What the model itself computes for an image.

    Attributes:
        features: one row; of unit length, except the logits of a classifier.
        blocks: path, module and output tokens of each block, in the order in which they ran.
    """

    features: Float[Tensor, "1 embed_dim"]
    blocks: list[tuple[str, nn.Module, Tensor]]


def _own_pass(source: Source, images: Tensor, *, is_unit: bool) -> _OwnPass:
    dtypes = {parameter.dtype for parameter in source.visual.parameters()}
    # In half precision open_clip keeps some parameters in float32, and dtypes do not always match.
    autocast = len(dtypes) > 1 and images.dtype in (torch.float16, torch.bfloat16)
    # The first path of a block that is used at several places.
    paths = {source.model.get_submodule(path): path for path in reversed(source.block_paths())}
    outputs: list[tuple[str, nn.Module, Tensor]] = []

    def keep(block: nn.Module, _inputs: object, output: Any) -> None:
        outputs.append((paths[block], block, output[0] if isinstance(output, tuple) else output))

    handles = [block.register_forward_hook(keep) for block in paths]
    try:
        with torch.autocast(images.device.type, dtype=images.dtype if autocast else None, enabled=autocast):
            features = source.own_features(images)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{qualified_name(type(source.model))}: the model itself cannot encode an image [1, 3, "
            f"{images.shape[2]}, {images.shape[3]}] of {images.dtype} ({type(error).__name__}: {error}). "
            f"Way out: {source.expected}, on one device, in one precision"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return _OwnPass(F.normalize(features, dim=-1) if is_unit else features, outputs)


def _first_different_block(own: _OwnPass, received: Trace, tolerance: float) -> str | None:
    """Name the first block after which the tokens of the model's own pass differ from the closed form."""
    for (path, block, tokens), layer in zip(own.blocks, received.layers, strict=False):
        others = layer.block_outputs
        batch_first = tokens if tokens.shape == others.shape else tokens.transpose(0, 1)
        if batch_first.shape != others.shape or not _relative_distance(batch_first, others) <= tolerance:
            return f"{path}, a {qualified_name(type(block))}"
    return None


def _relative_distance(tensor: Tensor, other: Tensor) -> float:
    return float((tensor - other).norm() / tensor.norm().clamp(min=torch.finfo(tensor.dtype).tiny))


def _check_derivatives(source: Source) -> None:
    """Raise an error for a class whose derivative is not the one that its `forward` has.

    One module of each class is checked: its class may have been changed since it was defined.
    """
    parameter = next(source.visual.parameters())
    one_of_each = {type(module): (path, module) for path, module in written_out(source.visual, source.known)}
    for kind, (path, module) in one_of_each.items():
        if isinstance(module, nn.GELU | QuickGELU) or kind in source.known.same_as:
            stage = Activation(source.known.same_as.get(kind, module))
            is_own = _has_derivative(module, stage, parameter.new_empty(1, 5, 16))
        elif isinstance(module, nn.LayerNorm):
            is_own = _has_derivative(
                module, Norm(module), module.weight.new_empty(1, 5, *module.normalized_shape)
            )
        else:
            continue
        if not is_own:
            raise UnsupportedModelError(
                f"{type(source.model).__name__}: {_in_model(source, path)}, a {qualified_name(kind)}, has "
                "another derivative than its class defines: its `forward` was replaced. Way out: restore it"
            )


def _check_activations(source: Source, tower: Tower) -> None:
    """Raise an error for an activation of an unknown class that does not act on each element separately."""
    parameter = tower.parameter()
    for path, module in written_out(source.visual, source.known):
        is_activation = path.rpartition(".")[2] in source.known.activations
        if not is_activation or type(module) in _ELEMENTWISE:
            continue
        if reason := _why_not_elementwise(module, parameter):
            raise UnsupportedModelError(
                f"{type(source.model).__name__}: {_in_model(source, path)}, a "
                f"{qualified_name(type(module))}, {reason}. Way out: {way_out(module, source.known)}"
            )


def _in_model(source: Source, path: str) -> str:
    return ".".join(filter(None, (source.visual_path, path)))


def _has_derivative(module: nn.Module, stage: Activation | Norm, like: Tensor) -> bool:
    """Test whether a stage's derivative of a module is the one that autograd computes."""
    generator = _seeded()
    inputs, gradients = (
        torch.randn(like.shape, generator=generator, device="cpu").to(like) for _ in range(2)
    )
    received = stage.pullback(inputs, like.dtype)(gradients, slice(None))
    with torch.inference_mode(False), torch.enable_grad():
        # Parameters and inputs that were made in inference mode cannot be differentiated, copies can.
        leaf = inputs.clone().requires_grad_()
        parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
        outputs = torch.func.functional_call(module, parameters, (leaf,))
        (expected,) = torch.autograd.grad(outputs, leaf, gradients.clone(), allow_unused=True)
    return expected is not None and _relative_distance(expected, received) <= TOLERANCES[like.dtype]


def _why_not_elementwise(activation: nn.Module, like: Tensor) -> str | None:
    """Return why an output depends on more than its own input, or None; copies are called."""
    generator = _seeded()
    inputs = torch.randn(2, 3, 16, generator=generator, device="cpu").to(like.device, like.dtype)
    places = torch.randperm(inputs.numel(), generator=generator, device="cpu").to(like.device)[:40]
    evaluated, training = copy.deepcopy(activation), copy.deepcopy(activation)
    _train(training, True)
    try:
        outputs = evaluated(inputs.clone())
        others = training(inputs.flatten()[places].reshape(1, 5, 8).clone())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as it is foreign, it may raise anything
        return f"does not take inputs of any shape ({type(error).__name__}: {error})"
    state, *states = (module.state_dict() for module in (activation, evaluated, training))
    if not all(torch.equal(state[name], other[name]) for other in states for name in state):
        return "changes its own state when it is called"
    if outputs.shape == inputs.shape and others.shape == (1, 5, 8):
        slack = 8 * torch.finfo(like.dtype).eps
        received, expected = others.flatten(), outputs.flatten()[places]
        if torch.allclose(received, expected, rtol=slack, atol=slack, equal_nan=True):
            return None
    return "does not act on each element separately, or acts differently in training"


def _seeded() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _train(module: nn.Module, mode: bool) -> None:
    for part in module.modules():
        part.training = mode


@contextmanager
def _as_if_evaluated(source: Source) -> Iterator[None]:
    """Disable gradients, dropout, autocast and compilation, then restore flags and random state."""
    flags = {module: module.training for module in source.visual.modules()}
    device = next(source.visual.parameters()).device
    compiled = any(module._compiled_call_impl is not None for module in flags)
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.random.fork_rng(cuda), eager:
            _train(source.visual, False)
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

    def has_hooks(self, known: KnownModules) -> bool:
        hooks = map(vars(self.module).__getitem__, HOOKS)
        return any(of_kind and acting_hooks(of_kind, known) for of_kind in hooks)

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
    called: tuple[tuple[nn.Module, type[nn.Module], tuple[nn.Module, ...]], ...]
    parts: tuple[_Part, ...]
    classes: tuple[tuple[type, dict[str, object]], ...]
    known: KnownModules

    @classmethod
    def of(cls, source: Source) -> "Snapshot":
        """Record the state of a model."""
        roots = (source.visual, *source.others.values())
        parts = tuple(
            _Part.of(module)
            for module in dict.fromkeys(
                module for root in roots for _, module in written_out(root, source.known)
            )
        )
        own = {part.module for part in parts}
        called = tuple(
            (module, type(module), tuple(module.children()))
            for module in source.visual.modules()
            if module not in own
        )
        kinds = dict.fromkeys(kind for part in parts for kind in part.kind.__mro__ if kind is not object)
        kinds |= dict.fromkeys(kind for kind in type(source.model).__mro__ if kind is not object)
        return cls(
            hash(tuple(id(part.module) for part in parts)),
            _Part.of(source.model),
            called,
            parts,
            tuple((kind, dict(vars(kind))) for kind in kinds),
            source.known,
        )

    def is_of(self, model: nn.Module) -> bool:
        """Return whether a model is still in this state, so that its description is still valid."""
        return (
            model is self.model.module
            and not any(_GLOBAL_HOOKS)
            and self.model.is_as_it_was()
            and all(part.is_as_it_was() and not part.has_hooks(self.known) for part in self.parts)
            and all(
                type(module) is kind and tuple(module.children()) == children
                for module, kind, children in self.called
            )
            and all(_is_same_class(kind, names) for kind, names in self.classes)
        )


def _is_same_class(kind: type, names: dict[str, object]) -> bool:
    now = vars(kind)
    return len(now) == len(names) and all(map(is_, now.values(), names.values()))
