"""Exports in the formats of other tools: VOC, YOLO, COCO polygons; read back as those tools read them."""

import io
from collections import Counter

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from scipy import ndimage
from torchvision.datasets import VOCSegmentation
from typer.testing import CliRunner

from legrad.masks.rle import decode_rle, encode_rle
from pipeline.cli.main import app
from pipeline.config.classes import class_entries
from pipeline.datasets.voc import open_voc
from pipeline.errors import UserError
from pipeline.export.parts import Parts
from pipeline.export.polygons import AT_CENTRES, AT_EDGES, joined_polygon, part_polygons
from pipeline.export.write import ExportOptions, export_job
from pipeline.output.label_map import label_map
from pipeline.output.row_classes import RowClasses
from tests.helpers.report_jobs import HEIGHT, WIDTH, box_rle, row, write_job

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def spots(*boxes):
    """An encoded mask of boxes: top, left, bottom, right."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = True
    return encode_rle(mask[None])[0]


def two_class_rows():
    """A dog in two parts, one of 4 pixels, and a more similar cat in front of the other part."""
    return [
        row(0, 0, prompt="dog", class_id=1, similarity=0.2, mask=spots((4, 4, 20, 20), (40, 60, 42, 62))),
        row(0, 1, prompt="cat", class_id=2, similarity=0.3, mask=spots((12, 12, 30, 40))),
        row(1, 0, prompt="cat", class_id=2, ignore=box_rle(0, 0, 3, WIDTH)),
    ]


@pytest.fixture
def job(tmp_path):
    return write_job(tmp_path / "job", [two_class_rows(), [row(0, prompt="dog", class_id=1)]], runs=False)


masks = st.tuples(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.integers(0, 3)).map(
    lambda made: (
        ndimage.gaussian_filter(np.random.default_rng(made[0]).random((23, 31)), made[2])
        > np.quantile(
            ndimage.gaussian_filter(np.random.default_rng(made[0]).random((23, 31)), made[2]), made[1]
        )
    )
)


@settings(max_examples=60, deadline=None)
@given(mask=masks)
def test_polygons_along_pixel_edges_are_the_mask_again_for_pycocotools(mask):
    polygons = [polygon.ravel().tolist() for polygon in part_polygons(mask, AT_EDGES)]
    read_back = coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(polygons, *mask.shape)))
    assert np.array_equal(read_back, mask)


@settings(max_examples=60, deadline=None)
@given(mask=masks)
def test_polygons_through_pixel_centres_are_the_mask_again_for_opencv(mask):
    pixels = np.zeros(mask.shape, dtype=np.uint8)
    for polygon in part_polygons(mask, AT_CENTRES):
        cv2.fillPoly(pixels, [np.floor(polygon).astype(np.int32)], 1)
    # a seam to a hole may cross another hole, and OpenCV fills what it runs through
    holes = ndimage.binary_fill_holes(mask) & ~mask
    assert not (mask & (pixels == 0)).any()
    assert not (~mask & ~holes & (pixels == 1)).any()
    joined = np.zeros(mask.shape, dtype=np.uint8)
    cv2.fillPoly(joined, [np.floor(joined_polygon(part_polygons(mask, AT_CENTRES))).astype(np.int32)], 1)
    assert not (mask & (joined == 0)).any()


def test_coco_polygons_come_with_the_mask_beside_them_and_the_agreement_of_both(job, tmp_path):
    arguments = ["export", str(job), str(tmp_path / "to"), "--format", "coco", "--polygons", "--no-images"]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert "polygons, read back as pixels, against masks: mean IoU 1.0000, lowest 1.0000" in ran.output
    coco = COCO(str(tmp_path / "to" / "annotations.json"))
    assert len(coco.anns) == 4
    for annotation in coco.anns.values():
        assert isinstance(annotation["segmentation"], list)
        assert np.array_equal(coco.annToMask(annotation), decode_rle(annotation["rle"]))


def test_ids_of_images_and_annotations_begin_at_one(job, tmp_path):
    export_job(str(job), str(tmp_path / "to"), ExportOptions("coco", images=False))
    coco = COCO(str(tmp_path / "to" / "annotations.json"))
    assert min(coco.imgs) == 1
    assert min(coco.anns) == 1


def test_parts_below_the_smallest_area_are_skipped_and_counted(job, tmp_path):
    options = ExportOptions("coco", kind="instances", images=False, min_area=5)
    totals = export_job(str(job), str(tmp_path / "to"), options)
    assert (totals.written, totals.counts["parts_below_min_area"]) == (4, 1)
    counts = Counter()
    parts = list(Parts("instances", 4).of(two_class_rows()[0], HEIGHT, WIDTH, counts))
    assert [int(mask.sum()) for mask, _ in parts] == [256, 4]
    assert not counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions("webdataset", min_area=3), "--min-area: webdataset has no annotations"),
        (ExportOptions("voc", min_area=3), "--min-area: voc has objects only with --kind instances"),
        (ExportOptions("voc", polygons=True), "--polygons: belongs to --format coco"),
        (ExportOptions("voc", split="../up"), r"--split: expected .* got '\.\./up'"),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(job, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export_job(str(job), str(tmp_path / "to"), options)
    assert not (tmp_path / "to").exists()


def test_torchvision_reads_images_and_classes_of_a_voc_export(job, tmp_path):
    export_job(str(job), str(tmp_path / "to"), ExportOptions("voc", split="val"))
    dataset = VOCSegmentation(str(tmp_path / "to"), year="2012", image_set="val")
    found = [(image.size, np.array(labels)) for image, labels in (dataset[index] for index in range(3))]
    assert len(dataset) == 3
    assert all(size == (WIDTH, HEIGHT) for size, _ in found)
    expected = label_map(two_class_rows()[:2], HEIGHT, WIDTH)
    assert any(np.array_equal(values, expected) for _, values in found)
    assert not (tmp_path / "to/VOCdevkit/VOC2012/SegmentationObject").exists()


def test_the_reader_of_voc_takes_a_voc_export_with_the_names_of_its_classes(job, tmp_path):
    export_job(str(job), str(tmp_path / "to"), ExportOptions("voc"))
    dataset = open_voc(tmp_path / "to", "train")
    assert dataset.class_names == ("dog", "cat")
    samples = [dataset.read(name) for name in dataset.image_names]
    assert sorted(sample.document["class_names"] for sample in samples) == [["cat"], ["dog"], ["dog", "cat"]]
    ran = CliRunner().invoke(
        app, ["shards", "voc", str(tmp_path / "to"), str(tmp_path / "tars"), "--split", "train"]
    )
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / "tars" / "classes.txt").read_text().split() == ["dog", "cat"]


def voc_pngs(folder, kind):
    paths = sorted((folder / "VOCdevkit/VOC2012" / kind).glob("*.png"))
    return [np.array(Image.open(io.BytesIO(path.read_bytes()))) for path in paths]


def test_objects_of_voc_are_the_visible_parts_and_small_ones_are_void_in_both_label_maps(job, tmp_path):
    options = ExportOptions("voc", kind="instances", min_area=5)
    assert export_job(str(job), str(tmp_path / "to"), options).counts["parts_below_min_area"] == 1
    classes, objects = (voc_pngs(tmp_path / "to", f"Segmentation{kind}") for kind in ("Class", "Object"))
    both = [pair for pair in zip(classes, objects, strict=True) if set(np.unique(pair[0])) == {0, 1, 2, 255}]
    ((of_class, of_object),) = both
    assert np.array_equal(of_class == 255, of_object == 255)
    assert np.array_equal(of_class == 0, of_object == 0)
    assert (of_class == 255).sum() == 4
    for number in (1, 2):
        assert len(np.unique(of_class[of_object == number])) == 1
    assert set(np.unique(of_object)) == {0, 1, 2, 255}


def test_beyond_254_objects_the_smallest_are_void_and_counted(tmp_path):
    grid = np.zeros((HEIGHT, WIDTH), dtype=bool)
    grid[::2, ::2] = True
    grid[0:3, 0:3] = True
    rows = [row(0, prompt="dog", class_id=1, mask=encode_rle(grid[None])[0])]
    job = write_job(tmp_path / "job", [rows], runs=False)
    totals = export_job(str(job), str(tmp_path / "to"), ExportOptions("voc", kind="instances"))
    (objects,) = voc_pngs(tmp_path / "to", "SegmentationObject")
    assert set(np.unique(objects)) == set(range(256))
    assert totals.counts["objects_beyond_254"] == (objects == 255).sum()
    assert objects[1, 1] not in (0, 255)


def yolo_objects(label_file, height=HEIGHT, width=WIDTH):
    """Class and pixels of each line, as ultralytics reads it at the image's own size."""
    found = []
    for line in label_file.read_text().splitlines():
        number, *values = line.split()
        points = np.array(values, dtype=np.float32).reshape(-1, 2)
        assert len(points) >= 3
        assert points.min() >= 0
        assert points.max() <= 1
        pixels = np.zeros((height, width), dtype=np.uint8)
        cv2.fillPoly(pixels, [(points * (width, height)).astype(np.int32)], 1)
        found.append((int(number), pixels.astype(bool)))
    return found


