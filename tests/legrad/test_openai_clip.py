"""OpenAI's `clip` package, and its archives by their state: against open_clip with the same weights."""

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

import legrad
from tests.helpers.oracle import oracle_relevance
from tests.helpers.tiny_models import (
    EMBED_DIM,
    LAYERS,
    PATCH,
    fill,
    relative_error,
    tiny_images,
    unit_texts,
)

SIDE = 4 * PATCH
VISION = {"layers": LAYERS, "width": 128, "head_width": 64, "patch_size": PATCH, "image_size": SIDE}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
NAMES = ["a cat", "two dogs and a red ball"]
# The numbers that OpenAI's archives hold beside the weights.
SETTINGS = {"input_resolution": SIDE, "context_length": 77, "vocab_size": 49408}


def _in_open_clip() -> nn.Module:
    return fill(open_clip.CLIP(EMBED_DIM, VISION, TEXT, quick_gelu=True)).eval()


class _Archive(nn.Module):
    """The state of a model under OpenAI's names, with a forward pass of its own that must not run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, _with_tensors_of(child))
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(self, name, nn.Parameter(getattr(model, name).detach()))
        for name, number in SETTINGS.items():
            self.register_buffer(name, torch.tensor(number))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("code of the archive was run")


def _with_tensors_of(module: nn.Module) -> nn.Module:
    """A tree of plain modules with the same names and tensors, which TorchScript can compile."""
    copied = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        copied.register_parameter(name, nn.Parameter(parameter.detach()))
    for name, child in module.named_children():
        copied.add_module(name, _with_tensors_of(child))
    return copied


def _state_of_archive(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict() | {name: torch.tensor(number) for name, number in SETTINGS.items()}


def _inputs(dtype=torch.float64, size=(SIDE, SIDE)):
    return tiny_images(2, size=size, dtype=dtype), unit_texts(2, 3, dtype=dtype)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_an_archive_is_explained_by_its_state_and_none_of_its_code_is_run():
    model = _in_open_clip().double()
    archive = torch.jit.script(_Archive(model))
    images, texts = _inputs()
    explainer = legrad.LeGrad(archive, layers="all")
    received = explainer.relevance(images, texts, per_layer=True).flatten(-2)
    assert relative_error(received, oracle_relevance(model, images, texts, LAYERS)) < 1e-12
    expected = nn.functional.normalize(model.encode_text(SimpleTokenizer()(NAMES)), dim=-1)
    assert relative_error(explainer.embed_text(NAMES), expected) < 1e-12


def test_a_state_shares_its_weights_with_the_explained_model():
    state = _state_of_archive(_in_open_clip().double())
    images, texts = _inputs(size=(3 * PATCH, 5 * PATCH))
    explainer = legrad.LeGrad(state)
    before = explainer.relevance(images, texts)
    assert explainer.model.visual.proj.data_ptr() == state["visual.proj"].data_ptr()
    state["visual.proj"].mul_(torch.linspace(0.5, 2, EMBED_DIM))
    assert relative_error(explainer.relevance(images, texts), before) > 1e-3


def test_a_state_in_half_precision_stays_as_it_is():
    model = _in_open_clip()
    images, texts = _inputs(torch.float32)
    expected = legrad.LeGrad(model).relevance(images, texts)
    open_clip.model.convert_weights_to_lp(model, torch.float16)
    explainer = legrad.LeGrad(_state_of_archive(model))
    assert explainer.dtype == torch.float16
    assert relative_error(explainer.relevance(images.half(), texts), expected) < 0.01


STATES = {
    "something else": (
        {name: torch.tensor(1) for name in (*SETTINGS, "weight")},
        "KeyError: 'visual.conv1.weight'",
    ),
    "empty": ({}, "KeyError: 'input_resolution'"),
    "of no archive": (_in_open_clip().state_dict(), "'input_resolution'.*another activation"),
}


@pytest.mark.parametrize("case", STATES)
def test_another_state_is_refused_with_the_way_out(case):
    state, said = STATES[case]
    with pytest.raises(legrad.UnsupportedModelError, match=f"(?s)OpenAI's clip.*{said}.*Way out"):
        legrad.LeGrad(state)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_state_whose_names_or_shapes_do_not_fit_is_refused(change):
    state = _state_of_archive(_in_open_clip())
    if change == "missing":
        del state["visual.ln_post.weight"]
    elif change == "unexpected":
        state["visual.transformer.resblocks.0.ls_1.gamma"] = torch.ones(128)
    else:
        state["visual.ln_post.weight"] = torch.ones(3)
    with pytest.raises(legrad.UnsupportedModelError, match=r"RuntimeError: .*visual"):
        legrad.LeGrad(state)


@pytest.fixture
def package():
    """OpenAI's package; it is not on PyPI under this name, so few machines have it."""
    pytest.importorskip("clip", reason="needs OpenAI's clip: pip install git+https://github.com/openai/CLIP")
    return pytest.importorskip("clip.model")


