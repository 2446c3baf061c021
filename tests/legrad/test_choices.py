"""Which layers are explained, at what size maps are returned, and how much memory that takes."""

import pytest
import torch

import legrad
from legrad.calls import bytes_of_image
from tests.helpers.live_memory import LiveMemory
from tests.helpers.oracle import oracle_relevance
from tests.helpers.tiny_models import (
    GRID_HEIGHT,
    GRID_WIDTH,
    LAYERS,
    relative_error,
    tiny_clip,
    tiny_images,
    unit_texts,
)

GRID = (GRID_HEIGHT, GRID_WIDTH)
DOUBLE = torch.float64


@pytest.mark.parametrize(
    ("layers", "indices"),
    [
        (1, [2]),
        (2, [1, 2]),
        ("all", [0, 1, 2]),
        ([0, 2], [0, 2]),
        ([2, 0], [0, 2]),
        ([-1], [2]),
        ((-3, 1), [0, 1]),
        (range(2), [0, 1]),
    ],
)
def test_chosen_layers_are_those_of_autograd_from_first_to_last(layers, indices):
    model = tiny_clip().double()
    images, texts = tiny_images(2, dtype=DOUBLE), unit_texts(2, 3, dtype=DOUBLE)
    expected = oracle_relevance(model, images, texts, LAYERS)[indices].unflatten(-1, GRID)
    explainer = legrad.LeGrad(model, layers=layers)
    assert explainer.layer_indices == tuple(indices)
    trace = explainer.encode(images)
    assert trace.layer_indices == tuple(indices)
    assert relative_error(explainer.relevance(trace, texts, per_layer=True), expected) < 1e-10
    assert relative_error(explainer.relevance(trace, texts), expected.sum(dim=0)) < 1e-10


@pytest.mark.parametrize(
    ("layers", "weights"), [([2, 0], [3.0, 0.5]), (2, (1, 0)), ("all", torch.tensor([0.1, 0.2, 0.3]))]
)
def test_weights_follow_their_layers_in_the_sum_and_nowhere_else(layers, weights):
    model, images, texts = tiny_clip().double(), tiny_images(2, dtype=DOUBLE), unit_texts(3, dtype=DOUBLE)
    explainer = legrad.LeGrad(model, layers=layers, layer_weights=[float(each) for each in weights])
    plain = legrad.LeGrad(model, layers="all").relevance(images, texts, per_layer=True)
    named = layers if isinstance(layers, list) else explainer.layer_indices
    expected = sum(float(weight) * plain[index] for weight, index in zip(weights, named, strict=True))
    torch.testing.assert_close(explainer.relevance(images, texts), expected)
    torch.testing.assert_close(
        explainer.relevance(images, texts, per_layer=True), plain[list(explainer.layer_indices)]
    )


def test_a_trace_of_more_layers_is_explained_for_the_chosen_ones():
    model, images, texts = tiny_clip(), tiny_images(2), unit_texts(3)
    trace = legrad.LeGrad(model, layers="all").encode(images)
    some = legrad.LeGrad(model, layers=[0, 2])
    torch.testing.assert_close(some.relevance(trace, texts), some.relevance(images, texts))


def test_the_authors_map_has_no_weights_of_layers():
    model, images, texts = tiny_clip(), tiny_images(2), unit_texts(3)
    weighted = legrad.LeGrad(model, layer_weights=[1.0, 0.0])
    expected = legrad.LeGrad(model).heatmaps(images, texts)
    assert torch.equal(weighted.heatmaps(images, texts, as_authors=True), expected)
    assert not torch.equal(weighted.heatmaps(images, texts), expected)


def test_choices_follow_a_model_that_changes():
    model = tiny_clip()
    explainer = legrad.LeGrad(model, layers=[-1])
    blocks = model.visual.transformer.resblocks
    model.visual.transformer.resblocks = blocks[:2]
    explainer.relevance(tiny_images(), unit_texts(1))
    assert explainer.layer_indices == (1,)


@pytest.mark.parametrize("normalised_after", [True, False])
def test_maps_have_the_size_of_the_original_image(normalised_after):
    explainer = legrad.LeGrad(tiny_clip())
    if not normalised_after:
        object.__setattr__(explainer.tower, "normalisation", "grid")
    images, texts = tiny_images(3), unit_texts(2)
    trace = explainer.encode(images)
    grids = explainer.relevance(trace, texts)
    how = explainer.tower.normalisation
    received = explainer.heatmaps(trace, texts, output_size=(31, 47))
    assert torch.equal(received, legrad.heatmaps_of(grids, 31, 47, how))
    assert torch.equal(
        explainer.heatmaps(trace, texts, output_size=(12, 20)), explainer.heatmaps(trace, texts)
    )
    sizes = [(31, 47), (5, 60), (31, 47)]
    listed = explainer.heatmaps(trace, texts, output_size=sizes)
    for maps, own, size in zip(listed, grids, sizes, strict=True):
        assert torch.equal(maps, legrad.heatmaps_of(own, *size, how))


