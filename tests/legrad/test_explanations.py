"""Many images explained for several texts each: the maps of one by one, in files that can be read again."""

import hashlib
import inspect
import io
import json
import os
import weakref
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import legrad
from legrad.explaining import weights_sha256
from tests.helpers.text_lengths import Lengths
from tests.helpers.tiny_models import tiny_clip

TEXTS = ["a dog", "a red cactus!", "sky"]
SIZES = [(30, 50), (60, 20), (30, 50), (40, 40), (20, 60), (31, 50)]


def noise(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def images():
    return [noise(*size, seed) for seed, size in enumerate(SIZES)]


def explainer_with(**options):
    return legrad.LeGrad(tiny_clip(), tokenizer=Lengths(), **options)


@pytest.fixture(scope="module")
def explainer():
    return explainer_with()


@pytest.fixture(scope="module")
def explanations(explainer, images):
    return legrad.explain_images(explainer, images, TEXTS, batch_size=4)


@pytest.fixture
def saved(explanations, tmp_path):
    return explanations.save(tmp_path / "saved")


def check_equal(received, expected):
    assert received.texts == expected.texts
    assert [image.name for image in received.images] == [image.name for image in expected.images]
    for attribute in ("maps", "grids", "similarities"):
        pairs = zip(getattr(received, attribute), getattr(expected, attribute), strict=True)
        for mine, other in pairs:
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("fit", ["stretch", "keep"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_each_image_gets_what_explain_image_gives(images, fit, batch_size):
    explainer = explainer_with(fit=fit, layers="all")
    explanations = legrad.explain_images(explainer, images, TEXTS, batch_size=batch_size)
    assert len({tuple(maps.shape) for maps in explanations.maps}) == (1 if fit == "stretch" else 4)
    for image, maps, grids, similarities in zip(
        images, explanations.maps, explanations.grids, explanations.similarities, strict=True
    ):
        alone = legrad.explain_image(explainer, image, TEXTS)
        torch.testing.assert_close(maps, alone.heatmaps)
        torch.testing.assert_close(grids, alone.layer_grids.sum(dim=0))
        torch.testing.assert_close(similarities, alone.similarities)


def test_each_image_can_have_texts_of_its_own(explainer, images):
    lists = [["sky"], ["a dog", "sky"], ["b"], ["a dog"], ["sky", "b", "c"], ["a dog"]]
    explanations = legrad.explain_images(explainer, images, lists, batch_size=2)
    assert explanations.texts == tuple(map(tuple, lists))
    for image, texts, maps in zip(images, lists, explanations.maps, strict=True):
        torch.testing.assert_close(maps, legrad.explain_image(explainer, image, texts).heatmaps)


def test_more_texts_than_are_explained_at_once_change_nothing(explainer, images, monkeypatch):
    expected = legrad.explain_images(explainer, images, TEXTS, "a photo of a")
    monkeypatch.setattr("legrad.explaining.PAIRS_AT_ONCE", 4)
    check_equal(legrad.explain_images(explainer, images, TEXTS, "a photo of a"), expected)


def test_a_neutral_text_corrects_as_in_heatmaps(explainer, images):
    explanations = legrad.explain_images(
        explainer, images, TEXTS, "a photo of a", neutral_threshold=0.6, batch_size=4
    )
    expected = explainer.heatmaps(
        explainer.preprocess(images),
        explainer.embed_text(TEXTS),
        neutral_embedding=explainer.embed_text(["a photo of a"]),
        neutral_threshold=0.6,
    )
    torch.testing.assert_close(torch.stack(list(explanations.maps)), expected)


def test_the_authors_maps_are_those_of_explain_image(explainer, images):
    explanations = legrad.explain_images(explainer, images, TEXTS, as_authors=True)
    for image, maps in zip(images, explanations.maps, strict=True):
        alone = legrad.explain_image(explainer, image, TEXTS, as_authors=True)
        torch.testing.assert_close(maps, alone.heatmaps)


def test_images_are_read_a_few_batches_ahead_at_most(explainer, images, monkeypatch):
    read = []
    encoded = []
    encode = type(explainer).encode

    def counted(self, pixels):
        encoded.append((len(read), len(pixels)))
        return encode(self, pixels)

    def frames():
        for image in images * 8:
            read.append(image)
            yield image

    monkeypatch.setattr(type(explainer), "encode", counted)
    explanations = legrad.explain_images(explainer, frames(), TEXTS, batch_size=2)
    assert len(explanations) == len(images) * 8
    ahead = [taken - sum(count for _, count in encoded[:number]) for number, (taken, _) in enumerate(encoded)]
    assert max(ahead) <= 4 * 2


def test_original_images_are_not_kept(explainer):
    alive = []

    def frames():
        for seed in range(40):
            frame = noise(30, 50, seed)
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            assert sum(each() is not None for each in alive) <= 2

    explanations = legrad.explain_images(explainer, frames(), TEXTS, batch_size=2, picture_side=10)
    assert {image.picture.size for image in explanations.images} == {(10, 6)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_maps(images, explanations):
    explainer = legrad.LeGrad(tiny_clip().cuda(), tokenizer=Lengths())
    received = legrad.explain_images(explainer, images, TEXTS, batch_size=4)
    for mine, other in zip(received.maps, explanations.maps, strict=True):
        assert mine.device.type == "cpu"
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)


def test_paths_are_opened_upright_and_name_the_images(explainer, images, tmp_path):
    turned, exif = images[0].transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save(tmp_path / "a.png", exif=exif)
    images[1].save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", str(tmp_path / "b.png")]
    explanations = legrad.explain_images(explainer, paths, TEXTS)
    assert [image.name for image in explanations.images] == [os.fspath(path) for path in paths]
    assert [(image.height, image.width) for image in explanations.images] == SIZES[:2]
    expected = legrad.explain_images(explainer, images[:2], TEXTS)
    torch.testing.assert_close(explanations.grids, expected.grids)


def test_masks_have_the_original_images_sizes(explainer, images, explanations):
    rule = legrad.MaskRule("fixed", value=0.4)
    for image, masks, grids in zip(images, explanations.masks(rule), explanations.grids, strict=True):
        expected = legrad.grid_to_masks(grids, image.height, image.width, rule)
        assert masks.rles == expected.rles
        assert masks.rles[0]["size"] == [image.height, image.width]
    assert explanations.masks("otsu")[0].rles == explanations.masks()[0].rles
    with pytest.raises(legrad.MaskError, match="expected one of fixed"):
        explanations.masks("otzu")


def test_the_table_has_a_row_for_each_image_and_text(explanations):
    table = explanations.to_dataframe({"half": legrad.MaskRule("fixed"), "otsu": legrad.MaskRule("otsu")})
    assert len(table) == len(SIZES) * len(TEXTS)
    columns = ["image", "name", "height", "width", "text", "similarity", "peak", "area_half", "area_otsu"]
    assert list(table.columns) == columns
    assert table["image"].tolist() == [place for place in range(len(SIZES)) for _ in TEXTS]
    assert table["text"].tolist() == TEXTS * len(SIZES)
    similarities = torch.cat(explanations.similarities)
    assert table["similarity"].to_numpy() == pytest.approx(similarities.numpy())
    for place, masks in enumerate(explanations.masks(legrad.MaskRule("fixed"))):
        assert table[table["image"] == place]["area_half"].tolist() == masks.areas.tolist()
    assert list(explanations.to_dataframe()["area_otsu"]) == table["area_otsu"].tolist()
    with pytest.raises(legrad.InputError, match="expected a list of names"):
        explanations.to_dataframe("otsu")


def test_the_figure_has_images_as_rows_and_texts_as_columns(explanations, explainer, images):
    picture = np.asarray(explanations.grid(panel_side=100, max_images=2))
    assert picture.shape[1] == 4 * 108 - 8
    height = picture.shape[0] // 2
    photo = np.asarray(images[0].resize((100, 60), Image.Resampling.LANCZOS))
    assert np.array_equal(picture[20:80, :100], photo)
    assert (picture[:20] == 255).all(), "an image that is not square has white above it"
    lists = [["sky"], ["a dog", "sky"]]
    ragged = legrad.explain_images(explainer, images[:2], lists).grid(panel_side=100)
    assert (np.asarray(ragged)[:height, 2 * 108 :] == 255).all(), "a row with fewer texts ends early"
    with Image.open(io.BytesIO(explanations._repr_png_())) as shown:
        assert shown.tobytes() == explanations.grid().tobytes()


def test_it_is_shown_in_a_line(explanations):
    assert repr(explanations) == "Explanations(6 images, 18 heat maps)"
    assert len(explanations) == len(explanations.maps) == 6
    assert len(explanations.maps[1:3]) == 2


def test_what_is_saved_is_loaded(explanations, saved):
    loaded = legrad.Explanations.load(saved)
    check_equal(loaded, explanations)
    assert loaded.made_by == json.loads(json.dumps(explanations.made_by))
    assert loaded.grid().tobytes() == explanations.grid().tobytes()
    for mine, other in zip(loaded.masks(), explanations.masks(), strict=True):
        assert mine.rles == other.rles


def test_the_manifest_names_what_made_the_maps_and_every_file(explainer, explanations, tmp_path):
    saved = explanations.save(tmp_path / "new", model_name="my model")
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["made_by"]["model"] == {
        "class": "open_clip.model.CLIP",
        "family": "clip",
        "dtype": "torch.float32",
        "weights_sha256": weights_sha256(explainer.model),
        "name": "my model",
    }
    assert set(manifest["made_by"]["versions"]) == {"legrad", "open_clip", "torch"}
    assert manifest["made_by"]["layers"] == [1, 2]
    assert manifest["made_by"]["preprocessing"]["fit"] == "stretch"
    assert manifest["images"][0]["texts"] == TEXTS
    sizes = {path.name: path.stat().st_size for path in saved.iterdir() if path.name != "manifest.json"}
    assert {name: facts["bytes"] for name, facts in manifest["files"].items()} == sizes
    assert len(sizes) == 1 + len(SIZES) * (1 + 2 * len(TEXTS))


def test_the_pictures_are_the_heat_maps(explanations, saved):
    with Image.open(saved / "00001-002-heatmap.png") as grey:
        assert np.abs(np.asarray(grey) / 255 - explanations.maps[1][2].numpy()).max() <= 0.5 / 255 + 1e-6
    with Image.open(saved / "00001-002-overlay.png") as over:
        assert over.tobytes() == explanations.overlays(1)[2].tobytes()


def test_the_digest_changes_with_any_weight_of_either_tower():
    model = tiny_clip()
    before = weights_sha256(model)
    assert weights_sha256(tiny_clip()) == before
    for parameter in (model.visual.conv1.weight, model.logit_scale):
        with torch.no_grad():
            parameter.flatten()[0] += 1
        assert weights_sha256(model) != before
        before = weights_sha256(model)


def test_no_text_or_name_becomes_part_of_a_path(explainer, images, tmp_path):
    texts = ["../../escaped", "a\0b", "x" * 5000]
    image = images[0].copy()
    image.filename = "/etc/../passwd"
    explanations = legrad.explain_images(explainer, [image], texts)
    explanations.save(tmp_path / "inner" / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]
    assert [path.name for path in (tmp_path / "inner").iterdir()] == ["saved"]
    assert legrad.Explanations.load(tmp_path / "inner" / "saved").texts == (tuple(texts),)


def test_a_folder_with_files_is_refused_unless_it_may_be_overwritten(explainer, images, saved, explanations):
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(legrad.InputError, match=r"is not empty .*overwrite=True"):
        explanations.save(saved)
    fewer = legrad.explain_images(explainer, images[:2], ["sky"])
    fewer.save(saved, overwrite=True, pictures=False)
    assert sorted(path.name for path in saved.iterdir()) == [
        "00000-image.png",
        "00001-image.png",
        "grids.npz",
        "manifest.json",
        "notes.txt",
    ]
    check_equal(legrad.Explanations.load(saved), fewer)


def test_a_link_in_the_folder_is_replaced_not_followed(explanations, saved, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (saved / "grids.npz").unlink()
    (saved / "grids.npz").symlink_to(tmp_path / "precious")
    explanations.save(saved, overwrite=True)
    assert (tmp_path / "precious").read_text() == "precious"
    check_equal(legrad.Explanations.load(saved), explanations)


@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_save_that_fails_leaves_no_folder_that_passes_as_complete(explanations, saved, monkeypatch, step):
    import legrad.explanation_files as files

    publish, calls = files._publish, []

    def failing(path, content):
        calls.append(path)
        if len(calls) > step:
            raise OSError(28, "No space left on device")
        publish(path, content)

    monkeypatch.setattr(files, "_publish", failing)
    with pytest.raises(legrad.InputError, match="No space left"):
        explanations.save(saved, overwrite=True)
    with pytest.raises(legrad.InputError, match=r"no manifest\.json"):
        legrad.Explanations.load(saved)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edited(key, value):
    def edit(path):
        manifest = json.loads(path.read_text())
        manifest[key] = value
        path.write_text(json.dumps(manifest))

    return edit


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("grids.npz", cut, "the manifest says"),
        ("grids.npz", flip, "SHA-256"),
        ("00002-image.png", flip, "SHA-256"),
        ("00002-001-overlay.png", os.unlink, "is missing"),
        ("manifest.json", os.unlink, "no manifest.json"),
        ("manifest.json", cut, "legrad|cannot be read"),
        ("manifest.json", edited("format", "legrad explanations 99"), "another format"),
        ("manifest.json", edited("files", {"../manifest.json": {"bytes": 1}}), "which save never writes"),
        ("manifest.json", edited("files", []), "damaged"),
        ("manifest.json", edited("images", [{}]), "damaged"),
        ("manifest.json", lambda path: path.write_text("[]"), "another format"),
        ("manifest.json", lambda path: path.write_text("[" * 100_000), "cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(saved, name, damage, message):
    damage(saved / name)
    if name == "manifest.json" and damage is cut:
        damage(saved / name)  # the first byte is a line break
    with pytest.raises(legrad.InputError, match=message):
        legrad.Explanations.load(saved)


def test_arrays_larger_than_the_manifest_says_are_not_decompressed(saved):
    with zipfile.ZipFile(saved / "grids.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        sink = io.BytesIO()
        np.save(sink, np.zeros(2**24, np.float32))
        for position in range(len(SIZES)):
            archive.writestr(f"grids_{position:05d}.npy", sink.getvalue())
    manifest = json.loads((saved / "manifest.json").read_text())
    content = (saved / "grids.npz").read_bytes()
    manifest["files"]["grids.npz"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(legrad.InputError, match="larger than its shape"):
        legrad.Explanations.load(saved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "a dog"}, r"pass \['a dog'\]"),
        ({"texts": []}, "at least one text, received none"),
        ({"texts": [["a"], []]}, r"texts\[1\]: expected a list of at least one text"),
        ({"texts": ["a", ["b"]]}, r"texts\[0\]: expected a list of texts.* received .*'a'"),
        ({"texts": [["a"]] * 5}, "received 5 lists and more images"),
        ({"texts": [["a"]] * 7}, "a list for each of 6 images, received 7 lists"),
        ({"texts": [None]}, r"texts\[0\]: expected a text \(str\), received None"),
        ({"images": []}, "at least one image, received none"),
        ({"images": "a.jpg"}, r"received one image; pass \[image\]"),
        ({"images": ["no-such.jpg"]}, r"images\[0\]: cannot read .*no-such\.jpg"),
        ({"images": [3]}, r"images\[0\]: expected a PIL image.* received .*int"),
        ({"neutral": ["a photo of a"]}, "neutral: expected a text or None"),
        ({"neutral_threshold": 2.0}, "neutral_threshold: expected a value from 0 to 1"),
        ({"batch_size": 0}, "batch_size: expected a whole number of at least 1"),
        ({"picture_side": 1.5}, "picture_side: expected a whole number of at least 1"),
        ({"resize": "quick"}, "resize: expected"),
    ],
)
def test_what_does_not_fit_is_refused(explainer, images, arguments, message):
    unchecked = inspect.unwrap(legrad.explain_images)  # the tests' checks of types would come first
    with pytest.raises(legrad.InputError, match=message):
        unchecked(**{"explainer": explainer, "images": images, "texts": TEXTS} | arguments)
