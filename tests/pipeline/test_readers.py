"""Datasets in their owners' layout come out of the shards as their owners' own tools would read them."""

import contextlib
import csv
import io
import json
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.config.classes import read_class_list
from pipeline.config.schema import InputConfig
from pipeline.datasets.coco import open_coco
from pipeline.datasets.imagenet_s import open_imagenet_s
from pipeline.datasets.openimages import open_openimages
from pipeline.datasets.truth_dataset import unique_names
from pipeline.datasets.voc import open_voc
from pipeline.datasets.writing import write_shards
from pipeline.errors import UserError
from pipeline.prompts.mentions import MentionFinder
from pipeline.shards.captions import read_captions
from pipeline.shards.ground_truth import Scene, list_truth_shards, read_scenes
from pipeline.shards.images import open_image
from tests.helpers.dataset_trees import (
    box_polygon,
    coco_object,
    encoded_jpeg,
    palette_png,
    png,
    voc_palette,
    write,
    write_coco,
    write_imagenet_s,
    write_openimages,
    write_voc,
)


def scenes_of(folder):
    """Every scene of the shards in a folder by key; fails where one is an error."""
    settings = InputConfig(shards="unused")
    found = [
        scene for shard in list_truth_shards(f"{folder}/*.tar") for scene in read_scenes(shard, settings)
    ]
    assert all(isinstance(scene, Scene) for scene in found), found
    return {scene.key: scene for scene in found}


def documents_of(folder):
    """The JSON field of every sample by key, as webdataset reads the shards."""
    return {sample["__key__"]: json.loads(sample["json"]) for sample in webdataset_samples(folder)}


def webdataset_samples(folder):
    samples = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            samples += group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
    return samples


def classes_of(folder):
    """Names by rank, as a job would read them."""
    entries = read_class_list(str(folder / "classes.txt"))
    assert [entry.class_id for entry in entries] == list(range(1, len(entries) + 1))
    return [entry.name for entry in entries]


# VOC 2012


def test_voc_label_maps_hold_the_indices_and_never_the_colours(tmp_path):
    truth = write_voc(tmp_path, ["2007_000033", "2007_000042", "2011_003276"])
    write_shards(open_voc(tmp_path), str(tmp_path / "out"))
    scenes = scenes_of(tmp_path / "out")
    assert list(scenes) == list(truth)
    colours = voc_palette()
    for name, scene in scenes.items():
        path = tmp_path / "VOCdevkit/VOC2012/SegmentationClass" / f"{name}.png"
        with Image.open(path) as image:
            drawn = np.asarray(image.convert("RGB"))
        assert scene.label_map.dtype == np.uint8
        np.testing.assert_array_equal(colours[scene.label_map], drawn)
        np.testing.assert_array_equal(scene.label_map == 255, truth[name] == 255)


def test_voc_samples_name_the_classes_that_are_seen(tmp_path):
    truth = write_voc(tmp_path, ["2007_000033"])
    write_shards(open_voc(tmp_path / "VOCdevkit"), str(tmp_path / "out"))
    (document,) = documents_of(tmp_path / "out").values()
    names = classes_of(tmp_path / "out")
    assert len(names) == 20
    assert names[0] == "aeroplane"
    assert names[19] == "tv monitor"
    assert set(document["class_ids"]) == set(np.unique(truth["2007_000033"]).tolist()) - {0, 255}
    assert document["captions"] == [names[class_id - 1] for class_id in document["class_ids"]]
    assert document["captions"] == document["class_names"] == document["labels"]


