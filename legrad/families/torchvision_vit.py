"""Describe torchvision's VisionTransformer, a classifier."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchvision.models.vision_transformer import Encoder, EncoderBlock, MLPBlock, VisionTransformer

from legrad.families.modules import KnownModules
from legrad.families.parts import (
    NotCovered,
    check_affine_norm,
    check_covered,
    class_name,
    describe_blocks,
    resample_positions,
    split_heads,
)
from legrad.families.timm_parts import layer_stages
from legrad.method.stages import Activation, Linear, Norm
from legrad.method.towers import Block, EmbeddedImages, QueriesKeysValues, Scoring, Tower

PREFIX_TOKENS = 1
# Of all of torchvision's weights but those with SWAG in their names, which are resized bicubically.
PREPROCESSING = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bilinear"}
KNOWN = KnownModules(
    frozenset(
        {
            *(VisionTransformer, Encoder, EncoderBlock, MLPBlock, nn.Sequential, nn.Linear, nn.LayerNorm),
            *(nn.MultiheadAttention, NonDynamicallyQuantizableLinear, nn.GELU, nn.Dropout, nn.Tanh),
        }
    ),
    called=("conv_proj",),
    activations=(),
)
MLP_LAYERS = (nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout)


def describe(model: VisionTransformer) -> Tower:
    """Describe a classifier; its reference scoring is that of torch-cam 0.5.

    Raises:
        NotCovered: a part of it is not covered.
    """
    if type(model.conv_proj) is not nn.Conv2d:
        raise NotCovered(f"its patches are made by {class_name(model.conv_proj)}", model.conv_proj)
    check_affine_norm(model.encoder.ln, "encoder.ln")
    cells = model.image_size // model.patch_size
    head = (Norm(model.encoder.ln), *layer_stages(model.heads))
    reference = Scoring((), slice(0, None), head, is_unit=False)
    return Tower(
        family="torchvision-classifier",
        patch_size=model.patch_size,
        native_grid=(cells, cells),
        native_size=(model.image_size, model.image_size),
        takes_any_grid=True,
        embed_dim=_classes(model.heads),
        prefix_tokens=PREFIX_TOKENS,
        normalisation="upsampled",
        embed=partial(_embed, model),
        blocks=describe_blocks(model.encoder.layers, _describe_block),
        reference=reference,
        authors=reference,
        own=Scoring((), slice(0, 1), head, is_unit=False),
        parameter=partial(getattr, model.conv_proj, "weight"),
        is_classifier=True,
    )


def _classes(heads: nn.Module) -> int:
    layers = [module for module in heads.modules() if type(module) is nn.Linear]
    if not layers:
        raise NotCovered("it has no classifier, so that its score is undefined", heads)
    return layers[-1].out_features


def _describe_block(block: Any) -> Block:
    if type(block) is not EncoderBlock:
        raise NotCovered(f"it is {class_name(block)}, not an EncoderBlock", block)
    attention, mlp = block.self_attention, block.mlp
    if type(attention) is not nn.MultiheadAttention or attention.in_proj_weight is None:
        raise NotCovered(f"its attention is {class_name(attention)} without a joint projection", attention)
    check_covered(
        (
            "its attention adds keys beyond those of the tokens",
            attention.bias_k is not None or attention.add_zero_attn,
        ),
        ("its attention takes tokens before images", not attention.batch_first),
    )
    if type(attention.out_proj) not in (nn.Linear, NonDynamicallyQuantizableLinear):
        raise NotCovered(f"its attention's output is {class_name(attention.out_proj)}", attention.out_proj)
    if type(mlp) is not MLPBlock or tuple(map(type, mlp)) != MLP_LAYERS:
        raise NotCovered(f"its MLP is made of {[type(layer).__name__ for layer in mlp]}", mlp)
    check_affine_norm(block.ln_1, "ln_1")
    check_affine_norm(block.ln_2, "ln_2")
    first, activation, _, second, _ = mlp
    return Block(
        norm=block.ln_1,
        project=partial(_project, attention),
        out=(Linear.of(attention.out_proj),),
        mlp=(Norm(block.ln_2), Linear.of(first), Activation(activation), Linear.of(second)),
    )


def _project(
    attention: nn.MultiheadAttention, tokens: Float[Tensor, "batch tokens width"], _rotary: Tensor | None
) -> QueriesKeysValues:
    joint = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    return split_heads(joint, attention.num_heads)


def _embed(model: VisionTransformer, images: Float[Tensor, "batch 3 height width"]) -> EmbeddedImages:
    """Embed patches of images of any size; torchvision's own forward pass takes one size only."""
    patches = model.conv_proj(images)
    class_token = model.class_token.expand(len(patches), -1, -1)
    tokens = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
    cells = model.image_size // model.patch_size
    positions = resample_positions(
        model.encoder.pos_embedding[0], (cells, cells), patches.shape[-2:], prefix_tokens=PREFIX_TOKENS
    )
    return EmbeddedImages(tokens + positions.to(tokens.dtype))
