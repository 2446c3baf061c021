"""Relevance spread along the keys of the last blocks, against NumPy on keys that the model computed."""

import copy
import pickle

import numpy as np
import pytest
import torch

import legrad
from legrad.checks import check_affinity
from legrad.errors import InputError
from legrad.method.affinity import spread_along_keys
from tests.helpers.timm_models import tiny_timm_clip
from tests.helpers.tiny_models import (
    GRID_HEIGHT,
    GRID_WIDTH,
    relative_error,
    tiny_clip,
    tiny_images,
    unit_texts,
)

SHARPNESS = 8
PATCHES = GRID_HEIGHT * GRID_WIDTH
MODELS = {
    "clip": tiny_clip,
    "coca": lambda: tiny_clip(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=6),
    "siglip": lambda: tiny_timm_clip("ViT-B-16-SigLIP"),
    "timm-vit": lambda: tiny_timm_clip("vit_medium_patch16_gap_256"),
    "eva, post-norm": lambda: tiny_timm_clip("EVA02-E-14"),
    "eva, rotary, register tokens": lambda: tiny_timm_clip("EVA02-B-16", num_reg_tokens=2),
    "eva, grouped queries": lambda: tiny_timm_clip(
        "EVA02-B-16", attn_type="rope", qkv_fused=False, num_kv_heads=2, qk_norm=True
    ),
    "pe": lambda: tiny_timm_clip("PE-Core-B-16", attn_pool_num_heads=4),
    "relpos": lambda: tiny_timm_clip("vit_relpos_medium_patch16_cls_224"),
}


def random_texts(embed_dim):
    """Three texts for each of two images."""
    return torch.randn(2, 3, embed_dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def keys_of_last_blocks(model, images):
    """Keys of the last two blocks without rotation, each [images, tokens, width], by hooks on the model."""
    model, seen = copy.deepcopy(model), []
    if hasattr(model.visual, "trunk"):
        for block in model.visual.trunk.blocks[-2:]:
            block.attn.k_norm.register_forward_hook(lambda _module, _inputs, keys: seen.append(keys))
        model.visual(images)
        return [keys.transpose(1, 2).flatten(2).detach().numpy() for keys in seen]
    blocks = model.visual.transformer.resblocks[-2:]
    for block in blocks:
        block.ln_1.register_forward_hook(lambda _module, _inputs, tokens: seen.append(tokens))
    model.visual(images)
    width = seen[0].shape[-1]
    own = slice(width, 2 * width)
    return [
        (tokens @ block.attn.in_proj_weight[own].T + block.attn.in_proj_bias[own]).detach().numpy()
        for block, tokens in zip(blocks, seen, strict=True)
    ]


def spread_by_hand(grids, keys_of_blocks):
    """The formula for the grids [maps, height, width] of one image and its keys [patches, width] by block."""
    cosines = []
    for keys in keys_of_blocks:
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        cosines.append(unit @ unit.T)
    affinity = np.maximum(0, np.mean(cosines, axis=0)) ** SHARPNESS
    affinity /= affinity.sum(axis=1, keepdims=True)
    return np.stack([(affinity @ grid.ravel()).reshape(grid.shape) for grid in grids])


@pytest.mark.parametrize("name", MODELS)
def test_relevance_is_the_mean_weighted_by_the_keys_of_the_patches_in_every_family(name):
    model = MODELS[name]().double()
    explainer, images = legrad.LeGrad(model, affinity="keys"), tiny_images(2, dtype=torch.float64)
    texts = random_texts(explainer.embed_dim)
    plain = legrad.LeGrad(model).relevance(images, texts)
    first, second = keys_of_last_blocks(model, images)
    expected = [
        spread_by_hand(plain[image].numpy(), [first[image, -PATCHES:], second[image, -PATCHES:]])
        for image in range(2)
    ]
    received = explainer.relevance(images, texts)
    assert received.shape == plain.shape
    np.testing.assert_allclose(received.numpy(), expected, rtol=1e-9)
    assert relative_error(received, plain) > 1e-3


def test_each_layer_is_spread_and_their_sum_is_what_is_returned_otherwise():
    explainer = legrad.LeGrad(tiny_clip().double(), layers="all", affinity="keys")
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, dtype=torch.float64)
    layers = explainer.relevance(images, texts, per_layer=True)
    assert layers.shape == (3, 2, 2, GRID_HEIGHT, GRID_WIDTH)
    torch.testing.assert_close(layers.sum(dim=0), explainer.relevance(images, texts))


