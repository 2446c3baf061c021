"""Check that the modules of a vision tower compute what the closed form assumes.

A description (`legrad.families`) reads weights and settings from a tower's modules and computes with them
itself. This is the model's own computation only if each module has exactly a known type, and if nothing
changes its forward pass: no replaced method, no hook, no parametrization.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import timm.layers
import timm.models.eva
import timm.models.vision_transformer
import timm.models.vision_transformer_relpos
from open_clip import transformer
from open_clip.timm_model import TimmModel
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.drop import DropPath
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import LayerNorm, RmsNorm
from timm.layers.patch_dropout import PatchDropout
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_rel import RelPosBias, RelPosMlp
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from legrad.families.parts import NotCovered, class_name, qualified_name

# Skipped by the closed form, as they only act in training.
DROPOUTS: frozenset[type[nn.Module]] = frozenset(
    {nn.Dropout, DropPath, PatchDropout, transformer.PatchDropout}
    # from timm 1.0.20 on
    | {getattr(timm.layers, "PatchDropoutWithIndices", nn.Dropout)}
)
WRITTEN_OUT: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.Identity, nn.Linear, NonDynamicallyQuantizableLinear, nn.MultiheadAttention),
        *(nn.Sequential, nn.ModuleList, nn.LayerNorm, nn.RMSNorm, nn.Conv2d),
        *(transformer.VisionTransformer, transformer.Transformer, transformer.ResidualAttentionBlock),
        *(transformer.AttentionalPooler, transformer.LayerNorm, transformer.LayerNormFp32),
        *(transformer.LayerScale, TimmModel, PatchEmbed, HybridEmbed, Attention, AttentionRope),
        *(AttentionPoolLatent, LayerScale, LayerNorm, RmsNorm, Mlp, GluMlp, SwiGLU, GeGluMlp),
        *(RotaryEmbeddingCat, RelPosBias, RelPosMlp),
        timm.models.vision_transformer.VisionTransformer,
        timm.models.vision_transformer.Block,
        *(timm.models.eva.Eva, timm.models.eva.EvaBlock, timm.models.eva.EvaBlockPostNorm),
        timm.models.eva.EvaAttention,
        timm.models.vision_transformer_relpos.VisionTransformerRelPos,
        timm.models.vision_transformer_relpos.RelPosBlock,
        timm.models.vision_transformer_relpos.ResPostRelPosBlock,
        timm.models.vision_transformer_relpos.RelPosAttention,
    }
    | ({getattr(timm.layers.norm, "LayerNormFp32", nn.LayerNorm)})
)
PLAIN_WAY_OUT = "put the model's own module back in its place"
HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
GLOBAL_HOOKS = {
    "_global_forward_hooks": "forward hook",
    "_global_forward_pre_hooks": "forward pre-hook",
    "_global_backward_hooks": "backward hook",
    "_global_backward_pre_hooks": "backward pre-hook",
}


@dataclass(frozen=True)
class KnownModules:
    """The modules that the descriptions of a library's vision towers cover.

    Attributes:
        written_out: exact classes that the closed form computes itself.
        dropouts: exact classes that only act in training; the closed form skips them. Their names in a tower
            contain "drop".
        called: paths of the convolutions that embed patches: called by the closed form and never
            differentiated, so hooks on them act.
        called_with_children: path of a module that is called likewise, whatever it contains; or None.
        activations: names of activations in a tower: called too, and differentiated element by element;
            `legrad.families.faithful` tests those of unknown classes.
        idle_hooks: qualified names of hooks that the library itself leaves on modules, and that change
            nothing.
        same_as: activations with a fast derivative, by the exact class that computes the same.
    """

    written_out: frozenset[type[nn.Module]]
    called: tuple[str, ...]
    activations: tuple[str, ...]
    dropouts: frozenset[type[nn.Module]] = DROPOUTS
    called_with_children: str | None = None
    idle_hooks: frozenset[str] = frozenset()
    same_as: Mapping[type[nn.Module], nn.Module] = field(default_factory=dict)


IN_OPEN_CLIP = KnownModules(
    WRITTEN_OUT,
    called=("conv1", "trunk.patch_embed.proj"),
    activations=("gelu", "act", "bias_act"),
    called_with_children="trunk.patch_embed.backbone",
)


def written_out(visual: nn.Module, known: KnownModules = IN_OPEN_CLIP) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a vision tower that the closed form computes itself, each with its path."""
    called = known.called_with_children
    for path, module in visual.named_modules(remove_duplicate=False):
        is_within = called is not None and f"{path}.".startswith(f"{called}.")
        if path not in known.called and not is_within:
            yield path, module


def check_modules(visual: nn.Module, known: KnownModules = IN_OPEN_CLIP) -> None:
    """Raise `NotCovered` for a module that may compute something else than the closed form.

    The tower is not run. The message names the module, its class and the way out.
    """
    for path in known.called:
        called = _submodule(visual, path)
        if called is not None and type(called) not in (nn.Conv2d, nn.Identity):
            raise NotCovered("its patches are not made by a plain convolution", called)
    for path, module in written_out(visual, known):
        _check_type(path, module, known)
        check_nothing_hangs_on(module, known)
    for name, kind in GLOBAL_HOOKS.items():
        if hooks := getattr(torch_module, name, None):
            raise NotCovered(
                f"a {kind} is registered for all modules ({_names(hooks.values())}), which the explanation "
                "would ignore. Way out: remove it first, with its handle's `remove()`"
            )


