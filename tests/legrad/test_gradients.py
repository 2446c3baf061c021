"""The code of legrad/README.md for those who need gradients of relevance."""

import re
from pathlib import Path

import pytest
import torch

import legrad
from tests.helpers.oracle import oracle_relevance
from tests.helpers.tiny_models import relative_error, tiny_clip, tiny_images, unit_texts

README = Path(legrad.__file__).parent / "README.md"


@pytest.fixture
def by_autograd():
    code = re.search(r"```python\n(import torch\n.*?return total\n)", README.read_text(), re.DOTALL)[1]
    namespace = {}
    exec(compile(code, str(README), "exec"), namespace)
    return namespace["differentiable_relevance"]


@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.5}])
def test_the_documented_code_computes_what_the_library_does(vision, by_autograd):
    model = tiny_clip(**vision).double()
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(3, dtype=torch.float64)
    received = by_autograd(model, images, texts, layers=2)
    expected = legrad.LeGrad(model, layers=2).relevance(images, texts)
    assert relative_error(received, expected.flatten(-2)) < 1e-10
    oracle = oracle_relevance(model, images, texts.expand(2, 3, -1), 2).sum(dim=0)
    assert relative_error(received, oracle) < 1e-10


def test_the_documented_code_is_differentiable_and_the_library_is_not(by_autograd):
    model, texts = tiny_clip().double(), unit_texts(2, dtype=torch.float64).requires_grad_()
    images = tiny_images(1, dtype=torch.float64).requires_grad_()
    direction = tiny_images(1, dtype=torch.float64, seed=3)
    by_autograd(model, images, texts).square().sum().backward()
    slope = float((images.grad * direction).sum())
    step = 1e-5
    before, after = (
        float(by_autograd(model, images + sign * step * direction, texts).detach().square().sum())
        for sign in (-1, 1)
    )
    assert abs((after - before) / (2 * step) - slope) < 1e-4 * abs(slope)
    assert texts.grad is not None
    explainer = legrad.LeGrad(model)
    for result in (
        explainer.relevance(images, texts),
        explainer.heatmaps(images, texts),
        explainer.similarity(images, texts),
    ):
        assert not result.requires_grad