def _of_package(package) -> nn.Module:
    model = package.CLIP(EMBED_DIM, SIDE, LAYERS, 128, PATCH, 77, 49408, 64, 1, 2)
    return fill(model).eval()


def test_a_model_of_the_package_equals_autograd(package, monkeypatch):
    # Its norms compute in float32, which no oracle of 1e-12 can hold; here they compute as torch's own.
    monkeypatch.setattr(package.LayerNorm, "forward", nn.LayerNorm.forward)
    model = _of_package(package).double()
    images, texts = _inputs()
    received = legrad.LeGrad(model, layers="all").relevance(images, texts, per_layer=True).flatten(-2)
    same = legrad.LeGrad(_state_of_archive(model)).model
    assert relative_error(received, oracle_relevance(same, images, texts, LAYERS)) < 1e-12


def test_a_model_of_the_package_gives_the_maps_and_texts_of_its_state(package):
    model = _of_package(package)
    images, texts = _inputs(torch.float32)
    explainer, by_state = legrad.LeGrad(model), legrad.LeGrad(_state_of_archive(model))
    assert relative_error(explainer.heatmaps(images, texts), by_state.heatmaps(images, texts)) < 1e-5
    assert relative_error(explainer.embed_text(NAMES), by_state.embed_text(NAMES)) < 1e-5
    features = nn.functional.normalize(model.encode_image(images), dim=-1)
    assert relative_error(explainer.encode(images).image_features, features) < 1e-5
    other_size = tiny_images(2, size=(3 * PATCH, 5 * PATCH))
    assert explainer.relevance(other_size, texts).shape == (2, 3, 3, 5)
    assert explainer.transform == by_state.transform


def test_the_packages_own_tokenizer_may_be_passed(package):
    clip = pytest.importorskip("clip")
    model = _of_package(package)
    expected = nn.functional.normalize(model.encode_text(clip.tokenize(NAMES)), dim=-1)
    for tokenizer in (None, clip.tokenize):
        explainer = legrad.LeGrad(model, tokenizer=tokenizer)
        assert relative_error(explainer.embed_text(NAMES), expected) < 1e-5
    assert explainer.embed_text(["word " * 200]).shape == (1, EMBED_DIM)


def test_half_precision_of_the_package_is_taken(package):
    model = _of_package(package)
    images, texts = _inputs(torch.float32)
    expected = legrad.LeGrad(model).relevance(images, texts)
    package.convert_weights(model)
    received = legrad.LeGrad(model).relevance(images.half(), texts)
    assert relative_error(received, expected) < 0.01


def test_what_the_package_has_beside_plain_vision_transformers_is_refused(package):
    convolutional = package.CLIP(EMBED_DIM, 64, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 1).eval()
    with pytest.raises(legrad.UnsupportedModelError, match="ModifiedResNet is convolutional"):
        legrad.LeGrad(convolutional)
    model = _of_package(package)
    with pytest.raises(legrad.UnsupportedModelError, match="not a subclass or a part of it"):
        legrad.LeGrad(model.visual)
    model.visual.transformer.resblocks[1].mlp.c_fc.register_forward_hook(lambda *_: None)
    with pytest.raises(legrad.UnsupportedModelError, match="a forward hook is registered"):
        legrad.LeGrad(model)
