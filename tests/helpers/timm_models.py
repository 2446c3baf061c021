"""Small CLIP models around timm's trunks, and an oracle that is the model's own forward pass."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from torch import Tensor, nn

from tests.helpers.tiny_models import EMBED_DIM, IMAGE_SIZE, LAYERS, PATCH, TEXT, fill


def tiny_timm_clip(name: str, **trunk: Any) -> nn.Module:
    """The open_clip model of this name with a small trunk, its pooling and head as configured.

    Random weights in every parameter; `trunk` overrides what timm makes the trunk with.
    """
    size = {"img_size": IMAGE_SIZE, "patch_size": PATCH, "embed_dim": 32, "depth": LAYERS, "num_heads": 4}
    small = size | trunk
    vision = open_clip.get_model_config(name)["vision_cfg"] | {"image_size": small["img_size"]}
    create_model = timm.create_model

    def create_tiny_model(*args: Any, **kwargs: Any) -> nn.Module:
        return create_model(*args, **kwargs | small)

    with mock.patch.object(timm, "create_model", create_tiny_model):
        model = open_clip.CLIP(EMBED_DIM, vision, TEXT)
    return fill(model).eval()


def resized(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """A copy of a model, brought to another input size by open_clip and timm themselves."""
    model = copy.deepcopy(model)
    model.visual.set_input_size(size)
    return model


def relevance_by_autograd(
    model: nn.Module, images: Tensor, texts: Tensor, *, reference: bool = False, prefix_tokens: int
) -> Tensor:
    """Relevance [layers, batch, prompts, patches] of each attention matrix that timm itself spells out.

    The score of a layer is that of its tokens sent on by the model's own path; `reference`: that of the mean
    of all its tokens.
    """
    visual = copy.deepcopy(model).visual
    for module in visual.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    trunk, outputs, maps = visual.trunk, [], []
    for block in trunk.blocks:
        block.register_forward_hook(lambda _module, _inputs, tokens: outputs.append(tokens))
    with attention_matrices() as of_blocks:
        trunk.forward_features(images)
    for tokens, matrix in zip(outputs, of_blocks, strict=True):
        with attention_matrices() as of_pooler:
            if reference:
                features = visual.head(trunk.head(trunk.fc_norm(trunk.norm(tokens.mean(dim=1)))))
            else:
                features = visual.head(trunk.forward_head(trunk.norm(tokens)))
        scores = nn.functional.normalize(features, dim=-1).unsqueeze(1) * texts
        explained = of_pooler[0] if of_pooler else matrix
        maps.append(torch.stack([rectified(score.sum(), explained) for score in scores.unbind(1)], dim=1))
    return torch.stack(maps)[..., prefix_tokens:]


@contextmanager
def attention_matrices() -> Iterator[list[Tensor]]:
    """Note every softmax that is taken."""
    matrices: list[Tensor] = []
    softmax = torch.Tensor.softmax

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        matrices.append(softmax(*args, **kwargs))
        return matrices[-1]

    with mock.patch.object(torch.Tensor, "softmax", noted):
        yield matrices


def rectified(score: Tensor, matrix: Tensor) -> Tensor:
    # Images do not mix, so the gradient of the batch's sum holds each image's own.
    (gradient,) = torch.autograd.grad(score, matrix, retain_graph=True)
    return gradient.relu().mean(dim=(1, 2))
