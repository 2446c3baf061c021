"""One shard from tar to Parquet, without ray: outcomes, columns, faults and where they end."""

import copy
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import legrad
from legrad.masks.rle import decode_rle
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.model import load_explainer
from pipeline.demo import assets
from pipeline.errors import OutputError, ShardError
from pipeline.output.folder import OutputFolder
from pipeline.output.label_map import mask_frame
from pipeline.output.schema import ERROR_SCHEMA, annotation_schema
from pipeline.output.stored_grids import stored_grid
from tests.helpers.corpus import captions_json, demo_job, image_bytes, sample, write_corpus, write_shard


@pytest.fixture(scope="module")
def explainer():
    name = assets.register_demo_model()
    return legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=2)


@pytest.fixture
def annotate(explainer, tmp_path):
    """Annotates shards into a folder of their own and returns the last one's rows, errors and counts."""
    annotators = []

    def run(*paths, out=tmp_path / "out", explainer=explainer, **sections):
        config = demo_job(paths, out, **sections)
        annotator = ShardAnnotator(config, explainer, decode_threads=2, metadata={"config_hash": "h"})
        annotators.append(annotator)
        for shard in storage.list_shards(config.input.shards):
            report = annotator.annotate(shard)
        name = f"{shard.shard_id}.parquet"
        annotations, errors = (pq.read_table(out / folder / name) for folder in ("annotations", "errors"))
        assert annotations.schema.equals(annotation_schema(with_maps=config.output.heatmap))
        assert errors.schema.equals(ERROR_SCHEMA)
        footers = [
            OutputFolder(str(out)).footer(shard.shard_id, table) for table in ("annotations", "errors")
        ]
        assert footers[0] == footers[1]
        assert (report.counts.rows, report.counts.error_rows) == (annotations.num_rows, errors.num_rows)
        return annotations.to_pylist(), errors.to_pylist(), report.counts

    yield run
    for annotator in annotators:
        annotator.close()


def test_each_caption_becomes_a_row_with_a_mask_at_the_original_size(annotate, tmp_path):
    path = write_shard(tmp_path / "0.tar", [sample("a", 1, jpg=image_bytes(1, 50, 70)), sample("b", 2)])
    rows, errors, counts = annotate(path, output={"heatmap": True}, masks={"rule": "fixed", "value": 0.4})
    assert [(row["key"], row["sample_index"], row["prompt_index"]) for row in rows] == [
        ("a", 0, 0),
        ("b", 1, 0),
    ]
    assert (errors, counts.annotated, counts.samples_in) == ([], 2, 2)
    row = rows[0]
    mask = decode_rle(row["mask"])
    assert mask.shape == (50, 70) == (row["image_height"], row["image_width"])
    assert (row["area"], row["threshold"]) == (mask.sum(), pytest.approx(0.4))
    assert row["shard"] == path.as_uri()
    assert (row["status"], row["prompt"], row["prompt_truncated"]) == ("ok", "a dog", False)
    down, across = np.nonzero(mask)
    left, top, width, height = row["bbox_xywh"]
    assert (left, top, left + width, top + height) == (
        across.min(),
        down.min(),
        across.max() + 1,
        down.max() + 1,
    )
    grid = stored_grid(row["heatmap"], row["heatmap_height"], row["heatmap_width"])
    assert (grid.shape, grid.max(), len(row["heatmap"])) == ((12, 12), 1, 288)


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_the_rows_say_what_the_library_says_of_the_image_alone(annotate, explainer, tmp_path, resize):
    captions = ["a dog", "a red car", "cactus"]
    shard = [
        sample(f"s{i}", i, jpg=image_bytes(i, 40 + i, 60), json=captions_json(captions)) for i in range(5)
    ]
    rows, _, _ = annotate(
        write_shard(tmp_path / "0.tar", shard),
        input={"caption": "json:captions", "resize": resize},
        prompts={"source": "captions"},
        run={"batch_size": 2},
        output={"heatmap": True},
    )
    texts = explainer.embed_text(captions)
    for index in range(5):
        picture = Image.open(__import__("io").BytesIO(dict(shard[index])[f"s{index}.jpg"]))
        trace = explainer.encode(explainer.preprocess([picture], resize=resize))
        grids = explainer.relevance(trace, texts)[0]
        similarity = explainer.similarity(trace, texts)[0]
        mine = [row for row in rows if row["sample_index"] == index]
        assert [row["prompt"] for row in mine] == captions
        for row, grid, cosine in zip(mine, grids, similarity, strict=True):
            assert row["similarity"] == pytest.approx(float(cosine), abs=1e-4)
            assert row["peak"] == pytest.approx(float(grid.max()), rel=1e-3)
            stored = stored_grid(row["heatmap"], 12, 12)
            assert np.abs(stored - (grid / grid.max()).numpy()).max() < 0.001


