"""Contrast between the texts of an image, against plain loops in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import legrad
from legrad.errors import InputError
from legrad.masks import contrast
from legrad.masks.contrast import (
    contrasted_by_image,
    contrasted_grids,
    distances_by_image,
    text_distances,
)

GRID, DIM = (3, 4), 6


def oracle(grids, images, rows, share, *, others=None, takes=None):
    """The formula, text by text and cell by cell."""
    grids, rows = grids.double().numpy(), rows.double().numpy()
    others = None if others is None else others.double().numpy()
    # without other texts, that of unit rows at a right angle
    usual = [
        2.0 if others is None else np.mean([((row - text) ** 2).sum() for text in others]) for row in rows
    ]
    result = grids.copy()
    for p in range(len(grids)):
        strongest = np.zeros(grids.shape[1:])
        for q in range(len(grids)):
            if q == p or images[q] != images[p] or (takes is not None and not takes[q]):
                continue
            squared = ((rows[p] - rows[q]) ** 2).sum()
            weight = min(1.0, squared / max((usual[p] + usual[q]) / 2, 1e-12))
            strongest = np.maximum(strongest, weight * grids[q])
        result[p] = np.maximum(0, grids[p] - share * strongest)
    return result


def batch_of(counts, seed=0):
    """Raw grids of images with some number of texts each, the image of each grid, and unit rows."""
    generator = torch.Generator().manual_seed(seed)
    maps = sum(counts)
    grids = torch.rand(maps, *GRID, generator=generator) * torch.rand(maps, 1, 1, generator=generator)
    rows = F.normalize(torch.randn(maps, DIM, generator=generator), dim=1)
    return grids, torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)), rows


def flags(generator, count):
    return torch.from_numpy(generator.random(count) < 0.6)


def contrasted(grids, images, rows, **options):
    return contrasted_by_image(grids, images, distances_by_image(rows, images), **options)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=8),
    st.integers(0, 10**6),
    st.sampled_from([10**7, 200, 1]),
)
def test_distances_of_images_with_different_numbers_of_texts_are_those_of_each_image(counts, seed, values):
    _, images, rows = batch_of(counts, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrast, "MAX_VALUES", values)
        found = distances_by_image(rows, images).split([count**2 for count in counts])
    for image, own in enumerate(found):
        expected = text_distances(rows[images == image])
        torch.testing.assert_close(own, expected.flatten(), rtol=0, atol=1e-7)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=8),
    st.integers(0, 10**6),
    st.sampled_from([0.1, 0.5, 1.0]),
    st.sampled_from([10**7, 200, 1]),
)
def test_each_text_loses_a_share_of_the_strongest_other_text_of_its_image(counts, seed, share, values):
    grids, images, rows = batch_of(counts, seed)
    generator = np.random.default_rng(seed)
    others = F.normalize(torch.from_numpy(generator.normal(size=(5, DIM))), dim=1)
    options = {
        "takes": flags(generator, len(grids)),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrast, "MAX_VALUES", values)
        distances = distances_by_image(rows, images, others.mean(0))
        found = contrasted_by_image(grids, images, distances, share=share, **options)
    expected = oracle(grids, images, rows, share, others=others, **options)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=8), st.integers(0, 10**6), st.randoms())
def test_an_image_alone_and_texts_in_another_order_give_the_same_to_the_bit(counts, seed, random):
    grids, images, rows = batch_of(counts, seed)
    found = contrasted(grids, images, rows)
    for image in range(len(counts)):
        own = images == image
        alone = contrasted(grids[own], torch.zeros(int(own.sum()), dtype=torch.int64), rows[own])
        assert torch.equal(found[own], alone)
    order = list(range(len(grids)))
    random.shuffle(order)
    permuted = contrasted(grids[order], images[order], rows[order])
    assert torch.equal(permuted, found[order])


def test_one_text_alone_and_one_from_which_nobody_takes_keep_their_grids_to_the_bit():
    grids, images, rows = batch_of([1, 1, 3])
    grids[0, 0, 0] = -1e-9  # rounding
    found = contrasted(grids, images, rows, takes=torch.tensor([True, True, True, False, False]))
    assert torch.equal(found[:3], grids[:3])
    assert (found[3:] != grids[3:]).any()
    assert torch.equal(contrasted(grids[:2], images[:2], rows[:2]), grids[:2])
    assert contrasted_grids(grids, share=0.0) is grids


def test_equal_texts_take_nothing_from_each_other():
    grids, _, rows = batch_of([2])
    rows[1] = rows[0]
    assert torch.equal(contrasted_grids(grids, text_distances(rows), share=1.0), grids)


def test_a_text_that_others_explain_better_everywhere_has_zeros_and_no_nan():
    grids = torch.stack([torch.rand(GRID), torch.full(GRID, 3.0)])
    found = contrasted_grids(grids)
    assert torch.equal(found[0], torch.zeros(GRID))
    masks = legrad.grid_to_masks(found, 12, 16, legrad.MaskRule("fixed", 0.0))
    assert masks.areas[0] == 0


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_grid_that_is_not_finite_takes_nothing(broken):
    grids, images, rows = batch_of([3, 2])
    without = contrasted(grids[[0, 2, 3, 4]], images[[0, 2, 3, 4]], rows[[0, 2, 3, 4]])
    grids[1, 0, 0] = broken
    found = contrasted(grids, images, rows)
    assert torch.equal(found[[0, 2, 3, 4]], without)
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grids_in_half_precision_are_contrasted_in_single_precision(dtype):
    grids, _, rows = batch_of([4])
    half = grids.to(dtype)
    found = contrasted_grids(half, text_distances(rows))
    assert torch.equal(found, contrasted_grids(half.float(), text_distances(rows)))


def test_a_batch_of_relevance_is_contrasted_image_by_image():
    grids = torch.rand(3, 4, *GRID)
    rows = F.normalize(torch.randn(4, DIM), dim=1)
    found = contrasted_grids(grids, text_distances(rows), share=0.4)
    for image, own in zip(grids, found, strict=True):
        expected = oracle(image, [0] * 4, rows, 0.4)
        np.testing.assert_allclose(own, expected, atol=1e-6)


def test_a_text_that_contains_another_takes_little_of_its_grid_though_all_texts_are_alike():
    """Rows as a text tower makes them: a common direction, and small parts for what the texts name."""
    common, dog, cat, car = torch.eye(4)
    named = {"a dog": dog, "a dog and a cat": (dog + cat) / 2**0.5, "a car": car}
    rows = F.normalize(torch.stack([common + 0.4 * part for part in named.values()]), dim=1)
    assert (rows @ rows.T).min() > 0.8
    distances = text_distances(rows, 0.93 * common.double())
    assert distances[0, 1] < 0.35
    assert distances[0, 2] > 0.9
    assert text_distances(rows)[0, 2] < 0.2
    on_dog = torch.tensor([[1.0, 0.0, 0.0]])
    on_both = torch.tensor([[1.0, 1.0, 0.0]])
    grids = torch.stack([on_dog, on_both, torch.full((1, 3), 0.4)])
    found = contrasted_grids(grids, distances)
    assert found[0, 0, 0] > 0.75
    assert found[1, 0, 0] > 0.75
    assert found[2, 0, 0] == 0


def test_a_text_at_the_centre_and_equal_texts_there_have_finite_distances():
    rows = F.normalize(torch.ones(2, DIM), dim=1)
    assert text_distances(rows, rows[0].double()).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(InputError, match=r"share: expected .* from 0 to 1"):
        contrasted_grids(torch.rand(2, 3, 4), share=share)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_contrasts_as_the_cpu_does():
    grids, images, rows = batch_of([1, 5, 40, 2])
    on_gpu = contrasted(grids.cuda(), images, rows.cuda()).cpu()
    torch.testing.assert_close(on_gpu, contrasted(grids, images, rows))
