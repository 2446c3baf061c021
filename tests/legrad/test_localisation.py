"""Localisation of heat maps, against scikit-learn and counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score

import legrad

LEVELS = st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.booleans()), min_size=12, max_size=12)


def arrays(cells):
    heat, truth, valid = (np.array(part).reshape(3, 4) for part in zip(*cells, strict=True))
    return heat.astype(np.float32) / 8, truth, valid | (np.arange(12).reshape(3, 4) == 5)


@given(LEVELS)
def test_a_map_is_measured_as_scikit_learn_measures_its_valid_pixels(cells):
    heat, truth, valid = arrays(cells)
    found = legrad.map_localisation(heat, truth, valid)
    values, labels = heat[valid], truth[valid]
    covered = values > 0.5
    assert found.true_positives + found.false_negatives == labels.sum()
    assert found.true_positives + found.false_positives == covered.sum()
    assert found.true_positives == (covered & labels).sum()
    assert found.true_negatives == (~covered & ~labels).sum()
    assert found.iou == pytest.approx(jaccard_score(labels, covered, zero_division=1))
    both = np.concatenate([~labels, labels]), np.concatenate([1 - values, values])
    assert found.two_class_average_precision == pytest.approx(average_precision_score(*both))
    assert (found.average_precision is None) == (not labels.any())
    if labels.any():
        assert found.average_precision == pytest.approx(average_precision_score(labels, values))
    assert found.is_pointing_hit == labels[list(values).index(max(values))]


@given(st.lists(LEVELS, min_size=1, max_size=4))
def test_scores_of_a_set_are_those_of_all_its_pixels_and_the_mean_over_maps(several):
    maps = [arrays(cells) for cells in several]
    scores = legrad.localisation_scores(legrad.map_localisation(*each) for each in maps)
    covered, labels = (
        np.concatenate([part(*each) for each in maps])
        for part in (lambda heat, _, valid: heat[valid] > 0.5, lambda _, truth, valid: truth[valid])
    )
    assert scores.maps == len(maps)
    assert scores.pixel_accuracy == pytest.approx(accuracy_score(labels, covered))
    iou = [jaccard_score(labels, covered, pos_label=side, zero_division=1) for side in (True, False)]
    assert scores.mean_iou == pytest.approx(np.mean(iou))
    single = [legrad.map_localisation(*each) for each in maps]
    assert scores.foreground_iou == pytest.approx(np.mean([each.iou for each in single]))
    two_class = [each.two_class_average_precision for each in single]
    assert scores.mean_average_precision == pytest.approx(np.mean(two_class))
    assert scores.pointing_game == np.mean([each.is_pointing_hit for each in single])
    defined = [each.average_precision for each in single if each.average_precision is not None]
    assert scores.average_precision == (pytest.approx(np.mean(defined)) if defined else None)


def test_tensors_are_measured_as_arrays_and_the_threshold_is_the_callers():
    heat = torch.tensor([[0.2, 0.6], [0.9, 0.4]])
    truth = heat > 0.5
    assert legrad.map_localisation(heat, truth) == legrad.map_localisation(heat.numpy(), truth.numpy())
    assert legrad.map_localisation(heat, truth).iou == 1
    assert legrad.map_localisation(heat, truth, threshold=0.7).iou == 0.5