def test_a_batch_size_changes_no_row(annotate, tmp_path):
    path = write_corpus(tmp_path, 1, 7)[0]
    one, _, _ = annotate(path, out=tmp_path / "one", run={"batch_size": 1})
    many, _, _ = annotate(path, out=tmp_path / "many", run={"batch_size": 5})
    for left, right in zip(one, many, strict=True):
        assert left["key"] == right["key"]
        assert left["similarity"] == pytest.approx(right["similarity"], abs=1e-5)
        assert abs(left["area"] - right["area"]) <= 3


def test_every_kind_of_bad_sample_is_an_error_row_and_the_shard_goes_on(annotate, tmp_path):
    bad_file = b"%!PS-Adobe-3.0 EPSF-3.0\n"
    samples = [
        sample("good", 1),
        sample("noimage", 2, jpg=None),
        sample("nocaption", 3, txt=None),
        sample("eps", 4, jpg=bad_file),
        sample("cut", 5, jpg=image_bytes(5)[:300]),
        sample("empty", 6, txt=b"  \n"),
        sample("latin", 7, txt=b"caf\xe9"),
        sample("last", 8),
    ]
    rows, errors, counts = annotate(write_shard(tmp_path / "0.tar", samples))
    assert [row["key"] for row in rows] == ["good", "last"]
    assert {(error["key"], error["sample_index"], error["stage"]) for error in errors} == {
        ("noimage", 1, "decode"),
        ("nocaption", 2, "caption"),
        ("eps", 3, "decode"),
        ("cut", 4, "decode"),
        ("empty", 5, "caption"),
        ("latin", 6, "caption"),
    }
    assert (counts.annotated, counts.empty, counts.failed, counts.samples_in) == (2, 0, 6, 8)
    assert sum(counts.errors_by_kind.values()) == len(errors)


def test_an_image_too_large_is_refused_before_it_is_decoded(annotate, tmp_path):
    path = write_shard(tmp_path / "0.tar", [sample("a", 1), sample("b", 2, jpg=image_bytes(2, 200, 200))])
    rows, errors, _ = annotate(path, input={"max_image_pixels": 10_000})
    assert [row["key"] for row in rows] == ["a"]
    assert [(error["key"], error["stage"]) for error in errors] == [("b", "decode")]


def test_a_bad_prompt_costs_its_own_row_only(annotate, tmp_path):
    path = write_shard(tmp_path / "0.tar", [sample("a", 1, json=captions_json(["a dog", "", "a cat"]))])
    rows, errors, counts = annotate(path, input={"caption": "json:captions"}, prompts={"source": "captions"})
    assert [row["prompt_index"] for row in rows] == [0, 2]
    assert [(error["key"], error["prompt_index"]) for error in errors] == [("a", 1)]
    assert (counts.annotated, counts.failed) == (1, 0)


def test_prompts_marked_bad_get_no_row_and_those_of_other_samples_do(annotate, tmp_path):
    path = write_shard(
        tmp_path / "0.tar",
        [sample(key, number, json=captions_json(["a dog", "a cat"])) for number, key in enumerate("abc")],
    )
    url = storage.list_shards([str(path)])[0].canonical_url
    marks = [
        {"shard": url, "key": key, "prompt_index": index, "prompt": text, "mark": mark}
        for key, index, text, mark in (
            ("a", 0, "a dog", "bad"),
            ("b", 1, "a cat", "good"),
            ("c", 0, "a cow", "bad"),
        )
    ]
    rows, errors, counts = annotate(
        path, input={"caption": "json:captions"}, prompts={"source": "captions", "marks": marks}
    )
    assert [(row["key"], row["prompt"]) for row in rows] == [("a", "a cat"), ("b", "a dog"), ("b", "a cat")]
    assert [(error["key"], error["stage"], error["kind"]) for error in errors] == [
        ("c", "caption", "other_prompt_marked")
    ]
    assert (counts.annotated, counts.failed) == (2, 1)


