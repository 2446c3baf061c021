"""`legrad explain`: pictures of one image, in files of safe names."""

import io
import re
import subprocess
import sys
import tarfile
from functools import partial

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.cli.explain import DEFAULT_MODEL, DEFAULT_TAG, explain_file, model_named
from pipeline.demo import assets
from pipeline.errors import UserError
from tests.helpers.tiny_models import fill

HOSTILE = "../../etc/passwd\x1b[31m <img src=x onerror=alert(1)>"


@pytest.fixture
def scene(tmp_path):
    """A demo scene: its image on disk, and what it shows."""
    with tarfile.open(assets.demo_shard_paths("heldout")[0]) as tar:
        (tmp_path / "scene.jpg").write_bytes(tar.extractfile("heldout-00000.jpg").read())
    return tmp_path / "scene.jpg"


@pytest.fixture
def explain(legrad):
    """Runs `legrad explain` in this process; returns exit code, standard output and standard error."""
    return partial(legrad, "explain")


def test_each_text_gets_an_overlay_and_a_strip_and_all_get_one_picture(explain, scene, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = explain(
        scene, "a banana", "a banana", "a panda", HOSTILE, "--model", "demo", "--layers", 3, "--out", out
    )
    assert code == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "00-a-banana-layers.png",
        "00-a-banana.png",
        "01-a-banana-layers.png",
        "01-a-banana.png",
        "02-a-panda-layers.png",
        "02-a-panda.png",
        "03-etc-passwd-31m-img-src-x-onerror-alert-layers.png",
        "03-etc-passwd-31m-img-src-x-onerror-alert.png",
        "side-by-side.png",
    ]
    assert all(str(out / name) in printed for name in names)
    assert "\x1b" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scene.jpg"]
    with Image.open(scene) as image, Image.open(out / "00-a-banana.png") as overlay:
        scene_size = image.size
        assert overlay.size == scene_size
    with Image.open(out / "00-a-banana-layers.png") as strip:
        assert strip.width == 4 * (round(224 * scene_size[0] / max(scene_size)) + 8) - 8
    similarities = [float(found) for found in re.findall(r"similarity ([+-]\d\.\d{3})", printed)]
    assert len(similarities) == 4
    assert min(similarities[0], similarities[2]) > similarities[3], "the scene shows a banana and a panda"


@pytest.fixture
def tuned(tmp_path):
    """A checkpoint of timm's smallest transformer with three classes."""
    model = fill(timm.create_model("test_vit", num_classes=3))
    torch.save(model.state_dict(), tmp_path / "tuned.pt")
    return tmp_path / "tuned.pt"


def test_a_classifier_is_explained_by_the_number_of_a_class(explain, scene, tuned, tmp_path):
    out = tmp_path / "out"
    options = ["--model", "timm:test_vit", "--pretrained", tuned, "--layers", "all", "--out", out]
    code, printed, _ = explain(scene, "2", "0", *options)
    assert code == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["00-2-layers.png", "00-2.png", "01-0-layers.png", "01-0.png", "side-by-side.png"]
    assert len(re.findall(r"logit [+-]\d+\.\d{3}  [20]", printed)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["3"], "class 3: the model has 3 classes, from 0 to 2"),
        (["a cat"], "the names of this model's classes are not known: give an index from 0 to 2"),
        (["0", "--model", "timm:test_vti"], "timm has no model named 'test_vti'; nearest: test_vit"),
        (["0", "--model", "timm:test_resnet"], "ResNet is convolutional"),
        (["0", "--layers", "7"], "layers: expected"),
        (["0", "--layers", "none"], "--layers"),
        (["0", "--pretrained", "gone.pt"], "there is no file gone.pt; weights of a tag are named"),
    ],
)
def test_a_class_or_classifier_that_is_not_there_is_the_users_mistake(
    explain, scene, tuned, arguments, message
):
    code, _, errors = explain(scene, "--model", "timm:test_vit", "--pretrained", tuned, *arguments)
    assert code == 1
    assert message in " ".join(errors.split())
    assert "Traceback" not in errors


