"""Models made by open_clip's factory, from checkpoints and tags."""

import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip import factory, pretrained
from safetensors.torch import save_file

import legrad
from legrad.loading import device_precision
from tests.helpers.tiny_models import EMBED_DIM, TEXT, VISION, fill, tiny_images, unit_texts

CONFIG = {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": TEXT | {"vocab_size": 49408}}


@pytest.fixture(autouse=True)
def _tiny_models_by_name(monkeypatch):
    """Teach open_clip the names of tiny models, for one test."""
    pooled = CONFIG | {"vision_cfg": VISION | {"attentional_pool": "parallel"}}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", CONFIG)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-pooled", pooled)


@pytest.fixture
def weights(tmp_path) -> Path:
    """A checkpoint of the tiny model."""
    model = fill(open_clip.create_model("tiny"), seed=5)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_a_local_checkpoint_is_loaded_and_explained(weights):
    explainer = legrad.LeGrad.from_open_clip("tiny", str(weights), layers="all", device="cpu")
    model = open_clip.create_model("tiny", pretrained=str(weights)).eval()
    images, texts = tiny_images(), unit_texts(2)
    expected = legrad.LeGrad(model, layers="all").relevance(images, texts)
    torch.testing.assert_close(explainer.relevance(images, texts), expected)
    assert not explainer.model.training
    assert (explainer.embed_dim, explainer.patch_size, explainer.device.type) == (EMBED_DIM, 4, "cpu")


def test_texts_can_be_embedded_at_once(weights):
    explainer = legrad.LeGrad.from_open_clip("tiny", str(weights), device="cpu")
    rows = explainer.embed_text(["a dog", "a car"])
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2))
    assert explainer.tokenizer(["a dog"]).shape == (1, TEXT["context_length"])


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16", "pure_fp16"])
def test_the_precision_asked_for_is_the_models(weights, precision):
    explainer = legrad.LeGrad.from_open_clip("tiny", str(weights), device="cpu", precision=precision)
    assert explainer.dtype == (torch.bfloat16 if "bf16" in precision else torch.float16)
    images = tiny_images(dtype=explainer.dtype)
    exact = legrad.LeGrad.from_open_clip("tiny", str(weights), device="cpu")
    received, expected = (
        explainer.relevance(images, unit_texts(2)),
        exact.relevance(images.float(), unit_texts(2)),
    )
    assert (received - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_tag_decides_on_activation_and_preprocessing(monkeypatch, weights, quick_gelu):
    tag = {"quick_gelu": quick_gelu, "mean": (0.1, 0.2, 0.3), "std": [1, 2, 3], "interpolation": "bilinear"}
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", {"some_tag": tag})
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: str(weights))
    explainer = legrad.LeGrad.from_open_clip("tiny", "some_tag", device="cpu")
    activation = explainer.model.visual.transformer.resblocks[0].mlp.gelu
    assert isinstance(activation, open_clip.transformer.QuickGELU) == quick_gelu
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
    assert explainer.transform == legrad.ImageTransform(12, 20, mean, std, "bilinear", patch_size=4)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(legrad.ModelLoadError, match="no model named 'ViT-B-61'; nearest: ViT-B-16"):
        legrad.LeGrad.from_open_clip("ViT-B-61")


def test_a_slash_in_a_name_is_read_as_open_clip_does():
    with pytest.raises(
        legrad.UnsupportedModelError, match="RN50/quickgelu: a ModifiedResNet is convolutional"
    ):
        legrad.LeGrad.from_open_clip("RN50/quickgelu", "openai")


def test_an_unsupported_model_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("a model was made"))
    with pytest.raises(
        legrad.UnsupportedModelError, match=r"tiny-pooled: it pools by the 'parallel' or.*Supported"
    ):
        legrad.LeGrad.from_open_clip("tiny-pooled", "laion2b")


def test_auto_is_fp32_on_a_cpu(weights):
    explainer = legrad.LeGrad.from_open_clip("tiny", str(weights), device="cpu", precision="auto")
    assert explainer.dtype == torch.float32


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_auto_is_bf16_on_gpus_that_compute_it_themselves(monkeypatch, capability, precision):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert device_precision("cuda:1") == precision
    assert device_precision("cpu") == "fp32"


@pytest.mark.parametrize("precision", ["amp", "int8", "fp64"])
def test_an_unknown_precision_is_refused(precision):
    with pytest.raises(legrad.ModelLoadError, match="precision: expected one of fp32, fp16, bf16"):
        legrad.LeGrad.from_open_clip("tiny", precision=precision)


def test_random_weights_are_logged_as_a_warning(caplog):
    legrad.LeGrad.from_open_clip("tiny", device="cpu")
    (message,) = caplog.messages
    assert message == "tiny gets random weights, as pretrained is None: its maps mean nothing"


def test_an_unknown_tag_is_refused():
    with pytest.raises(legrad.ModelLoadError, match="'tiny' with pretrained='no-such-tag'"):
        legrad.LeGrad.from_open_clip("tiny", "no-such-tag")


def test_weights_of_another_model_are_refused(tmp_path):
    save_file({"visual.proj": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(legrad.ModelLoadError, match=r"could not make 'tiny'.*Missing key"):
        legrad.LeGrad.from_open_clip("tiny", str(tmp_path / "other.safetensors"), device="cpu")


class _Harmful:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_code_hidden_in_a_checkpoint_is_not_run(tmp_path):
    marker, checkpoint = tmp_path / "was-run", tmp_path / "harmful.pt"
    torch.save({"state_dict": {"visual.proj": _Harmful(marker)}}, checkpoint)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(checkpoint, weights_only=True)
    with pytest.raises(legrad.ModelLoadError, match="code in it is never run"):
        legrad.LeGrad.from_open_clip("tiny", str(checkpoint), device="cpu")
    assert not marker.exists()
