"""Classes are found by index or name, and an unknown one is answered with those near it."""

import numpy as np
import pytest
import torch

import legrad
from legrad.classes import as_class_index, class_rows, find_class, logits_of

NAMES = ("tench, Tinca tinca", "goldfish", "tabby, tabby_cat", "crane", "crane", "7")


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ("goldfish", 1),
        ("GOLDFISH ", 1),
        ("tinca tinca", 0),
        ("tench, Tinca tinca", 0),
        ("tabby cat", 2),
        ("Tabby_Cat", 2),
        ("4", 4),
        (3, 3),
        ("7", 5),
    ],
)
def test_a_class_is_found_by_index_by_name_and_by_synonym(wanted, index):
    assert find_class(wanted, len(NAMES), NAMES) == index


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("goldfihs", r"no class is named 'goldfihs'; nearest: 1 \(goldfish\)"),
        ("cat", r"no class is named 'cat'; nearest: 2 \(tabby, tabby_cat\)"),
        ("zzz", r"no class is named 'zzz'; give an index from 0 to 5"),
        ("", r"no class is named ''; give an index"),
        ("crane", r"'crane' is the name of several classes: 3 \(crane\); 4 \(crane\)"),
        ("6", r"class 6: the model has 6 classes, from 0 to 5"),
        ("-1", "no class is named '-1'"),
    ],
)
def test_an_unknown_class_is_answered_with_those_near_it(wanted, message):
    with pytest.raises(legrad.InputError, match=message):
        find_class(wanted, len(NAMES), NAMES)


def test_without_names_only_indices_are_known():
    assert find_class("3", 5, None) == 3
    with pytest.raises(
        legrad.InputError, match="the names of this model's classes are not known: give an index"
    ):
        find_class("cat", 5, None)


@pytest.mark.parametrize(
    ("class_index", "shape"),
    [
        (3, [1]),
        (np.int64(3), [1]),
        ([3, 0], [2]),
        ((), [0]),
        (np.array([3, 0]), [2]),
        (torch.tensor([[3], [0]]), [2, 1]),
        ([[3, 1, 1], [0, 2, 4]], [2, 3]),
        (torch.tensor([3, 0], dtype=torch.uint8), [2]),
    ],
)
def test_a_class_index_is_a_number_a_list_or_one_list_for_each_image(class_index, shape):
    logits = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    index = as_class_index(class_index, logits)
    rows = class_rows(class_index, logits)
    assert list(index.shape) == shape
    assert list(rows.shape) == [*shape, 5]
    assert torch.equal(rows.argmax(dim=-1) if index.numel() else index, index)
    if len(shape) == 1:
        assert torch.equal(logits_of(logits, class_index, None), logits @ rows.T)
    else:
        assert torch.equal(logits_of(logits, class_index, None), (logits[:, None] * rows).sum(dim=-1))


@pytest.mark.parametrize(
    ("class_index", "message"),
    [
        (5, "from 0 to 4, as the model has 5 classes, received 5"),
        ([0, -1], "received -1"),
        (1.5, "expected whole numbers from 0 to 4, received 1.5"),
        (True, "expected whole numbers from 0 to 4, received True"),
        ("cat", "class_index: expected whole numbers, .*received 'cat'"),
        (["cat", 1], "received \\['cat', 1\\]"),
        ([[1], [2], [3]], r"with a batch of 2, received \[3, 1\]"),
        ([[[1]]], r"received \[1, 1, 1\]"),
        ([[1], [2, 3]], "class_index: expected whole numbers"),
        (None, "class_index: expected whole numbers, .*received None"),
    ],
)
def test_a_class_index_that_does_not_fit_is_refused(class_index, message):
    with pytest.raises(legrad.InputError, match=message):
        class_rows(class_index, torch.zeros(2, 5))


@pytest.mark.parametrize(
    ("class_index", "image_index", "message"),
    [
        ([[1], [2]], torch.tensor([0, 1]), r"image_index: expected class_index \[classes\]"),
        ([1, 2], torch.tensor([0]), r"received \[2\] and \[1\]"),
        ([1, 2], torch.tensor([0.0, 1.0]), "expected an integer dtype"),
        ([1, 2], torch.tensor([0, 2]), "expected rows from 0 to 1"),
        ([1, 2], torch.tensor([0, -1]), "expected rows from 0 to 1"),
        (None, torch.tensor([0]), "expected a class_index with it"),
    ],
)
def test_an_image_index_that_does_not_fit_the_classes_is_refused(class_index, image_index, message):
    with pytest.raises(legrad.InputError, match=message):
        logits_of(torch.zeros(2, 5), class_index, image_index)


def test_logits_of_pairs_are_those_of_each_class_for_its_image():
    logits = torch.arange(10.0).reshape(2, 5)
    assert logits_of(logits, [4, 0, 2], torch.tensor([0, 1, 1])).tolist() == [4, 5, 7]
