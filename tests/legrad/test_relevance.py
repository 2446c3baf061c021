"""The closed form against plain autograd, and the properties that any use of it relies on."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import legrad
from legrad.inputs import as_ragged
from legrad.method.relevance import relevance_grids
from legrad.method.stages import activation_derivative
from tests.helpers.oracle import oracle_relevance
from tests.helpers.processes import python_path
from tests.helpers.tiny_models import (
    EMBED_DIM,
    GRID_HEIGHT,
    GRID_WIDTH,
    LAYERS,
    relative_error,
    tiny_clip,
    tiny_images,
    unit_texts,
)

GRID = (GRID_HEIGHT, GRID_WIDTH)
CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
NORM_THEN_MEAN = {"pool_type": "avg"}


@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"ls_init_value": 0.5},
        {"act_kwargs": {"approximate": "tanh"}},
        {"mlp_ratio": 2.5},
        CLIPA,
        NORM_THEN_MEAN,
    ],
    ids=["plain", "layer_scale", "tanh_gelu", "narrow_mlp", "clipa", "norm_then_mean"],
)
def test_every_layer_equals_autograd_on_the_attention_matrix(vision, quick_gelu, pool):
    if quick_gelu and "act_kwargs" in vision:
        vision = {}
    model = tiny_clip(quick_gelu=quick_gelu, **vision).double()
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, 3, dtype=torch.float64)
    expected = oracle_relevance(model, images, texts, LAYERS, pool)
    received = legrad.LeGrad(model, layers="all", pool=pool).relevance(images, texts, per_layer=True)
    assert received.dtype == torch.float64
    assert relative_error(received.flatten(-2), expected) < 1e-10


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(), nn.Tanh()])
def test_any_elementwise_activation_is_differentiated(activation):
    model = tiny_clip().double()
    for block in model.visual.transformer.resblocks:
        block.mlp.gelu = activation
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, 2, dtype=torch.float64)
    received = legrad.LeGrad(model).relevance(images, texts, per_layer=True)
    assert relative_error(received.flatten(-2), oracle_relevance(model, images, texts, 2)) < 1e-10


def test_layers_sum_to_the_merged_map():
    explainer = legrad.LeGrad(tiny_clip(), layers="all")
    trace = explainer.encode(tiny_images())
    per_layer = explainer.relevance(trace, unit_texts(2, 3), per_layer=True)
    assert per_layer.shape == (LAYERS, 2, 3, *GRID)
    torch.testing.assert_close(per_layer.sum(dim=0), explainer.relevance(trace, unit_texts(2, 3)))


def test_fewer_layers_are_the_last_of_all_layers():
    model, images, texts = tiny_clip(), tiny_images(), unit_texts(3)
    every = legrad.LeGrad(model, layers="all").relevance(images, texts, per_layer=True)
    last = legrad.LeGrad(model, layers=1).relevance(images, texts, per_layer=True)
    torch.testing.assert_close(last[0], every[-1])


def test_a_batch_equals_its_singles():
    explainer = legrad.LeGrad(tiny_clip())
    images, texts = tiny_images(4), unit_texts(4, 3)
    singles = [explainer.relevance(images[i : i + 1], texts[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(explainer.relevance(images, texts), torch.cat(singles), rtol=1e-4, atol=1e-9)


def test_prompts_without_a_batch_axis_are_explained_for_every_image():
    explainer = legrad.LeGrad(tiny_clip())
    images, texts = tiny_images(3), unit_texts(2)
    torch.testing.assert_close(
        explainer.relevance(images, texts), explainer.relevance(images, texts.expand(3, -1, -1))
    )


@settings(deadline=None, max_examples=15)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=4), data=st.data())
def test_ragged_prompts_in_any_order_equal_padded_ones(counts, data):
    explainer = legrad.LeGrad(tiny_clip())
    trace = explainer.encode(tiny_images(len(counts)))
    padded = unit_texts(len(counts), max(counts) + 1)
    pairs = data.draw(st.permutations([(i, p) for i, count in enumerate(counts) for p in range(count)]))
    rows = torch.tensor([i for i, _ in pairs], dtype=torch.int64)
    columns = torch.tensor([p for _, p in pairs], dtype=torch.int64)
    ragged = explainer.relevance(trace, padded[rows, columns], image_index=rows)
    assert ragged.shape == (len(pairs), *GRID)
    torch.testing.assert_close(
        ragged, explainer.relevance(trace, padded)[rows, columns], rtol=1e-4, atol=1e-9
    )
    similarity = explainer.similarity(trace, padded[rows, columns], image_index=rows)
    torch.testing.assert_close(similarity, explainer.similarity(trace, padded)[rows, columns])


@settings(deadline=None, max_examples=10)
@given(budget=st.integers(1, 40_000))
def test_no_memory_budget_changes_the_result(budget):
    explainer = legrad.LeGrad(tiny_clip())
    trace = explainer.encode(tiny_images(2))
    prompts = as_ragged(trace.image_features, unit_texts(2, 4), None)
    arguments = (explainer.tower, trace, prompts.unit_rows, prompts.image_index)
    chunked = relevance_grids(*arguments, scoring=explainer.scoring, memory_budget_bytes=budget)
    whole = relevance_grids(*arguments, scoring=explainer.scoring)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize(
    "vision", [{}, CLIPA, NORM_THEN_MEAN, {"attentional_pool": True, "attn_pooler_heads": 4}]
)
def test_images_together_as_on_a_gpu_equal_one_image_at_a_time(vision, pool):
    explainer = legrad.LeGrad(tiny_clip(**vision), layers="all", pool=pool)
    trace = explainer.encode(tiny_images(3))
    prompts = as_ragged(trace.image_features, unit_texts(7), torch.tensor([2, 0, 0, 2, 1, 2, 0]))
    arguments = (explainer.tower, trace, prompts.unit_rows, prompts.image_index)
    together, apart = (
        relevance_grids(*arguments, scoring=explainer.scoring, one_image_at_a_time=one)
        for one in (False, True)
    )
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-9)


COMPILED_BESIDE_PLAIN = """
import torch
from tests.helpers.tiny_models import tiny_clip, tiny_images, unit_texts
import legrad

