"""The class LeGrad: its results, its errors, and that it does not change the model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import legrad
from legrad.inputs import as_ragged
from tests.helpers.oracle import oracle_relevance
from tests.helpers.refusals import messages_of
from tests.helpers.tiny_models import (
    EMBED_DIM,
    GRID_HEIGHT,
    GRID_WIDTH,
    IMAGE_SIZE,
    tiny_clip,
    tiny_images,
    unit_texts,
)

GRID = (GRID_HEIGHT, GRID_WIDTH)


def test_heatmaps_are_the_upsampled_grids_from_zero_to_one():
    model = tiny_clip().double()
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, 3, dtype=torch.float64)
    grids = oracle_relevance(model, images, texts, 2).sum(dim=0).unflatten(-1, GRID)
    pixels = F.interpolate(grids, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    lowest, highest = pixels.amin(dim=(-2, -1), keepdim=True), pixels.amax(dim=(-2, -1), keepdim=True)
    heatmaps = legrad.LeGrad(model).heatmaps(images, texts)
    torch.testing.assert_close(heatmaps, (pixels - lowest) / (highest - lowest))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8, 1.0])
def test_patches_where_the_neutral_text_is_high_are_zeroed_before_normalising(threshold):
    model = tiny_clip().double()
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, 3, dtype=torch.float64)
    neutral = unit_texts(1, dtype=torch.float64, seed=9)
    grids = oracle_relevance(model, images, texts, 2).sum(dim=0).unflatten(-1, GRID)
    (neutral_grids,) = oracle_relevance(model, images, neutral.expand(2, 1, -1), 2).sum(dim=0).split(2)
    for image in range(2):
        own = neutral_grids[image, 0]
        high = (own - own.min()) / (own.max() - own.min()) > threshold
        grids[image][:, high.unflatten(-1, GRID)] = 0
    pixels = F.interpolate(grids, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    lowest, highest = pixels.amin(dim=(-2, -1), keepdim=True), pixels.amax(dim=(-2, -1), keepdim=True)
    expected = (pixels - lowest) / (highest - lowest)

    explainer = legrad.LeGrad(model)
    trace = explainer.encode(images)
    received = explainer.heatmaps(trace, texts, neutral_embedding=neutral, neutral_threshold=threshold)
    torch.testing.assert_close(received, expected)
    rows = torch.tensor([1, 0, 1])
    ragged = explainer.heatmaps(
        trace, texts[rows, torch.arange(3)], rows, neutral_embedding=neutral[0], neutral_threshold=threshold
    )
    torch.testing.assert_close(ragged, expected[rows, torch.arange(3)])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_an_index_of_any_signed_dtype_names_images_also_beside_a_neutral_text(dtype):
    explainer = legrad.LeGrad(tiny_clip())
    images, texts, rows = tiny_images(2), unit_texts(2), torch.tensor([1, 0])
    expected = explainer.heatmaps(images, texts, rows, neutral_embedding=texts[:1])
    assert torch.equal(
        explainer.heatmaps(images, texts, rows.to(dtype), neutral_embedding=texts[:1]), expected
    )


def test_an_index_that_is_a_column_of_pairs_reaches_the_kernels_in_one_piece():
    pairs = torch.tensor([[1, 9], [0, 9], [1, 9]])
    prompts = as_ragged(torch.zeros(2, EMBED_DIM), unit_texts(3), pairs[:, 0])
    assert prompts.image_index.is_contiguous()
    assert prompts.image_index.tolist() == [1, 0, 1]


def test_a_constant_map_gives_zeros():
    model = tiny_clip()
    for block in model.visual.transformer.resblocks:
        block.attn.in_proj_weight.data[64:] = 0  # the same values at every token
    explainer = legrad.LeGrad(model)
    trace = explainer.encode(tiny_images())
    grids = explainer.relevance(trace, unit_texts(2))
    assert (grids == grids[..., :1, :1]).all()
    assert grids.max() > 0
    assert torch.equal(explainer.heatmaps(trace, unit_texts(2)), torch.zeros(2, 2, *IMAGE_SIZE))


def test_similarity_is_the_models_own_cosine():
    model = tiny_clip()
    images, texts = tiny_images(3), unit_texts(4)
    with torch.no_grad():
        expected = model.encode_image(images, normalize=True) @ texts.T
    explainer = legrad.LeGrad(model)
    torch.testing.assert_close(explainer.similarity(explainer.encode(images), texts), expected)


def test_images_are_encoded_once_however_many_prompts(monkeypatch):
    model, passes = tiny_clip(), []
    convolve = model.visual.conv1.forward
    monkeypatch.setattr(model.visual.conv1, "forward", lambda images: passes.append(1) or convolve(images))
    explainer = legrad.LeGrad(model)
    passes.clear()  # a new explainer compares the model with itself once
    trace = explainer.encode(tiny_images())
    explainer.relevance(trace, unit_texts(5))
    explainer.heatmaps(trace, unit_texts(5), neutral_embedding=unit_texts(1))
    explainer.similarity(trace, unit_texts(5))
    assert len(passes) == 1


def _state(model: nn.Module) -> dict[str, object]:
    """All of a model that a careless caller could change."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()},
        "flags": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ],
        "random": torch.get_rng_state(),
        "grad_enabled": torch.is_grad_enabled(),
    }


