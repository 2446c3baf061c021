"""Baselines on tiny seeded models, each against its formula on an explicit forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import legrad
from legrad.inputs import as_ragged
from tests.helpers.timm_models import tiny_timm_clip
from tests.helpers.tiny_models import EMBED_DIM, GRID_HEIGHT, GRID_WIDTH, tiny_clip, tiny_images, unit_texts

GRID, HEADS, HEAD_DIM = (GRID_HEIGHT, GRID_WIDTH), 4, 8
IMAGE_INDEX = torch.tensor([0, 2, 2, 1])
POOLINGS = {
    "class token": {},
    "mean of patches, norm after": {"pool_type": "avg", "final_ln_after_pool": True},
}
FAMILIES = {
    "clip": tiny_clip,
    "coca": lambda: tiny_clip(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=6),
    "siglip": lambda: tiny_timm_clip("ViT-B-16-SigLIP"),
    "timm-vit": lambda: tiny_timm_clip("vit_medium_patch16_gap_256"),
    "eva": lambda: tiny_timm_clip("EVA02-B-16"),
    "eva, post-norm": lambda: tiny_timm_clip("EVA02-E-14"),
    "pe": lambda: tiny_timm_clip("PE-Core-B-16", attn_pool_num_heads=4),
    "relpos": lambda: tiny_timm_clip("vit_relpos_medium_patch16_cls_224"),
}


@pytest.fixture(params=POOLINGS)
def model(request) -> nn.Module:
    return tiny_clip(**POOLINGS[request.param]).double()


@pytest.fixture
def images() -> Tensor:
    return tiny_images(3, dtype=torch.float64)


@pytest.fixture
def texts() -> Tensor:
    return unit_texts(4, dtype=torch.float64)


def pooled_rows(model: nn.Module, rows: Tensor) -> Tensor:
    """The row of the class token, or the mean of those of the patches: what the model pools."""
    return rows[:, 0] if model.visual.pool_type == "tok" else rows[:, 1:].mean(dim=1)


def explicit_attention(block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Attention matrices [batch, heads, queries, keys] from the weights alone, and the block's output."""
    joint = F.linear(block.ln_1(tokens), block.attn.in_proj_weight, block.attn.in_proj_bias)
    query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in joint.chunk(3, dim=-1))
    attention = (query @ key.mT / HEAD_DIM**0.5).softmax(dim=-1)
    attended = tokens + block.attn.out_proj((attention @ value).transpose(1, 2).flatten(2))
    return attention, attended + block.mlp(block.ln_2(attended))


def explicit_attentions(model: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Attention of every block, and the last block's output."""
    tokens, attentions = model.visual._embeds(images), []
    for block in model.visual.transformer.resblocks:
        attention, tokens = explicit_attention(block, tokens)
        attentions.append(attention)
    return attentions, tokens


def maps_of(model: nn.Module, method: str, images: Tensor, texts: Tensor) -> Tensor:
    return legrad.baseline(legrad.LeGrad(model), method, images, texts, IMAGE_INDEX)


def test_rollout_is_the_product_of_every_blocks_attention_halved_with_the_identity(model, images, texts):
    attentions, _ = explicit_attentions(model, images)
    rollout = torch.eye(attentions[0].shape[-1], dtype=torch.float64)
    for attention in attentions:
        rollout = (attention.mean(dim=1) + torch.eye(attention.shape[-1])) / 2 @ rollout
    expected = pooled_rows(model, rollout)[:, 1:].reshape(3, *GRID).float()
    torch.testing.assert_close(maps_of(model, "rollout", images, texts), expected[IMAGE_INDEX])


def test_raw_attention_is_that_of_the_pooled_token_in_the_last_block(model, images, texts):
    attention = explicit_attentions(model, images)[0][-1].mean(dim=1)
    for method, rows in (
        ("raw_attention", pooled_rows(model, attention)),
        ("mean_query_attention", attention.mean(dim=1)),
    ):
        expected = rows[:, 1:].reshape(3, *GRID).float()[IMAGE_INDEX]
        torch.testing.assert_close(maps_of(model, method, images, texts), expected)


def test_in_siglip_raw_attention_is_the_poolers_and_the_first_factor_of_rollout():
    model = tiny_timm_clip("ViT-B-16-SigLIP").double()
    trunk, images = model.visual.trunk, tiny_images(3, dtype=torch.float64)
    pool, heads = trunk.attn_pool, trunk.attn_pool.num_heads

    def weights(queries, keys):
        split = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (queries, keys)]
        return (split[0] @ split[1].mT / split[0].shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)

    tokens = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images)))
    attentions = []
    for block in trunk.blocks:
        heads = block.attn.num_heads
        attentions.append(weights(*block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)[:2]))
        tokens = block(tokens)
    heads, normed = pool.num_heads, trunk.norm(tokens)
    row = weights(pool.q(pool.latent.expand(3, -1, -1)), pool.kv(normed).chunk(2, dim=-1)[0])
    explainer = legrad.LeGrad(model)
    texts = torch.ones(3, explainer.embed_dim, dtype=torch.float64)
    index = torch.arange(3)
    raw = legrad.baseline(explainer, "raw_attention", images, texts, index)
    torch.testing.assert_close(raw, row[:, 0].reshape(3, *GRID).float())
    for attention in reversed(attentions):
        row = row @ (attention + torch.eye(attention.shape[-1])) / 2
    rollout = legrad.baseline(explainer, "rollout", images, texts, index)
    torch.testing.assert_close(rollout, row[:, 0].reshape(3, *GRID).float())


