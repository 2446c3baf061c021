"""Check that the modules of a vision tower compute what the closed form assumes.

A description (`legrad.families`) reads weights and settings from a tower's modules and computes with them
itself. This is the model's own computation only if each module has exactly a known type, and if nothing
changes its forward pass: no replaced method, no hook, no parametrization.
"""

from collections.abc import Iterator

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
# Modules that embed patches: called by the closed form and never differentiated, so hooks on them act.
_CALLED = ("conv1", "trunk.patch_embed.proj")
_CALLED_WITH_CHILDREN = "trunk.patch_embed.backbone"
# Activations: called too, and differentiated element by element; `legrad.families.faithful` tests those of
# unknown types.
ACTIVATION_NAMES = ("gelu", "act", "bias_act")
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


def written_out(visual: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a vision tower that the closed form computes itself, each with its path."""
    for path, module in visual.named_modules(remove_duplicate=False):
        if path not in _CALLED and not f"{path}.".startswith(f"{_CALLED_WITH_CHILDREN}."):
            yield path, module


def check_modules(visual: nn.Module) -> None:
    """Raise `NotCovered` for a module that may compute something else than the closed form.

    The tower is not run. The message names the module, its class and the way out.
    """
    for path in _CALLED:
        called = _submodule(visual, path)
        if called is not None and type(called) not in (nn.Conv2d, nn.Identity):
            raise NotCovered("its patches are not made by a plain convolution", called)
    for path, module in written_out(visual):
        _check_type(path, module)
        _check_nothing_hangs_on(module)
    for name, kind in GLOBAL_HOOKS.items():
        if hooks := getattr(torch_module, name, None):
            raise NotCovered(
                f"a {kind} is registered for all modules ({_names(hooks)}), which the explanation would "
                "ignore. Way out: remove it first, with its handle's `remove()`"
            )


def _check_type(path: str, module: nn.Module) -> None:
    parts = path.split(".")
    if type(module) is nn.Identity or not {*ACTIVATION_NAMES}.isdisjoint(parts):
        return
    known = DROPOUTS if "drop" in parts[-1] else WRITTEN_OUT
    if type(module) not in known:
        raise NotCovered(f"its {path} is {class_name(module)}, which may compute something else", module)


def _check_nothing_hangs_on(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        raise NotCovered(f"{class_name(module)} has parametrized weights", module)
    own = [key for key in vars(module) if callable(getattr(type(module), key, None))]
    if own:
        raise NotCovered(
            f"its method `{own[0]}` was replaced on the module itself, which the explanation would ignore. "
            f"Way out: remove it first (`del module.{own[0]}`)",
            module,
        )
    for name, kind in HOOKS.items():
        if hooks := getattr(module, name):
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


def _names(hooks: dict[int, object]) -> str:
    return ", ".join(
        dict.fromkeys(
            qualified_name(hook if hasattr(hook, "__qualname__") else type(hook)) for hook in hooks.values()
        )
    )


def _submodule(visual: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = visual
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def way_out(module: nn.Module) -> str:
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
    plain = next((kind for kind in type(module).__mro__ if kind in WRITTEN_OUT | DROPOUTS), None)
    if plain is not None and plain is not type(module):
        return f"replace it by a {qualified_name(plain)} with the same weights, if its forward is the same"
    return PLAIN_WAY_OUT
