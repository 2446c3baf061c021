"""The program that compares our maps with those of the authors' package."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.processes import REPOSITORY

DEMO = REPOSITORY / "pipeline" / "demo" / "legrad_demo_clip.json"


def run(*arguments):
    program = REPOSITORY / "legrad" / "examples" / "compare_maps.py"
    words = [sys.executable, str(program), *map(str, arguments)]
    return subprocess.run(words, check=False, capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.medium
def test_maps_are_saved_and_compared_field_by_field(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    model = ["--model", DEMO, "--pretrained", DEMO.with_suffix(".safetensors"), "--image-size", 96]
    request = ["--image", tmp_path / "image.png", "--text", "a fox", "--text", "a cup", *model]
    saved = run("save", tmp_path / "ours.npz", *request)
    assert saved.returncode == 0, saved.stderr
    assert saved.stderr == ""
    ours = dict(np.load(tmp_path / "ours.npz"))
    assert ours["maps"].shape == (1, 2, 96, 96)
    np.savez(tmp_path / "other.npz", **{**ours, "maps": ours["maps"] + np.float32(0.25)})
    compared = run("compare", tmp_path / "ours.npz", tmp_path / "other.npz")
    _, *rows = map(json.loads, compared.stdout.splitlines())
    assert [(row["field"], row["largest_difference"]) for row in rows] == [
        ("images", 0),
        ("text_embeddings", 0),
        ("maps", pytest.approx(0.25, abs=1e-6)),
    ]


def test_maps_of_different_texts_are_not_compared(tmp_path):
    case = dict.fromkeys(("model", "pretrained", "layers", "image_size", "images_sha256"), 1)
    for name in ("one", "other"):
        np.savez(tmp_path / f"{name}.npz", case=np.array(json.dumps({**case, "texts": [name]})))
    compared = run("compare", tmp_path / "one.npz", tmp_path / "other.npz")
    assert compared.returncode == 1
    assert compared.stderr.startswith("texts differs: ")