@pytest.mark.parametrize("where", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_is_found_from_any_of_its_three_folders(tmp_path, where):
    write_voc(tmp_path, ["2007_000033"], split="trainval")
    assert list(open_voc(tmp_path / where, "trainval").image_names) == ["2007_000033"]


@pytest.mark.parametrize("split", ["test", "../../../etc/passwd", ""])
def test_an_unknown_split_of_voc_is_an_input_error(tmp_path, split):
    write_voc(tmp_path, ["2007_000033"])
    with pytest.raises(UserError):
        open_voc(tmp_path, split)


def test_images_are_passed_on_byte_for_byte(tmp_path):
    write_voc(tmp_path, ["2007_000033"])
    write_shards(open_voc(tmp_path), str(tmp_path / "out"))
    (sample,) = webdataset_samples(tmp_path / "out")
    assert sample["jpg"] == (tmp_path / "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg").read_bytes()


def test_the_captions_of_a_sample_serve_as_prompts(tmp_path):
    write_voc(tmp_path, ["2007_000033"])
    write_shards(open_voc(tmp_path), str(tmp_path / "out"))
    (sample,) = webdataset_samples(tmp_path / "out")
    captions = read_captions(sample, "json:captions", several=True)
    assert captions == json.loads(sample["json"])["captions"]
    assert len(captions) == 2


@pytest.mark.parametrize(
    ("orientation", "frame"),
    # an upright map of the stored size could not be distinguished from one of the stored image
    [(orientation, "stored") for orientation in range(1, 9)]
    + [(orientation, "upright") for orientation in range(5, 9)],
)
def test_label_maps_follow_the_image_when_exif_turns_it(tmp_path, orientation, frame):
    # class 3 is where the picture is bright
    stored = np.zeros((16, 32), np.uint8)
    stored[0:8, 0:16] = 3
    data = encoded_jpeg(np.repeat((stored == 3)[:, :, None] * np.uint8(255), 3, axis=2), orientation)
    upright = np.asarray(open_image(data, max_image_pixels=10**6).convert("L")) > 127
    write_voc(tmp_path, ["turned"])
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    write(folder / "JPEGImages" / "turned.jpg", data)
    annotated = stored if frame == "stored" else np.where(upright, 3, 0)
    write(folder / "SegmentationClass" / "turned.png", palette_png(annotated))
    write_shards(open_voc(tmp_path), str(tmp_path / "out"))
    np.testing.assert_array_equal(scenes_of(tmp_path / "out")["turned"].label_map == 3, upright)


# COCO


def coco_oracle(instances_file, image_id):
    """The label map by pycocotools' own masks, pixel by pixel: the smallest object wins, crowds are last."""
    coco = COCO(instances_file)
    rank = {category: index for index, category in enumerate(sorted(coco.getCatIds()), 1)}
    image = coco.loadImgs(image_id)[0]
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
    with warnings.catch_warnings():
        # pycocotools' own, under numpy 2
        warnings.simplefilter("ignore", DeprecationWarning)
        masks = [(each, coco.annToMask(each).astype(bool)) for each in annotations]
    labels = np.zeros((image["height"], image["width"]), int)
    smallest = np.full(labels.shape, np.inf)
    for each, mask in masks:
        if each["iscrowd"]:
            labels[mask & np.isinf(smallest)] = 255
            continue
        # of equal areas, the later one
        wins = mask & (mask.sum() <= smallest)
        labels[wins] = rank[each["category_id"]]
        smallest[wins] = mask.sum()
    return labels


def crowd(mask):
    """Run lengths as COCO ships them for crowds: down the columns, background first."""
    flat = mask.ravel(order="F").astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def test_coco_label_maps_are_what_pycocotools_draws(tmp_path, capsys):
    crowded = np.zeros((24, 32), bool)
    crowded[:10, 15:] = True
    objects = [
        coco_object(1, 139, 67, box_polygon(2, 3, 28, 20)),
        coco_object(2, 139, 18, box_polygon(5.5, 6.2, 14.7, 12.9)),
        coco_object(3, 139, 1, [*box_polygon(20, 5, 26, 9), [3, 15, 9, 15, 6, 20]]),
        coco_object(4, 139, 1, crowd(crowded), iscrowd=1),
        coco_object(5, 285, 90, box_polygon(0, 0, 10, 10)),
    ]
    path = write_coco(tmp_path, objects, images={139: (24, 32), 285: (20, 20), 632: (10, 12)})
    write_shards(open_coco(tmp_path), str(tmp_path / "out"))
    scenes = scenes_of(tmp_path / "out")
    assert list(scenes) == ["000000000139", "000000000285", "000000000632"]
    for image_id in (139, 285, 632):
        np.testing.assert_array_equal(
            scenes[f"{image_id:012d}"].label_map, coco_oracle(path, image_id), strict=False
        )
    # sparse ids 1, 2, 18, 67, 90 become ranks
    assert scenes["000000000139"].class_ids == (1, 3, 4)
    assert scenes["000000000139"].captions == ("person", "dog", "dining table")
    assert scenes["000000000285"].class_ids == (5,)
    assert scenes["000000000632"].class_ids == ()
    assert classes_of(tmp_path / "out") == ["person", "bicycle", "dog", "dining table", "toothbrush"]
    assert 255 in scenes["000000000139"].label_map


boxes = st.tuples(
    st.floats(0, 30, width=16),
    st.floats(0, 20, width=16),
    st.floats(2, 20, width=16),
    st.floats(2, 20, width=16),
)
drawn_objects = st.lists(st.tuples(boxes, st.sampled_from([1, 2, 18, 67, 90]), st.booleans()), max_size=6)


@settings(max_examples=25)
@given(drawn_objects)
def test_any_overlap_of_coco_objects_and_crowds_is_drawn_by_the_same_rule(tmp_path_factory, drawn):
    root = tmp_path_factory.mktemp("coco")
    objects = []
    for identity, ((left, top, width, height), category, is_crowd) in enumerate(drawn, 1):
        mask = np.zeros((24, 32), bool)
        mask[int(top) : int(top + height), int(left) : int(left + width)] = True
        outline = box_polygon(left, top, min(left + width, 32), min(top + height, 24))
        shape = crowd(mask) if is_crowd else outline
        objects.append(coco_object(identity, 7, category, shape, int(is_crowd)))
    path = write_coco(root, objects, images={7: (24, 32)})
    write_shards(open_coco(root), str(root / "out"))
    np.testing.assert_array_equal(
        scenes_of(root / "out")["000000000007"].label_map, coco_oracle(path, 7), strict=False
    )


def test_real_captions_of_coco_are_in_the_sample(tmp_path):
    captions = [
        {"id": 9, "image_id": 139, "caption": "The later one."},
        {"id": 4, "image_id": 139, "caption": " A room with chairs.\n"},
    ]
    objects = [coco_object(1, 139, 1, box_polygon(2, 3, 8, 9))]
    write_coco(tmp_path, objects, images={139: (24, 32), 632: (10, 12)}, captions=captions)
    write_shards(open_coco(tmp_path), str(tmp_path / "out"))
    documents = documents_of(tmp_path / "out")
    assert documents["000000000139"]["caption"] == "A room with chairs."
    assert documents["000000000139"]["all_captions"] == ["A room with chairs.", "The later one."]
    assert documents["000000000139"]["captions"] == ["person"]
    assert "caption" not in documents["000000000632"]


def edited_coco(root, edit, captions=()):
    """Two images with one object each, and whatever an edit makes of the document."""
    objects = [
        coco_object(1, 139, 1, box_polygon(2, 3, 8, 9)),
        coco_object(2, 632, 18, box_polygon(1, 1, 6, 6)),
    ]
    path = write_coco(root, objects, images={139: (24, 32), 632: (10, 12)}, captions=captions)
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return write_shards(open_coco(root), str(root / "out"))


A_CAPTION = {"id": 1, "image_id": 139, "caption": "A room."}


@pytest.mark.parametrize(
    ("caption", "kind", "message"),
    [
        ({"id": 2, "image_id": 139, "caption": None}, "captions_malformed", "a text as caption, found null"),
        ({"id": 2, "image_id": 139, "caption": 7}, "captions_malformed", "a text as caption, found 7"),
        ({"id": 2, "image_id": 139}, "captions_malformed", "a text as caption, found none"),
        ({"id": 2, "image_id": 139, "caption": " \n"}, "captions_malformed", "only white space"),
        ({"id": 2, "caption": "A dog."}, "captions_malformed", "a whole number as image_id, found none"),
        (
            {"id": "x", "image_id": 139, "caption": "A."},
            "captions_malformed",
            "a whole number as id, found 'x'",
        ),
        (None, "captions_malformed", "a JSON object, found None"),
        (
            {"id": 2, "image_id": 5, "caption": "A dog."},
            "captions_of_unknown_or_ambiguous_image",
            "caption 2 of image 5",
        ),
        (A_CAPTION, "captions_listed_twice", "caption 1 of image 139"),
    ],
)
def test_a_coco_caption_that_is_none_is_counted_and_named(tmp_path, caption, kind, message):
    conversion = edited_coco(tmp_path, lambda document: None, captions=[A_CAPTION, caption])
    assert conversion.omitted == {kind: 1}
    assert message in conversion.omitted_names[kind][0]
    assert documents_of(tmp_path / "out")["000000000139"]["all_captions"] == ["A room."]


def append(name, record):
    return lambda document: document[name].append(record)


@pytest.mark.parametrize(
    ("edit", "kind", "message"),
    [
        (append("annotations", {"id": 9}), "annotations_malformed", "image_id, found none"),
        (append("annotations", "x"), "annotations_malformed", "a JSON object, found 'x'"),
        (
            append("annotations", {"id": 9, "image_id": 5}),
            "annotations_of_unknown_or_ambiguous_image",
            "annotation 9 of image 5",
        ),
        (
            append("annotations", coco_object(1, 139, 1, box_polygon(2, 3, 8, 9))),
            "annotations_listed_twice",
            "annotation 1 of image 139",
        ),
        (append("images", {"id": 7}), "images_malformed", "height, found none"),
        (append("images", None), "images_malformed", "a JSON object, found None"),
        (
            append("images", {"id": 7, "file_name": None, "height": 2, "width": 2}),
            "images_malformed",
            "a text as file_name, found null",
        ),
        (
            append("images", {"id": 7, "file_name": "x.jpg", "height": "2", "width": 2}),
            "images_malformed",
            "a whole number as height, found '2'",
        ),
        (
            append("images", {"id": 139, "file_name": f"{139:012d}.jpg", "height": 24, "width": 32}),
            "images_listed_twice",
            "image 139",
        ),
    ],
)
def test_a_coco_record_that_no_image_can_have_is_counted_and_named(tmp_path, edit, kind, message):
    conversion = edited_coco(tmp_path, edit)
    assert (conversion.written, conversion.skipped) == (2, {})
    assert conversion.omitted == {kind: 1}
    assert message in conversion.omitted_names[kind][0]


def another_id(document):
    document["images"].append({**document["images"][0], "id": 7})
    document["annotations"].append(coco_object(3, 7, 1, box_polygon(1, 1, 4, 4)))


def another_name(document):
    document["images"].append({**document["images"][0], "file_name": "else.jpg"})


@pytest.mark.parametrize(
    ("edit", "skipped", "objects"),
    [(another_id, ["000000000139.jpg"], 2), (another_name, ["000000000139.jpg", "else.jpg"], 1)],
)
def test_coco_images_of_one_name_or_one_id_are_skipped_with_all_their_objects_counted(
    tmp_path, edit, skipped, objects
):
    conversion = edited_coco(tmp_path, edit)
    assert conversion.skipped == {"ambiguous_image": len(skipped)}
    assert sorted(name for name, _ in conversion.skipped_names["ambiguous_image"]) == skipped
    assert conversion.omitted == {"annotations_of_unknown_or_ambiguous_image": objects}
    assert list(scenes_of(tmp_path / "out")) == ["000000000632"]


@pytest.mark.parametrize("folder", ["a", "a/b", "val2017"])
def test_a_coco_file_name_may_hold_folders(tmp_path, folder):
    def edit(document):
        (first, _) = document["images"]
        file = tmp_path / "val2017" / first["file_name"]
        if folder != "val2017":
            write(tmp_path / "val2017" / folder / file.name, file.read_bytes())
            file.unlink()
        first["file_name"] = f"{folder}/{file.name}"

    conversion = edited_coco(tmp_path, edit)
    assert (conversion.written, conversion.skipped) == (2, {})


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/x.jpg", "a//b.jpg", "a/./b.jpg", "a\\b.jpg", "a/"])
def test_a_coco_file_name_that_leaves_the_folder_is_unsafe(tmp_path, name):
    write(tmp_path / "secret.jpg", b"secret")
    conversion = edited_coco(tmp_path, lambda document: document["images"][0].update(file_name=name))
    assert conversion.skipped == {"unsafe_name": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 99}, "annotation 1: category 99 is not one of the 5 categories"),
        ({"category_id": None}, "annotation 1: expected a whole number as category_id, found null"),
        (
            {"segmentation": None},
            "annotation 1: expected polygons or run lengths as segmentation, found none",
        ),
        ({"segmentation": [7]}, "annotation 1: expected a list of numbers as polygon, found 7"),
        ({"segmentation": {"counts": "x"}}, "annotation 1: has no 'size' in its segmentation"),
    ],
)
def test_a_coco_object_that_cannot_be_drawn_skips_its_image_with_a_readable_reason(tmp_path, change, message):
    conversion = edited_coco(tmp_path, lambda document: document["annotations"][0].update(change))
    assert conversion.skipped_names == {"bad_annotation": [["000000000139.jpg", message]]}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda document: document.pop("images"), "expected a list 'images', found none"),
        (lambda document: document.update(annotations=None), "expected a list 'annotations', found null"),
        (append("categories", {"id": 1, "name": "x"}), "categories of different ids, found 1 more than once"),
        (append("categories", {"id": 5}), "expected a text as name, found none"),
        (append("categories", None), "expected a JSON object, found None"),
    ],
)
def test_what_is_not_laid_out_as_cocos_says_what_was_expected(tmp_path, edit, message):
    with pytest.raises(UserError, match=message):
        edited_coco(tmp_path, edit)


