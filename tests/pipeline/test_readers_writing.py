"""Shards of datasets: every image is written or counted, no name is trusted, and a stop loses nothing."""

import io
import json
import re
import zlib
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline import storage
from pipeline.datasets.coco import open_coco
from pipeline.datasets.conversion import ShardLimits
from pipeline.datasets.truth_dataset import TruthDataset, TruthSample
from pipeline.datasets.voc import open_voc
from pipeline.datasets.writing import sample_key, write_shards
from pipeline.errors import OutputError, UserError
from tests.helpers.dataset_trees import (
    box_polygon,
    coco_object,
    jpeg,
    palette_png,
    png,
    write,
    write_coco,
    write_imagenet_s,
    write_openimages,
    write_voc,
)
from tests.helpers.pictures import grey_png_without_its_last_row, png_chunk

NAMES = [f"2007_00000{index}" for index in range(7)]


def voc_folder(root):
    return root / "VOCdevkit" / "VOC2012"


def keys_of(folder):
    """Keys by tar, as webdataset groups their members."""
    keys = {}
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            members = tar_file_expander([{"url": str(path), "stream": stream}])
            keys[path.name] = [sample["__key__"] for sample in group_by_keys(members)]
    return keys


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_samples_keep_their_order_over_shards_of_the_size_asked_for(tmp_path):
    write_voc(tmp_path, NAMES)
    conversion = write_shards(open_voc(tmp_path), str(tmp_path / "out"), ShardLimits(max_samples=3))
    keys = keys_of(tmp_path / "out")
    assert list(keys) == conversion.shards == [f"voc2012-val-{index:06d}.tar" for index in range(3)]
    assert [len(each) for each in keys.values()] == [3, 3, 1]
    assert list(chain(*keys.values())) == NAMES


def test_no_shard_is_larger_than_allowed_unless_one_sample_is(tmp_path):
    write_voc(tmp_path, NAMES)
    write(voc_folder(tmp_path) / "JPEGImages" / f"{NAMES[3]}.jpg", jpeg(12, 20) + bytes(40_000))
    write_shards(open_voc(tmp_path), str(tmp_path / "out"), ShardLimits(max_bytes=20_480))
    keys = keys_of(tmp_path / "out")
    sizes = {name: (tmp_path / "out" / name).stat().st_size for name in keys}
    assert list(chain(*keys.values())) == NAMES
    assert all(size <= 20_480 or keys[name] == [NAMES[3]] for name, size in sizes.items())
    assert any(len(each) > 1 for each in keys.values())


def test_a_second_conversion_writes_the_same_bytes(tmp_path):
    write_voc(tmp_path, NAMES)
    for folder in ("one", "two"):
        write_shards(open_voc(tmp_path), str(tmp_path / folder), ShardLimits(max_samples=3))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def break_voc(root):
    """One image for each way in which an image of a dataset can be unusable; returns name to reason."""
    folder = voc_folder(root)
    (folder / "JPEGImages" / f"{NAMES[0]}.jpg").unlink()
    (folder / "SegmentationClass" / f"{NAMES[1]}.png").unlink()
    write(folder / "JPEGImages" / f"{NAMES[2]}.jpg", jpeg(64, 64)[:900])
    write(folder / "JPEGImages" / f"{NAMES[3]}.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n")
    write(folder / "SegmentationClass" / f"{NAMES[4]}.png", palette_png(np.zeros((5, 5), np.uint8)))
    write(folder / "SegmentationClass" / f"{NAMES[5]}.png", palette_png(np.full((12, 20), 57)))
    reasons = "missing_image missing_label_map truncated format_not_allowed size_mismatch unknown_class"
    return dict(zip(NAMES, reasons.split(), strict=False))


def test_what_cannot_be_used_is_counted_and_named_by_reason(tmp_path):
    write_voc(tmp_path, NAMES)
    reasons = break_voc(tmp_path)
    conversion = write_shards(open_voc(tmp_path), str(tmp_path / "out"))
    assert conversion.skipped == dict.fromkeys(reasons.values(), 1)
    assert {name: reason for reason, ((name, _),) in conversion.skipped_names.items()} == reasons
    assert list(chain(*keys_of(tmp_path / "out").values())) == [NAMES[6]]
    assert conversion.images == conversion.written + sum(conversion.skipped.values())
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["skipped"] == conversion.skipped


