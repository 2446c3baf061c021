"""Which towers are taken, which are refused, and that structure decides."""

import open_clip
import pytest
import torch
from tiny_models import EMBED_DIM, TEXT, tiny_clip
from torch import nn

import legrad
from legrad.support import ModelSupport, model_support

SUPPORTED = {
    "ViT-B-32",
    "ViT-B-16",
    "ViT-L-14-336-quickgelu",
    "ViT-M-16-alt",
    "ViT-bigG-14-CLIPA-336",
    "ViT-H-14-worldwide",
    "roberta-ViT-B-32",
    "coca_base",
}
REFUSED = {
    "RN50": "ModifiedResNet",
    "ViT-B-16-SigLIP": "TimmModel",
    "MobileCLIP2-S4": "fastvit",
    "EVA02-E-14": "TimmModel",
    "PE-Core-bigG-14-448": "TimmModel",
    "convnext_base_w": "convnext",
    "coca_ViT-L-14": "pools by attention",
}


def _without_joint_projection(model):
    width = 32
    model.visual.transformer.resblocks[1].attn = nn.MultiheadAttention(width, 4, kdim=16, vdim=16)


def _with_extra_keys(model):
    model.visual.transformer.resblocks[0].attn = nn.MultiheadAttention(32, 4, add_zero_attn=True)


def _with_longer_mlp(model):
    model.visual.transformer.resblocks[2].mlp.add_module("drop", nn.Dropout(0.5))


def _with_other_norm(model):
    model.visual.transformer.resblocks[2].ln_2 = nn.RMSNorm(32)


def _with_norm_without_weights(model):
    model.visual.transformer.resblocks[2].ln_1 = nn.LayerNorm(32, elementwise_affine=False)


def _with_wrapped_linear(model):
    model.visual.transformer.resblocks[0].mlp.c_fc = nn.Sequential(nn.Linear(32, 128))


def _without_head(model):
    model.visual.proj = None


def _without_norm(model):
    model.visual.ln_post = nn.Identity()


def _without_pooling(model):
    model.visual.pool_type = "none"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_joint_projection, "block 1: its queries, keys and values have no joint projection"),
        (_with_extra_keys, "block 0: its attention adds keys"),
        (_with_longer_mlp, "block 2: its MLP is made of"),
        (_with_other_norm, "block 2: its norms are not LayerNorms"),
        (_with_norm_without_weights, "block 2: its norms are not LayerNorms"),
        (_with_wrapped_linear, "block 0: its mlp.c_fc is a Sequential"),
        (_without_head, "projection was removed"),
        (_without_norm, "ln_post is no LayerNorm"),
        (_without_pooling, "its pooling is 'none'"),
    ],
)
def test_a_changed_tower_is_refused_with_the_part_that_differs(change, reason):
    model = tiny_clip()
    change(model)
    with pytest.raises(legrad.UnsupportedModelError, match=reason):
        legrad.LeGrad(model)


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ({"attentional_pool": True}, "pools by attention"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"patch_size": (4, 2), "image_size": (12, 12)}, "patches are not square"),
    ],
)
def test_a_configuration_that_is_not_covered_is_refused(vision, reason):
    model = tiny_clip(**vision)
    with pytest.raises(legrad.UnsupportedModelError, match=reason) as refusal:
        legrad.LeGrad(model)
    assert "CLIP with a vision tower VisionTransformer" in str(refusal.value)
    assert "Supported: open_clip's VisionTransformer" in str(refusal.value)


def test_towers_of_other_classes_are_refused_by_name():
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32}
    with pytest.raises(legrad.UnsupportedModelError, match="ModifiedResNet"):
        legrad.LeGrad(open_clip.CLIP(EMBED_DIM, resnet, TEXT))
    with torch.device("meta"):
        siglip = open_clip.CLIP(EMBED_DIM, open_clip.get_model_config("ViT-B-16-SigLIP")["vision_cfg"], TEXT)
    with pytest.raises(legrad.UnsupportedModelError, match=r"TimmModel\(VisionTransformer\)"):
        legrad.LeGrad(siglip)
    with pytest.raises(legrad.UnsupportedModelError, match="Linear: expected an open_clip model"):
        legrad.LeGrad(nn.Linear(2, 2))


def test_every_model_that_open_clip_knows_has_a_family_or_a_reason():
    models = legrad.supported_models()
    assert list(models) == open_clip.list_models()
    assert all((support.family is None) != (support.reason is None) for support in models.values())
    assert {name for name in SUPPORTED if models[name].family != "clip"} == set()
    assert {
        name: reason for name, reason in REFUSED.items() if reason not in (models[name].reason or "")
    } == {}


@pytest.mark.parametrize("name", ["ViT-B-32", "coca_base", "ViT-B-16-SigLIP", "RN50", "coca_ViT-B-32"])
def test_the_list_agrees_with_what_happens_to_the_model_itself(name):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], TEXT)
    if model_support(name).family is None:
        with pytest.raises(legrad.UnsupportedModelError):
            legrad.LeGrad(model)
    else:
        assert legrad.LeGrad(model).tower.family == model_support(name).family


def test_a_name_that_open_clip_does_not_know_has_a_reason():
    assert model_support("ViT-Z") == ModelSupport(None, "open_clip has no model of the name 'ViT-Z'")
