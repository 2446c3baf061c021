"""The column `instances`: how rows get it, which files have it, and who reads it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pycocotools.coco import COCO
from skimage.measure import label as connected_parts

import legrad
from legrad.masks.promptable import MaskCandidates
from legrad.masks.rle import decode_rle
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.cutting import device_cut_of
from pipeline.annotate.rows import annotation_rows
from pipeline.annotate.segmenting import MapSharpener, digest_of_segmenter, load_sharpener, resolved_segmenter
from pipeline.config.load import parse_config
from pipeline.demo import assets
from pipeline.errors import DamagedFileError, UserError
from pipeline.export.write import ExportOptions, export_job
from pipeline.output.folder import ANNOTATIONS, OutputFolder
from pipeline.output.schema import ANNOTATION_SCHEMA, annotation_schema
from pipeline.output.status import read_status
from pipeline.output.tables import open_table
from pipeline.report.write import write_report
from pipeline.training import MaskDataset
from tests.helpers.compacted_jobs import compacted
from tests.helpers.corpus import demo_job, sample, write_shard
from tests.helpers.report_jobs import box_rle, row, write_job
from tests.pipeline.test_mask_rows import explained

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WATERSHED = {"instances": "watershed"}
ONE = torch.zeros(6, 10)
ONE[2:4, 1:3] = 8.0
TWO = ONE.clone()
TWO[2:4, 6:9] = 7.0
NOTHING = torch.zeros(6, 10)


def rows_of(*grids, masks=WATERSHED, **options):
    config = demo_job(["a.tar"], "out", masks={"rule": "fixed", "value": 0.4, **masks}, output=options)
    names = [f"text {number}" for number in range(len(grids))]
    return annotation_rows(explained(*names, grids=torch.stack(grids)), config)


def masks_of(found):
    return np.array([decode_rle(instance["mask"]) for instance in found["instances"]])


@pytest.mark.parametrize("combine", ["independent", "argmax"])
def test_each_peak_of_a_map_is_an_instance_and_their_union_is_the_mask(combine):
    one, two = rows_of(ONE, TWO, masks={**WATERSHED, "combine": combine}, rows="all")
    assert len(one["instances"]) == 1
    assert len(two["instances"]) >= (2 if combine == "independent" else 1)
    for found in (one, two):
        masks = masks_of(found)
        assert masks.sum(axis=0).max() == 1
        assert np.array_equal(masks.any(axis=0), decode_rle(found["mask"]))
        assert [instance["area"] for instance in found["instances"]] == masks.sum(axis=(1, 2)).tolist()
        scores = [instance["score"] for instance in found["instances"]]
        assert scores == sorted(scores, reverse=True)
        assert 0 < scores[-1] <= scores[0] <= 1


def test_equal_prompts_have_equal_instances():
    first, second = rows_of(TWO, TWO)
    assert first["instances"] == second["instances"]


def test_a_rejected_row_has_null_and_an_empty_mask_no_instance():
    found = rows_of(TWO, NOTHING, masks={**WATERSHED, "min_area": 0.9}, rows="all")
    assert [entry["status"] for entry in found] == ["rejected_area", "rejected_area"]
    assert [entry["instances"] for entry in found] == [None, None]
    (empty,) = rows_of(NOTHING, rows="all")
    assert (empty["status"], empty["instances"]) == ("empty_mask", [])


def test_a_refined_map_is_split_in_its_own_frame():
    refined = torch.nn.functional.interpolate(TWO[None, None] / 8, size=(48, 80), mode="bilinear")[0]
    config = demo_job(["a.tar"], "out", masks={"rule": "fixed", **WATERSHED})
    (found,) = annotation_rows(explained("two", grids=TWO[None], refined=refined.half()), config)
    assert len(found["instances"]) == 2


def test_without_instances_rows_have_no_such_column():
    (found,) = rows_of(TWO, masks={"instances": "none"})
    assert "instances" not in found


def test_masks_that_are_split_are_cut_where_the_maps_are():
    config = demo_job(["a.tar"], "out", masks={"rule": "fixed", "combine": "independent"})
    cuda = torch.device("cuda")
    assert device_cut_of(config.masks, cuda) is not None
    split = config.masks.model_copy(update=WATERSHED)
    assert device_cut_of(split, cuda) is None


@pytest.mark.parametrize("instances", ["none", "watershed"])
def test_only_the_files_of_jobs_that_split_masks_have_the_column_and_it_is_last(tmp_path, instances):
    shard = write_shard(tmp_path / "0.tar", [sample("a", txt=b"a dog"), sample("b", jpg=b"broken")])
    config = demo_job([shard], tmp_path / "out", masks={"instances": instances}, output={"heatmap": False})
    explainer = legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers=1
    )
    annotator = ShardAnnotator(config, explainer, decode_threads=1, metadata={"config_hash": "h"})
    annotator.annotate(storage.list_shards(config.input.shards)[0])
    annotator.close()
    table = pq.read_table(tmp_path / "out" / "annotations")
    has_instances = instances == "watershed"
    assert table.schema.equals(annotation_schema(with_instances=has_instances))
    assert (table.schema.names[-1] == "instances") == has_instances
    (entry,) = table.to_pylist()
    if has_instances:
        assert np.array_equal(masks_of(entry).any(axis=0), decode_rle(entry["mask"]))


def test_the_schema_of_other_jobs_is_what_it_was():
    assert "instances" not in ANNOTATION_SCHEMA.names
    assert annotation_schema(with_instances=True).names == [*ANNOTATION_SCHEMA.names, "instances"]


LEFT, RIGHT = box_rle(4, 4, 20, 20), box_rle(4, 20, 20, 40)
BOTH = box_rle(4, 4, 20, 40)


def instance(rle, score):
    mask = decode_rle(rle)
    rows, columns = np.nonzero(mask)
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
    return {"area": int(mask.sum()), "bbox_xywh": [float(edge) for edge in box], "score": score, "mask": rle}


def split_rows():
    return [
        row(
            0,
            prompt="cat",
            class_id=2,
            similarity=0.5,
            mask=BOTH,
            instances=[instance(RIGHT, 1.0), instance(LEFT, 0.75)],
        ),
        row(1, prompt="cat", class_id=2, status="rejected_peak", instances=None),
    ]


@pytest.fixture
def job(tmp_path):
    return write_job(
        tmp_path / "job", [split_rows(), [row(0, class_id=2, key="c", instances=[])]], masks=WATERSHED
    )


def rows_in(out):
    folder = OutputFolder(str(out))
    found = []
    for shard_id in sorted(folder.ids(ANNOTATIONS)):
        with folder.open(ANNOTATIONS, shard_id) as table:
            found += table.rows(["key", "instances"])
    return found


def test_readers_return_what_was_written(job):
    first, rejected, other = rows_in(job)
    assert first["instances"] == split_rows()[0]["instances"]
    assert rejected["instances"] is None
    assert other["instances"] == []


def test_a_compacted_folder_keeps_the_column(job, tmp_path):
    new = compacted(job, tmp_path / "new")
    assert rows_in(new) == rows_in(job)
    parts = pq.read_table(tmp_path / "new" / "annotations")
    assert parts.schema.names[-1] == "instances"


def test_a_compacted_folder_of_another_job_has_no_such_column(tmp_path):
    out = write_job(tmp_path / "job", [[row(0)]])
    compacted(out, tmp_path / "new")
    assert pq.read_table(tmp_path / "new" / "annotations").schema.names == ANNOTATION_SCHEMA.names


def test_status_report_and_dataset_take_files_with_the_column(job):
    assert read_status(str(job)).counts.rows == 3
    write_report(str(job))
    taken = list(MaskDataset(str(job), target="masks", shuffle=False))
    assert [entry["key"] for entry in taken] == ["key000", "c"]


def test_a_column_of_another_type_is_damage(job, tmp_path):
    (path, *_) = sorted((job / "annotations").glob("*.parquet"))
    table = pq.read_table(path)
    place = table.schema.get_field_index("instances")
    pq.write_table(table.set_column(place, "instances", pa.array([1, 2])), tmp_path / "other.parquet")
    with (
        pytest.raises(DamagedFileError, match="column instances"),
        open_table(str(tmp_path / "other.parquet"), "annotations"),
    ):
        pass


def exported(out, dest, kind="instances"):
    totals = export_job(str(out), str(dest), ExportOptions("coco", kind=kind, images=False))
    return totals, COCO(str(dest / "annotations.json"))


def test_the_export_of_instances_takes_those_of_the_column(job, tmp_path):
    totals, coco = exported(job, tmp_path / "coco")
    assert totals.instances == "column"
    first, second = (annotation for annotation in coco.anns.values() if annotation["prompt"] == "cat")
    assert np.array_equal(coco.annToMask(first), decode_rle(RIGHT))
    assert np.array_equal(coco.annToMask(second), decode_rle(LEFT))
    assert (first["bbox"], second["bbox"]) == ([20, 4, 20, 16], [4, 4, 16, 16])
    assert (first["score"], second["score"]) == (pytest.approx(0.5), pytest.approx(0.375))


def test_the_export_of_stuff_takes_masks_whole(job, tmp_path):
    totals, coco = exported(job, tmp_path / "coco", "stuff")
    assert totals.instances is None
    (cat,) = (annotation for annotation in coco.anns.values() if annotation["prompt"] == "cat")
    assert np.array_equal(coco.annToMask(cat), decode_rle(BOTH))


def test_the_export_of_other_jobs_takes_connected_parts_and_reports_that(tmp_path):
    out = write_job(tmp_path / "job", [[row(0, class_id=2, mask=BOTH)]])
    totals, coco = exported(out, tmp_path / "coco")
    assert totals.instances == "connected parts"
    assert len(coco.anns) == connected_parts(decode_rle(BOTH)).max() == 1


# ---------------------------------------------------------------- segmenter


class LeftHalf:
    """Offers the left half of each prompt's box, and that box."""

    def segment(self, image, prompts):
        return [self._candidates(image.shape[:2], prompt.box_xyxy.astype(int)) for prompt in prompts]

    @staticmethod
    def _candidates(size, box):
        left, top, right, bottom = box
        masks = np.zeros((1, *size), bool)
        masks[0, top:bottom, left : (left + right) // 2] = True
        return MaskCandidates(masks, np.ones(1, np.float32))


def sharpened(min_iou, instances="none"):
    masks = demo_job(
        ["a.tar"], "out", masks={"rule": "fixed", "instances": instances, "segmenter_min_iou": min_iou}
    ).masks
    heat = torch.zeros(3, 48, 80)
    heat[:2, 10:30, 10:30] = 0.9
    heat[:2, 10:30, 40:60] = 0.8
    pixels = torch.zeros(1, 48, 80, 3, dtype=torch.uint8)
    return MapSharpener(LeftHalf(), 0.5, masks).sharpened(pixels, heat, [[0]], (6, 10)), heat


def test_a_sharpened_map_is_above_the_threshold_in_its_new_mask_and_nowhere_else():
    found, before = sharpened(0.1)
    above = found.heatmaps[0] > 0.5
    assert above[10:30, 10:35].all()
    assert above.sum() == 20 * 25
    assert torch.equal(found.heatmaps[1:], before[1:]), "maps that are not to be sharpened stay"
    assert found.instance_labels is None


def test_a_map_whose_candidates_disagree_keeps_its_mask():
    found, before = sharpened(0.9)
    assert torch.equal(found.heatmaps[0] > 0.5, before[0] > 0.5)


def test_each_instance_is_sharpened_by_itself_where_masks_are_split():
    found, _ = sharpened(0.1, "watershed")
    labels = found.instance_labels[0]
    assert (labels[10:30, 10:20] == 1).all()
    assert (labels[10:30, 40:50] == 2).all()
    assert (labels > 0).sum() == 2 * 20 * 10


@pytest.mark.parametrize("combine", ["independent", "argmax"])
def test_a_job_with_a_segmenter_has_its_masks_and_instances(tmp_path, combine):
    pytest.importorskip("transformers", reason="needs the extra sam")
    from tests.helpers.tiny_segmenters import save_tiny_sam

    segmenter = save_tiny_sam(tmp_path / "sam")
    shard = write_shard(tmp_path / "0.tar", [sample("a", txt=b"a dog"), sample("b", seed=1, txt=b"a cat")])
    masks = {
        "rule": "fixed",
        "combine": combine,
        "segmenter": str(segmenter),
        "segmenter_min_iou": 0.0,
        **WATERSHED,
    }
    config = demo_job([shard], tmp_path / "out", masks=masks)
    explainer = legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers=1
    )
    sharpener = load_sharpener(config.masks, "cpu", "fp32", expected_digest=digest_of_segmenter(config.masks))
    annotator = ShardAnnotator(
        config, explainer, decode_threads=1, metadata={"config_hash": "h"}, sharpener=sharpener
    )
    annotator.annotate(storage.list_shards(config.input.shards)[0])
    annotator.close()
    for entry in pq.read_table(tmp_path / "out" / "annotations").to_pylist():
        masks = masks_of(entry)
        assert np.array_equal(masks.sum(axis=0) == 1, decode_rle(entry["mask"]))