def test_a_sample_without_prompts_is_empty_not_failed(annotate, tmp_path):
    path = write_shard(
        tmp_path / "0.tar", [sample("a", 1, json=captions_json([])), sample("b", 2, json=b"{")]
    )
    _, errors, counts = annotate(path, input={"caption": "json:captions"}, prompts={"source": "captions"})
    assert (counts.empty, counts.failed, counts.annotated) == (1, 1, 0)
    assert [error["key"] for error in errors] == ["b"]


def test_of_too_many_prompts_the_most_similar_are_kept_and_the_others_counted(annotate, explainer, tmp_path):
    captions = ["a dog", "a cat", "a car", "a tree", "a pizza"]
    path = write_shard(
        tmp_path / "0.tar",
        [sample("a", 1, json=captions_json(captions)), sample("b", 2, json=captions_json(captions[:2]))],
    )
    settings = {"input": {"caption": "json:captions"}}
    everything, _, _ = annotate(path, out=tmp_path / "all", prompts={"source": "captions"}, **settings)
    rows, _, counts = annotate(path, prompts={"source": "captions", "max_per_sample": 2}, **settings)
    best = sorted((row for row in everything if row["key"] == "a"), key=lambda row: -row["similarity"])[:2]
    assert [row["prompt"] for row in rows if row["key"] == "a"] == [
        row["prompt"] for row in sorted(best, key=lambda row: row["prompt_index"])
    ]
    assert (counts.dropped_prompts, counts.rows) == (3, 4)


def test_a_long_caption_is_marked_as_truncated_and_is_no_error(annotate, tmp_path):
    rows, errors, _ = annotate(write_shard(tmp_path / "0.tar", [sample("a", 1, txt=b"dog " * 60)]))
    assert ([row["prompt_truncated"] for row in rows], errors) == ([True], [])


def test_a_rejected_prompt_keeps_its_row_without_a_mask_unless_only_accepted_ones_are_wanted(
    annotate, tmp_path
):
    path = write_corpus(tmp_path, 1, 3)[0]
    rows, _, counts = annotate(path, masks={"min_similarity": 0.999})
    assert {(row["status"], row["area"], row["mask"], row["bbox_xywh"] is None) for row in rows} == {
        ("rejected_similarity", 0, None, True)
    }
    assert counts.annotated == 3
    rows, _, counts = annotate(
        path, out=tmp_path / "b", masks={"min_similarity": 0.999}, output={"rows": "accepted"}
    )
    assert (rows, counts.annotated, counts.empty, counts.samples_in) == ([], 0, 3, 3)


@pytest.mark.parametrize(
    ("setting", "status"), [({"min_peak": 1e6}, "rejected_peak"), ({"min_area": 1.0}, "rejected_area")]
)
def test_weak_and_tiny_masks_are_rejected_by_name(annotate, tmp_path, setting, status):
    rows, _, _ = annotate(write_corpus(tmp_path, 1, 2)[0], masks=setting)
    assert {row["status"] for row in rows} == {status}


def test_masks_in_a_smaller_frame_carry_its_size_and_the_images_own(annotate, tmp_path):
    rows, _, _ = annotate(
        write_shard(tmp_path / "0.tar", [sample("a", 1, jpg=image_bytes(1, 100, 200))]),
        masks={"max_side": 50},
    )
    assert rows[0]["mask"]["size"] == [25, 50]
    assert (rows[0]["image_height"], rows[0]["image_width"]) == (100, 200)


@pytest.mark.parametrize(
    ("height", "width", "max_side", "frame"),
    [
        (100, 200, None, (100, 200)),
        (100, 200, 200, (100, 200)),
        (100, 200, 20, (10, 20)),
        (1, 3000, 30, (1, 30)),
    ],
)
def test_a_mask_frame_keeps_the_aspect_ratio_and_never_vanishes(height, width, max_side, frame):
    assert mask_frame(height, width, max_side) == frame


def test_what_can_be_read_of_a_truncated_shard_is_annotated(annotate, tmp_path):
    path = write_corpus(tmp_path, 1, 6)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    rows, errors, counts = annotate(path)
    assert 1 <= len(rows) < 6
    assert [row["key"] for row in rows] == [f"0000{index:04d}" for index in range(len(rows))]
    assert any(error["kind"] == "truncated" for error in errors)
    assert counts.annotated + counts.failed == counts.samples_in


