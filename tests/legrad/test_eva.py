"""EVA and PE-Core: small instances of each architecture against timm's own forward pass."""

import copy
from functools import partial

import open_clip
import pytest
import torch
from timm.layers import Attention, HybridEmbed, RmsNorm, SwiGLU
from torch import nn

import legrad
from legrad.heatmaps import heatmaps_of
from legrad.support import model_support
from tests.helpers.timm_models import relevance_by_autograd, resized, tiny_timm_clip
from tests.helpers.tiny_models import (
    GRID_HEIGHT,
    GRID_WIDTH,
    LAYERS,
    PATCH,
    relative_error,
    tiny_images,
    unit_texts,
)

MODELS = {
    "EVA01-g": ("EVA01-g-14", {}),
    "EVA02-B": ("EVA02-B-16", {}),
    "EVA02-E": ("EVA02-E-14", {}),
    "PE-Core with class token": ("PE-Core-B-16", {"attn_pool_num_heads": 4}),
    "PE-Core without class token": ("PE-Core-bigG-14-448", {"attn_pool_num_heads": 4}),
}
GROUPED = {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2}
# What timm's Eva can be beyond what open_clip's configurations make of it.
VARIANTS = {
    "mean of patches": {"global_pool": "avg"},
    "mean of normed patches": {"global_pool": "avg", "use_fc_norm": False},
    "no class token": {"global_pool": "avg", "class_token": False},
    "register tokens": {"num_reg_tokens": 2},
    "positions of patches alone": {"num_reg_tokens": 2, "no_embed_class": True},
    "no learned positions": {"use_abs_pos_emb": False},
    "norm in front": {"use_pre_transformer_norm": True},
    "layer scale": {"init_values": 0.1},
    "layer scale of attention": {"init_values": 0.1, "attn_only_layer_scale": True},
    "one projection": {"qkv_fused": True},
    "one projection without bias": {"qkv_fused": True, "qkv_bias": False},
    "queries and keys normed": {"qk_norm": True},
    "grouped queries": GROUPED | {"qk_norm": True},
    "gated MLP in one layer": {"scale_mlp": False},
    "halves rotated": {"rope_rotate_half": True},
    "places as they are": {"ref_feat_shape": None, "rope_grid_offset": 0.5},
    "any size by itself": {"dynamic_img_size": True},
    "post-norm with rotation": {"use_post_norm": True},
}


def _tiny(name, **trunk):
    model_name, overrides = MODELS[name]
    return tiny_timm_clip(model_name, **overrides | trunk).double()


def _has_pooler(model):
    return model.visual.trunk.attn_pool is not None


def _check_against_autograd(model, pool):
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, 3, dtype=torch.float64)
    expected = relevance_by_autograd(
        model,
        images,
        texts,
        # The authors have no tower like PE-Core: its own path is the reference.
        reference=pool == "reference" and not _has_pooler(model),
        prefix_tokens=model.visual.trunk.num_prefix_tokens,
    )
    explainer = legrad.LeGrad(model, layers="all", pool=pool)
    trace = explainer.encode(images)
    received = explainer.relevance(trace, texts, per_layer=True).flatten(-2)
    assert (trace.grid_height, trace.grid_width) == (GRID_HEIGHT, GRID_WIDTH)
    assert relative_error(trace.image_features, model.encode_image(images, normalize=True)) < 1e-10
    assert [relative_error(received[i], expected[i]) < 1e-10 for i in range(LAYERS)] == [True] * LAYERS


@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize("name", MODELS)
def test_features_and_every_layer_equal_the_models_own_forward_pass_with_autograd(name, pool):
    _check_against_autograd(_tiny(name), pool)