# ImageNet-S

WORDNET_IDS = ["n01440764", "n01443537", "n02084071", "n02119789"]


def test_imagenet_s_ids_above_254_are_written_with_16_bits(tmp_path):
    ids = np.zeros((12, 20), np.int64)
    ids[2:5, 2:5], ids[6:9, 2:9], ids[0, :] = 300, 256, 1000
    from timm.data.imagenet_info import ImageNetInfo

    folders = ImageNetInfo("imagenet-1k").label_names()[:300]
    write_imagenet_s(tmp_path / "ImageNetS300", folders, {f"{folders[299]}/ILSVRC2012_val_00000293": ids})
    write_shards(open_imagenet_s(tmp_path, variant=300), str(tmp_path / "out"))
    (scene,) = scenes_of(tmp_path / "out").values()
    assert scene.key == f"{folders[299]}_ILSVRC2012_val_00000293"
    assert scene.label_map.dtype == np.uint16
    assert scene.ignored_label == 65535
    np.testing.assert_array_equal(scene.label_map, np.where(ids == 1000, 65535, ids))
    assert scene.class_ids == (256, 300)
    assert len(classes_of(tmp_path / "out")) == 300


def test_imagenet_s_50_fits_8_bits_and_its_classes_go_by_their_wordnet_ids(tmp_path):
    from timm.data.imagenet_info import ImageNetInfo

    folders = ImageNetInfo("imagenet-1k").label_names()[:50]
    ids = np.full((12, 20), 2)
    ids[:3], ids[3:5] = 1000, 0
    write_imagenet_s(
        tmp_path / "ImageNetS50", folders[::-1], {"n01443537/b": ids, "n01440764/a": np.ones((8, 8), int)}
    )
    write_shards(open_imagenet_s(tmp_path / "ImageNetS50", variant=50), str(tmp_path / "out"))
    scenes = scenes_of(tmp_path / "out")
    assert list(scenes) == ["n01440764_a", "n01443537_b"]
    assert scenes["n01443537_b"].captions == ("goldfish",)
    np.testing.assert_array_equal(scenes["n01443537_b"].label_map, np.where(ids == 1000, 255, ids))


