"""timm's VisionTransformerRelPos: a small instance against timm's own forward pass."""

import copy

import pytest
import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer_relpos import ResPostRelPosBlock
from torch import nn

import legrad
from legrad.support import model_support
from tests.helpers.timm_models import relevance_by_autograd, tiny_timm_clip
from tests.helpers.tiny_models import LAYERS, relative_error, tiny_images, unit_texts

NAME = "vit_relpos_medium_patch16_cls_224"
# The tower of open_clip's configuration, and what else timm's class can be.
VARIANTS = {
    "as configured": {},
    "mean of patches": {"class_token": False, "global_pool": "avg"},
    "mean of patches then norm": {"class_token": False, "global_pool": "avg", "fc_norm": True},
    "mean of patches beside a class token": {"global_pool": "avg"},
    "one bias for all blocks": {"shared_rel_pos": True},
    "a table of biases": {"rel_pos_type": "bias"},
    "bounded biases": {"rel_pos_type": "mlp-swin"},
    "no layer scale": {"init_values": None},
    "queries and keys normed": {"qk_norm": True, "qkv_bias": True},
    "post-norm": {"block_fn": ResPostRelPosBlock},
}


def _tiny(variant="as configured", **trunk):
    return tiny_timm_clip(NAME, **VARIANTS[variant] | trunk).double()


@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_and_every_layer_equal_the_models_own_forward_pass_with_autograd(variant, pool):
    model, images = _tiny(variant), tiny_images(2, dtype=torch.float64)
    texts = unit_texts(2, 3, dtype=torch.float64)
    expected = relevance_by_autograd(
        model,
        images,
        texts,
        reference=pool == "reference",
        prefix_tokens=model.visual.trunk.num_prefix_tokens,
    )
    explainer = legrad.LeGrad(model, layers="all", pool=pool)
    trace = explainer.encode(images)
    received = explainer.relevance(trace, texts, per_layer=True).flatten(-2)
    assert relative_error(trace.image_features, model.encode_image(images, normalize=True)) < 1e-10
    assert [relative_error(received[i], expected[i]) < 1e-10 for i in range(LAYERS)] == [True] * LAYERS


def test_the_relative_position_bias_matters():
    model = _tiny()
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2)
    received = legrad.LeGrad(model).relevance(images, texts)
    for block in model.visual.trunk.blocks:
        block.attn.rel_pos = None
    assert relative_error(legrad.LeGrad(model).relevance(images, texts), received) > 1e-3


def test_images_of_another_size_are_refused():
    with pytest.raises(legrad.InputError, match=r"relpos\) are bound to 12 x 20 pixels, received 20 x 12"):
        legrad.LeGrad(_tiny()).encode(tiny_images(size=(20, 12), dtype=torch.float64))


def test_nothing_that_acts_in_training_alone_acts_and_the_model_stays_as_it_was():
    rates = {f"{part}drop_rate": 0.5 for part in ("", "proj_", "attn_")}
    model = _tiny(**rates, drop_path_rate=0.5)
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2)
    evaluated = legrad.LeGrad(model).relevance(images, texts)
    before = copy.deepcopy(model.train())
    torch.testing.assert_close(legrad.LeGrad(model).relevance(images, texts), evaluated)
    assert all(module.training for module in model.modules())
    tensors, earlier = (
        dict(each.named_parameters()) | dict(each.named_buffers()) for each in (model, before)
    )
    assert tensors.keys() == earlier.keys()
    assert all(torch.equal(tensors[name], earlier[name]) for name in tensors)


def test_half_precision_gives_the_models_own_features_and_maps_near_those_of_single():
    single = _tiny().float()
    half = copy.deepcopy(single).bfloat16()
    images, texts = tiny_images(2), unit_texts(2, 3)
    explainer = legrad.LeGrad(half)
    trace = explainer.encode(images.bfloat16())
    features = half.encode_image(images.bfloat16(), normalize=True)
    assert relative_error(trace.image_features, features) < 2 * torch.finfo(torch.bfloat16).eps
    expected = legrad.LeGrad(single).relevance(images, texts)
    assert relative_error(explainer.relevance(trace, texts), expected) < 0.03


def _change(model, path, module):
    parent, _, name = path.rpartition(".")
    setattr(model.visual.trunk.get_submodule(parent), name, module)


@pytest.mark.parametrize(
    ("path", "module", "reason"),
    [
        ("blocks.1", nn.Identity(), "block 1: it is a Identity"),
        ("blocks.1.attn", Attention(32), "block 1: its attention is a Attention"),
        ("blocks.0.attn.rel_pos", Mlp(32), "block 0: its positions are a Mlp"),
        ("patch_embed", nn.Conv2d(3, 32, 4), "its patches are made by a Conv2d"),
    ],
)
def test_what_is_not_covered_is_refused_with_the_part_that_differs(path, module, reason):
    model = _tiny()
    _change(model, path, module)
    with pytest.raises(legrad.UnsupportedModelError, match=reason):
        legrad.LeGrad(model)


def test_a_tower_without_pooling_is_refused():
    with pytest.raises(legrad.UnsupportedModelError, match="its pooling is ''"):
        model = _tiny()
        model.visual.trunk.global_pool = ""
        legrad.LeGrad(model)


def test_open_clips_model_of_this_family_is_taken():
    assert model_support(NAME).family == "relpos"