def test_the_default_model_is_a_real_one_and_demo_is_the_shipped_one():
    assert (model_named(None, None).name, model_named(None, None).pretrained) == (DEFAULT_MODEL, DEFAULT_TAG)
    for name, tag in (("demo", None), (None, "demo"), (assets.DEMO_MODEL_NAME, "demo")):
        model = model_named(name, tag)
        assert (model.name, model.pretrained) == (assets.DEMO_MODEL_NAME, "demo")


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        (["--model", "ViT-L-14"], "--pretrained"),
        (["--model", "demo", "--layers", "many"], "--layers"),
        (["--model", "demo", "--layers", "0"], "--layers"),
        (["--model", "demo", "--layers", "99"], "layers"),
        (["--model", "demo", "--fit", "crop"], "--fit"),
        (["--model", "demo", "--fit", "tile"], "--fit"),
        (["--model", "demo", "--precision", "int3"], "--precision"),
        (["--model", "no-such-model", "--pretrained", "x"], "no-such-model"),
        (
            ["--model", "demo", "--pretrained", "x"],
            "--pretrained: the bundled model goes with its own weights",
        ),
        (
            ["--model", "ViT-L-14", "--pretrained", "demo"],
            "--pretrained: the bundled model goes with its own",
        ),
        (["--model", "hf:./x", "--pretrained", "x"], "--pretrained: hf:./x brings its own weights; omit"),
        (["--model", "openai/clip-x", "--pretrained", "x"], "nearest: hf:openai/clip-x of transformers"),
    ],
)
def test_options_that_cannot_be_are_reported_on_one_screen(explain, scene, tmp_path, options, printed):
    code, _, err = explain(scene, "a dog", "--out", tmp_path / "out", *options)
    assert code == 1
    assert printed in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def eps():
    sink = io.BytesIO()
    Image.new("RGB", (4, 4)).save(sink, "EPS")
    return sink.getvalue()


@pytest.mark.parametrize("content", [None, b"", b"not an image", eps()])
def test_an_image_that_cannot_be_opened_is_an_input_error(tmp_path, content):
    if content is not None:
        (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.jpg"):
        explain_file(str(tmp_path / "x.jpg"), ["a dog"], model_named("demo", None), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nofile.jpg", "a dog"], "nofile.jpg: cannot be read: No such file or directory"),
        (["page.jpg", "a dog"], "page.jpg: expected a JPEG, PNG, WebP, BMP or GIF, got an HTML page"),
        (["page.jpg", " "], "TEXT: one of the texts is empty"),
        (["page.jpg", "a dog", "--out", "page.jpg"], "is a file, and a folder is expected"),
        (["page.jpg", "a dog", "--layers", "0"], "--layers"),
        (["page.jpg", "a dog", "--model", "ViT-L-14"], "--pretrained"),
        (["page.jpg", "a dog", "--model", "RN50"], "--model RN50: a ModifiedResNet is convolutional"),
        (["page.jpg", "a dog", "--model", "ViT-B/33", "--pretrained", "x"], "nearest: ViT-B-32"),
    ],
)
def test_all_arguments_are_checked_before_a_model_library_is_imported(tmp_path, arguments, message):
    (tmp_path / "page.jpg").write_bytes(b"<!doctype html><html></html>")
    program = (
        "import sys; from pipeline.__main__ import run; from pipeline.cli import main\n"
        f"sys.argv = ['legrad', 'explain', *{arguments}]\n"
        "try: main.main()\n"
        "finally: print('torch' in sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout.strip()) == (1, "False")
    assert message in ended.stderr


@pytest.mark.parametrize("texts", [["a", " "], ["x" * 20_000], ["a"] * 101])
def test_texts_that_cannot_be_are_input_errors(scene, tmp_path, texts):
    with pytest.raises(UserError, match="TEXT"):
        explain_file(str(scene), texts, model_named("demo", None), str(tmp_path / "out"))


@given(text=st.text(max_size=200))
def test_any_text_gives_a_file_name_that_is_safe_everywhere(text):
    from pipeline.cli.explain import slug

    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", slug(text))


def test_an_image_without_end_is_refused_before_it_fills_the_memory(tmp_path):
    with pytest.raises(UserError, match=r"/dev/zero: cannot be read: has more than 67108864 bytes"):
        explain_file("/dev/zero", ["a cat"], model_named("demo", None), str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["", "\n", "ViT\x1b[2J"])
def test_a_model_name_that_cannot_be_is_reported_in_plain_words(name):
    with pytest.raises(UserError, match=r"^--model: expected a text .*got '") as refusal:
        model_named(name, "openai")
    assert str(refusal.value).isprintable()