def test_class_folders_that_are_missing_are_reported_by_the_authors_list_in_any_order(tmp_path):
    from timm.data.imagenet_info import ImageNetInfo

    names = ImageNetInfo("imagenet-1k").label_names()[:50]
    write_imagenet_s(tmp_path, ["n01443537"], {"n01443537/b": np.full((8, 8), 2)})
    with pytest.raises(UserError, match=r"expected 50 classes, found 1.*--categories"):
        open_imagenet_s(tmp_path, variant=50)
    listed = write(tmp_path / "ImageNetS_categories_im50.txt", "\n".join(reversed(names)))
    dataset = open_imagenet_s(tmp_path, variant=50, categories_file=listed)
    assert dataset.class_names[:3] == ("tench", "goldfish", "great white shark")


def test_two_images_of_imagenet_s_with_one_name_are_skipped_and_named(tmp_path):
    from timm.data.imagenet_info import ImageNetInfo

    folders = ImageNetInfo("imagenet-1k").label_names()[:50]
    ids = {f"{folders[0]}/{name}": np.ones((8, 8), int) for name in "ab"}
    write_imagenet_s(tmp_path, folders, ids)
    (image,) = tmp_path.glob(f"validation/{folders[0]}/a.*")
    write(image.with_suffix(".png"), png(np.zeros((8, 8, 3), np.uint8)))
    conversion = write_shards(open_imagenet_s(tmp_path, variant=50), str(tmp_path / "out"))
    assert conversion.skipped == {"ambiguous_image": 1}
    assert conversion.written == 1