@pytest.mark.parametrize(
    ("label_map", "reason"),
    [
        (b"", "bad_label_map"),
        (b"\x89PNG\r\n\x1a\nnonsense", "bad_label_map"),
        (png(np.zeros((12, 20, 3), np.uint8)), "bad_label_map"),
        (jpeg(12, 20), "bad_label_map"),
        (grey_png_without_its_last_row(np.ones((12, 20))), "bad_label_map"),
    ],
    ids=["empty", "cut", "colours", "JPEG", "a row too few"],
)
def test_a_label_map_that_is_none_costs_one_image(tmp_path, label_map, reason):
    write_voc(tmp_path, NAMES[:2])
    write(voc_folder(tmp_path) / "SegmentationClass" / f"{NAMES[0]}.png", label_map)
    assert write_shards(open_voc(tmp_path), str(tmp_path / "out")).skipped == {reason: 1}


def test_a_label_map_of_a_monstrous_size_is_never_decoded(tmp_path):
    header = (200_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(9)))
    write_voc(tmp_path, NAMES[:2])
    write(voc_folder(tmp_path) / "SegmentationClass" / f"{NAMES[0]}.png", bomb)
    assert write_shards(open_voc(tmp_path), str(tmp_path / "out")).skipped == {"size_mismatch": 1}


HOSTILE_NAMES = ["../../../secret", "/etc/passwd", "a/../../secret", "a\\b", "C:secret"]


def test_names_in_a_list_never_lead_out_of_the_dataset(tmp_path):
    write_voc(tmp_path, NAMES[:1])
    write(tmp_path / "secret.jpg", jpeg())
    write(tmp_path / "secret.png", palette_png(np.ones((12, 20))))
    write(
        voc_folder(tmp_path) / "ImageSets" / "Segmentation" / "val.txt",
        "\n".join([*HOSTILE_NAMES, NAMES[0], NAMES[0]]),
    )
    conversion = write_shards(open_voc(tmp_path), str(tmp_path / "out"))
    assert conversion.skipped == {"unsafe_name": len(HOSTILE_NAMES), "duplicate": 1}
    assert list(chain(*keys_of(tmp_path / "out").values())) == NAMES[:1]


def test_a_name_with_dots_and_blanks_still_makes_one_sample(tmp_path):
    names = ["a.v1", "a.v2", "à la carte", "a_v1"]
    write_voc(tmp_path, names)
    write_shards(open_voc(tmp_path), str(tmp_path / "out"))
    (keys,) = keys_of(tmp_path / "out").values()
    assert len(set(keys)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in keys)


@given(st.lists(st.text(min_size=1, max_size=120), min_size=2, max_size=8, unique=True))
def test_keys_are_safe_short_and_apart_unless_names_were_safe_to_begin_with(names):
    keys = [sample_key(name) for name in names]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in keys)
    odd = [
        key for name, key in zip(names, keys, strict=True) if not re.fullmatch(r"[\w./-]+", name, re.ASCII)
    ]
    assert len(set(odd)) == len(odd)


@pytest.mark.parametrize(
    "outline",
    [
        [],
        [[1, 1, 5]],
        [[1, 1, 5, 5, 9, "x"]],
        [[1e9, 1, 5, 5, 9, 9]],
        [[float("nan"), 1, 5, 5, 9, 9]],
        {"size": [9, 9], "counts": [81]},
        {"size": [24, 32], "counts": [5, 5]},
        {"size": [24, 32], "counts": [-1, 769]},
        {"size": [24, 32], "counts": "ÿ"},
        {"size": [24, 32], "counts": "zzzzzzz"},
        {"size": [24, 32], "counts": "`h0o"},
        {"size": [24, 32], "counts": "o" * 100_000},
        {"size": [24, 32], "counts": [384.5, 383.5]},
        {"size": [24, 32], "counts": [10**400, 768 - 10**400]},
        {"size": [24, 32], "counts": [0] * 5000 + [768]},
        {"size": [24, 32, 1], "counts": [768]},
        {"size": [40_000, 40_000], "counts": "`h0"},
        {"size": "24", "counts": "`h0"},
        [[0, 0, 60, 0, 60, 60, 0, 60] * 20_000],
        [[0, 0, 10, 0, 10]],
        [[float("inf"), 0, 10, 0, 10, 10]],
        {"size": [24, 32], "counts": ""},
        {"counts": [768]},
        None,
        "text",
    ],
    ids=lambda outline: str(outline)[:30],
)
def test_a_broken_annotation_of_coco_costs_its_image_and_no_other(tmp_path, outline):
    objects = [coco_object(1, 1, 18, outline), coco_object(2, 2, 18, box_polygon(1, 1, 9, 9))]
    write_coco(tmp_path, objects, images={1: (24, 32), 2: (24, 32)})
    conversion = write_shards(open_coco(tmp_path), str(tmp_path / "out"))
    assert conversion.skipped == {"bad_annotation": 1}
    assert conversion.written == 1