def test_chefercam_is_its_update_of_relevancies_by_autograd_on_explicit_attention(model, images, texts):
    maps = maps_of(model, "chefercam", images, texts)
    assert (maps > 0).any()
    visual = model.visual
    for prompt, image in enumerate(IMAGE_INDEX.tolist()):
        attentions, tokens = explicit_attentions(model, images[image : image + 1])
        if visual.pool_type == "tok":
            feature = visual.ln_post(tokens)[0, 0] @ visual.proj
        else:
            feature = visual.ln_post(tokens[0, 1:].mean(dim=0)) @ visual.proj
        gradients = torch.autograd.grad(F.cosine_similarity(feature, texts[prompt], dim=0), attentions)
        relevancy = torch.eye(tokens.shape[1], dtype=torch.float64)[None]
        for attention, gradient in zip(attentions, gradients, strict=True):
            relevancy = relevancy + (attention * gradient).relu().mean(dim=1) @ relevancy
        expected = pooled_rows(model, relevancy)[0, 1:].reshape(GRID).float()
        torch.testing.assert_close(maps[prompt], expected)


def test_patch_text_similarity_is_the_cosine_of_each_patch_token(model, images, texts):
    tokens = model.visual.transformer(model.visual._embeds(images))
    grids = maps_of(model, "patch_text", images, texts)
    for prompt, image in enumerate(IMAGE_INDEX.tolist()):
        patches = model.visual.ln_post(tokens[image, 1:]) @ model.visual.proj
        expected = F.cosine_similarity(patches, texts[prompt][None]).reshape(GRID)
        torch.testing.assert_close(grids[prompt], expected.float())


def test_gradcam_weighs_channels_by_gradients_of_the_models_own_score(model, images, texts):
    grids = maps_of(model, "gradcam", images, texts)
    assert (grids > 0).any()
    for prompt, image in enumerate(IMAGE_INDEX.tolist()):
        activations: list[Tensor] = []
        norm = model.visual.transformer.resblocks[-1].ln_1
        handle = norm.register_forward_hook(lambda _m, _i, output: activations.append(output))  # noqa: B023
        score = F.cosine_similarity(model.visual(images[image : image + 1])[0], texts[prompt], dim=0)
        handle.remove()
        (gradient,) = torch.autograd.grad(score, activations)
        weights = gradient[0, 1:].mean(dim=0)
        expected = (activations[0][0, 1:] @ weights).clamp(min=0).reshape(GRID)
        torch.testing.assert_close(grids[prompt], expected.float())


def test_the_centre_prior_is_highest_in_the_middle_and_symmetric(images, texts):
    prior = maps_of(tiny_clip().double(), "centre_prior", images, texts)[0]
    assert prior.argmax() == 7
    torch.testing.assert_close(prior, prior.flip(0).flip(1))
    assert prior[0, 0] < prior[0, 2] < prior[1, 2]