def test_a_segmenter_that_is_missing_is_reported_before_any_work(tmp_path):
    masks = demo_job(["a.tar"], "out", masks={"rule": "fixed", "segmenter": str(tmp_path / "absent")}).masks
    with pytest.raises(UserError, match=r"section masks: segmenter .*absent: there is no such folder"):
        digest_of_segmenter(masks)


def test_missing_scikit_image_is_reported_before_any_work(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(UserError, match=r"legrad-pipeline\[instances\]"):
        digest_of_segmenter(demo_job(["a.tar"], "out", masks=WATERSHED).masks)


def test_the_folder_of_a_segmenter_is_absolute_in_every_worker(tmp_path, monkeypatch):
    (tmp_path / "sam").mkdir()
    monkeypatch.chdir(tmp_path)
    masks = demo_job(["a.tar"], "out", masks={"rule": "fixed", "segmenter": "sam"}).masks
    assert resolved_segmenter(masks).segmenter == str(tmp_path / "sam")
    on_hub = masks.model_copy(update={"segmenter": "facebook/sam-vit-base"})
    assert resolved_segmenter(on_hub) == on_hub


@pytest.mark.parametrize(
    "masks", [{"rule": "otsu"}, {"rule": "quantile"}, {"rule": "band", "band_center": "otsu"}]
)
def test_a_segmenter_needs_a_threshold_that_does_not_depend_on_the_map(masks):
    document = {
        "input": {"shards": "a.tar"},
        "model": {"name": "ViT-B-32", "pretrained": "openai"},
        "masks": {**masks, "segmenter": "facebook/sam-vit-base"},
        "output": {"dir": "out"},
    }
    with pytest.raises(UserError, match=r"masks\.segmenter: needs masks\.rule fixed"):
        parse_config(document)