def test_yolo_lines_are_the_masks_again_and_data_yaml_names_their_classes(job, tmp_path):
    totals = export_job(str(job), str(tmp_path / "to"), ExportOptions("yolo-seg", kind="instances"))
    assert (totals.written, totals.fit.polygons, totals.fit.iou_min) == (5, 5, 1.0)
    data = yaml.safe_load((tmp_path / "to" / "data.yaml").read_text())
    assert data == {"train": "train.txt", "val": "train.txt", "names": {0: "dog", 1: "cat"}}
    images = (tmp_path / "to" / "train.txt").read_text().splitlines()
    assert len(images) == 3
    found = {}
    for image in images:
        assert (tmp_path / "to" / image).is_file()
        label_file = (tmp_path / "to" / image.replace("/images/", "/labels/")).with_suffix(".txt")
        found[label_file.parent.name[0], label_file.stem] = yolo_objects(label_file)
    first = found["0", "00000000-key000"]
    expected = [(0, two_class_rows()[0]["mask"]), (1, two_class_rows()[1]["mask"])]
    for number, rle in expected:
        union = np.any([pixels for other, pixels in first if other == number], axis=0)
        assert np.array_equal(union, decode_rle(rle))


def test_a_hole_stays_open_and_parts_of_one_mask_are_one_yolo_object(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[5:25, 5:25] = True
    mask[10:20, 10:20] = False
    mask[30:34, 50:54] = True
    rows = [row(0, prompt="ring", class_id=1, mask=encode_rle(mask[None])[0])]
    job = write_job(tmp_path / "job", [rows], runs=False)
    export_job(str(job), str(tmp_path / "to"), ExportOptions("yolo-seg"))
    (label_file,) = (tmp_path / "to" / "labels").rglob("*.txt")
    ((number, pixels),) = yolo_objects(label_file)
    assert number == 0
    assert np.array_equal(pixels[:25, :25], mask[:25, :25])
    assert np.array_equal(pixels[30:, 50:], mask[30:, 50:])
    # the seam between the parts is one pixel wide
    assert (pixels & ~mask).sum() <= WIDTH


def test_captions_without_classes_are_one_yolo_class_and_the_command_says_so(tmp_path):
    job = write_job(tmp_path / "job", [[row(0, prompt="a dog on a roof")]], runs=False)
    ran = CliRunner().invoke(app, ["export", str(job), str(tmp_path / "to"), "--format", "yolo-seg"])
    assert ran.exit_code == 0, ran.output
    assert "prompts without a class share the category `prompt`" in ran.output
    assert yaml.safe_load((tmp_path / "to" / "data.yaml").read_text())["names"] == {0: "prompt"}


def test_ultralytics_reads_a_yolo_export(job, tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    ultralytics = pytest.importorskip("ultralytics.data.utils", reason="ultralytics is not installed")
    export_job(str(job), str(tmp_path / "to"), ExportOptions("yolo-seg", kind="instances"))
    data = ultralytics.check_det_dataset(str(tmp_path / "to" / "data.yaml"), autodownload=False)
    assert data["names"] == {0: "dog", 1: "cat"}
    dataset = pytest.importorskip("ultralytics.data.dataset").YOLODataset(
        img_path=data["train"], data=data, task="segment", augment=False
    )
    assert sorted(label["cls"].ravel().tolist() for label in dataset.labels) == [[0], [0, 0, 1], [1]]


CLASSES = class_entries(
    [
        {"name": "dog", "synonyms": ["puppy"]},
        {"name": "hot dog"},
        {"name": "goose"},
        {"name": "cactus", "id": 9},
        {"name": "crane", "synonyms": ["bird"]},
        {"name": "gull", "synonyms": ["bird"], "id": 20},
    ]
)


@pytest.mark.parametrize(
    ("prompt", "outcome"),
    [
        ("dog", 1),
        ("a dog", 1),
        ("Two Dogs, asleep", 1),
        ("the puppy", 1),
        ("a hot-dog", 2),
        ("geese", 3),
        ("cacti", 9),
        ("a dogma", "rows_without_class"),
        ("", "rows_without_class"),
        ("a dog and a goose", "rows_several_classes"),
        ("a bird", "rows_several_classes"),
    ],
)
def test_a_prompt_belongs_to_the_class_that_it_mentions_alone(prompt, outcome):
    reasons = []
    found = RowClasses(CLASSES).classified({"prompt": prompt, "class_id": None}, reasons.append)
    assert (reasons or [found["class_id"]]) == [outcome]
    assert RowClasses(CLASSES).classified({"prompt": prompt, "class_id": 7})["class_id"] == 7


def test_an_export_counts_prompts_that_mention_no_class_apart_from_those_that_mention_several(tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("dog\ncat\n")
    prompts = ["a dog", "two cats", "a dog with a cat", "the sky"]
    rows = [row(index, prompt=prompt) for index, prompt in enumerate(prompts)]
    job = write_job(tmp_path / "job", [rows], runs=False)
    arguments = ["export", str(job), str(tmp_path / "to"), "--format", "coco", "--classes", str(classes)]
    ran = CliRunner().invoke(app, arguments)
    assert "1 rows skipped: the prompt mentions no class" in ran.output
    assert "1 rows skipped: the prompt mentions several classes" in ran.output
    assert "2 samples skipped: no prompt with a mask belongs to one class" in ran.output
    assert "no accepted mask" not in ran.output
    coco = COCO(str(tmp_path / "to" / "annotations.json"))
    named = {entry["id"]: entry["name"] for entry in coco.dataset["categories"]}
    assert sorted((named[entry["category_id"]], entry["prompt"]) for entry in coco.anns.values()) == [
        ("cat", "two cats"),
        ("dog", "a dog"),
    ]
