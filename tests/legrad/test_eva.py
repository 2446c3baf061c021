"""EVA and PE-Core: small instances of each architecture against timm's own forward pass."""

import copy

import pytest
import torch
from tiny_models import LAYERS, relative_error, tiny_images, unit_texts
from timm_models import relevance_by_autograd, resized, tiny_timm_clip
from torch import nn

import legrad
from legrad.support import model_support

MODELS = {
    "EVA01-g": ("EVA01-g-14", {}),
    "EVA02-B": ("EVA02-B-16", {}),
    "EVA02-L": ("EVA02-L-14", {}),
    "EVA02-E": ("EVA02-E-14", {}),
    "PE-Core with class token": ("PE-Core-B-16", {"attn_pool_num_heads": 4}),
    "PE-Core without class token": ("PE-Core-bigG-14-448", {"attn_pool_num_heads": 4}),
}


def _tiny(name, **trunk):
    model_name, overrides = MODELS[name]
    return tiny_timm_clip(model_name, **overrides | trunk).double()


def _agrees(model, *, pool, tolerance=1e-10):
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, 3, dtype=torch.float64)
    explainer = legrad.LeGrad(model, layers="all", pool=pool)
    has_pooler = model.visual.trunk.attn_pool is not None
    expected = relevance_by_autograd(
        model,
        images,
        texts,
        reference=pool == "reference" and not has_pooler,
        prefix_tokens=model.visual.trunk.num_prefix_tokens,
    )
    trace = explainer.encode(images)
    received = explainer.relevance(trace, texts, per_layer=True).flatten(-2)
    features = model.encode_image(images, normalize=True)
    assert relative_error(trace.image_features, features) < tolerance
    assert all(relative_error(received[i], expected[i]) < tolerance for i in range(LAYERS))


@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize("name", MODELS)
def test_features_and_every_layer_equal_the_models_own_forward_pass_with_autograd(name, pool):
    _agrees(_tiny(name), pool=pool)