@pytest.mark.parametrize("size", [(12, 20), (8, 32), (4, 4)])
def test_ragged_prompts_in_any_order_get_what_their_image_gives_alone(size):
    explainer = legrad.LeGrad(tiny_clip(), affinity="keys")
    images, texts = tiny_images(4, size=size), unit_texts(5)
    rows = torch.tensor([3, 0, 3, 1, 0])
    batched = explainer.relevance(images, texts, rows)
    for prompt, row in enumerate(rows.tolist()):
        alone = explainer.relevance(images[row : row + 1], texts[prompt : prompt + 1])[0, 0]
        torch.testing.assert_close(batched[prompt], alone)


def test_no_prompts_give_no_grids():
    explainer = legrad.LeGrad(tiny_clip(), affinity="keys")
    assert explainer.relevance(tiny_images(2), unit_texts(0)).shape == (2, 0, GRID_HEIGHT, GRID_WIDTH)


def test_strips_of_any_height_give_the_same():
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(2, 12, 8, generator=generator), dim=-1)
    grids, rows = torch.rand(3, 5, 3, 4, generator=generator), torch.tensor([0, 1, 1, 0, 1])
    whole = spread_along_keys(grids, keys, rows)
    for strip_bytes in (0, 5 * 12 * 4, 12 * 12 * 4):
        torch.testing.assert_close(spread_along_keys(grids, keys, rows, strip_bytes=strip_bytes), whole)


def test_patches_with_the_same_keys_share_their_relevance_and_others_keep_theirs():
    keys = torch.eye(3)[torch.tensor([0, 0, 1, 2])][None]
    grid = torch.tensor([[[1.0, 3.0, 5.0, 7.0]]])
    assert spread_along_keys(grid, keys, torch.tensor([0])).tolist() == [[[2.0, 2.0, 5.0, 7.0]]]


def test_without_affinity_nothing_changes_by_a_bit_and_no_keys_are_kept():
    model, images, texts = tiny_clip(), tiny_images(2), unit_texts(2)
    plain, spread = legrad.LeGrad(model), legrad.LeGrad(model, affinity="keys")
    assert plain.encode(images).unit_keys is None
    trace = spread.encode(images)
    assert trace.unit_keys.shape == (2, PATCHES, 64)
    # a trace with keys serves an explainer that does not use them
    assert torch.equal(plain.relevance(trace, texts), plain.relevance(images, texts))
    assert torch.equal(trace.image_features, plain.encode(images).image_features)


def test_a_trace_without_keys_is_refused_where_they_are_needed():
    model = tiny_clip()
    trace = legrad.LeGrad(model).encode(tiny_images())
    with pytest.raises(InputError, match="affinity='keys'; encode the images with this explainer"):
        legrad.LeGrad(model, affinity="keys").relevance(trace, unit_texts(1))


def test_another_affinity_is_refused_with_the_choices():
    with pytest.raises(InputError, match="expected 'none' or 'keys', received 'values'"):
        check_affinity("values")


def test_the_map_of_the_authors_has_no_affinity():
    model, images, texts = tiny_clip(), tiny_images(2), unit_texts(2)
    explainer = legrad.LeGrad(model, affinity="keys")
    by_authors = explainer.heatmaps(explainer.encode(images), texts, as_authors=True)
    assert torch.equal(by_authors, legrad.LeGrad(model).heatmaps(images, texts))
    assert not torch.equal(by_authors, explainer.heatmaps(images, texts))


def test_a_copy_and_a_pickled_explainer_keep_the_affinity():
    explainer = legrad.LeGrad(tiny_clip(), affinity="keys")
    images, texts = tiny_images(2), unit_texts(2)
    expected = explainer.relevance(images, texts)
    for other in (copy.copy(explainer), copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
        assert torch.equal(other.relevance(images, texts), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_maps_near_those_of_single(dtype):
    images, texts = tiny_images(2), unit_texts(2)
    expected = legrad.LeGrad(tiny_clip(), affinity="keys").relevance(images, texts)
    half = legrad.LeGrad(tiny_clip().to(dtype), affinity="keys").relevance(images.to(dtype), texts.to(dtype))
    assert half.dtype == torch.float32
    assert relative_error(half, expected) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_bit_for_bit_as_it_was(training):
    model = tiny_clip(patch_dropout=0.5).train(training)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    legrad.LeGrad(model, affinity="keys").relevance(tiny_images(2), unit_texts(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for module in model.modules():
        assert module.training == training
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
