"""Masks in other formats: read back by the tools that those formats belong to."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from skimage.measure import label as connected_parts
from typer.testing import CliRunner

from legrad.masks.rle import decode_rle, encode_rle
from pipeline.cli.main import app
from pipeline.config.schema import InputConfig
from pipeline.errors import UserError
from pipeline.export.export_samples import index_png
from pipeline.export.write import ExportOptions, export_job
from pipeline.output.label_map import label_map
from pipeline.output.writer import ShardWriter
from pipeline.run.job import prepare_job
from pipeline.shards.ground_truth import Scene, list_truth_shards, read_scenes
from tests.helpers.corpus import image_bytes
from tests.helpers.report_jobs import HEIGHT, WIDTH, box_rle, row, write_job

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def classed_rows():
    """Two samples: one of two overlapping classes, one of a class and a rejected prompt; a third rejected."""
    return [
        row(0, 0, prompt="cat", class_id=3, similarity=0.30, mask=box_rle(4, 4, 30, 30), key="a b&c"),
        row(0, 1, prompt="dog", class_id=1, similarity=0.35, mask=box_rle(20, 20, 40, 50), key="a b&c"),
        row(1, 0, prompt="dog", class_id=1, similarity=0.2, ignore=box_rle(0, 0, 3, 64)),
        row(1, 1, prompt="cat", class_id=3, status="rejected_similarity"),
        row(2, 0, prompt="cat", class_id=3, status="rejected_peak"),
    ]


@pytest.fixture
def job(tmp_path):
    return write_job(
        tmp_path / "job", [classed_rows(), [row(0, prompt="cat", class_id=3, key="c")]], runs=False
    )


def test_coco_loads_every_mask_as_it_was_written(job, tmp_path):
    totals = export_job(str(job), str(tmp_path / "coco"), ExportOptions("coco"))
    assert (totals.written, totals.counts["exported"], totals.counts["without_mask"]) == (4, 3, 1)
    merged = COCO(str(tmp_path / "coco" / "annotations.json"))
    parts = sorted((tmp_path / "coco" / "annotations").glob("*.json"))
    ids = [set(COCO(str(part)).anns) for part in parts]
    assert ids[0] | ids[1] == set(merged.anns)
    assert not ids[0] & ids[1]
    assert {entry["name"]: entry["id"] for entry in merged.dataset["categories"]} == {"cat": 3, "dog": 1}
    expected = {(r["key"], r["prompt"]): r for r in [*classed_rows(), row(0, prompt="cat", key="c")]}
    for annotation in merged.anns.values():
        image = merged.imgs[annotation["image_id"]]
        written = expected[image["key"], annotation["prompt"]]
        assert np.array_equal(merged.annToMask(annotation), decode_rle(written["mask"]))
        assert annotation["area"] == decode_rle(written["mask"]).sum()
        stored = tmp_path / "coco" / "images" / image["file_name"]
        with Image.open(stored) as picture:
            assert picture.size == (image["width"], image["height"])


def test_instances_are_the_connected_parts_of_a_mask(tmp_path):
    spots = np.zeros((HEIGHT, WIDTH), dtype=bool)
    spots[2:6, 2:6] = spots[6, 6] = spots[20:30, 40:60] = spots[40, 0] = True
    rows = [row(0, prompt="cat", class_id=2, mask=encode_rle(spots[None])[0])]
    job = write_job(tmp_path / "job", [rows], runs=False)
    options = ExportOptions("coco", kind="instances", images=False)
    export_job(str(job), str(tmp_path / "coco"), options)
    coco = COCO(str(tmp_path / "coco" / "annotations.json"))
    oracle = connected_parts(spots, connectivity=2)
    found = sorted(coco.annToMask(annotation).tobytes() for annotation in coco.anns.values())
    assert found == sorted((oracle == part).astype(np.uint8).tobytes() for part in range(1, oracle.max() + 1))
    assert not (tmp_path / "coco" / "images").exists()


def test_masks_in_a_smaller_frame_come_out_at_the_size_of_the_image(tmp_path):
    small = box_rle(0, 0, 12, 16, height=24, width=32)
    job = write_job(tmp_path / "job", [[row(0, prompt="cat", class_id=2, mask=small)]], runs=False)
    export_job(str(job), str(tmp_path / "coco"), ExportOptions("coco"))
    coco = COCO(str(tmp_path / "coco" / "annotations.json"))
    (annotation,) = coco.anns.values()
    assert np.array_equal(coco.annToMask(annotation), decode_rle(box_rle(0, 0, 24, 32)))
    assert annotation["bbox"] == [0, 0, 32, 24]


def test_an_mmseg_tree_holds_an_index_for_every_pixel_and_the_more_similar_prompt_in_front(job, tmp_path):
    export_job(str(job), str(tmp_path / "to"), ExportOptions("mmseg", split="val"))
    labels = sorted((tmp_path / "to" / "ann_dir" / "val").rglob("*.png"))
    images = sorted((tmp_path / "to" / "img_dir" / "val").rglob("*.jpg"))
    assert [path.relative_to(tmp_path / "to" / "ann_dir").with_suffix("") for path in labels] == [
        path.relative_to(tmp_path / "to" / "img_dir").with_suffix("") for path in images
    ]
    with Image.open(next(path for path in labels if "a_b_c" in path.name)) as png:
        assert png.mode == "P"
        values = np.array(png)
    assert np.array_equal(values, label_map(classed_rows()[:2], HEIGHT, WIDTH))
    assert values[25, 25] == 1
    assert values[10, 10] == 3
    with Image.open(next(path for path in labels if "key001" in path.name)) as png:
        assert (np.array(png)[0] == 255).all()
    assert (tmp_path / "to" / "classes.txt").read_text().splitlines() == ["dog", "2", "cat"]
    listed = (tmp_path / "to" / "splits" / "val.txt").read_text()
    assert listed.splitlines() == [str(p.relative_to(tmp_path / "to/ann_dir/val"))[:-4] for p in labels]


def test_the_palette_is_that_of_voc():
    with Image.open(io.BytesIO(index_png(np.arange(256, dtype=np.uint8)[None]))) as png:
        colours = np.array(png.getpalette()).reshape(-1, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 15: (192, 128, 128)}
    known |= {20: (0, 64, 128), 255: (224, 224, 192)}
    assert {label: tuple(colours[label]) for label in known} == known


def test_webdataset_shards_are_ground_truth_for_the_next_program(job, tmp_path):
    export_job(str(job), str(tmp_path / "tars"), ExportOptions("webdataset"))
    shards = list_truth_shards(str(tmp_path / "tars" / "*.tar"))
    scenes = [scene for shard in shards for scene in read_scenes(shard, InputConfig(shards="unused"))]
    assert all(isinstance(scene, Scene) for scene in scenes)
    assert len(scenes) == 3
    first = next(scene for scene in scenes if "a_b_c" in scene.key)
    assert first.class_ids == (3, 1)
    assert np.array_equal(first.label_map, label_map(classed_rows()[:2], HEIGHT, WIDTH))


def test_a_second_run_writes_what_is_left_and_what_was_annotated_anew(job, tmp_path):
    dest, options = tmp_path / "to", ExportOptions("mmseg")
    first = export_job(str(job), str(dest), options)
    again = export_job(str(job), str(dest), options)
    assert (first.shards_written, again.shards_written, again.shards_done_before) == (2, 0, 2)
    assert (again.written, again.counts) == (first.written, first.counts)
    next((dest / "export").glob("0-*.json")).unlink()
    assert export_job(str(job), str(dest), options).shards_written == 1
    annotate_again(job, [row(0, prompt="fox", class_id=9, key="c")])
    anew = export_job(str(job), str(dest), options)
    assert anew.shards_written == 1
    assert anew.class_names == {1: "dog", 3: "cat", 9: "fox"}


def annotate_again(job, rows):
    """The last shard of a job once more, by another attempt."""
    document = json.loads((job / "job.json").read_text())["config"]
    from pipeline.config.load import parse_config

    prepared = prepare_job(parse_config(document))
    shard = prepared.shards[-1]
    with ShardWriter(shard, {**prepared.metadata, "attempt": "b"}) as writer:
        writer.add_sample(rows, ())
        writer.publish(str(job))


def test_a_killed_export_leaves_no_file_under_a_final_name_that_is_cut(job, tmp_path, monkeypatch):
    dest = tmp_path / "tars"
    written = []

    def stop(shard_id, count):
        written.append(shard_id)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_job(str(job), str(dest), ExportOptions("webdataset"), on_shard=stop)
    (tar,) = dest.glob("*.tar")
    with tarfile.open(tar) as whole:
        assert whole.getnames()
    assert export_job(str(job), str(dest), ExportOptions("webdataset")).shards_done_before == len(written)


def test_other_options_or_another_folder_in_use_are_refused(job, tmp_path):
    dest = tmp_path / "to"
    export_job(str(job), str(dest), ExportOptions("mmseg"))
    with pytest.raises(UserError, match="another job, with other options"):
        export_job(str(job), str(dest), ExportOptions("mmseg", split="val"))
    with pytest.raises(UserError, match="expected an empty folder"):
        export_job(str(job), str(job.parent), ExportOptions("coco"))


def test_captions_without_classes_share_a_category_in_coco_and_are_refused_as_label_maps(tmp_path):
    job = write_job(tmp_path / "job", [[row(0, prompt="a dog on a roof")]], runs=False)
    export_job(str(job), str(tmp_path / "coco"), ExportOptions("coco"))
    coco = COCO(str(tmp_path / "coco" / "annotations.json"))
    assert [entry["name"] for entry in coco.dataset["categories"]] == ["prompt"]
    assert [entry["prompt"] for entry in coco.anns.values()] == ["a dog on a roof"]
    with pytest.raises(UserError, match=r"0\.tar: .*class ids from 1 to 254, received None"):
        export_job(str(job), str(tmp_path / "to"), ExportOptions("mmseg"))


def test_a_classes_file_gives_captions_their_class(tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("dog\nfox\n")
    rows = [row(0, prompt="Fox"), row(0, 1, prompt="a moose")]
    job = write_job(tmp_path / "job", [rows], runs=False)
    totals = export_job(str(job), str(tmp_path / "to"), ExportOptions("mmseg", classes_file=str(classes)))
    assert totals.counts["rows_without_class"] == 1
    assert totals.class_names == {2: "fox"}
    (png,) = (tmp_path / "to" / "ann_dir").rglob("*.png")
    with Image.open(png) as image:
        assert set(np.unique(np.array(image))) == {0, 2}


@pytest.mark.parametrize(
    ("names", "found"),
    [("dog\nfox\ndog-like\n", "'dog-like' in the file"), ("dog\n", "no class in the file")],
)
def test_a_classes_file_that_names_the_jobs_own_classes_otherwise_is_refused(job, tmp_path, names, found):
    (tmp_path / "classes.txt").write_text(names)
    options = ExportOptions("coco", classes_file=str(tmp_path / "classes.txt"))
    with pytest.raises(UserError, match=f"class 3 of the job is 'cat', and {found}"):
        export_job(str(job), str(tmp_path / "to"), options)
    (tmp_path / "classes.txt").write_text("dog\nfox\ncat\n")
    assert export_job(str(job), str(tmp_path / "to"), options).class_names == {1: "dog", 3: "cat"}


def test_more_classes_than_a_byte_holds_are_refused_before_anything_is_written(job, tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"class {number}\n" for number in range(1, 256)))
    with pytest.raises(UserError, match="up to 254"):
        export_job(str(job), str(tmp_path / "to"), ExportOptions("voc", classes_file=str(classes)))
    assert not (tmp_path / "to").exists()


def test_images_that_lie_on_their_side_are_written_upright(tmp_path):
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(image_bytes(0, height=WIDTH, width=HEIGHT))) as image:
        image.save(sink, "JPEG", exif=exif)
    turned = write_job(
        tmp_path / "job", [[row(0, prompt="cat", class_id=1)]], images=sink.getvalue(), runs=False
    )
    export_job(str(turned), str(tmp_path / "to"), ExportOptions("mmseg"))
    (picture,) = (path for path in (tmp_path / "to" / "img_dir").rglob("*") if path.is_file())
    with Image.open(picture) as image:
        assert image.size == (WIDTH, HEIGHT)


def test_samples_that_are_not_the_ones_annotated_are_counted_and_skipped(job, tmp_path):
    rows = [row(0, prompt="cat", class_id=1, image_height=99), row(1, prompt="cat", class_id=1)]
    other = write_job(tmp_path / "other", [rows], runs=False)
    totals = export_job(str(other), str(tmp_path / "to"), ExportOptions("mmseg"))
    assert (totals.written, totals.counts["mispaired"]) == (1, 1)


@pytest.mark.parametrize("form", ["coco", "voc", "mmseg", "yolo-seg", "webdataset"])
def test_masks_of_a_shard_that_changed_since_are_never_exported(job, tmp_path, form):
    shard = next(path for path in sorted(tmp_path.rglob("*.tar")))
    content = bytearray(shard.read_bytes())
    content[-1] = 1
    shard.write_bytes(content)
    ran = CliRunner().invoke(app, ["export", str(job), str(tmp_path / "dest"), "--format", form])
    assert ran.exit_code == 3
    assert f"{shard.name}: changed since it was annotated" in ran.output


def test_an_export_without_all_shards_of_a_job_is_not_reported_as_success(job, tmp_path):
    missing = next((job / "annotations").glob("0-*.parquet"))
    missing.unlink()
    ran = CliRunner().invoke(app, ["export", str(job), str(tmp_path / "dest"), "--format", "coco"])
    assert f"shard skipped: {missing.stem}: has no annotations" in ran.output
    assert ran.exit_code == 3


def test_a_job_is_exported_to_a_store(store, only_loopback, monkeypatch, job):
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    store.ask("PUT", "exports")
    dest = "s3://exports/voc"
    assert export_job(str(job), dest, ExportOptions("mmseg")).shards_written == 2
    assert export_job(str(job), dest, ExportOptions("mmseg")).shards_done_before == 2
    assert store.get("exports/voc/classes.txt").decode().splitlines() == ["dog", "2", "cat"]
    (shard_id,) = (path.stem for path in (job / "annotations").glob("0-*.parquet"))
    png = store.get(f"exports/voc/ann_dir/train/{shard_id}/00000000-a_b_c.png")
    with Image.open(io.BytesIO(png)) as image:
        assert np.array_equal(np.array(image), label_map(classed_rows()[:2], HEIGHT, WIDTH))


def test_the_command_counts_what_it_wrote_and_what_it_skipped(job, tmp_path):
    dest = tmp_path / "coco"
    result = CliRunner().invoke(app, ["export", str(job), str(dest), "--format", "coco", "--no-images"])
    assert result.exit_code == 0, result.output
    assert "3 samples exported" in result.output
    assert "1 samples skipped: no accepted mask" in result.output
    assert f"4 annotation(s) of 2 class(es) in {dest}: 2 shard(s) written, 0 done before" in result.output


@pytest.mark.parametrize("form", ["coco", "voc", "mmseg", "yolo-seg", "webdataset"])
def test_a_prompt_that_won_no_pixel_is_skipped_and_an_image_of_no_other_too(tmp_path, form):
    empty = {"status": "empty_mask", "area": 0, "mask": box_rle(0, 0, 0, 0), "bbox_xywh": [0.0] * 4}
    rows = [
        row(0, 0, prompt="cat", class_id=3),
        row(0, 1, prompt="dog", class_id=1, **empty),
        row(1, 0, prompt="dog", class_id=1, **empty),
    ]
    totals = export_job(
        str(write_job(tmp_path / "job", [rows], runs=False)), str(tmp_path / "to"), ExportOptions(form)
    )
    assert totals.counts == {"exported": 1, "rows_empty": 2, "without_mask": 1}
    assert totals.written == 1


def test_every_name_that_is_written_stays_within_the_folder(tmp_path):
    keys = ["deep/er", "a\\b", "c:d", "x" * 300, "ein Bär", "-", "%2e%2e", "~"]
    rows = [row(index, prompt="cat", class_id=1, key=key) for index, key in enumerate(keys)]
    job = write_job(tmp_path / "job", [rows], runs=False)
    dest = tmp_path / "tree" / "out"
    totals = export_job(str(job), str(dest), ExportOptions("mmseg"))
    written = list((tmp_path / "tree").rglob("*.jpg"))
    assert totals.counts["exported"] == len(written) == totals.written
    assert all(dest in path.parents and len(path.name) < 120 for path in written)
    assert all(Path(path.name).name == path.name for path in written)


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "[" * 100_000, '{"attempt": 1}', None],
    ids=["a list", "cut", "nested", "fields lacking", "names of classes as a list"],
)
def test_a_damaged_record_of_a_shard_means_that_it_is_exported_again(job, tmp_path, content):
    export_job(str(job), str(tmp_path / "dest"), ExportOptions("coco"))
    record = next((tmp_path / "dest" / "export").iterdir())
    document = json.loads(record.read_text())
    record.write_text(json.dumps(document | {"class_names": ["a"]}) if content is None else content)
    assert export_job(str(job), str(tmp_path / "dest"), ExportOptions("coco")).shards_written == 1
    assert json.loads(record.read_text()) == document


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"images": 5}'])
def test_a_damaged_part_of_a_merged_file_is_named(job, tmp_path, content):
    export_job(str(job), str(tmp_path / "dest"), ExportOptions("coco"))
    part = next((tmp_path / "dest" / "annotations").iterdir())
    part.write_text(content)
    with pytest.raises(UserError, match=rf"{part.name}: is no part of an export"):
        export_job(str(job), str(tmp_path / "dest"), ExportOptions("coco"))