def test_a_class_that_imagenet_does_not_know_is_an_input_error(tmp_path):
    write_imagenet_s(tmp_path, ["n00000001"], {})
    (tmp_path / "validation-segmentation").mkdir()
    with pytest.raises(UserError, match="n00000001"):
        open_imagenet_s(tmp_path, variant=1)


# Open Images V7

CLASSES = {"/m/01xyz": "Tree", "/m/0bt9lr": "Dog", "/g/11bc": 'Sign, "stop"', "/m/unused": "Kite"}
POINTS = [
    ("b2", 0.25, 0.5, "/m/0bt9lr", "yes"),
    ("a1", 0.125, 1.0, "/m/01xyz", "no"),
    ("b2", 0.0, 0.0, "/g/11bc", "no"),
    ("a1", 0.3, 0.7, "/m/01xyz", "unsure"),
    ("a1", 0.4, 0.6, "/g/11bc", "yes"),
    ("a1", 0.4, 0.6, "/m/nobody", "yes"),
    ("a1", 1.5, 0.6, "/m/01xyz", "yes"),
    ("b2", 0.75, 0.5, "/m/0bt9lr", "yes"),
]


def test_points_that_answer_nothing_or_name_no_image_are_counted(tmp_path):
    odd = [
        ("b2", 0.5, 0.5, "/m/0bt9lr", "maybe"),
        ("", 0.5, 0.5, "/m/0bt9lr", "yes"),
        ("c3", 0.5, 0.5, "/m/x", "no"),
    ]
    write_openimages(tmp_path, [*POINTS, *odd], classes=CLASSES, images=["b2", "a1"])
    conversion = write_shards(open_openimages(tmp_path), str(tmp_path / "out"))
    counts = (conversion.written, conversion.omitted["points_malformed"], conversion.skipped)
    assert counts == (2, 2, {})
    # the nameless one, and the one whose only point is of an unknown class
    assert conversion.omitted["images_without_a_point"] == 2


