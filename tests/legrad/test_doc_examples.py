"""Every public name has an example in its docstring, which prints on the demo model what it shows."""

import doctest
import inspect
import io
import re
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import legrad
from pipeline.demo import assets

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?(?![\w.])")
# A constant has the docstring of its type.
DOCUMENTED = [
    name
    for name in sorted(legrad.__all__)
    if inspect.isclass(getattr(legrad, name)) or inspect.isroutine(getattr(legrad, name))
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class ToTheDigitsShown(doctest.OutputChecker):
    """Compare decimal numbers to the digits that the docstring shows, whose last one may differ by one."""

    def check_output(self, want, got, optionflags):
        """Compare the output with the numbers of `got` rounded like those of `want`."""
        shown, printed = NUMBER.findall(want), NUMBER.findall(got)
        if len(shown) == len(printed):
            pairs = zip(shown, printed, strict=True)
            close = iter([mine if _is_close(mine, other) else other for mine, other in pairs])
            got = NUMBER.sub(lambda _: next(close), got)
        return super().check_output(want, got, optionflags)


def _is_close(shown, printed):
    digits = len(shown.partition(".")[2])
    return bool(digits) and abs(float(shown) - float(printed)) <= 10.0**-digits


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the examples use, as the docstring of `legrad` says."""
    name, weights = assets.register_demo_model(), str(assets.demo_weights_path())
    explainer = legrad.LeGrad.from_open_clip(name, weights, device="cpu")
    with tarfile.open(assets.demo_shard_paths("heldout")[0]) as shard:
        content = shard.extractfile("heldout-00000.jpg").read()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    pixels, texts = explainer.preprocess([image]), explainer.embed_text(["a banana", "a panda"])
    return {
        "legrad": legrad,
        "np": np,
        "torch": torch,
        "explainer": explainer,
        "image": image,
        "grids": explainer.relevance(pixels, texts)[0],
        "folder": tmp_path_factory.mktemp("examples"),
    }


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_docstring_has_an_example_that_prints_what_it_shows(name, names, monkeypatch):
    # describing all models of open_clip takes long
    monkeypatch.setattr(open_clip, "list_models", lambda: ["RN50", "ViT-B-16"])
    docstring = getattr(legrad, name).__doc__ or ""
    example = doctest.DocTestParser().get_doctest(docstring, dict(names), name, None, 0)
    assert example.examples, f"legrad.{name}: the docstring has no example"
    printed = io.StringIO()
    failed, _ = doctest.DocTestRunner(ToTheDigitsShown(), optionflags=FLAGS).run(example, out=printed.write)
    assert not failed, printed.getvalue()


@pytest.mark.parametrize(
    ("want", "got", "is_right"),
    [
        ("0.25\n", "0.2500001\n", True),
        ("0.25\n", "0.27\n", False),
        ("(2, 0.5)\n", "(2, 0.54)\n", True),
        ("(2, 0.5)\n", "(3, 0.5)\n", False),
        ("torch.Size([1, 2])\n", "torch.Size([1, 3])\n", False),
        ("[1, 2]\n", "[1, 2, 3]\n", False),
    ],
)
def test_numbers_are_compared_to_the_digits_shown(want, got, is_right):
    assert ToTheDigitsShown().check_output(want, got, FLAGS) == is_right