@contextmanager
def located(roots: Mapping[str, nn.Module], known: KnownModules = IN_OPEN_CLIP) -> Iterator[None]:
    """Add to a `NotCovered` the path of the module that is not covered, and the way out if it is missing.

    Args:
        roots: the modules in which it is looked for, by their path in the model.
        known: the modules that are covered.
    """
    try:
        yield
    except NotCovered as reason:
        raise NotCovered(_with_place(reason, roots, known)) from None
    except AttributeError as error:  # a module was replaced by one without the expected attributes
        raise NotCovered(f"one of its modules lacks an expected attribute: {error}") from error


def _with_place(reason: NotCovered, roots: Mapping[str, nn.Module], known: KnownModules) -> str:
    if reason.module is None:
        return str(reason)
    paths = (
        ".".join(filter(None, (root, path)))
        for root, visual in roots.items()
        for path, module in visual.named_modules()
        if module is reason.module
    )
    place = next(paths, next(iter(roots)))
    where = ", ".join(filter(None, (place, f"a {qualified_name(type(reason.module))}")))
    named = f"{reason} ({where})"
    return named if "Way out" in named else f"{named}. Way out: {way_out(reason.module, known)}"


def _check_type(path: str, module: nn.Module, known: KnownModules) -> None:
    parts = path.split(".")
    if type(module) is nn.Identity or not {*known.activations}.isdisjoint(parts):
        return
    if type(module) not in (known.dropouts if "drop" in parts[-1] else known.written_out):
        raise NotCovered(f"its {path} is {class_name(module)}, which may compute something else", module)


def check_nothing_hangs_on(module: nn.Module, known: KnownModules) -> None:
    """Raise `NotCovered` for a replaced method, a hook, parametrized weights or quantised parameters."""
    if parametrize.is_parametrized(module):
        raise NotCovered(f"{class_name(module)} has parametrized weights", module)
    if "_hf_hook" in vars(module):
        raise NotCovered(
            "accelerate has placed it on a device of its own choice (`device_map`) and replaced its "
            "`forward`. Way out: load the model without `device_map`, or call "
            "`accelerate.hooks.remove_hook_from_submodules(model)` first",
            module,
        )
    own = [key for key in vars(module) if callable(getattr(type(module), key, None))]
    if own:
        raise NotCovered(
            f"its method `{own[0]}` was replaced on the module itself, which the explanation would ignore. "
            f"Way out: remove it first (`del module.{own[0]}`)",
            module,
        )
    for name, kind in HOOKS.items():
        if hooks := acting_hooks(getattr(module, name), known):
            raise NotCovered(
                f"a {kind} is registered ({_names(hooks)}), which the explanation would ignore. Way out: "
                "remove it first, with its handle's `remove()`, or with remove_weight_norm, "
                "remove_spectral_norm or prune.remove of torch.nn.utils",
                module,
            )
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) not in (nn.Parameter, Tensor):
            raise NotCovered(
                f"its {name} is a {qualified_name(type(parameter))}, not a plain tensor. Way out: explain "
                "the model before its weights are quantised or distributed",
                module,
            )


def acting_hooks(hooks: Mapping[int, object], known: KnownModules) -> list[object]:
    """Return the hooks of a module that may change what it computes."""
    return [hook for hook in hooks.values() if _name(hook) not in known.idle_hooks]


def _names(hooks: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(_name, hooks)))


def _name(hook: object) -> str:
    return qualified_name(hook if hasattr(hook, "__qualname__") else type(hook))


def _submodule(visual: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = visual
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def way_out(module: nn.Module, known: KnownModules = IN_OPEN_CLIP) -> str:
    """Say what to do about a module of a class that is not covered."""
    kinds = [qualified_name(kind).lower() for kind in type(module).__mro__]
    if "_orig_mod" in module._modules:
        return "it was compiled with torch.compile: use its `_orig_mod` instead"
    if parametrize.is_parametrized(module):
        return "bake the weights in first (`torch.nn.utils.parametrize.remove_parametrizations`)"
    if any("lora" in kind or kind.startswith("peft.") for kind in kinds) or hasattr(
        module, "merge_and_unload"
    ):
        return (
            "merge the adapter into the weights first (`model.merge_and_unload()` in peft; otherwise replace "
            "it by a plain layer with the merged weights)"
        )
    if "module" in module._modules:
        return "it wraps the model: use its `model.module` instead"
    plain = next((kind for kind in type(module).__mro__ if kind in known.written_out | known.dropouts), None)
    if plain is not None and plain is not type(module):
        return f"replace it by a {qualified_name(plain)} with the same weights, if its forward is the same"
    return PLAIN_WAY_OUT
