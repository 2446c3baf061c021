"""The paper's tables on tiny trees, against scikit-learn and loops over pixels and points."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, auc, average_precision_score, jaccard_score

import legrad
from pipeline.cli.main import main
from pipeline.datasets.imagenet_s import imagenet_class_names, imagenet_wordnet_ids
from pipeline.demo import assets
from pipeline.reproduce import paper, run
from pipeline.reproduce.journal import open_journal
from pipeline.reproduce.tables import rows_of
from tests.helpers.command_line import run_legrad
from tests.helpers.dataset_trees import jpeg, png, write, write_imagenet_s, write_openimages

WORDNET_IDS = imagenet_wordnet_ids()
CLASSES = {"/m/1": "Cat", "/m/2": "Dog", "/m/3": "Apple"}
POINTS = [
    ("a", 0.2, 0.3, "/m/1", "yes"),
    ("a", 0.8, 0.3, "/m/1", "no"),
    ("a", 0.5, 0.9, "/m/1", "yes"),
    ("a", 0.5, 0.5, "/m/3", "no"),
    ("b", 0.5, 0.5, "/m/2", "yes"),
    ("b", 0.9, 0.1, "/m/2", "no"),
    ("b", 0.1, 0.5, "/m/1", "yes"),
    ("c", 0.1, 0.5, "/m/3", "no"),
]
BATCH = 2  # so that a tiny tree has several batches


@pytest.fixture(scope="module")
def explainer() -> legrad.LeGrad:
    return legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers="all", device="cpu"
    )


@pytest.fixture(scope="module")
def classes(explainer) -> torch.Tensor:
    names = imagenet_class_names(WORDNET_IDS)
    return torch.cat([explainer.embed_text([paper.TEMPLATE.format(name)]) for name in names])


def opened(path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def label_map(class_id: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ids = np.zeros((24, 40), np.uint16)
    top, left = rng.integers(0, 10, 2)
    ids[top : top + 12, left : left + 20] = class_id
    ids[-2:] = 1000
    return ids


@pytest.fixture(scope="module")
def root(tmp_path_factory, explainer, classes):
    """All three datasets; some images are damaged, without a class, or of the class that the model names."""
    root = tmp_path_factory.mktemp("root")
    names = {f"{WORDNET_IDS[place]}/ILSVRC2012_val_{place:08d}": place + 1 for place in range(4)}
    truth = {name: label_map(class_id, class_id) for name, class_id in names.items()}
    truth[f"{WORDNET_IDS[1]}/ILSVRC2012_val_00000001"][:10, :10] = 7
    truth[f"{WORDNET_IDS[9]}/no_class"] = np.zeros((24, 40), np.uint16)
    write_imagenet_s(root / "ImageNetS50", WORDNET_IDS[:50], truth)
    folder = root / "ImageNetS50"
    damaged = folder / "validation" / WORDNET_IDS[3] / "damaged.JPEG"
    write(damaged, jpeg(24, 40)[:300])
    write(
        folder / "validation-segmentation" / WORDNET_IDS[3] / "damaged.png",
        png(np.zeros((24, 40, 3), np.uint8)),
    )
    write_openimages(root / "openimages", POINTS, classes=CLASSES, images=["a", "b", "c"])
    for seed in range(3):
        data = jpeg(64, 64, seed=seed)
        draft = write(root / "draft.jpg", data)
        images = explainer.preprocess([opened(draft)])
        best = int((explainer.encode(images).image_features @ classes.T).argmax())
        place = best if seed else (best + 1) % 1000
        write(root / "imagenet" / "val" / WORDNET_IDS[place] / f"{seed}.JPEG", data)
    (root / "draft.jpg").unlink()
    return root


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(run, "BATCH_SIZE", BATCH)


@pytest.fixture(scope="module")
def tables(root, tmp_path_factory):
    """The document of one run over all tables."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "BATCH_SIZE", BATCH)
        patch.setattr("sys.argv", ["legrad", "reproduce", str(root), "--model", "demo", "--to", str(out)])
        try:
            main()
        except SystemExit as ending:
            assert ending.code in (0, None)
    return out


