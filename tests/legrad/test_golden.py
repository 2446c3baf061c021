"""Maps equal those of the authors' package, on generated weights and images; see tests/golden/README.md."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import legrad
from tests.helpers.tiny_models import relative_error

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


@cache
def _recipe() -> ModuleType:
    specification = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _explainer_by_recipe(name: str, layers: int) -> legrad.LeGrad:
    config = open_clip.get_model_config(name)
    # Without memory for weights: the recipe fills the vision tower, and nothing runs the text tower.
    with torch.device("meta"):
        model = open_clip.CLIP(
            config["embed_dim"],
            config["vision_cfg"] | {"timm_model_pretrained": False},
            {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1},
            quick_gelu=config.get("quick_gelu", False),
        )
    model.visual.load_state_dict(_recipe().recipe_weights(model.visual.state_dict()), assign=True)
    return legrad.LeGrad(model, layers=layers)


def _neutral_embedding(seed: int, embed_dim: int) -> torch.Tensor:
    row = np.random.default_rng(seed + 1000).standard_normal((1, embed_dim), dtype=np.float32)
    return torch.from_numpy(row / np.linalg.norm(row))


def test_all_cases_of_the_published_package_are_here():
    assert CASES == [
        "ViT-B-16-224px-last4",
        "ViT-B-16-448px-last2",
        "ViT-B-16-SigLIP-224px-last12",
        "ViT-B-16-SigLIP-224px-last2",
        "ViT-B-16-SigLIP-224px-last3-neutral",
        "ViT-B-32-224px-last2",
        "ViT-B-32-quickgelu-224px-last12",
        "coca_ViT-B-32-224px-last2",
    ]


@pytest.mark.parametrize("name", CASES)
def test_heatmaps_equal_those_of_the_published_package(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    case = json.loads(str(golden["case"]))
    explainer = _explainer_by_recipe(case["model"], case["layers"])
    images, texts = _recipe().golden_inputs(
        case["seed"], case["batch"], case["image_size"], case["prompts"], explainer.embed_dim
    )
    neutral = _neutral_embedding(case["seed"], explainer.embed_dim) if case.get("correction") else None
    heatmaps = explainer.heatmaps(images, texts, neutral_embedding=neutral)
    assert heatmaps.shape == (case["batch"], case["prompts"], case["image_size"], case["image_size"])
    assert relative_error(heatmaps[..., ::4, ::4], torch.from_numpy(golden["maps"])) < 1e-5


NEUTRAL = "ViT-B-16-SigLIP-224px-last3-neutral"


def test_one_argument_gives_siglips_map_of_the_published_package(monkeypatch):
    golden = np.load(GOLDEN / f"{NEUTRAL}.npz")
    case, maps = json.loads(str(golden["case"])), torch.from_numpy(golden["maps"])
    assert case["correction"]
    explainer = _explainer_by_recipe(case["model"], case["layers"])
    images, texts = _recipe().golden_inputs(
        case["seed"], case["batch"], case["image_size"], case["prompts"], explainer.embed_dim
    )
    neutral = _neutral_embedding(case["seed"], explainer.embed_dim)
    rows = {"a photo of a": neutral[0]} | {f"text {number}": row for number, row in enumerate(texts)}
    monkeypatch.setattr(legrad.LeGrad, "embed_text", lambda _, given: torch.stack([rows[it] for it in given]))

    heatmaps = explainer.heatmaps(images, texts, as_authors=True)
    assert relative_error(heatmaps[..., ::4, ::4], maps) < 1e-5
    assert relative_error(explainer.heatmaps(images, texts)[..., ::4, ::4], maps) > 1e-2

    monkeypatch.setattr(legrad.LeGrad, "preprocess", lambda _, __, **___: images[:1])
    asked = [text for text in rows if text != "a photo of a"]
    explanation = legrad.explain_image(explainer, Image.new("RGB", (224, 224)), asked, as_authors=True)
    assert relative_error(explanation.heatmaps[:, ::4, ::4], maps[0]) < 1e-5
    torch.testing.assert_close(explanation.heatmaps, heatmaps[0])