def test_a_class_of_open_images_that_is_described_twice_is_an_input_error(tmp_path):
    write_openimages(tmp_path, POINTS, classes=CLASSES, images=["b2", "a1"])
    table = tmp_path / "oidv7-class-descriptions.csv"
    table.write_text(table.read_text() + "/m/0bt9lr,Hound\n")
    with pytest.raises(UserError, match="/m/0bt9lr more than once"):
        open_openimages(tmp_path)


def test_open_images_points_are_those_of_the_table_that_somebody_was_sure_of(tmp_path):
    path = write_openimages(tmp_path, POINTS, classes=CLASSES, images=["b2", "a1", "without-points"])
    conversion = write_shards(open_openimages(tmp_path), str(tmp_path / "out"))
    scenes, class_id_of = scenes_of(tmp_path / "out"), {mid: rank for rank, mid in enumerate(CLASSES, 1)}
    assert list(scenes) == ["a1", "b2"]
    for name, scene in scenes.items():
        rows = csv.DictReader(io.StringIO(path.read_text()))
        expected = [
            (float(row["X"]), float(row["Y"]), class_id_of[row["Label"]], row["EstimatedYesNo"] == "yes")
            for row in rows
            if row["ImageId"] == name
            and row["EstimatedYesNo"] != "unsure"
            and row["Label"] in class_id_of
            and float(row["X"]) <= 1
        ]
        assert [(p.x, p.y, p.class_id, p.is_object) for p in scene.points] == expected
        assert scene.label_map is None
    assert scenes["a1"].captions == ('Sign, "stop"',)
    assert scenes["b2"].class_ids == (2,)
    assert classes_of(tmp_path / "out") == list(CLASSES.values())
    assert conversion.omitted == {
        "points_unsure": 1,
        "points_of_unknown_class": 1,
        "points_outside": 1,
    }