@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize("name", ["PE-Core with class token", "PE-Core without class token"])
def test_as_the_authors_would_the_pooler_takes_tokens_that_are_not_normed(name, pool):
    model = _tiny(name)
    without_norm = copy.deepcopy(model)
    without_norm.visual.trunk.norm = nn.Identity()
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, 3, dtype=torch.float64)
    prefix_tokens = model.visual.trunk.num_prefix_tokens
    expected = relevance_by_autograd(without_norm, images, texts, prefix_tokens=prefix_tokens)
    explainer = legrad.LeGrad(model, layers="all", pool=pool)
    grids = expected.sum(dim=0).unflatten(-1, (GRID_HEIGHT, GRID_WIDTH))
    received = explainer.heatmaps(images, texts, as_authors=True)
    assert relative_error(received, heatmaps_of(grids, *images.shape[-2:], "upsampled")) < 1e-10
    assert relative_error(explainer.heatmaps(images, texts), received) > 1e-3
    with pytest.raises(legrad.InputError, match="made with pool='authors'"):
        explainer.heatmaps(explainer.encode(images), texts, as_authors=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_other_form_of_the_trunk_equals_its_own_forward_pass_with_autograd(variant):
    for pool in ("reference", "model"):
        _check_against_autograd(_tiny("EVA02-B", **VARIANTS[variant]), pool)


@pytest.mark.parametrize(
    "name", [*MODELS, "any size by itself", "places as they are", "positions of patches alone"]
)
def test_another_size_is_what_timm_makes_of_the_model_for_that_size(name):
    model = _tiny(name) if name in MODELS else _tiny("EVA02-B", **VARIANTS[name])
    size = (7 * PATCH, 4 * PATCH)
    images, texts = tiny_images(2, size=size, dtype=torch.float64), unit_texts(2, 2, dtype=torch.float64)
    other = resized(model, size)
    trace = legrad.LeGrad(model).encode(images)
    assert (trace.grid_height, trace.grid_width) == (7, 4)
    # timm resamples learned positions in float32, whatever the model's precision.
    assert relative_error(trace.image_features, other.encode_image(images, normalize=True)) < 1e-6
    received, expected = (legrad.LeGrad(each).relevance(images, texts) for each in (model, other))
    assert relative_error(received, expected) < 1e-6


def _state(model):
    """All that a forward pass could change: tensors, those not saved too, and the plain attributes."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    plain = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | tuple | list | type(None))
    }
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, copy.deepcopy(plain)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["EVA02-B", "PE-Core with class token"])
def test_images_of_many_sizes_leave_the_model_bit_for_bit_as_it_was(name, training):
    model = _tiny(name).train(training)
    tensors, plain = _state(model)
    for size in [(12, 20), (20, 12), (32, 8)]:
        legrad.LeGrad(model).relevance(tiny_images(size=size, dtype=torch.float64), unit_texts(2))
    tensors_after, plain_after = _state(model)
    assert plain_after == plain
    assert tensors_after.keys() == tensors.keys()
    assert all(torch.equal(tensors_after[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("size", [(12, 20), (20, 20)])
def test_nothing_that_acts_in_training_alone_acts(size):
    rates = {f"{part}drop_rate": 0.5 for part in ("", "pos_", "patch_", "proj_", "attn_")}
    model = _tiny("EVA02-B", **rates, drop_path_rate=0.5, rope_shift_coords=2.0, rope_jitter_coords=2.0)
    images, texts = tiny_images(2, size=size, dtype=torch.float64), unit_texts(2)
    evaluated = legrad.LeGrad(model).relevance(images, texts)
    torch.testing.assert_close(legrad.LeGrad(model.train()).relevance(images, texts), evaluated)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_gives_the_models_own_features_and_maps_near_those_of_single(name, dtype):
    single, size = _tiny(name).float(), (20, 16)
    half = copy.deepcopy(single).to(dtype)
    images, texts = tiny_images(2, size=size), unit_texts(2, 3)
    explainer = legrad.LeGrad(half)
    trace = explainer.encode(images.to(dtype))
    features = resized(half, size).encode_image(images.to(dtype), normalize=True)
    assert trace.image_features.dtype == dtype
    assert relative_error(trace.image_features, features) < 2 * torch.finfo(dtype).eps
    received = explainer.relevance(trace, texts)
    assert received.dtype == torch.float32
    expected = legrad.LeGrad(single).relevance(images, texts)
    assert relative_error(received, expected) < 4 * torch.finfo(dtype).eps


def _replaced(path, module):
    """A change to the trunk: another module, or none, at a place."""

    def change(trunk):
        parent, _, name = path.rpartition(".")
        setattr(trunk.get_submodule(parent), name, module)

    return change


def _set(name, value):
    return lambda trunk: setattr(trunk, name, value)


class _SwiGLU(SwiGLU):
    """A subclass, which may compute something else."""


REFUSED = {
    "gate": (
        {},
        _replaced("blocks.2.attn.gate", nn.Linear(32, 32)),
        "block 2: its attention has a gate",
    ),
    "mixed rotation": ({"rope_type": "mixed"}, None, "its trunk.rope is a RotaryEmbeddingMixed"),
    "rotation of DINOv3": ({"rope_type": "dinov3"}, None, "its trunk.rope is a RotaryEmbeddingDinoV3"),
    "largest of the patches": ({"global_pool": "max"}, None, "its pooling is 'max'"),
    "no pooling": ({"global_pool": ""}, None, "its pooling is ''"),
    "other norms": (
        {"norm_layer": partial(RmsNorm, eps=1e-6)},
        None,
        "its norm is a RmsNorm, not a LayerNorm",
    ),
    "other block": ({}, _replaced("blocks.1", nn.Identity()), "block 1: it is a Identity"),
    "other attention": (
        {},
        _replaced("blocks.1.attn", Attention(32)),
        "block 1: its attention is a Attention",
    ),
    "other MLP": ({}, _replaced("blocks.0.mlp", _SwiGLU(32)), "its trunk.blocks.0.mlp is a _SwiGLU"),
    "other projection": (
        {},
        _replaced("blocks.0.attn.proj", nn.Bilinear(32, 32, 32)),
        "its trunk.blocks.0.attn.proj is a Bilinear",
    ),
    "other patches": (
        {},
        _set("patch_embed", HybridEmbed(nn.Conv2d(3, 8, 4), img_size=16, patch_size=1)),
        "its patches are made by a HybridEmbed",
    ),
    "oblong patches": (
        {"patch_size": (4, 2), "img_size": (12, 12)},
        None,
        "its patches are not square: 4 x 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_covered_is_refused_with_the_part_that_differs(case):
    overrides, change, reason = REFUSED[case]
    model = _tiny("EVA02-B", **overrides)
    if change is not None:
        change(model.visual.trunk)
    with pytest.raises(legrad.UnsupportedModelError, match=reason) as refusal:
        legrad.LeGrad(model)
    assert "TimmModel(Eva)" in str(refusal.value)


def test_all_of_open_clips_models_of_these_families_are_taken():
    families = {
        name: model_support(name) for name in open_clip.list_models() if name.startswith(("EVA", "PE-"))
    }
    assert len(families) >= 12
    assert {name: support for name, support in families.items() if support.reason is not None} == {}
    assert {name for name, support in families.items() if support.family == "pe"} == {
        name for name in families if name.startswith("PE-")
    }