def document(out):
    found = (json.loads(path.read_text()) for path in sorted(out.glob("*.json")))
    return {table["name"]: table for table in found}


def values(out, table: str, method: str) -> dict[str, float]:
    (row,) = [row for row in document(out)[table]["rows"] if row["method"] == method]
    return row["values"]


def maps_by(method: str, explainer, images, texts):
    if method == "LeGrad, last 2":
        return explainer.relevance(images, texts, per_layer=True)[-2:].sum(dim=0)[0]
    return legrad.baseline(explainer, "rollout", images, texts)[0]


METHODS = ["LeGrad, last 2", "attention rollout"]


@pytest.mark.parametrize("method", METHODS)
def test_segmentation_is_what_scikit_learn_computes_of_all_pixels(root, tables, explainer, method):
    folder = root / "ImageNetS50"
    covered, labels, precisions = [], [], []
    names = imagenet_class_names(WORDNET_IDS[:50])
    for path in sorted((folder / "validation").glob("*/ILSVRC*")):
        red_green = np.array(
            opened(folder / "validation-segmentation" / path.parent.name / f"{path.stem}.png")
        ).astype(int)
        ids = red_green[..., 0] + 256 * red_green[..., 1]
        present = [class_id for class_id in np.unique(ids) if class_id not in (0, 1000)]
        images = explainer.preprocess([opened(path)])
        texts = explainer.embed_text([f"a photo of a {names[class_id - 1]}." for class_id in present])
        grids = maps_by(method, explainer, images, texts)
        for class_id, grid in zip(present, grids, strict=True):
            heat = legrad.heatmaps_of(grid, *ids.shape, "upsampled").numpy()[ids != 1000]
            truth = (ids == class_id)[ids != 1000]
            covered.append(heat > 0.5)
            labels.append(truth)
            precisions.append(
                average_precision_score(np.concatenate([~truth, truth]), np.concatenate([1 - heat, heat]))
            )
    assert len(labels) == 5
    covered, labels = np.concatenate(covered), np.concatenate(labels)
    found = values(tables, "imagenet-s", method)
    assert found["pixel_accuracy"] == pytest.approx(100 * accuracy_score(labels, covered), abs=0.05)
    iou = [jaccard_score(labels, covered, pos_label=side) for side in (True, False)]
    assert found["mean_iou"] == pytest.approx(100 * np.mean(iou), abs=0.05)
    assert found["mean_average_precision"] == pytest.approx(100 * np.mean(precisions), abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_points_are_counted_one_by_one(root, tables, explainer, method):
    positive, predicted, both = (dict.fromkeys(CLASSES, 0) for _ in range(3))
    for image in "abc":
        picture = opened(root / "openimages" / "validation" / f"{image}.jpg")
        own = [point for point in POINTS if point[0] == image]
        for mid in sorted({point[3] for point in own if point[4] == "yes"}):
            texts = explainer.embed_text([f"a photo of a {CLASSES[mid]}."])
            grid = maps_by(method, explainer, explainer.preprocess([picture]), texts)[0]
            heat = legrad.heatmaps_of(grid, picture.height, picture.width, "upsampled")
            for _, x, y, of_class, answer in own:
                if of_class == mid:
                    inside = bool(heat[int(y * picture.height), int(x * picture.width)] > 0.5)
                    positive[mid] += answer == "yes"
                    predicted[mid] += inside
                    both[mid] += inside and answer == "yes"
    ious = [both[mid] / (positive[mid] + predicted[mid] - both[mid]) for mid in CLASSES if positive[mid]]
    assert len(ious) == 2
    found = values(tables, "openimages-v7", method)["point_mean_iou"]
    assert found == pytest.approx(100 * np.mean(ious))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_perturbation_blackens_pixels_of_the_resized_image_in_the_order_of_the_map(
    root, tables, explainer, classes, method
):
    transform = explainer.transform
    shares = np.arange(10) / 10
    accuracy = {
        f"{order}_{kind}": [] for order in ("negative", "positive") for kind in ("predicted", "target")
    }
    for path in sorted((root / "imagenet" / "val").glob("*/*.JPEG")):
        pixels = transform.resize(opened(path), "exact")
        images = transform.normalise(torch.from_numpy(pixels[None]), torch.float32)
        target = WORDNET_IDS.index(path.parent.name)
        named = int((explainer.encode(images).image_features @ classes.T).argmax())
        for kind, explained in (("predicted", named), ("target", target)):
            grid = maps_by(method, explainer, images, classes[explained, None])[0]
            heat = legrad.heatmaps_of(grid, *pixels.shape[:2], "upsampled").numpy().ravel()
            for order, sign in (("negative", 1), ("positive", -1)):
                ranked = np.argsort(sign * heat, kind="stable")
                right = []
                for share in shares:
                    hidden = pixels.copy().reshape(-1, 3)
                    hidden[ranked[: round(share * len(ranked))]] = 0
                    shown = transform.normalise(
                        torch.from_numpy(hidden.reshape(1, *pixels.shape)), torch.float32
                    )
                    feature = explainer.model.encode_image(shown, normalize=True)
                    right.append(int((feature @ classes.T).argmax()) == target)
                accuracy[f"{order}_{kind}"].append(right)
    found = values(tables, "perturbation", method)
    for metric, of_images in accuracy.items():
        assert len(of_images) == 3
        expected = 100 * auc(shares, np.mean(of_images, axis=0)) / 0.9
        assert found[metric] == pytest.approx(expected, abs=1e-6), metric
    assert found["negative_target"] > 0


def test_images_that_cannot_be_used_are_counted_with_the_reason(tables):
    images = document(tables)["imagenet-s"]["images"]
    assert images == {
        "total": 6,
        "wanted": 6,
        "used": 4,
        "skipped": {"no_class": 1},
        "errors": {"decode/truncated": 1},
    }
    assert document(tables)["openimages-v7"]["images"]["skipped"] == {"no_class": 1}
    page = (tables / "imagenet-s.md").read_text()
    assert "6 images: 4 used, 1 skipped (no_class 1), 1 errors (decode/truncated 1)." in page


def test_an_interrupted_run_resumes_to_the_same_table(root, tables, tmp_path, monkeypatch, capsys):
    measure_batch, batches = run.measure_batch, []

    def interrupted(methods, dataset, names, measure):
        batches.append(list(names))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return measure_batch(methods, dataset, names, measure)

    monkeypatch.setattr(run, "measure_batch", interrupted)
    arguments = ("reproduce", str(root), "--only", "imagenet-s", "--model", "demo", "--to", str(tmp_path))
    assert run_legrad(monkeypatch, *arguments) == 130
    assert "Run the same command again to resume" in capsys.readouterr().out
    # as if the machine had stopped while it wrote the next batch
    results = tmp_path / "imagenet-s.images.jsonl"
    finished = (tables / "imagenet-s.images.jsonl").read_bytes().splitlines(keepends=True)
    assert results.read_bytes().splitlines(keepends=True) == finished[:3]
    with results.open("ab") as stream:
        stream.write(finished[3] + finished[4][:50])
    assert run_legrad(monkeypatch, *arguments) == 0
    assert len(batches) == 4
    assert results.read_bytes() == (tables / "imagenet-s.images.jsonl").read_bytes()
    assert document(tmp_path)["imagenet-s"] == document(tables)["imagenet-s"]


def test_a_limit_takes_a_sample_that_a_later_run_extends(root, tables, tmp_path, monkeypatch):
    arguments = ("reproduce", str(root), "--only", "imagenet-s", "--model", "demo", "--to", str(tmp_path))
    assert run_legrad(monkeypatch, *arguments, "--limit", "3") == 0
    assert document(tmp_path)["imagenet-s"]["images"]["wanted"] == 3
    assert "3 images (a random sample of 6)" in (tmp_path / "imagenet-s.md").read_text()
    assert run_legrad(monkeypatch, *arguments) == 0
    assert document(tmp_path)["imagenet-s"] == document(tables)["imagenet-s"]


def test_results_of_other_settings_are_refused(root, tables, tmp_path, monkeypatch, capsys):
    shutil.copy(tables / "openimages-v7.images.jsonl", tmp_path)
    arguments = ("reproduce", str(root), "--only", "openimages-v7", "--model", "demo", "--to", str(tmp_path))
    assert run_legrad(monkeypatch, *arguments, "--image-size", "64") == 1
    said = capsys.readouterr().err
    assert "holds results of other settings: input_size was" in said
    assert "choose another --to" in said


def test_a_file_that_another_run_writes_is_left_alone(tmp_path):
    from pipeline.errors import UserError

    path = tmp_path / "table.jsonl"
    with (
        open_journal(path, {}, ["a"], 1),
        pytest.raises(UserError, match="another run is writing it"),
        open_journal(path, {}, ["a"], 1),
    ):
        pass


def test_data_that_is_missing_is_named_with_where_to_get_it(root, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run_legrad(monkeypatch, "reproduce", str(empty), "--model", "demo") == 1
    said = capsys.readouterr().err
    for text in (
        "ImageNetS919/validation",
        "oidv7-val-annotations-point-labels.csv",
        "imagenet/val/n01440764",
    ):
        assert text in said
    assert "https://github.com/LUSSeg/ImageNet-S" in said
    assert run_legrad(monkeypatch, "reproduce", str(tmp_path / "nowhere")) == 1
    assert "no folder" in capsys.readouterr().err
    assert run_legrad(monkeypatch, "reproduce", str(root), "--only", "voc") == 1
    assert "expected imagenet-s, openimages-v7, perturbation, got 'voc'" in capsys.readouterr().err


def test_a_folder_with_some_of_the_data_gives_these_tables_and_is_not_complete(
    root, tmp_path, monkeypatch, capsys
):
    some = tmp_path / "some"
    shutil.copytree(root / "openimages", some / "openimages")
    to = tmp_path / "out"
    assert run_legrad(monkeypatch, "reproduce", str(some), "--model", "demo", "--to", str(to)) == 3
    assert list(document(to)) == ["openimages-v7"]
    said = capsys.readouterr().out
    assert "Not made, because data is missing" in said
    assert "https://image-net.org" in said
    # with most images gone, the table is written, but nothing counts as done
    for image in "ab":
        (some / "openimages" / "validation" / f"{image}.jpg").unlink()
    arguments = ("reproduce", str(some), "--only", "openimages-v7", "--model", "demo")
    assert run_legrad(monkeypatch, *arguments, "--to", str(tmp_path / "again")) == 3
    assert "none can be used" in capsys.readouterr().out


def test_the_papers_figures_are_beside_the_methods_that_the_source_quotes():
    scores = {
        method: {"mean_iou": 0.5} for method in ("LeGrad, last 2", "LeGrad, all 12", "rollout", "gradcam")
    }
    rows = {row.title: row for row in rows_of(scores, paper.figures("imagenet-s", "ViT-B-16"))}
    assert rows["LeGrad, last 2"].paper["mean_iou"] == rows["LeGrad, all 12"].paper["mean_iou"] == 58.66
    assert rows["attention rollout"].paper == {"mean_iou": 40.64, "pixel_accuracy": 60.63}
    assert rows["attention rollout"].values == {"mean_iou": 50}
    assert rows["GradCAM, last block"].paper == {}
    assert rows["TextSpan (not computed here)"].values == {}
    assert paper.figures("imagenet-s", "RN50") == {}
    assert "no figures of this model; it has those of ViT-B/16" in paper.missing_figures("imagenet-s", "RN50")
    assert "quotes no figure of this table" in paper.missing_figures("perturbation", "ViT-B-16")
