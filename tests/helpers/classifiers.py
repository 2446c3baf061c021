"""Small vision transformers with a classifier, and an oracle by autograd on attention that is spelled out."""

import copy
import math
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from tests.helpers.timm_models import attention_matrices, rectified
from tests.helpers.tiny_models import IMAGE_SIZE, LAYERS, PATCH, fill

CLASSES = 7


def tiny_timm_classifier(name: str, **options: Any) -> nn.Module:
    """timm's model of this name, small, with random weights in every parameter."""
    size = {"img_size": IMAGE_SIZE, "patch_size": PATCH, "embed_dim": 32, "depth": LAYERS, "num_heads": 4}
    model = timm.create_model(name, num_classes=CLASSES, **size | options)
    return fill(model).eval()


def tiny_torchvision_vit(**options: Any) -> nn.Module:
    """torchvision's vision transformer on 20 x 20 pixels, with random weights in every parameter."""
    sizes = {"image_size": 5 * PATCH, "patch_size": PATCH, "num_layers": LAYERS, "num_heads": 4}
    model = VisionTransformer(**sizes, hidden_dim=32, mlp_dim=64, num_classes=CLASSES, **options)
    return fill(model).eval()


def relevance_of_logits(model: nn.Module, images: Tensor, *, pool: str = "reference") -> Tensor:
    """Relevance [layers, batch, classes, patches] of each attention matrix for every logit.

    The logits of a layer are those of its tokens sent on by the model's own path; with the pool "reference",
    those of the mean of all its tokens.
    """
    model = copy.deepcopy(model)
    if isinstance(model, VisionTransformer):
        matrices, outputs = _torchvision_pass(model, images)
        prefix_tokens = 1
    else:
        matrices, outputs = _timm_pass(model, images)
        prefix_tokens = model.num_prefix_tokens
    maps = []
    for matrix, tokens in zip(matrices, outputs, strict=True):
        with attention_matrices() as of_pooler:
            logits = _logits(model, tokens, pool)
        explained = of_pooler[0] if of_pooler else matrix
        maps.append(torch.stack([rectified(one.sum(), explained) for one in logits.unbind(1)], dim=1))
    return torch.stack(maps)[..., prefix_tokens:]


def _timm_pass(model: Any, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    outputs: list[Tensor] = []
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, tokens: outputs.append(tokens))
    with attention_matrices() as matrices:
        model.forward_features(images)
    return matrices, outputs


def _torchvision_pass(model: Any, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    patches = model.conv_proj(images).flatten(2).mT
    tokens = torch.cat([model.class_token.expand(len(images), -1, -1), patches], dim=1)
    tokens = tokens + model.encoder.pos_embedding
    matrices, outputs = [], []
    for block in model.encoder.layers:
        tokens, matrix = _torchvision_block(block, tokens)
        matrices.append(matrix)
        outputs.append(tokens)
    return matrices, outputs


def _torchvision_block(block: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    attention = block.self_attention
    batch, count, width = tokens.shape
    joint = block.ln_1(tokens) @ attention.in_proj_weight.T + attention.in_proj_bias
    queries, keys, values = (
        part.reshape(batch, count, attention.num_heads, -1).transpose(1, 2) for part in joint.chunk(3, dim=-1)
    )
    matrix = torch.softmax(queries @ keys.mT / math.sqrt(queries.shape[-1]), dim=-1)
    context = (matrix @ values).transpose(1, 2).reshape(batch, count, width)
    attended = tokens + attention.out_proj(context)
    return attended + block.mlp(block.ln_2(attended)), matrix


def _logits(model: Any, tokens: Tensor, pool: str) -> Any:
    if isinstance(model, VisionTransformer):
        pooled = tokens.mean(dim=1) if pool == "reference" else tokens[:, 0]
        return model.heads(model.encoder.ln(pooled))
    if pool == "model" or getattr(model, "attn_pool", None) is not None:
        return model.forward_head(model.norm(tokens))
    mean = model.norm(tokens.mean(dim=1))
    if hasattr(model, "head_dist"):
        return (model.head(mean) + model.head_dist(mean)) / 2
    return model.head(model.fc_norm(mean))
