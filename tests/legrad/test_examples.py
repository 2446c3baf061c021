"""The scripts in legrad/examples run on the demo model, and write only into the folder given to them."""

import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

import legrad
from tests.helpers.processes import REPOSITORY

FOLDER = REPOSITORY / "legrad" / "examples"
WRITTEN = {
    "classifier": {"class-26.png", "class-4.png", "class-63.png", "scene-0.jpg"},
    "comparing_methods": {"methods.png", "scene-0.jpg"},
    "fine_tuned": {"fine-tuned.safetensors", "merged.png", "scene-0.jpg"},
    "first_map": {"overlay.png", "scene-0.jpg", "side-by-side.png"},
    "layers_and_heads": {"last-three.png", "layers.png", "scene-0.jpg"},
    "many_images": {"grid.png", "saved", "table.csv", *(f"scene-{index}.jpg" for index in range(6))},
    "masks_and_coco": {"annotations.json", *(f"scene-{index}.jpg" for index in range(3))},
    "video_frames": {"frames.csv", "frames.gif", "scene-0.jpg"},
}


@pytest.fixture
def written(monkeypatch, tmp_path):
    """Run an example in an empty folder; return the folder that it was given."""

    def run(name):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", str(tmp_path / "out")])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        assert not list(elsewhere.iterdir())
        assert {path.name for path in tmp_path.iterdir()} == {"out", "elsewhere"}
        assert {path.name for path in (tmp_path / "out").iterdir()} == WRITTEN[name]
        return tmp_path / "out"

    return run


def colours(path):
    """How many different colours a picture has: a heat map has many."""
    with Image.open(path) as picture:
        return len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))


def test_every_example_is_run_here_and_named_in_the_readme():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "compare_maps", "demo_data"}
    assert scripts == set(WRITTEN)
    page = (REPOSITORY / "legrad" / "README.md").read_text()
    assert all(f"(examples/{name}.py)" in page for name in scripts)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_every_example_has_cells_and_names_its_command_and_a_real_model(name):
    source = (FOLDER / f"{name}.py").read_text()
    assert source.count("\n# %% ") >= 3
    assert f"python legrad/examples/{name}.py [FOLDER]" in source
    assert '\nMODEL = "demo"\n' in source
    assert "laion2b_s34b_b88k" in source


def test_the_first_map_is_drawn(written, capsys):
    out = written("first_map")
    assert colours(out / "side-by-side.png") > 1000
    assert colours(out / "overlay.png") > 1000
    assert "a panda: similarity" in capsys.readouterr().out


def test_the_layers_are_drawn_and_their_shares_printed(written, capsys):
    out = written("layers_and_heads")
    assert colours(out / "layers.png") > 1000
    printed = capsys.readouterr().out
    shares = [int(line.split()[-1].rstrip("%")) for line in printed.splitlines() if "contributes" in line]
    assert len(shares) == 6
    assert abs(sum(shares) - 100) <= 3
    assert "in each head" in printed


def test_many_images_are_saved_and_loaded(written):
    out = written("many_images")
    loaded = legrad.Explanations.load(out / "saved")
    assert len(loaded) == 6
    assert len((out / "table.csv").read_text().splitlines()) == 1 + sum(map(len, loaded.texts))
    assert loaded.made_by["neutral"] == "a photo of a"
    assert colours(out / "grid.png") > 1000


def test_the_fine_tuned_model_is_explained_once_its_lora_is_merged(written, capsys):
    out = written("fine_tuned")
    printed = capsys.readouterr().out
    assert "refused:" in printed
    assert "merge_and_unload" in printed
    assert "LoraLinear" in printed
    change = next(line for line in printed.splitlines() if line.startswith("largest change"))
    assert float(change.split()[-1]) > 0.01
    assert colours(out / "merged.png") > 1000


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_coco_annotations_are_complete(written, capsys):
    out = written("masks_and_coco")
    dataset = json.loads((out / "annotations.json").read_text())
    sizes = {each["id"]: [each["height"], each["width"]] for each in dataset["images"]}
    assert len(sizes) == 3
    for annotation in dataset["annotations"]:
        rle = annotation["segmentation"]
        assert rle["size"] == sizes[annotation["image_id"]]
        assert legrad.mask_area([rle])[0] == annotation["area"]
        assert legrad.mask_bbox_xywh([rle])[0].tolist() == annotation["bbox"]
    masks = len(dataset["annotations"])
    assert f"{masks} of {masks} masks of 3 images are the same" in capsys.readouterr().out


def test_the_methods_are_drawn_one_in_each_line(written, capsys):
    out = written("comparing_methods")
    with Image.open(out / "scene-0.jpg") as scene, Image.open(out / "methods.png") as figure:
        assert figure.height == 5 * scene.height
        assert figure.width % scene.width == 0
    assert capsys.readouterr().out.count("mean of each text's heat map") == 5


def test_the_frames_become_an_animation_and_a_table(written, capsys):
    out = written("video_frames")
    with Image.open(out / "frames.gif") as animation:
        assert animation.n_frames == 12
    assert len((out / "frames.csv").read_text().splitlines()) == 13
    assert capsys.readouterr().out.count("similarity with") == 12


def test_a_classifier_names_its_classes_and_draws_their_maps(written, capsys):
    out = written("classifier")
    assert "'panda'" in capsys.readouterr().out.splitlines()[0]
    assert all(colours(out / f"class-{index}.png") > 1000 for index in (4, 26, 63))
