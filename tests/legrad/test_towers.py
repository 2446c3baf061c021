"""Which towers are supported and which are refused, by their structure."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from torch import nn

import legrad
from legrad.families.support import built_table
from legrad.support import TABLE, ModelSupport, model_support
from tests.helpers.tiny_models import EMBED_DIM, TEXT, tiny_clip

# Every name that open_clip 3.3.0 has: a name that another release adds needs a family or a reason here.
FAMILIES = {
    "clip": (
        "ViT-B-16 ViT-B-16-plus ViT-B-16-plus-240 ViT-B-16-quickgelu ViT-B-32 ViT-B-32-256 "
        "ViT-B-32-plus-256 ViT-B-32-quickgelu ViT-H-14 ViT-H-14-378 ViT-H-14-378-quickgelu "
        "ViT-H-14-CLIPA ViT-H-14-CLIPA-336 ViT-H-14-quickgelu ViT-H-14-worldwide "
        "ViT-H-14-worldwide-378 ViT-H-14-worldwide-quickgelu ViT-H-16 ViT-L-14 ViT-L-14-280 "
        "ViT-L-14-336 ViT-L-14-336-quickgelu ViT-L-14-CLIPA ViT-L-14-CLIPA-336 ViT-L-14-quickgelu "
        "ViT-L-14-worldwide ViT-L-14-worldwide-quickgelu ViT-L-16 ViT-L-16-320 ViT-M-16 ViT-M-16-alt "
        "ViT-M-32 ViT-M-32-alt ViT-S-16 ViT-S-16-alt ViT-S-32 ViT-S-32-alt ViT-bigG-14 "
        "ViT-bigG-14-CLIPA ViT-bigG-14-CLIPA-336 ViT-bigG-14-quickgelu ViT-bigG-14-worldwide "
        "ViT-bigG-14-worldwide-378 ViT-e-14 ViT-g-14 coca_base coca_roberta-ViT-B-32 "
        "mt5-base-ViT-B-32 mt5-xl-ViT-H-14 nllb-clip-base nllb-clip-large roberta-ViT-B-32 "
        "xlm-roberta-base-ViT-B-32 xlm-roberta-large-ViT-H-14"
    ),
    "coca": ("coca_ViT-B-32 coca_ViT-L-14"),
    "eva": ("EVA01-g-14 EVA01-g-14-plus EVA02-B-16 EVA02-E-14 EVA02-E-14-plus EVA02-L-14 EVA02-L-14-336"),
    "pe": ("PE-Core-B-16 PE-Core-L-14-336 PE-Core-S-16-384 PE-Core-T-16-384 PE-Core-bigG-14-448"),
    "relpos": ("vit_relpos_medium_patch16_cls_224"),
    "siglip": (
        "ViT-B-16-SigLIP ViT-B-16-SigLIP-256 ViT-B-16-SigLIP-384 ViT-B-16-SigLIP-512 "
        "ViT-B-16-SigLIP-i18n-256 ViT-B-16-SigLIP2 ViT-B-16-SigLIP2-256 ViT-B-16-SigLIP2-384 "
        "ViT-B-16-SigLIP2-512 ViT-B-32-SigLIP2-256 ViT-L-16-SigLIP-256 ViT-L-16-SigLIP-384 "
        "ViT-L-16-SigLIP2-256 ViT-L-16-SigLIP2-384 ViT-L-16-SigLIP2-512 ViT-SO400M-14-SigLIP "
        "ViT-SO400M-14-SigLIP-378 ViT-SO400M-14-SigLIP-384 ViT-SO400M-14-SigLIP2 "
        "ViT-SO400M-14-SigLIP2-378 ViT-SO400M-16-SigLIP-i18n-256 ViT-SO400M-16-SigLIP2-256 "
        "ViT-SO400M-16-SigLIP2-384 ViT-SO400M-16-SigLIP2-512 ViT-gopt-16-SigLIP2-256 "
        "ViT-gopt-16-SigLIP2-384 nllb-clip-base-siglip nllb-clip-large-siglip"
    ),
    "timm-hybrid": (
        "MobileCLIP-B MobileCLIP2-B ViTamin-B ViTamin-B-LTT ViTamin-L ViTamin-L-256 ViTamin-L-336 "
        "ViTamin-L-384 ViTamin-L2 ViTamin-L2-256 ViTamin-L2-336 ViTamin-L2-384 ViTamin-S "
        "ViTamin-S-LTT ViTamin-XL-256 ViTamin-XL-336 ViTamin-XL-384"
    ),
    "timm-vit": ("MobileCLIP2-L-14 vit_medium_patch16_gap_256"),
}
REFUSED = {
    "has no attention": (
        "convnext_base convnext_base_w convnext_base_w_320 convnext_large convnext_large_d "
        "convnext_large_d_320 convnext_small convnext_tiny convnext_xlarge convnext_xxlarge "
        "convnext_xxlarge_320"
    ),
    "convolutions after its attention": (
        "MobileCLIP-S1 MobileCLIP-S2 MobileCLIP2-S0 MobileCLIP2-S2 MobileCLIP2-S3 MobileCLIP2-S4"
    ),
    "its only attention pools a feature map": (
        "RN101 RN101-quickgelu RN50 RN50-quickgelu RN50x16 RN50x16-quickgelu RN50x4 RN50x4-quickgelu "
        "RN50x64 RN50x64-quickgelu"
    ),
    "attends within windows": ("swin_base_patch4_window7_224"),
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
        (_with_extra_keys, "block 0: its attention adds keys beyond those of the tokens"),
        (_with_longer_mlp, "block 2: its MLP is made of"),
        (_with_other_norm, "block 2: its ln_2 is a RMSNorm, not a LayerNorm"),
        (_with_norm_without_weights, "block 2: its ln_1 is a LayerNorm, not a LayerNorm with weight"),
        (_with_wrapped_linear, "block 0: its mlp.c_fc is a Sequential"),
        (_without_head, "projection was removed"),
        (_without_norm, "its ln_post is a Identity, not a LayerNorm"),
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
        ({"attentional_pool": "parallel"}, "'parallel' or 'cascade'"),
        ({"attentional_pool": True, "pool_type": "avg"}, "its pooling is 'avg'"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"patch_size": (4, 2), "image_size": (12, 12)}, "patches are not square"),
    ],
)
def test_a_configuration_that_is_not_covered_is_refused(vision, reason):
    model = tiny_clip(**vision)
    with pytest.raises(legrad.UnsupportedModelError, match=reason) as refusal:
        legrad.LeGrad(model)
    assert "CLIP with a vision tower VisionTransformer" in str(refusal.value)
    assert "Supported: open_clip's vision transformers" in str(refusal.value)


def test_towers_of_other_classes_are_refused_by_name():
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32}
    with pytest.raises(legrad.UnsupportedModelError, match="ModifiedResNet is convolutional"):
        legrad.LeGrad(open_clip.CLIP(EMBED_DIM, resnet, TEXT))
    with pytest.raises(legrad.UnsupportedModelError, match="Linear: expected an open_clip model"):
        legrad.LeGrad(nn.Linear(2, 2))


def test_a_subclass_of_a_known_trunk_is_refused():
    class Changed(timm.models.vision_transformer.VisionTransformer):
        pass

    with torch.device("meta"):
        model = open_clip.CLIP(24, open_clip.get_model_config("ViT-B-16-SigLIP")["vision_cfg"], TEXT)
    model.visual.trunk.__class__ = Changed
    with pytest.raises(legrad.UnsupportedModelError, match=r"TimmModel\(Changed\) is not covered"):
        legrad.LeGrad(model)


def shipped_models():
    """Names of open_clip's own models; other tests of the same process may have registered further ones."""
    return {path.stem for path in (Path(open_clip.__file__).parent / "model_configs").glob("*.json")}