model, images = tiny_clip(), tiny_images(2)
plain, compiled = legrad.LeGrad(model), legrad.LeGrad(model, compile=True)
for prompts in (1, 3):
    texts = unit_texts(2, prompts)
    expected = plain.relevance(images, texts)
    torch.testing.assert_close(compiled.relevance(images, texts), expected, rtol=1e-4, atol=1e-9)
"""


@pytest.mark.slow
def test_compiled_relevance_equals_the_plain_one():
    # In a process of its own: what checks shapes in tests cannot be compiled.
    subprocess.run(
        [sys.executable, "-c", COMPILED_BESIDE_PLAIN],
        check=True,
        env=os.environ | {"PYTHONPATH": python_path()},
    )


class _Operations(TorchDispatchMode):
    """Notes the name of every operation that runs, and the largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest_bytes = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(result, torch.Tensor):
            self.largest_bytes = max(self.largest_bytes, result.numel() * result.element_size())
        return result


def test_the_product_of_queries_and_keys_is_never_held_for_all_prompts():
    explainer = legrad.LeGrad(tiny_clip())
    trace = explainer.encode(tiny_images(1, size=(64, 64)))
    prompts = as_ragged(trace.image_features, unit_texts(1, 32), None)
    budget, tokens, heads = 300_000, 257, 4
    with _Operations() as operations:
        relevance_grids(
            explainer.tower,
            trace,
            prompts.unit_rows,
            prompts.image_index,
            scoring=explainer.scoring,
            memory_budget_bytes=budget,
        )
    assert 32 * heads * tokens * tokens * 4 > 100 * budget
    assert operations.largest_bytes <= budget


