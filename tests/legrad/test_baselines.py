"""Baselines on tiny seeded models, each against its formula on an explicit forward pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from legrad.errors import InputError
from legrad.families import describe_tower
from legrad.method.trace import Trace, trace_images
from legrad.quality.baselines import (
    attention_rollout,
    baseline_grids,
    centre_prior,
    cls_attention,
    gradcam,
    mean_query_attention,
    patch_text_similarity,
)

DIM, WIDTH, HEADS, GRID = 6, 16, 4, (2, 3)
IMAGE_INDEX = torch.tensor([0, 2, 2, 1])


class TinyClip(nn.Module):
    """Only what the baselines look at: an image tower under the name that open_clip gives it."""

    def __init__(self, seed: int = 0, **settings):
        super().__init__()
        torch.manual_seed(seed)
        self.visual = VisionTransformer(
            image_size=(8, 12),
            patch_size=4,
            width=WIDTH,
            layers=3,
            heads=HEADS,
            mlp_ratio=2,
            output_dim=DIM,
            **settings,
        )
        for parameter in self.visual.parameters():
            nn.init.normal_(parameter, std=0.3)


@pytest.fixture(params=["class token", "mean of patches, norm after"])
def model(request) -> TinyClip:
    mean = request.param != "class token"
    return TinyClip(pool_type="avg" if mean else "tok", final_ln_after_pool=mean).eval().double()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def texts() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return F.normalize(torch.randn(4, DIM, generator=generator, dtype=torch.float64), dim=-1)


def explicit_attention(block: nn.Module, normalised: Tensor) -> Tensor:
    """Attention matrices [batch, heads, queries, keys] from the weights alone."""
    query, key, _ = F.linear(normalised, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    query, key = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key))
    return (query @ key.mT / (WIDTH / HEADS) ** 0.5).softmax(dim=-1)


def traced(model: nn.Module, images: Tensor) -> Trace:
    tower = describe_tower(model)
    return trace_images(tower, images, 2, tower.reference)


def test_rollout_is_the_product_of_every_blocks_attention_halved_with_the_identity(model, images):
    visual = model.visual
    tokens, rollout = visual._embeds(images), torch.eye(1 + GRID[0] * GRID[1], dtype=torch.float64)
    for block in visual.transformer.resblocks:
        attention = explicit_attention(block, block.ln_1(tokens)).mean(dim=1)
        rollout = (attention + torch.eye(attention.shape[-1])) / 2 @ rollout
        tokens = block(tokens)
    tower = describe_tower(model)
    trace = trace_images(tower, images, 3, tower.reference)
    expected = rollout[:, 0, 1:].reshape(3, *GRID).float()
    torch.testing.assert_close(attention_rollout(tower, trace, images), expected)


def test_rollout_wants_every_block(model, images):
    with pytest.raises(InputError, match="all 3 blocks, received 2"):
        attention_rollout(describe_tower(model), traced(model, images), images)


def test_rollout_is_a_baseline_where_the_images_are_given(model, images, texts):
    tower = describe_tower(model)
    trace = trace_images(tower, images, 3, tower.reference)
    names = [
        set(baseline_grids(tower, trace, texts, IMAGE_INDEX, generator=torch.Generator(), images=given))
        for given in (images, None)
    ]
    assert names[0] - names[1] == {"attention rollout"}


def test_attention_maps_are_rows_of_the_explicit_attention_matrix(model, images):
    visual = model.visual
    first, second, last = visual.transformer.resblocks
    tokens = last.ln_1(second(first(visual._embeds(images))))
    attention = explicit_attention(last, tokens).mean(dim=1)
    tower, trace = describe_tower(model), traced(model, images)
    for grids, expected in (
        (cls_attention(tower, trace), attention[:, 0, 1:]),
        (mean_query_attention(tower, trace), attention.mean(dim=1)[:, 1:]),
    ):
        torch.testing.assert_close(grids, expected.reshape(3, *GRID).float())


def test_patch_text_similarity_is_the_cosine_of_each_patch_token(model, images, texts):
    tokens = model.visual.transformer(model.visual._embeds(images))
    grids = patch_text_similarity(describe_tower(model), traced(model, images), texts, IMAGE_INDEX)
    for prompt, image in enumerate(IMAGE_INDEX.tolist()):
        patches = model.visual.ln_post(tokens[image, 1:]) @ model.visual.proj
        expected = F.cosine_similarity(patches, texts[prompt][None]).reshape(GRID)
        torch.testing.assert_close(grids[prompt], expected.float())


def test_gradcam_weighs_channels_by_gradients_of_the_models_own_score(model, images, texts):
    grids = gradcam(describe_tower(model), traced(model, images), texts, IMAGE_INDEX)
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


def test_the_centre_prior_is_highest_in_the_middle_and_symmetric():
    prior = centre_prior(3, 5)
    assert prior.argmax() == 7
    torch.testing.assert_close(prior, prior.flip(0).flip(1))
    assert prior[0, 0] < prior[0, 2] < prior[1, 2]


def all_grids(
    model: nn.Module, images: Tensor, texts: Tensor, index: Tensor, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return baseline_grids(describe_tower(model), traced(model, images), texts, index, generator=generator)


def test_every_baseline_has_one_finite_grid_a_prompt(model, images, texts):
    grids = all_grids(model, images, texts, IMAGE_INDEX)
    assert len(grids) == 9
    for grid in grids.values():
        assert grid.shape == (4, *GRID)
        assert grid.dtype == torch.float32
        assert grid.isfinite().all()


def test_a_batch_gives_what_its_images_give_one_by_one(model, images, texts):
    batched = all_grids(model, images, texts, IMAGE_INDEX)
    for prompt, image in enumerate(IMAGE_INDEX.tolist()):
        single = all_grids(
            model, images[image : image + 1], texts[prompt : prompt + 1], torch.zeros(1, dtype=torch.long)
        )
        for name in set(batched) - {"random"}:
            torch.testing.assert_close(batched[name][prompt], single[name][0], msg=name)


def test_random_grids_follow_the_seed_alone(model, images, texts):
    first, again, other = (all_grids(model, images, texts, IMAGE_INDEX, seed)["random"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_prompts_give_no_grids(model, images):
    grids = all_grids(
        model, images, torch.empty(0, DIM, dtype=torch.float64), torch.empty(0, dtype=torch.long)
    )
    assert {grid.shape for grid in grids.values()} == {(0, *GRID)}


def fingerprint(model: nn.Module) -> tuple:
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ]
    gradients = [parameter.grad is None for parameter in model.parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return hooks, gradients, flags, model.training, [type(module) for module in model.modules()]


def test_the_model_is_left_as_it_was_found(model, images, texts):
    before, weights = fingerprint(model), copy.deepcopy(model.state_dict())
    all_grids(model, images, texts, IMAGE_INDEX)
    assert fingerprint(model) == before
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_text_of_another_dimension_fails_and_leaves_the_model_as_it_was(model, images):
    before = fingerprint(model)
    with pytest.raises(RuntimeError):
        all_grids(model, images, torch.ones(4, DIM + 1, dtype=torch.float64), IMAGE_INDEX)
    assert fingerprint(model) == before


def test_a_trace_of_one_block_is_refused(model, images, texts):
    tower = describe_tower(model)
    trace = trace_images(tower, images, 1, tower.reference)
    with pytest.raises(InputError, match="the last 2 blocks, received block 2"):
        gradcam(describe_tower(model), trace, texts, IMAGE_INDEX)