def test_open_images_may_lie_in_a_folder_of_their_own(tmp_path):
    write_openimages(tmp_path, POINTS, classes=CLASSES, images=["b2", "a1"])
    (tmp_path / "validation").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="validation"):
        open_openimages(tmp_path)
    assert list(open_openimages(tmp_path, images=tmp_path / "elsewhere").image_names) == ["a1", "b2"]


def test_classes_that_share_a_name_stay_apart_in_the_class_list_but_not_in_prompts(tmp_path):
    classes = {"/m/1": "Crane", "/m/2": "Kite", "/m/3": "crane", "/m/4": ""}
    points = [("a1", 0.5, 0.5, mid, "yes") for mid in classes]
    write_openimages(tmp_path, points, classes=classes, images=["a1"])
    write_shards(open_openimages(tmp_path), str(tmp_path / "out"))
    entries = read_class_list(str(tmp_path / "out" / "classes.txt"))
    assert {entry.class_id: entry.name for entry in entries} == {
        1: "Crane",
        2: "Kite",
        3: "crane (/m/3)",
        4: "/m/4",
    }
    (document,) = documents_of(tmp_path / "out").values()
    assert document["captions"] == ["Crane", "Kite", "crane", "/m/4"]
    assert document["class_names"] == [entry.name for entry in entries]


@pytest.mark.slow
def test_labels_mention_just_the_classes_that_are_in_the_image(tmp_path):
    classes = {"/m/1": "Crane", "/m/2": "Hot dog", "/m/3": "crane", "/m/4": "Dog"}
    points = [(f"image{mid[-1]}", 0.5, 0.5, mid, "yes") for mid in classes]
    write_openimages(tmp_path, points, classes=classes, images=[point[0] for point in points])
    write_shards(open_openimages(tmp_path), str(tmp_path / "out"))
    entries = read_class_list(str(tmp_path / "out" / "classes.txt"))
    finder = MentionFinder(entries)
    for document in documents_of(tmp_path / "out").values():
        mentioned = set().union(*(finder.mentioned(label) for label in document["labels"]))
        assert [entries[ordinal].class_id for ordinal in mentioned] == document["class_ids"]


@pytest.mark.parametrize(
    "table",
    ["ImageId,X,Y\na1,0.5,0.5\n", "ImageId,X,Y,Label,EstimatedYesNo\na1,left,0.5,/m/01xyz,yes\n", ""],
    ids=["columns missing", "no number", "empty"],
)
def test_a_table_that_holds_no_point_labels_is_named(tmp_path, table):
    path = write_openimages(tmp_path, POINTS, classes=CLASSES, images=["a1"])
    path.write_text(table)
    with pytest.raises(UserError, match="oidv7-val-annotations-point-labels"):
        open_openimages(tmp_path)


def test_the_class_table_needs_no_heading(tmp_path):
    write_openimages(tmp_path, POINTS, classes=CLASSES, images=["a1", "b2"])
    path = tmp_path / "oidv7-class-descriptions.csv"
    path.write_text(path.read_text().partition("\n")[2])
    assert open_openimages(tmp_path).class_names == tuple(CLASSES.values())