@pytest.mark.parametrize("content", [b"", b"this is no tar" * 100])
def test_a_shard_that_is_no_tar_is_committed_with_its_error(annotate, tmp_path, content):
    path = tmp_path / "0.tar"
    path.write_bytes(content)
    rows, errors, counts = annotate(path)
    assert (rows, counts.samples_in) == ([], 0)
    assert [(error["sample_index"], error["shard"]) for error in errors] == [(None, path.as_uri())]


def test_a_shard_that_comes_short_is_not_committed(explainer, tmp_path):
    path = write_corpus(tmp_path, 1, 3)[0]
    config = demo_job([path], tmp_path / "out")
    shard = storage.list_shards(config.input.shards)[0]
    path.write_bytes(path.read_bytes()[:-5000])
    annotator = ShardAnnotator(config, explainer, decode_threads=1, metadata={})
    with pytest.raises(ShardError, match="bytes"):
        annotator.annotate(shard)
    annotator.close()
    assert not (tmp_path / "out" / "annotations").exists()


def test_a_crash_between_the_two_files_leaves_the_shard_undone_and_a_rerun_gives_the_same_rows(
    annotate, explainer, tmp_path, monkeypatch
):
    path = write_corpus(tmp_path, 1, 4)[0]
    expected, _, _ = annotate(path, out=tmp_path / "undisturbed")
    publish = storage.publish

    def crash_before_annotations(folder, name, content, **options):
        if folder.endswith("annotations"):
            raise OutputError("the machine went down")
        publish(folder, name, content, **options)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "publish", crash_before_annotations)
        with pytest.raises(OutputError):
            annotate(path)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [".tmp", "errors"]
    again, _, _ = annotate(path)
    assert again == expected


def test_a_map_that_is_not_finite_is_an_error_row(explainer, tmp_path, annotate):
    def second_image_is_not_a_number(trace, prompts):
        grids = explainer.relevance(trace, prompts)
        return torch.where((prompts.image_index == 1)[:, None, None], torch.nan, grids)

    broken = copy.copy(explainer)
    broken.relevance = second_image_is_not_a_number
    config = demo_job(write_corpus(tmp_path, 1, 3), tmp_path / "out")
    annotator = ShardAnnotator(config, broken, decode_threads=1, metadata={})
    counts = annotator.annotate(storage.list_shards(config.input.shards)[0]).counts
    annotator.close()
    assert (counts.annotated, counts.failed, counts.errors_by_kind) == (2, 1, {"model/non_finite": 1})


def test_a_batch_too_large_for_the_device_is_halved_until_it_fits(explainer, tmp_path, caplog):
    sizes = []

    def two_images_at_most(images, **options):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return explainer.encode(images, **options)

    small = copy.copy(explainer)
    small.encode = two_images_at_most
    config = demo_job(write_corpus(tmp_path, 1, 20), tmp_path / "out")
    annotator = ShardAnnotator(config, small, decode_threads=1, metadata={})
    counts = annotator.annotate(storage.list_shards(config.input.shards)[0]).counts
    annotator.close()
    assert (counts.annotated, counts.failed) == (20, 0)
    assert sum("out of device memory" in record.message for record in caplog.records) == 1
    # once the size that fits is known, none larger is tried
    assert sizes == [8, 4] + [2] * 10


def test_two_shards_at_once_do_not_mix(explainer, tmp_path):
    paths = write_corpus(tmp_path, 2, 12)
    config = demo_job(paths, tmp_path / "out", run={"batch_size": 3})
    annotator = ShardAnnotator(config, explainer, decode_threads=2, metadata={})
    shards = storage.list_shards(config.input.shards)
    barrier = threading.Barrier(2)

    def start_together(shard):
        barrier.wait()
        return annotator.annotate(shard)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start_together, shards))
    annotator.close()
    for number, shard in enumerate(shards):
        table = pq.read_table(tmp_path / "out" / "annotations" / f"{shard.shard_id}.parquet")
        assert table["key"].to_pylist() == [f"{number:04d}{index:04d}" for index in range(12)]
        assert set(table["shard"].to_pylist()) == {shard.canonical_url}