def test_attention_stays_fused_in_every_block():
    explainer = legrad.LeGrad(tiny_clip(), layers="all")
    with _Operations() as operations:
        explainer.relevance(tiny_images(), unit_texts(2))
    assert not {name for name in operations.names if "softmax" in name}
    assert {name for name in operations.names if "scaled_dot_product" in name}


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_zero_prompts_give_an_empty_result_of_the_right_shape(leading):
    explainer = legrad.LeGrad(tiny_clip())
    trace = explainer.encode(tiny_images(2))
    texts = torch.zeros(*leading, EMBED_DIM)
    assert explainer.relevance(trace, texts).shape == (2, 0, *GRID)
    assert explainer.relevance(trace, texts, per_layer=True).shape == (2, 2, 0, *GRID)
    assert explainer.heatmaps(trace, texts).shape == (2, 0, 12, 20)
    assert explainer.similarity(trace, texts).shape == (2, 0)
    ragged = explainer.relevance(trace, torch.zeros(0, EMBED_DIM), torch.zeros(0, dtype=torch.int64))
    assert ragged.shape == (0, *GRID)


def test_zero_images_give_an_empty_result():
    explainer = legrad.LeGrad(tiny_clip())
    assert explainer.relevance(tiny_images(0), unit_texts(3)).shape == (0, 3, *GRID)


def test_text_of_any_length_means_its_direction():
    explainer = legrad.LeGrad(tiny_clip())
    trace, texts = explainer.encode(tiny_images()), unit_texts(3)
    torch.testing.assert_close(explainer.relevance(trace, 7.5 * texts), explainer.relevance(trace, texts))
    torch.testing.assert_close(explainer.similarity(trace, 7.5 * texts), explainer.similarity(trace, texts))


def test_a_text_equal_to_the_pooled_feature_has_no_gradient_and_gives_no_number_that_is_none():
    model = tiny_clip().double()
    explainer = legrad.LeGrad(model, layers=1, pool="model")
    trace = explainer.encode(tiny_images(2, dtype=torch.float64))
    own = explainer.relevance(trace, trace.image_features, torch.arange(2))
    other = explainer.relevance(trace, unit_texts(2, dtype=torch.float64), torch.arange(2))
    assert own.isfinite().all()
    assert own.max() < 1e-12 * other.max()


@pytest.mark.parametrize("pure", [False, True], ids=["weights of norms in fp32", "all weights in half"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_is_right_to_its_own_rounding(dtype, tolerance, pure):
    reference = tiny_clip(cast_dtype=None if pure else dtype)
    model = tiny_clip(cast_dtype=None if pure else dtype)
    if pure:
        model.to(dtype)
    else:
        open_clip_convert(model, dtype)
    images, texts = tiny_images(2), unit_texts(2, 3)
    expected = legrad.LeGrad(reference).relevance(images, texts)
    received = legrad.LeGrad(model).relevance(images.to(dtype), texts)
    assert received.dtype == torch.float32
    assert relative_error(received, expected) < tolerance


def test_tiny_gradients_survive_half_precision():
    # A mean over 1025 tokens and a head that hardly looks at it: gradients too small for float16 as they are.
    model = tiny_clip()
    model.visual.ln_post.weight.data *= 3e-4
    model.visual.ln_post.bias.data += 1
    images, texts = tiny_images(1, size=(128, 128)), unit_texts(1)
    expected = legrad.LeGrad(model).relevance(images, texts)
    received = legrad.LeGrad(model.half()).relevance(images.half(), texts)
    assert expected.max() < torch.finfo(torch.float16).tiny
    assert relative_error(received, expected) < 0.02


def open_clip_convert(model, dtype):
    from open_clip.model import convert_weights_to_lp

    convert_weights_to_lp(model, dtype)


def test_the_derivative_of_an_activation_holds_for_tensors_made_in_inference_mode():
    with torch.inference_mode():
        inputs = torch.linspace(-2, 2, 9)
        derivative = activation_derivative(nn.Tanh(), inputs)
    torch.testing.assert_close(derivative.clone(), 1 - torch.tanh(torch.linspace(-2, 2, 9)) ** 2)