def test_an_image_of_another_size_than_coco_says_is_skipped(tmp_path):
    write_coco(tmp_path, [], images={1: (24, 32), 2: (24, 32)})
    write(tmp_path / "val2017" / "000000000001.jpg", jpeg(20, 20))
    assert write_shards(open_coco(tmp_path), str(tmp_path / "out")).skipped == {"size_mismatch": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"images": []}', '{"images": [{}], "annotations": [1]}'])
def test_a_file_that_is_not_cocos_is_an_input_error(tmp_path, text):
    path = write_coco(tmp_path, [], images={1: (24, 32)})
    path.write_text(text)
    with pytest.raises(UserError, match=r"instances_val2017\.json"):
        open_coco(tmp_path)


class Stopped(Exception):
    """The process ends."""


@pytest.mark.parametrize("published", [1, 2, 3, 4, 5])
def test_a_conversion_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch, published):
    write_voc(tmp_path, NAMES)
    (voc_folder(tmp_path) / "JPEGImages" / f"{NAMES[1]}.jpg").unlink()
    limits, out = ShardLimits(max_samples=2), tmp_path / "out"
    write_shards(open_voc(tmp_path), str(tmp_path / "whole"), limits)
    calls = []
    publish = storage.publish

    def publish_so_often(*arguments):
        calls.append(arguments)
        if len(calls) > published:
            raise Stopped
        publish(*arguments)

    monkeypatch.setattr(storage, "publish", publish_so_often)
    with pytest.raises(Stopped):
        write_shards(open_voc(tmp_path), str(out), limits)
    monkeypatch.undo()
    write_shards(open_voc(tmp_path), str(out), limits, resume=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_conversion_resumes_to_itself(tmp_path):
    write_voc(tmp_path, NAMES)
    first = write_shards(open_voc(tmp_path), str(tmp_path / "out"))
    assert write_shards(open_voc(tmp_path), str(tmp_path / "out"), resume=True) == first


@pytest.mark.parametrize("change", ["limits", "dataset", "shard gone", "record broken"])
def test_what_has_changed_is_not_resumed(tmp_path, change):
    write_voc(tmp_path, NAMES)
    out, limits = tmp_path / "out", ShardLimits(max_samples=3)
    write_shards(open_voc(tmp_path), str(out), limits)
    if change == "limits":
        limits = ShardLimits(max_samples=2)
    elif change == "dataset":
        write_voc(tmp_path, NAMES[:-1])
    elif change == "shard gone":
        (out / "voc2012-val-000001.tar").unlink()
    else:
        (out / "conversion.json").write_text('{"dataset": 3}')
    with pytest.raises(UserError, match=r"conversion\.json"):
        write_shards(open_voc(tmp_path), str(out), limits, resume=True)


def test_a_folder_that_holds_anything_is_left_alone(tmp_path):
    write_voc(tmp_path, NAMES)
    out = tmp_path / "out"
    write_shards(open_voc(tmp_path), str(out), ShardLimits(max_samples=2))
    with pytest.raises(UserError, match="expected an empty folder"):
        write_shards(open_voc(tmp_path), str(out))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        write_shards(open_voc(tmp_path), str(out), overwrite=True)
    (out / "notes.txt").unlink()
    (out / "precious-000000.tar").write_text("mine")
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(UserError):
            write_shards(open_voc(tmp_path), str(out), ShardLimits(max_samples=5), **options)
    assert (out / "precious-000000.tar").read_text() == "mine"
    (out / "precious-000000.tar").unlink()
    write_shards(open_voc(tmp_path), str(out), overwrite=True)
    assert [path.name for path in out.glob("*.tar")] == ["voc2012-val-000000.tar"]


def test_where_nothing_can_be_written_nothing_stays_behind(tmp_path):
    write_voc(tmp_path, NAMES[:2])
    for name in NAMES[:2]:
        (voc_folder(tmp_path) / "JPEGImages" / f"{name}.jpg").unlink()
    with pytest.raises(
        UserError, match=r"2 missing_image; the first, 2007_000000: no file .*2007_000000\.jpg"
    ):
        write_shards(open_voc(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    write_voc(tmp_path, NAMES[:2])
    (tmp_path / "file").write_text("no folder")
    with pytest.raises((OutputError, UserError), match="file"):
        write_shards(open_voc(tmp_path), str(tmp_path / "file" / "out"))


@pytest.mark.parametrize(("classes", "mode"), [(254, "L"), (255, "I;16")])
def test_16_bits_are_used_only_where_the_class_ids_need_them(tmp_path, classes, mode):
    label_map = np.full((4, 6), classes, np.uint16)
    label_map[0] = 65535
    dataset = TruthDataset(
        "many",
        tuple(f"class {index}" for index in range(classes)),
        ["one"],
        lambda name: TruthSample(jpeg(4, 6), {"captions": [], "class_ids": []}, label_map),
    )
    write_shards(dataset, str(tmp_path / "out"))
    (path,) = (tmp_path / "out").glob("*.tar")
    with path.open("rb") as stream:
        (sample,) = group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
    with Image.open(io.BytesIO(sample["seg.png"])) as image:
        assert image.mode == mode
        values = np.asarray(image)
    assert values[1, 0] == classes
    assert values[0, 0] == (255 if mode == "L" else 65535)


# The commands


def trees(root):
    """A command line for each dataset, with the shard that it writes."""
    write_voc(root / "voc", NAMES)
    write_coco(
        root / "coco", [coco_object(1, 9, 18, box_polygon(1, 1, 9, 9))], images={9: (12, 20), 25: (12, 20)}
    )
    folders = ["n01440764", "n01443537"]
    write_imagenet_s(root / "s" / "ImageNetS2", folders, {"n01443537/val_1": np.full((8, 8), 2)})
    write_openimages(root / "oi", [("a1", 0.5, 0.5, "/m/1", "yes")], classes={"/m/1": "Tree"}, images=["a1"])
    return {
        "voc": (["voc", root / "voc"], "voc2012-val-000000.tar"),
        "coco": (["coco", root / "coco"], "coco-val2017-000000.tar"),
        "imagenet-s": (["imagenet-s", root / "s", "--variant", "2"], "imagenet-s2-validation-000000.tar"),
        "openimages": (["openimages", root / "oi"], "openimages-v7-val-000000.tar"),
    }


@pytest.mark.parametrize("name", ["voc", "coco", "imagenet-s", "openimages"])
def test_each_dataset_has_a_command(legrad, tmp_path, name):
    arguments, shard = trees(tmp_path)[name]
    command, root, *options = arguments
    code, out, err = legrad("shards", command, root, tmp_path / "out", *options)
    assert code == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {shard, "classes.txt", "conversion.json"}
    assert f"{shard}: " in out


def test_the_command_reports_what_it_skipped(legrad, tmp_path):
    write_voc(tmp_path, NAMES)
    reasons = break_voc(tmp_path)
    code, out, _ = legrad("shards", "voc", tmp_path, tmp_path / "out", "--shard-size", 1)
    assert code == 0
    for name, reason in reasons.items():
        assert re.search(rf"skipped: {reason} +.* 1 .*'{name}'", out), (reason, out)
    assert re.search(r"listed +.* 7 ", out)
    assert re.search(r"written +.* 1 ", out)


def test_a_full_folder_and_a_missing_dataset_end_with_1(legrad, tmp_path):
    write_voc(tmp_path, NAMES)
    assert legrad("shards", "voc", tmp_path, tmp_path / "out")[0] == 0
    code, _, err = legrad("shards", "voc", tmp_path, tmp_path / "out")
    assert code == 1
    assert "--resume" in err
    assert "Traceback" not in err
    assert legrad("shards", "voc", tmp_path, tmp_path / "out", "--resume")[0] == 0
    assert legrad("shards", "voc", tmp_path, tmp_path / "out", "--overwrite")[0] == 0
    code, _, err = legrad("shards", "coco", tmp_path / "nowhere", tmp_path / "other")
    assert code == 1
    assert "nowhere" in err