def all_grids(model: nn.Module, images: Tensor, texts: Tensor, index: Tensor = IMAGE_INDEX, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return legrad.baseline_grids(legrad.LeGrad(model), images, texts, index, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_every_baseline_in_its_range_and_a_batch_gives_what_its_images_give(family):
    model, images = FAMILIES[family](), tiny_images(3)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(4, legrad.LeGrad(model).embed_dim, generator=generator)
    batched = all_grids(model, images, texts)
    assert list(batched) == list(legrad.BASELINES)
    for name, grids in batched.items():
        method = legrad.BASELINES[name]
        assert grids.shape == (4, *GRID)
        assert grids.dtype == torch.float32
        assert grids.min() >= method.low - 1e-6, name
        assert method.high is None or grids.max() <= method.high + 1e-6, name
        if name != "random":
            assert torch.allclose(grids[1], grids[2]) != method.depends_on_text, name
    for prompt, image in enumerate(IMAGE_INDEX.tolist()):
        single = all_grids(model, images[image, None], texts[prompt, None], torch.zeros(1, dtype=torch.long))
        for name in set(batched) - {"random"}:
            torch.testing.assert_close(batched[name][prompt], single[name][0], rtol=1e-4, atol=1e-5, msg=name)


def test_the_forms_of_prompts_are_those_of_relevance(model, images, texts):
    explainer = legrad.LeGrad(model)
    flat = legrad.baseline(
        explainer, "gradcam", images, texts.repeat(3, 1), torch.arange(3).repeat_interleave(4)
    )
    every = legrad.baseline(explainer, "gradcam", images, texts)
    assert every.shape == explainer.relevance(images, texts).shape == (3, 4, *GRID)
    torch.testing.assert_close(every.flatten(0, 1), flat)
    own = legrad.baseline(explainer, "gradcam", images, 2 * texts.expand(3, -1, -1))
    torch.testing.assert_close(own, every)
    prepared = as_ragged(explainer.encode(images).image_features, texts, None)
    torch.testing.assert_close(legrad.baseline(explainer, "gradcam", images, prepared), every)


def test_a_trace_gives_the_same_maps_as_its_images(model, images, texts):
    explainer = legrad.LeGrad(model)
    trace = explainer.encode(images)
    for name, method in legrad.BASELINES.items():
        if not method.needs_images:
            expected = legrad.baseline(explainer, name, images, texts)
            torch.testing.assert_close(legrad.baseline(explainer, name, trace, texts), expected, msg=name)


def test_random_grids_follow_the_generator_alone(model, images, texts):
    first, again, other = (all_grids(model, images, texts, seed=seed)["random"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(maps_of(model, "random", images, texts), all_grids(model, images, texts)["random"])


def test_no_prompts_give_no_grids(model, images):
    grids = all_grids(
        model, images, torch.empty(0, EMBED_DIM, dtype=torch.float64), torch.empty(0, dtype=torch.long)
    )
    assert {grid.shape for grid in grids.values()} == {(0, *GRID)}


def fingerprint(model: nn.Module) -> tuple:
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ]
    gradients = [parameter.grad is None for parameter in model.parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return hooks, gradients, flags, model.training, [type(module) for module in model.modules()]


def test_the_model_is_left_as_it_was_found_and_no_map_needs_a_gradient(model, images, texts):
    before, weights = fingerprint(model), copy.deepcopy(model.state_dict())
    assert not any(grids.requires_grad for grids in all_grids(model, images, texts).values())
    assert fingerprint(model) == before
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_in_half_precision_every_map_is_close_to_that_in_single(images, texts):
    model = tiny_clip()
    single = all_grids(model, images.float(), texts.float())
    half = all_grids(model.bfloat16(), images.bfloat16(), texts.bfloat16())
    for name, grids in half.items():
        assert grids.dtype == torch.float32
        # cosines and attention; the others are gradients, whose rounding is relative to their size
        scale = (
            max(1.0, single[name].abs().max().item()) if legrad.BASELINES[name].high else single[name].max()
        )
        assert (grids - single[name]).abs().max() < 0.1 * scale, name


def test_a_trace_of_chosen_blocks_gives_the_maps_of_the_last_ones_or_is_refused(model, images, texts):
    every = legrad.LeGrad(model, layers="all").encode(images)
    explainer = legrad.LeGrad(model, layers=[0, -1])
    for name in ("gradcam", "naclip", "patch_text", "raw_attention"):
        expected = legrad.baseline(explainer, name, images, texts)
        torch.testing.assert_close(legrad.baseline(explainer, name, every, texts), expected, msg=name)
    torch.testing.assert_close(
        legrad.baseline(explainer, "patch_text", explainer.encode(images), texts),
        legrad.baseline(explainer, "patch_text", images, texts),
    )
    with pytest.raises(legrad.InputError, match="expected one with block 1, received blocks 0, 2"):
        legrad.baseline(explainer, "gradcam", explainer.encode(images), texts)
