"""Hiding and showing patches by relevance, against loops over patches and areas worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc

import legrad
from legrad.quality.perturbation import (
    SHARES,
    area_under_curve,
    blurred,
    filling_of,
    first_patches,
    perturbed_images,
)
from tests.helpers.tiny_models import tiny_clip, tiny_images, unit_texts

PATCH, GRID = 4, (2, 3)
shares = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
levels = st.lists(st.integers(0, 3), min_size=12, max_size=12)


def grids_of(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(2, *GRID)


def images() -> torch.Tensor:
    return torch.rand(2, 3, GRID[0] * PATCH, GRID[1] * PATCH, generator=torch.Generator().manual_seed(0)) + 1


@settings(max_examples=40)
@given(levels, shares, st.sampled_from(["positive", "negative"]))
def test_the_first_patches_are_the_first_of_a_stable_sort(values, share, order):
    chosen = first_patches(grids_of(values), share, order)
    for grid, marked in zip(grids_of(values), chosen, strict=True):
        sign = -1 if order == "positive" else 1
        ranked = sorted(range(6), key=lambda patch: (sign * grid.flatten()[patch].item(), patch))
        expected = set(ranked[: round(share * 6)])
        assert set(marked.flatten().nonzero().flatten().tolist()) == expected


@settings(max_examples=30)
@given(levels, shares, st.sampled_from(["deletion", "insertion"]), st.sampled_from(["positive", "negative"]))
def test_each_patch_is_either_the_images_or_the_fillings(values, share, test, order):
    shown, filling, grids = images(), -images(), grids_of(values)
    found = perturbed_images(shown, filling, grids, share, test=test, order=order)
    chosen = first_patches(grids, share, order)
    for image in range(2):
        for row, column in np.ndindex(GRID):
            pixels = np.s_[image, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            is_shown = bool(chosen[image, row, column]) == (test == "insertion")
            assert torch.equal(found[pixels], (shown if is_shown else filling)[pixels])


def test_inserting_what_is_most_relevant_is_deleting_what_is_least():
    grids = grids_of([3, 1, 2, 0, 5, 4, 9, 8, 7, 6, 5, 4])
    filling = torch.zeros_like(images())
    inserted = perturbed_images(images(), filling, grids, 2 / 6, test="insertion", order="positive")
    deleted = perturbed_images(images(), filling, grids, 4 / 6, test="deletion", order="negative")
    assert torch.equal(inserted, deleted)


def test_deletion_fills_with_the_mean_colour_and_insertion_with_the_blurred_image():
    assert filling_of(images(), "deletion").abs().max() == 0
    assert torch.equal(filling_of(images(), "insertion"), blurred(images()))


def test_a_blurred_image_keeps_its_mean_and_loses_its_detail():
    noise = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1)) + 0.5
    soft = blurred(noise)
    assert soft.shape == noise.shape
    assert soft.mean().item() == pytest.approx(noise.mean().item(), abs=0.01)
    assert soft.std() < 0.1 * noise.std()
    flat = torch.full((1, 3, 8, 12), 0.7)
    torch.testing.assert_close(blurred(flat), flat)


@given(st.lists(st.floats(-1, 1), min_size=10, max_size=10))
def test_the_area_is_scikit_learns_over_the_range(curve):
    assert area_under_curve(np.array(curve)) == pytest.approx(auc(SHARES, curve) / 0.9, abs=1e-9)


def test_the_area_of_an_unchanged_score_is_the_score_and_of_a_straight_fall_its_mean():
    curves = np.array([np.full(10, 0.4), np.linspace(1, 0, 10)])
    assert area_under_curve(curves) == pytest.approx([0.4, 0.5])


def test_a_map_that_knows_what_the_score_reads_beats_its_own_reverse():
    # the score is the brightness of two patches
    weight = grids_of([0, 9, 0, 5, 0, 0, 0, 0, 9, 0, 5, 0])

    def score(shown: torch.Tensor) -> np.ndarray:
        patches = torch.nn.functional.avg_pool2d(shown.mean(1), PATCH)
        return ((patches * weight).sum((1, 2)) / weight.sum((1, 2))).numpy()

    def area(grids: torch.Tensor, test: str, order: str) -> np.ndarray:
        zeros = torch.zeros_like(images())
        curve = [score(perturbed_images(images(), zeros, grids, s, test=test, order=order)) for s in SHARES]
        return area_under_curve(np.stack(curve, axis=1))

    assert (area(weight, "deletion", "positive") < area(-weight, "deletion", "positive")).all()
    assert (area(weight, "deletion", "negative") > area(weight, "deletion", "positive")).all()
    assert (area(weight, "insertion", "positive") > area(-weight, "insertion", "positive")).all()


def brute_force(explainer, image, grid, text, name, *, filling):
    """The cosines of one map's curve, patch by patch with plain loops and the model's own forward pass."""
    height, width = grid.shape
    rows, columns = image.shape[1] // height, image.shape[2] // width
    sign = -1 if name.endswith("positive") else 1
    order = sorted(range(height * width), key=lambda cell: (sign * grid.flatten()[cell].item(), cell))
    curve = []
    for share in SHARES:
        first = order[: round(share * height * width)]
        shown = image.clone() if name.startswith("deletion") else blurred(image[None])[0]
        for cell in first:
            row, column = divmod(cell, width)
            place = np.s_[:, row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            shown[place] = filling.expand_as(shown)[place] if name.startswith("deletion") else image[place]
        feature = explainer.model.encode_image(shown[None], normalize=True)[0]
        curve.append(float(feature @ text))
    return curve


@pytest.fixture(scope="module")
def explainer() -> legrad.LeGrad:
    return legrad.LeGrad(tiny_clip().double())


@torch.no_grad()
@pytest.mark.parametrize("filling", ["mean", "black"])
def test_the_curves_of_insertion_and_deletion_are_those_of_a_loop_over_patches(explainer, filling):
    shown, texts = tiny_images(2, dtype=torch.float64), unit_texts(3, dtype=torch.float64)
    index = torch.tensor([1, 0, 1])
    grids = explainer.relevance(shown, texts, index)
    transform = explainer.transform
    black = -torch.tensor(transform.mean).double() / torch.tensor(transform.std).double()
    value = torch.zeros(3, dtype=torch.float64) if filling == "mean" else black
    curves = legrad.insertion_deletion(explainer, shown, grids, texts, index, filling=filling, batch_size=2)
    assert list(curves) == [
        "deletion_positive",
        "deletion_negative",
        "insertion_positive",
        "insertion_negative",
    ]
    for name, curve in curves.items():
        expected = [
            brute_force(explainer, shown[image], grid, text, name, filling=value[:, None, None])
            for image, grid, text in zip(index.tolist(), grids, texts, strict=True)
        ]
        np.testing.assert_allclose(curve.score, expected, atol=1e-6)
        np.testing.assert_allclose(
            curve.score_area, [auc(SHARES, each) / 0.9 for each in expected], atol=1e-6
        )
        assert curve.accuracy is None
        assert curve.accuracy_area is None


@torch.no_grad()
def test_a_heat_map_of_pixels_hides_pixel_by_pixel(explainer):
    shown, texts = tiny_images(1, dtype=torch.float64), unit_texts(1, dtype=torch.float64)
    pixels = torch.rand(1, 1, 12, 20, dtype=torch.float64)
    curves = legrad.insertion_deletion(explainer, shown, pixels, texts, tests=["deletion_positive"])
    expected = brute_force(
        explainer, shown[0], pixels[0, 0], texts[0], "deletion_positive", filling=torch.zeros(3, 1, 1)
    )
    np.testing.assert_allclose(curves["deletion_positive"].score[0, 0], expected, atol=1e-6)


@torch.no_grad()
def test_accuracy_counts_the_maps_whose_class_scores_above_its_rivals(explainer):
    shown, texts = tiny_images(2, dtype=torch.float64), unit_texts(3, dtype=torch.float64)
    classes, shares = unit_texts(5, dtype=torch.float64, seed=7), [0.0, 0.5, 1.0]
    grids = explainer.relevance(shown, texts)
    own = torch.tensor([[0, 1, 2], [3, 4, 0]])
    rivals = torch.rand(2, 3, 5) > 0.5
    for some in (None, rivals):
        curves = legrad.insertion_deletion(
            explainer,
            shown,
            grids,
            texts,
            shares=shares,
            tests=["deletion_negative"],
            class_embeddings=classes,
            right_class=own,
            rivals=some,
        )
        curve = curves["deletion_negative"]
        assert curve.is_right.shape == (2, 3, 3)
        for (image, prompt, step), is_right in np.ndenumerate(curve.is_right):
            hidden = perturbed_images(
                shown[image, None],
                torch.zeros(1, 3, 12, 20),
                grids[image, prompt, None],
                shares[step],
                test="deletion",
                order="negative",
            )
            scores = (explainer.model.encode_image(hidden, normalize=True)[0] @ classes.T).tolist()
            best = scores.pop(own[image, prompt])
            counted = range(5) if some is None else some[image, prompt].nonzero().flatten().tolist()
            others = [row for row in range(5) if row != own[image, prompt]]
            assert is_right == all(best > scores[others.index(row)] for row in counted if row in others)
        np.testing.assert_allclose(curve.accuracy, curve.is_right.mean(axis=(0, 1)))
        assert curve.accuracy_area == pytest.approx(auc(shares, curve.accuracy))