def test_a_grey_label_map_of_voc_is_read_as_well(tmp_path):
    truth = write_voc(tmp_path, ["grey"])
    write(tmp_path / "VOCdevkit/VOC2012/SegmentationClass/grey.png", png(truth["grey"]))
    write_shards(open_voc(tmp_path), str(tmp_path / "out"))
    np.testing.assert_array_equal(scenes_of(tmp_path / "out")["grey"].label_map, truth["grey"])


def test_no_two_classes_share_a_name_even_where_one_looks_numbered_already():
    names = unique_names(["a", "a (3)", "a", "A"], ["1", "2", "3", "4"])
    assert len({name.casefold() for name in names}) == 4
    assert names[:2] == ("a", "a (3)")


def test_a_line_separator_within_a_class_name_shifts_no_class_id(tmp_path):
    classes = {"/m/1": "cat\u2028/m/9,evil\x0b", "/m/2": "dog"}
    write_openimages(tmp_path, [("a", 0.5, 0.5, "/m/2", "yes")], classes=classes, images=["a"])
    dataset = open_openimages(tmp_path)
    assert dataset.class_names == ("cat /m/9,evil", "dog")
    assert dataset.read("a").document["class_ids"] == [2]


def test_a_table_of_classes_that_csv_refuses_is_reported(tmp_path):
    write_openimages(
        tmp_path, [("a", 0.5, 0.5, "/m/1", "yes")], classes={"/m/1": "x" * 200_000}, images=["a"]
    )
    with pytest.raises(UserError, match=r"class-descriptions\.csv: is not a table of classes"):
        open_openimages(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_list_that_is_no_regular_file_is_refused_not_read(tmp_path, make):
    write_coco(tmp_path, [], images={1: (30, 40)})
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.unlink()
    make(path)
    with pytest.raises(UserError, match="is not a regular file"):
        open_coco(tmp_path)


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_records_nested_as_deeply_as_json_can_be_read_are_skipped_or_refused(tmp_path, depth):
    nested = "[" * depth + "]" * depth
    outlines = [coco_object(1, 1, 1, ["@"]), coco_object(1, 1, 1, ["@"])]
    write_coco(tmp_path, outlines, images={1: (30, 40)})
    path = tmp_path / "annotations" / "instances_val2017.json"
    sound = path.read_text()
    places = {
        '"@"': nested,
        '"images": [': f'"images": [{nested}, ',
        '"annotations": [': f'"annotations": [{nested}, ',
        '"category_id": 1': f'"category_id": {nested}',
    }
    for old, new in places.items():
        path.write_text(sound.replace(old, new))
        with contextlib.suppress(UserError):
            write_shards(open_coco(tmp_path), str(tmp_path / "out"))


def test_a_hundred_thousand_categories_are_read_without_counting_each_again(tmp_path):
    write_coco(tmp_path, [], images={1: (30, 40)})
    path = tmp_path / "annotations" / "instances_val2017.json"
    categories = [{"id": number, "name": f"thing {number}"} for number in range(100_000)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"categories": categories}))
    assert len(open_coco(tmp_path).class_names) == 100_000


@pytest.mark.parametrize(
    "changes",
    [
        {"images_read": "x"},
        {"images_read": -1},
        {"images_read": 10**30},
        {"images_read": 2},
        {"shards": 5},
        {"shards": [1]},
        {"skipped": []},
        {"skipped_names": {"a": 1}},
        {"written": None},
        {"fingerprint": ["\x1b[2J"]},
    ],
)
def test_a_damaged_record_of_a_conversion_is_reported_and_not_resumed(tmp_path, changes):
    write_voc(tmp_path / "voc", ["a"])
    out = tmp_path / "out"
    write_shards(open_voc(tmp_path / "voc"), str(out))
    record = out / "conversion.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    with pytest.raises(UserError, match=r"conversion\.json: is not the record of a conversion") as refusal:
        write_shards(open_voc(tmp_path / "voc"), str(out), resume=True)
    assert str(refusal.value).isprintable()