def test_memory_in_flight_is_bounded_by_batches_not_by_the_shard(explainer, tmp_path, monkeypatch):
    in_flight, most = 0, 0
    lock = threading.Lock()
    prepare, finish = ShardAnnotator._prepare, ShardAnnotator._finish

    def counted_prepare(self, item):
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        return prepare(self, item)

    def counted_finish(self, explained):
        nonlocal in_flight
        with lock:
            in_flight -= 1
        return finish(self, explained)

    monkeypatch.setattr(ShardAnnotator, "_prepare", counted_prepare)
    monkeypatch.setattr(ShardAnnotator, "_finish", counted_finish)
    config = demo_job(write_corpus(tmp_path, 1, 120), tmp_path / "out", run={"batch_size": 4})
    annotator = ShardAnnotator(config, explainer, decode_threads=2, metadata={})
    annotator.annotate(storage.list_shards(config.input.shards)[0])
    annotator.close()
    # eight batches of four, and one for each thread
    assert most <= 8 * 4 + 2


def test_the_footer_holds_counts_and_provenance(annotate, tmp_path):
    path = write_corpus(tmp_path, 1, 2)[0]
    annotate(path)
    name = next((tmp_path / "out" / "annotations").iterdir())
    footer = OutputFolder(str(tmp_path / "out")).footer(name.stem)
    assert (footer.counts().samples_in, footer.annotated, footer.rows) == (2, 2, 2)
    assert (footer.config_hash, footer.shard, footer.state) == ("h", path.as_uri(), "done")
    assert len(footer.attempt) == 32
    assert footer.version.size_bytes == path.stat().st_size
    assert footer.content_digest.startswith("sha256:")
    assert json.loads(pq.ParquetFile(name).metadata.metadata[b"legrad"])["samples_in"] == 2
    shutil.rmtree(tmp_path / "out")


def test_images_that_keep_their_aspect_ratio_are_explained_on_grids_of_their_own(annotate, tmp_path):
    sizes = [(60, 60), (40, 80), (80, 40), (60, 60), (40, 80)]
    samples = [sample(f"{i}", i, jpg=image_bytes(i, *size)) for i, size in enumerate(sizes)]
    path = write_shard(tmp_path / "0.tar", samples)
    model = {"name": assets.DEMO_MODEL_NAME, "pretrained": "demo", "layers": 2, "fit": "keep"}
    keeping = load_explainer(demo_job([path], tmp_path / "unused", model=model).model, "cpu")
    rows, errors, counts = annotate(path, explainer=keeping, output={"heatmap": True}, model=model)
    grids = [(row["heatmap_height"], row["heatmap_width"]) for row in rows]
    assert grids == [(12, 12), (8, 17), (17, 8), (12, 12), (8, 17)]
    assert [tuple(row["mask"]["size"]) for row in rows] == sizes
    assert (errors, counts.annotated) == ([], 5)


@pytest.mark.parametrize("how", ["replaced", "grown", "replaced in mid-read"])
def test_a_shard_that_changes_between_listing_and_end_is_not_published(explainer, tmp_path, monkeypatch, how):
    path, out = write_corpus(tmp_path, 1, 2)[0], tmp_path / "out"
    config = demo_job([path], out)
    (shard,) = storage.list_shards(config.input.shards)
    if how == "replaced":
        write_corpus(tmp_path / "other", 1, 4)[0].rename(path)
    elif how == "grown":
        path.write_bytes(path.read_bytes() + bytes(10240))
    else:
        monkeypatch.setattr(storage, "DigestingStream", touching(path))
    annotator = ShardAnnotator(config, explainer, decode_threads=2, metadata={"config_hash": "h"})
    try:
        with pytest.raises(ShardError, match=r"0000\.tar: changed since it was listed"):
            annotator.annotate(shard)
        assert not list((out / "annotations").glob("*"))
        monkeypatch.undo()
        (again,) = storage.list_shards(config.input.shards)
        assert annotator.annotate(again).counts.annotated == (4 if how == "replaced" else 2)
    finally:
        annotator.close()


def touching(path):
    """A stream during whose reading the file gets another time."""

    class Touching(storage.DigestingStream):
        def read(self, size_bytes=-1, /):
            os.utime(path, (1, 1))
            return super().read(size_bytes)

    return Touching
