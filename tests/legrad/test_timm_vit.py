"""SigLIP, ViTamin, MobileCLIP and timm's plain transformers, against timm's own forward pass."""

import copy
from functools import cache

import open_clip
import pytest
import torch
from torch import nn

import legrad
from tests.helpers.timm_models import relevance_by_autograd, resized, tiny_timm_clip
from tests.helpers.tiny_models import LAYERS, TEXT, relative_error, tiny_images

# The convolutions in front of hybrid towers fix the width, and 16 pixels to a patch.
HYBRID_SIZE = (48, 80)
HYBRID = {"img_size": HYBRID_SIZE, "patch_size": 1}
MODELS = {
    "SigLIP": ("ViT-B-16-SigLIP", {}),
    "SigLIP2 with other head width": ("ViT-SO400M-14-SigLIP2", {"num_heads": 8}),
    "gap": ("vit_medium_patch16_gap_256", {}),
    "CLIP in timm": ("MobileCLIP2-L-14", {}),
    "MobileCLIP-B": ("MobileCLIP-B", HYBRID | {"embed_dim": 768, "num_heads": 12}),
    "ViTamin": ("ViTamin-S", HYBRID | {"embed_dim": 384, "num_heads": 6}),
}
POOLED_BY_ATTENTION = ("SigLIP", "SigLIP2 with other head width")


@cache
def _made(name):
    model_name, overrides = MODELS[name]
    return tiny_timm_clip(model_name, **overrides).double()


def tiny(name):
    return copy.deepcopy(_made(name))


def texts_for(name, prompts=2):
    embed_dim = legrad.LeGrad(_made(name)).embed_dim
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(2, prompts, embed_dim, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(rows, dim=-1)


def images_for(name, batch=2):
    size = {"size": HYBRID_SIZE} if "img_size" in MODELS[name][1] else {}
    return tiny_images(batch, dtype=torch.float64, **size)


def without_final_norm(model):
    model = copy.deepcopy(model)
    model.visual.trunk.norm = nn.Identity()
    return model


@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize("name", MODELS)
def test_features_and_every_layer_equal_the_models_own_forward_pass_with_autograd(name, pool):
    model, images, texts = tiny(name), images_for(name), texts_for(name)
    is_reference = pool == "reference"
    # The authors send a SigLIP layer's tokens into the pooler as they are.
    scored = without_final_norm(model) if is_reference and name in POOLED_BY_ATTENTION else model
    expected = relevance_by_autograd(
        scored,
        images,
        texts,
        reference=is_reference and name not in POOLED_BY_ATTENTION,
        prefix_tokens=model.visual.trunk.num_prefix_tokens,
    )
    explainer = legrad.LeGrad(model, layers="all", pool=pool)
    trace = explainer.encode(images)
    received = explainer.relevance(trace, texts, per_layer=True).flatten(-2)
    assert relative_error(trace.image_features, model.encode_image(images, normalize=True)) < 1e-10
    assert [relative_error(received[i], expected[i]) < 1e-10 for i in range(LAYERS)] == [True] * LAYERS


@pytest.mark.parametrize("name", ["SigLIP", "gap", "CLIP in timm"])
def test_another_size_is_what_timm_makes_of_the_model_for_that_size(name):
    model, size = tiny(name), (20, 12)
    images, texts = tiny_images(2, size=size, dtype=torch.float64), texts_for(name)
    weights = copy.deepcopy(model.state_dict())
    received = legrad.LeGrad(model).relevance(images, texts)
    expected = legrad.LeGrad(resized(model, size)).relevance(images, texts)
    assert relative_error(received, expected) < 1e-6
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_stays_near_single(name):
    model, images, texts = tiny(name).float(), images_for(name).float(), texts_for(name)
    single = legrad.LeGrad(model).relevance(images, texts)
    half = legrad.LeGrad(copy.deepcopy(model).bfloat16()).relevance(images.bfloat16(), texts)
    assert half.dtype == torch.float32
    assert relative_error(half, single) < 0.1


def test_a_trace_made_for_another_pool_is_refused_where_the_tower_pools_by_attention():
    model, images = tiny_timm_clip("ViT-B-16-SigLIP"), tiny_images(1)
    trace, texts = legrad.LeGrad(model).encode(images), torch.eye(2, 32)
    legrad.LeGrad(model).relevance(trace, texts)
    with pytest.raises(legrad.InputError, match=r"made with pool='model'.* received .*pool='reference'"):
        legrad.LeGrad(model, pool="model").relevance(trace, texts)


def test_batch_norms_that_would_be_trained_are_refused_and_nothing_changes():
    model = tiny("MobileCLIP-B").train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(legrad.InputError, match=r"batch norms in training mode.*model\.eval\(\)"):
        legrad.LeGrad(model).encode(images_for("MobileCLIP-B"))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert model.training


def test_dropout_that_would_act_before_the_patches_is_refused():
    model = tiny("ViTamin").train()
    legrad.LeGrad(model).encode(images_for("ViTamin"))
    model.visual.trunk.patch_embed.backbone.pool.add_module("drop", nn.Dropout(0.5))
    with pytest.raises(legrad.InputError, match=r"dropouts in training mode.*model\.eval\(\)"):
        legrad.LeGrad(model).encode(images_for("ViTamin"))


def test_siglip_is_normalised_on_the_grid_and_the_others_after_upsampling():
    by_name = {name: legrad.LeGrad(_made(name)).tower.normalisation for name in MODELS}
    assert {name for name, how in by_name.items() if how == "grid"} == set(POOLED_BY_ATTENTION)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda trunk: setattr(trunk.blocks[1].attn, "gate", nn.Linear(32, 32)),
            "block 1: its attention has a gate",
        ),
        (lambda trunk: setattr(trunk.blocks[2], "mlp", nn.Linear(32, 32)), "block 2: its MLP is a Linear"),
        (lambda trunk: setattr(trunk.blocks[0], "norm2", nn.RMSNorm(32)), "block 0: its norm is a RMSNorm"),
        (lambda trunk: setattr(trunk.attn_pool, "pool", "avg"), "its pooler takes 'avg'"),
        (
            lambda trunk: setattr(trunk.attn_pool, "pos_embed", nn.Parameter(torch.ones(1))),
            "position embeddings",
        ),
        (lambda trunk: setattr(trunk, "attn_pool", nn.Identity()), "it pools by a Identity"),
        (lambda trunk: setattr(trunk, "patch_embed", nn.Identity()), "its patches are made by a Identity"),
        (lambda trunk: setattr(trunk, "global_pool", "max"), "its pooling is 'max'"),
    ],
)
def test_a_changed_tower_is_refused_with_the_part_that_differs(change, reason):
    model = tiny("SigLIP")
    change(model.visual.trunk)
    with pytest.raises(legrad.UnsupportedModelError, match=reason):
        legrad.LeGrad(model)


def test_patches_that_are_not_square_are_refused():
    model = tiny_timm_clip("ViT-B-16-SigLIP", patch_size=(4, 2))
    with pytest.raises(legrad.UnsupportedModelError, match="patches are not square: 4 x 2"):
        legrad.LeGrad(model)


def test_a_head_of_an_unknown_part_is_refused():
    vision = open_clip.get_model_config("vit_medium_patch16_gap_256")["vision_cfg"]
    with torch.device("meta"):
        model = open_clip.CLIP(24, vision, TEXT)
    model.visual.head.add_module("after", nn.Tanh())
    with pytest.raises(legrad.UnsupportedModelError, match=r"its head\.after is a Tanh"):
        legrad.LeGrad(model)