def test_ragged_prompts_come_back_by_image_if_every_image_has_a_size_of_its_own():
    explainer = legrad.LeGrad(tiny_clip())
    trace, texts, rows = explainer.encode(tiny_images(3)), unit_texts(5), [2, 0, 2, 2, 0]
    sizes = [(8, 9), (5, 5), (20, 30)]
    whole = explainer.heatmaps(trace, texts, rows, output_size=sizes)
    in_parts = explainer.heatmaps(trace, texts, rows, output_size=sizes, memory_budget_bytes=1)
    assert [tuple(maps.shape) for maps in whole] == [(2, 8, 9), (0, 5, 5), (3, 20, 30)]
    grids = explainer.relevance(trace, texts, rows)
    assert torch.equal(whole[2], legrad.heatmaps_of(grids[[0, 2, 3]], 20, 30, "upsampled"))
    for maps, parts in zip(whole, in_parts, strict=True):
        torch.testing.assert_close(parts, maps, rtol=1e-4, atol=1e-6)


CALLS = {
    "relevance": lambda explainer, *call, **budget: explainer.relevance(*call, **budget),
    "relevance of each layer": lambda explainer, *call, **budget: explainer.relevance(
        *call, per_layer=True, **budget
    ),
    "heat maps": lambda explainer, *call, **budget: explainer.heatmaps(*call, **budget),
    "heat maps without a neutral text's": lambda explainer, *call, **budget: explainer.heatmaps(
        *call, neutral_embedding=unit_texts(1, dtype=DOUBLE, seed=9), **budget
    ),
}
FORMS = {
    "every prompt for every image": (unit_texts(7, dtype=DOUBLE), None),
    "prompts of each image": (unit_texts(5, 3, dtype=DOUBLE), None),
    "ragged": (unit_texts(9, dtype=DOUBLE), torch.tensor([4, 0, 0, 4, 1, 3, 1, 1, 4])),
    "one by one": (unit_texts(5, dtype=DOUBLE), torch.arange(5)),
    "no prompts": (unit_texts(0, dtype=DOUBLE), None),
    "no ragged prompts": (unit_texts(0, dtype=DOUBLE), torch.zeros(0, dtype=torch.int64)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS)
def test_parts_give_what_all_at_once_gives(call, form):
    explainer = legrad.LeGrad(tiny_clip().double(), layers=[0, 2], layer_weights=[1.0, 2.0])
    images = tiny_images(5, dtype=DOUBLE)
    texts, rows = FORMS[form]
    whole = CALLS[call](explainer, images, texts, rows)
    for given in (images, explainer.encode(images)):
        for budget in (1, 3 * bytes_of_image(explainer.tower, explainer.scoring, 15, 2)):
            parts = CALLS[call](explainer, given, texts, rows, memory_budget_bytes=budget)
            torch.testing.assert_close(parts, whole)
            assert parts.stride() == whole.stride() or not parts.numel()


@pytest.mark.medium
@pytest.mark.parametrize("vision", [{}, {"attentional_pool": True, "attn_pooler_heads": 4}])
@pytest.mark.parametrize("affinity", ["none", "keys"])
@pytest.mark.parametrize("call", ["relevance of each layer", "heat maps"])
def test_memory_beside_arguments_and_result_stays_within_the_budget(call, affinity, vision):
    explainer = legrad.LeGrad(tiny_clip(**vision).double(), layers="all", affinity=affinity)
    images, texts = tiny_images(16, dtype=DOUBLE), unit_texts(15, dtype=DOUBLE)
    budget = 2 * bytes_of_image(explainer.tower, explainer.scoring, 15, LAYERS)
    with LiveMemory() as unlimited:
        result = CALLS[call](explainer, images, texts, None)
    with LiveMemory() as limited:
        CALLS[call](explainer, images, texts, None, memory_budget_bytes=budget)
    assert limited.peak_bytes - result.nbytes <= budget
    assert unlimited.peak_bytes - result.nbytes > 1.5 * budget


def test_similarity_encodes_images_and_is_that_of_their_trace():
    explainer = legrad.LeGrad(tiny_clip())
    images, texts = tiny_images(3), unit_texts(2)
    assert torch.equal(
        explainer.similarity(images, texts), explainer.similarity(explainer.encode(images), texts)
    )
    assert explainer.similarity(images[:0], texts).shape == (0, 2)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(
        explainer.similarity(images, texts, rows), explainer.similarity(images, texts)[rows, [0, 1]]
    )