def test_every_model_that_open_clip_knows_has_the_family_or_the_reason_written_here():
    expected = {name: family for family, names in FAMILIES.items() for name in names.split()}
    reasons = {name: reason for reason, names in REFUSED.items() for name in names.split()}
    models = legrad.supported_models()
    assert list(models) == open_clip.list_models()
    models = {name: support for name, support in models.items() if name in shipped_models()}
    assert {name: support.family for name, support in models.items() if support.family} == expected
    assert {name for name, support in models.items() if support.reason} == set(reasons)
    assert [name for name, reason in reasons.items() if reason not in models[name].reason] == []


@pytest.mark.medium
def test_the_table_of_models_is_what_the_installed_libraries_build():
    renewed = "run `python -m legrad.families.support` to renew legrad/supported_models.json"
    found = {key: entry for key, entry in built_table().items() if entry["model"] in shipped_models()}
    assert json.loads(TABLE.read_text("utf-8")) == found, renewed


def test_models_are_listed_as_open_clip_lists_them_where_it_is_not_imported():
    program = (
        "import sys; from legrad.support import model_configs\n"
        "listed = model_configs(); assert 'open_clip' not in sys.modules\n"
        "import open_clip; names = open_clip.list_models()\n"
        "assert list(listed) == names == list(model_configs())\n"
        "assert listed == model_configs()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_model_that_the_table_lacks_is_built(tmp_path):
    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"]["layers"] = 3
    (tmp_path / "ViT-of-tomorrow.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    assert model_support("ViT-of-tomorrow") == ModelSupport("clip", None, 3, takes_any_grid=True)


def test_a_name_with_a_slash_is_the_one_that_open_clip_reads_in_it():
    assert model_support("ViT-B/32") == model_support("ViT-B-32")
    assert model_support("ViT-B/32").family == "clip"


def test_a_name_that_open_clip_does_not_know_has_a_reason():
    assert model_support("ViT-Z") == ModelSupport(None, "open_clip has no model named 'ViT-Z'")
