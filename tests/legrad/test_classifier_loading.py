"""Classifiers are loaded with exactly the weights that are named, or one line says why not."""

from urllib.error import URLError

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import legrad
from tests.helpers.hub_server import hub_for_client
from tests.helpers.tiny_models import fill

NAME = "test_vit.r160_in1k"  # timm's smallest
WEIGHTS = torchvision.models.ViT_B_32_Weights.IMAGENET1K_V1


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with random weights of timm's smallest transformer on it, and an empty cache on this machine."""
    folder = tmp_path / "hub" / "timm" / NAME
    folder.mkdir(parents=True)
    save_file(fill(timm.create_model("test_vit")).state_dict(), folder / "model.safetensors")
    with hub_for_client(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def no_download(monkeypatch):
    """torchvision's default weights are those that a model starts with."""
    monkeypatch.setattr(
        type(WEIGHTS), "get_state_dict", lambda *_, **__: torchvision.models.vit_b_32().state_dict()
    )


@pytest.mark.parametrize("name", ["timm:test_vit", f"timm:{NAME}"])
def test_timms_weights_come_from_the_hub_with_the_names_of_their_classes(hub, name):
    explainer = legrad.LeGrad.from_classifier(name, device="cpu")
    expected = fill(timm.create_model("test_vit")).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in explainer.model.state_dict().items())
    assert not explainer.model.training
    assert explainer.find_class("goldfish") == 1
    assert explainer.find_class("tabby") == 281
    assert (explainer.transform.height, explainer.transform.mean) == (160, (0.5, 0.5, 0.5))
    with pytest.raises(
        legrad.InputError, match=r"no class is named 'goldfih'; nearest: 1 \(goldfish, Carassius"
    ):
        explainer.find_class("goldfih")


def test_weights_that_cannot_be_fetched_are_an_error_with_a_way_out(hub, monkeypatch):
    hub.refused.update(("model.safetensors", "pytorch_model.bin"))
    with pytest.raises(legrad.ModelLoadError, match=f"timm could not make '{NAME}': .*hub") as refusal:
        legrad.LeGrad.from_classifier(f"timm:{NAME}")
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(legrad.ModelLoadError, match=f"run `hf download timm/{NAME}` where it can"):
        legrad.LeGrad.from_classifier(f"timm:{NAME}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:test_vti", "timm has no model named 'test_vti'; nearest: test_vit"),
        ("timm:test_vit.nothing", "timm has no weights named 'test_vit.nothing'; it has test_vit.r160_in1k"),
        ("timm:vit_small_patch14_dinov2.lvd142m", "of a model without a classifier. Give a checkpoint"),
        ("torchvision:vit_b_61", "torchvision has no model named 'vit_b_61'; nearest: vit_b_16"),
        ("torchvision:vit_b_16.V9", "torchvision has no weights 'V9' of vit_b_16; it has IMAGENET1K_V1, "),
        ("clip:vit_b_16", "expected timm:NAME or torchvision:NAME, received 'clip:vit_b_16'"),
    ],
)
def test_a_name_that_nothing_has_is_answered_with_those_near_it(name, message):
    with pytest.raises(legrad.ModelLoadError, match=message):
        legrad.LeGrad.from_classifier(name)


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:resnet18"])
def test_a_model_that_is_not_covered_is_refused_before_its_weights_are_downloaded(hub, name):
    with pytest.raises(legrad.UnsupportedModelError, match="ResNet is convolutional"):
        legrad.LeGrad.from_classifier(name)
    assert hub.asked == []


def test_an_unknown_precision_is_refused():
    with pytest.raises(
        legrad.ModelLoadError, match="precision: expected fp32, fp16, bf16 or auto, received 'int8'"
    ):
        legrad.LeGrad.from_classifier("timm:test_vit", precision="int8")


@pytest.mark.parametrize("form", ["pt", "nested.pt", "safetensors"])
def test_a_fine_tuned_checkpoint_brings_its_own_number_of_classes(tmp_path, form):
    state = fill(timm.create_model("test_vit", num_classes=3), seed=4).state_dict()
    path = tmp_path / f"tuned.{form}"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if form == "nested.pt" else state, path)
    explainer = legrad.LeGrad.from_classifier("timm:test_vit", str(path), device="cpu", precision="bf16")
    assert explainer.embed_dim == 3
    assert explainer.class_names is None
    assert explainer.dtype == torch.bfloat16
    assert torch.equal(explainer.model.head.weight, state["head.weight"].bfloat16())


def _saved(tmp_path, change):
    state = timm.create_model("test_vit", num_classes=3).state_dict()
    change(state)
    torch.save(state, tmp_path / "tuned.pt")
    return str(tmp_path / "tuned.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.bias"), "tuned.pt lacks 1 weights, such as norm.bias"),
        (
            lambda state: state.update(more=torch.ones(1)),
            "tuned.pt holds beyond the model 1 weights, such as more",
        ),
        (
            lambda state: state.pop("head.weight"),
            "tuned.pt holds no classifier: expected a weight named head.weight",
        ),
        (
            lambda state: state.update(pos_embed=torch.ones(1, 5, 64)),
            r"pos_embed has the shape \[1, 5, 64\]; the model",
        ),
        (lambda state: state["norm.bias"].fill_(float("nan")), "not finite"),
        (lambda state: state.update({"norm.bias": torch.ones(64, dtype=torch.int8)}), "holds integers"),
        (lambda state: state.update(model=nn.Linear(1, 1)), "code in it is never run"),
    ],
)
def test_a_checkpoint_that_does_not_fill_the_model_is_refused(tmp_path, change, message):
    with pytest.raises(legrad.ModelLoadError, match=message):
        legrad.LeGrad.from_classifier("timm:test_vit", _saved(tmp_path, change))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(legrad.ModelLoadError, match=r"there is no file .*gone\.pt; weights of a tag"):
        legrad.LeGrad.from_classifier("timm:test_vit", str(tmp_path / "gone.pt"))


@pytest.mark.parametrize("name", ["torchvision:vit_b_32", "torchvision:vit_b_32.IMAGENET1K_V1"])
def test_torchvisions_weights_name_their_classes_and_their_preprocessing(no_download, name):
    explainer = legrad.LeGrad.from_classifier(name, device="cpu")
    assert explainer.find_class("goldfish") == 1
    assert explainer.transform.interpolation == "bilinear"
    assert (explainer.transform.height, explainer.transform.mean) == (224, (0.485, 0.456, 0.406))


def test_weights_of_torchvision_that_cannot_be_fetched_are_an_error_with_a_way_out(monkeypatch):
    def fail(*_arguments, **_options):
        raise URLError("no connection")

    monkeypatch.setattr(type(WEIGHTS), "get_state_dict", fail)
    with pytest.raises(legrad.ModelLoadError, match=r"torchvision could not make 'vit_b_32': .*TORCH_HOME"):
        legrad.LeGrad.from_classifier("torchvision:vit_b_32")
