"""The forward pass against open_clip's own."""

import dataclasses

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from torch.nn import functional as F

import legrad
from legrad.method.precision import full_precision_convolutions
from tests.helpers.tiny_models import (
    EMBED_DIM,
    PATCH,
    TEXT,
    VISION,
    fill,
    relative_error,
    tiny_clip,
    tiny_images,
    unit_texts,
)

TOWERS = {
    "plain": {},
    "layer_scale": {"ls_init_value": 0.5},
    "no_ln_pre": {"no_ln_pre": True},
    "mean_of_patches": {"pool_type": "avg"},
    "mean_of_patches_then_norm": {"pool_type": "avg", "final_ln_after_pool": True},
    "class_token_then_norm": {"final_ln_after_pool": True},
    "tokens_returned_as_well": {"output_tokens": True},
    "patch_dropout": {"patch_dropout": 0.5},
}


@pytest.mark.parametrize("name", TOWERS)
def test_image_features_are_those_of_the_model(name):
    model = tiny_clip(**TOWERS[name]).double()
    images = tiny_images(3, dtype=torch.float64)
    features = model.visual(images)
    features = features[0] if isinstance(features, tuple) else features
    trace = legrad.LeGrad(model).encode(images)
    torch.testing.assert_close(trace.image_features, F.normalize(features, dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_image_features_in_half_precision_are_those_of_the_model(dtype):
    model = tiny_clip().to(dtype)
    images = tiny_images(3, dtype=dtype)
    features = legrad.LeGrad(model).encode(images).image_features
    assert features.dtype == dtype
    assert relative_error(features, model.encode_image(images, normalize=True)) < 8 * torch.finfo(dtype).eps


def test_another_size_is_what_open_clip_makes_of_the_weights_for_that_size():
    square = fill(open_clip.CLIP(EMBED_DIM, VISION | {"image_size": 4 * PATCH}, TEXT)).eval()
    wide = open_clip.CLIP(EMBED_DIM, VISION | {"image_size": (3 * PATCH, 7 * PATCH)}, TEXT).eval()
    weights = square.state_dict()
    resize_pos_embed(weights, wide)
    wide.load_state_dict(weights)
    images = tiny_images(2, size=(3 * PATCH, 7 * PATCH))
    trace = legrad.LeGrad(square).encode(images)
    assert (trace.grid_height, trace.grid_width) == (3, 7)
    torch.testing.assert_close(trace.image_features, wide.encode_image(images, normalize=True))
    torch.testing.assert_close(
        legrad.LeGrad(square).relevance(images, unit_texts(2)),
        legrad.LeGrad(wide).relevance(images, unit_texts(2)),
    )


def test_a_model_in_training_mode_gives_the_same_and_stays_in_training_mode():
    model = tiny_clip(patch_dropout=0.5)
    images, texts = tiny_images(2), unit_texts(2)
    evaluated = legrad.LeGrad(model).relevance(images, texts)
    model.train()
    torch.testing.assert_close(legrad.LeGrad(model).relevance(images, texts), evaluated)
    assert all(module.training for module in model.modules())


def test_a_trace_holds_the_values_tokens_and_outputs_of_the_last_blocks():
    model = tiny_clip()
    images = tiny_images(2)
    trace = legrad.LeGrad(model, layers=2).encode(images)
    assert [layer.index for layer in trace.layers] == [1, 2]
    last = trace.layers[-1]
    assert last.values.shape == (2, 4, 16, 8)
    assert [None if kept is None else kept.shape[-1] for kept in last.mlp_inputs] == [32, None, 128, None]
    block = model.visual.transformer.resblocks[2]
    torch.testing.assert_close(block(trace.layers[0].outputs), last.outputs)
    with torch.no_grad():
        values = (
            block.ln_1(trace.layers[0].outputs) @ block.attn.in_proj_weight[64:].T
            + block.attn.in_proj_bias[64:]
        )
    torch.testing.assert_close(last.values.transpose(1, 2).flatten(2), values)


def test_a_trace_cannot_be_changed_and_needs_no_gradient():
    trace = legrad.LeGrad(tiny_clip()).encode(tiny_images())
    with pytest.raises(dataclasses.FrozenInstanceError):
        trace.grid_height = 7
    tensors = [trace.image_features, *(getattr(layer, "outputs") for layer in trace.layers)]  # noqa: B009
    assert not any(tensor.requires_grad for tensor in tensors)


def test_kept_values_do_not_keep_queries_and_keys_in_memory():
    layer = legrad.LeGrad(tiny_clip()).encode(tiny_images()).layers[0]
    assert layer.values.untyped_storage().nbytes() == layer.values.numel() * layer.values.element_size()


def settings_of_convolutions(model, images):
    """Precision of cuDNN's convolutions while a forward pass embeds the patches."""
    seen = []
    explainer = legrad.LeGrad(model)
    handle = model.visual.conv1.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision)
    )
    try:
        explainer.encode(images)
    finally:
        handle.remove()
    return seen


def test_single_precision_convolves_without_tf32_and_leaves_the_setting_as_it_was():
    before = torch.backends.cudnn.conv.fp32_precision
    assert before != "ieee"
    assert settings_of_convolutions(tiny_clip(), tiny_images()) == ["ieee"]
    assert settings_of_convolutions(tiny_clip().double(), tiny_images(dtype=torch.float64)) == [before]
    assert torch.backends.cudnn.conv.fp32_precision == before
    assert torch.backends.cudnn.allow_tf32


def test_the_setting_of_convolutions_is_restored_after_an_error():
    before = torch.backends.cudnn.conv.fp32_precision
    with pytest.raises(ZeroDivisionError), full_precision_convolutions(torch.float32):
        _ = 1 / 0
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_threads_that_convolve_in_turn_restore_the_setting_only_after_the_last():
    before = torch.backends.cudnn.conv.fp32_precision
    first, second = (full_precision_convolutions(torch.float32) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.conv.fp32_precision == before