def _assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = _state(model)
    for name in ("weights", "random"):
        torch.testing.assert_close(after.pop(name), before[name], rtol=0, atol=0, equal_nan=True)
    assert after == {name: before[name] for name in after}


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_bit_for_bit_as_it_was(training):
    model = tiny_clip(patch_dropout=0.5).train(training)
    model.visual.conv1.requires_grad_(False)
    before = _state(model)
    legrad.LeGrad(model, layers="all").heatmaps(tiny_images(), unit_texts(2), neutral_embedding=unit_texts(1))
    _assert_unchanged(model, before)


class _FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(context, inputs):
        return inputs * 1

    @staticmethod
    def backward(context, gradients):
        raise RuntimeError("planted in the backward pass")


class _FailsInForward(nn.Module):
    def forward(self, inputs):
        raise RuntimeError("planted in the forward pass")


class _FailingDerivative(nn.Module):
    def forward(self, inputs):
        return _FailsInBackward.apply(inputs)


@pytest.mark.parametrize("fault", [_FailsInForward(), _FailingDerivative()])
def test_the_model_is_left_bit_for_bit_as_it_was_after_an_exception(fault):
    model = tiny_clip().train()
    model.visual.transformer.resblocks[-1].mlp.gelu = fault
    before = _state(model)
    with pytest.raises((RuntimeError, legrad.UnsupportedModelError), match="planted"):
        legrad.LeGrad(model).relevance(tiny_images(), unit_texts(2))
    _assert_unchanged(model, before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_callers_gradient_mode_changes_nothing(mode):
    explainer = legrad.LeGrad(tiny_clip())
    images, texts = tiny_images(), unit_texts(2)
    expected = explainer.relevance(images, texts)
    with mode():
        received = explainer.relevance(images.clone(), texts.clone())
    torch.testing.assert_close(received.clone(), expected)
    assert not received.requires_grad


def test_autocast_does_not_act():
    explainer = legrad.LeGrad(tiny_clip())
    images, texts = tiny_images(), unit_texts(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        received = explainer.relevance(images, texts)
    assert torch.equal(received, explainer.relevance(images, texts))


def test_weights_that_are_loaded_later_are_followed():
    model, other = tiny_clip(), tiny_clip(quick_gelu=False)
    explainer = legrad.LeGrad(model)
    for parameter in other.parameters():
        parameter.data *= 1.1
    model.load_state_dict(other.state_dict(), assign=True)
    images, texts = tiny_images(), unit_texts(2)
    torch.testing.assert_close(
        explainer.relevance(images, texts), legrad.LeGrad(other).relevance(images, texts)
    )


REFUSALS = {
    "explainer = LeGrad(model, layers=0)": "layers: expected 'all' or a number from 1 to 3, received 0",
    "LeGrad(model, layers=4)": "layers: expected 'all' or a number from 1 to 3, received 4",
    "LeGrad(model, layers='last')": "layers: expected 'all' or a number from 1 to 3, received 'last'",
    "LeGrad(model, layers=True)": "layers: expected 'all' or a number from 1 to 3, received True",
    "LeGrad(model, pool='max')": "pool: expected 'reference' or 'model', received 'max'",
    "explainer.encode(images[0])": "images: expected [batch, 3, height, width], received [3, 12, 20]",
    "explainer.encode(images[:, :2])": "images: expected [batch, 3, height, width], received [2, 2, 12, 20]",
    "explainer.encode(images[..., :-1])": (
        "images: expected height and width as multiples of 4, received 12 x 19"
    ),
    "explainer.encode(images[..., :0])": (
        "images: expected height and width as multiples of 4, received 12 x 0"
    ),
    "explainer.encode(images.double())": (
        "images: expected torch.float32, as the model's weights, received torch.float64"
    ),
    "explainer.encode(images.byte())": (
        "images: expected torch.float32, as the model's weights, received torch.uint8"
    ),
    "explainer.encode(images.to('meta'))": "images: expected device cpu, as the model, received meta",
    "explainer.relevance(trace, texts[:, :7])": (
        "text_embeddings: expected [batch, prompts, 24] or [prompts, 24], received [3, 7]"
    ),
    "explainer.relevance(trace, texts[0])": (
        "text_embeddings: expected [batch, prompts, 24] or [prompts, 24], received [24]"
    ),
    "explainer.relevance(trace, texts.expand(5, 3, 24))": (
        "text_embeddings [batch, prompts, embed_dim]: expected 2 images, as encoded, received [5, 3, 24]"
    ),
    "explainer.relevance(trace, texts.long())": (
        "text_embeddings: expected a floating-point dtype, received torch.int64"
    ),
    "explainer.relevance(trace, texts.to('meta'))": (
        "text_embeddings: expected device cpu, as the images, received meta"
    ),
    "explainer.relevance(trace, texts * 0)": "text_embeddings: expected rows of finite length above zero",
    "explainer.relevance(trace, texts / 0)": "text_embeddings: expected rows of finite length above zero",
    "explainer.relevance(trace, texts, torch.tensor([0, 1]))": (
        "image_index: expected text_embeddings [prompts, embed_dim] and image_index [prompts], "
        "received [3, 24] and [2]"
    ),
    "explainer.relevance(trace, texts.expand(2, 3, 24), torch.tensor([0, 1]))": (
        "image_index: expected text_embeddings [prompts, embed_dim] and image_index [prompts], "
        "received [2, 3, 24] and [2]"
    ),
    "explainer.relevance(trace, texts, torch.tensor([0, 1, 2]))": (
        "image_index: expected rows from 0 to 1, received 0 to 2"
    ),
    "explainer.similarity(trace, texts, torch.tensor([0, -1, 1]))": (
        "image_index: expected rows from 0 to 1, received -1 to 1"
    ),
    "explainer.heatmaps(trace, texts, torch.tensor([0.0, 1.0, 1.0]))": (
        "image_index: expected an integer dtype, received torch.float32"
    ),
    "explainer.heatmaps(trace, texts, neutral_embedding=texts[0], neutral_threshold=1.5)": (
        "neutral_threshold: expected a value from 0 to 1, received 1.5"
    ),
    "explainer.heatmaps(trace, texts, neutral_embedding=texts[0, :5])": (
        "neutral_embedding: expected one embedding [24] or [1, 24], received [5]"
    ),
}


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    """What each call of REFUSALS says, in one run where shapes are not checked, as for users."""
    setup = """
import torch
from legrad import InputError, LeGrad
from tests.helpers.tiny_models import *

model, images, texts = tiny_clip(), tiny_images(2), unit_texts(3)
explainer = LeGrad(model)
trace = explainer.encode(images)
"""
    return messages_of(REFUSALS, setup)


@pytest.mark.parametrize("call", REFUSALS)
def test_what_does_not_fit_is_refused_with_what_was_expected_and_received(call, messages):
    assert messages.get(call, "nothing was refused").startswith(REFUSALS[call])
