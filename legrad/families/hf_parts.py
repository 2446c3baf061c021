"""Describe parts that the vision towers of several models of Hugging Face transformers share."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.activations import GELUActivation, GELUTanh, QuickGELUActivation

from legrad.families.modules import KnownModules
from legrad.families.parts import NotCovered, check_affine_norm, class_name
from legrad.method.stages import Activation, Linear, Norm, Stage
from legrad.method.towers import Block, QueriesKeysValues

# Activations of transformers that are those of torch and open_clip, with derivatives in one pass over memory.
SAME_AS: Mapping[type[nn.Module], nn.Module] = {
    QuickGELUActivation: QuickGELU(),
    GELUActivation: nn.GELU(),
    GELUTanh: nn.GELU(approximate="tanh"),
}
_TORCH = (nn.Identity, nn.Linear, nn.LayerNorm, nn.ModuleList, nn.MultiheadAttention, nn.Dropout)
# What transformers itself leaves on modules that were asked for hidden states; it only keeps outputs.
_CAPTURING = "transformers.utils.output_capturing.install_output_capuring_hook.<locals>.output_capturing_hook"


def known_modules(*own: type[nn.Module]) -> KnownModules:
    """Return the modules that the description of a tower covers, given the classes of its library file."""
    return KnownModules(
        frozenset({*_TORCH, NonDynamicallyQuantizableLinear, *own}),
        called=(),
        activations=("activation_fn",),
        called_with_children="embeddings",
        idle_hooks=frozenset({_CAPTURING}),
        same_as=SAME_AS,
    )


def native_size(visual: Any) -> tuple[int, int]:
    """Return height and width in pixels of the images that a tower was trained with; they are square."""
    embeddings = visual.embeddings
    if hasattr(embeddings, "position_embedding_size"):  # patches of any image, cut by the caller
        side = int(embeddings.position_embedding_size) * int(embeddings.patch_size)
    else:
        side = int(embeddings.image_size)
    return side, side


def embedded(
    visual: Any, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch tokens width_"]:
    """Embed images as the model does; for another size than its own it interpolates its positions."""
    is_resized = tuple(images.shape[-2:]) != native_size(visual)
    tokens: Tensor = visual.embeddings(images, interpolate_pos_encoding=is_resized)
    return tokens


def check_embeddings(embeddings: Any, kind: type[nn.Module], patches: type[nn.Module]) -> None:
    """Raise `NotCovered` unless patches are embedded by exactly these classes; they are called as a whole."""
    for module, expected in ((embeddings, kind), (embeddings.patch_embedding, patches)):
        check_class(module, expected, f"its patches are embedded by {class_name(module)}")


def check_class(module: nn.Module, kind: type[nn.Module], reason: str) -> None:
    """Raise `NotCovered` with a reason unless a module is exactly of a class."""
    if type(module) is not kind:
        raise NotCovered(reason, module)


def describe_block(layer_class: type[nn.Module], layer: Any) -> Block:
    """Describe a pre-norm block with separate projections of queries, keys and values.

    Raises:
        NotCovered: it is of another class than `layer_class`, or a part of it is not covered.
    """
    check_class(layer, layer_class, f"it is {class_name(layer)}, not a {layer_class.__name__}")
    attention = layer.self_attn
    check_affine_norm(layer.layer_norm1, "layer_norm1")
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        linear(projection)
    if attention.scale != attention.head_dim**-0.5:
        raise NotCovered(f"its attention is scaled by {attention.scale:g}", attention)
    return Block(
        norm=layer.layer_norm1,
        project=partial(_project, attention),
        out=(linear(attention.out_proj),),
        mlp=(*norm(layer.layer_norm2, "layer_norm2"), *mlp(layer.mlp)),
    )


def _project(
    attention: Any, tokens: Float[Tensor, "batch tokens width"], _rotary: Tensor | None
) -> QueriesKeysValues:
    projected = (attention.q_proj(tokens), attention.k_proj(tokens), attention.v_proj(tokens))
    queries, keys, values = (
        torch.unflatten(part, -1, (-1, attention.head_dim)).transpose(1, 2) for part in projected
    )
    return queries, keys, values


def linear(module: nn.Module) -> Linear:
    """Describe a linear layer."""
    if type(module) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        raise NotCovered(f"expected a linear layer, found {class_name(module)}", module)
    return Linear.of(module)  # type: ignore[arg-type]


def norm(module: nn.Module, name: str) -> tuple[Stage, ...]:
    """Describe a LayerNorm with weight and bias."""
    check_affine_norm(module, name)
    return (Norm(module),)  # type: ignore[arg-type]


def mlp(module: Any) -> tuple[Stage, ...]:
    """Describe an MLP with one activation."""
    activation = module.activation_fn
    return (
        linear(module.fc1),
        Activation(SAME_AS.get(type(activation), activation)),
        linear(module.fc2),
    )
