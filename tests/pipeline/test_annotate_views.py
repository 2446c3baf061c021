"""Shards annotated with several views of every image: rows, sizes, and small objects in large images."""

import copy
import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from legrad.canvases import Views
from legrad.masks.rle import decode_rle
from legrad.views import view_relevance
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.model import check_model, load_explainer, views_wanted
from pipeline.config.schema import ModelConfig
from pipeline.demo.assets import demo_shard_paths
from pipeline.errors import UserError
from pipeline.output.stored_grids import stored_grid
from pipeline.run.job import prepare_job
from pipeline.shards.images import open_image
from tests.helpers.corpus import captions_json, demo_job, image_bytes, sample, write_shard

SIZES = [(60, 60), (200, 230), (60, 60)]
CAPTIONS = ["a dog", "a red car", "cactus"]


@pytest.fixture(scope="module")
def explainer():
    return load_explainer(demo_job([], "unused").model, "cpu")


@pytest.fixture
def rows_of(explainer, tmp_path):
    """Annotates a shard into a folder of its own and returns the rows, having looked at the counts."""

    def run(path, name="out", **sections):
        config = demo_job([path], tmp_path / name, **({"output": {"heatmap": True}} | sections))
        annotator = ShardAnnotator(config, explainer, decode_threads=2, metadata={})
        (shard,) = storage.list_shards(config.input.shards)
        counts = annotator.annotate(shard).counts
        annotator.close()
        rows = pq.read_table(tmp_path / name / "annotations" / f"{shard.shard_id}.parquet").to_pylist()
        assert (counts.samples_in, counts.annotated, counts.rows) == (counts.samples_in,) * 2 + (len(rows),)
        return rows

    return run


def shard_of_several_sizes(folder):
    samples = [
        sample(f"s{i}", json=captions_json(CAPTIONS), txt=None, jpg=image_bytes(i, *size))
        for i, size in enumerate(SIZES)
    ]
    return write_shard(folder / "sizes.tar", samples)


def heatmap(row):
    return stored_grid(row["heatmap"], row["heatmap_height"], row["heatmap_width"])


def test_mirrored_and_scaled_views_give_what_the_library_gives_of_each_image(explainer, rows_of, tmp_path):
    path = shard_of_several_sizes(tmp_path)
    rows = rows_of(
        path, views={"flip": True, "scales": [1.0, 1.25]}, run={"batch_size": 3}, **with_caption(path)
    )
    assert len(rows) == len(SIZES) * len(CAPTIONS)
    texts = explainer.embed_text(CAPTIONS)
    for index, size in enumerate(SIZES):
        image = open_image(image_bytes(index, *size), max_image_pixels=10**6)
        views = Views(flip=True, scales=(1.0, 1.25))
        wanted = view_relevance(explainer, [image], texts, views=views, resize="fast")[0]
        for row, grid in zip(rows[3 * index : 3 * index + 3], wanted.numpy(), strict=True):
            assert row["peak"] == pytest.approx(grid.max(), rel=1e-3)
            assert np.abs(heatmap(row) - grid / grid.max()).max() < 0.01
            assert (row["heatmap_height"], row["heatmap_width"]) == (15, 15)
            assert tuple(row["mask"]["size"]) == size


def with_caption(path):
    return {
        "input": {"shards": [str(path)], "caption": "json:captions"},
        "prompts": {"source": "captions", "max_per_sample": 3},
    }


def test_similarities_are_those_of_the_whole_image_whatever_the_views(rows_of, tmp_path):
    path = shard_of_several_sizes(tmp_path)
    few = with_caption(path) | {"prompts": {"source": "captions", "max_per_sample": 2}}
    plain = rows_of(path, "plain", **few)
    tiled = rows_of(path, "tiled", model={"fit": "tile"}, views={"tile_zoom": 1.25}, **few)
    assert [row["prompt"] for row in tiled] == [row["prompt"] for row in plain]
    received, expected = ([row["similarity"] for row in rows] for rows in (tiled, plain))
    assert received == pytest.approx(expected, abs=1e-5)


def test_windows_give_large_images_finer_grids_and_small_ones_what_they_had(rows_of, tmp_path):
    path = shard_of_several_sizes(tmp_path)
    # a limit below one sample's bytes: one at a time
    tight = {"batch_size": 8, "lookahead_bytes": 1}
    rows = rows_of(
        path,
        model={"fit": "tile"},
        views={"tile_zoom": 3.0, "tile_overlap": 0.0},
        run=tight,
        **with_caption(path),
    )
    plain = rows_of(path, "plain", **with_caption(path))
    grids = [(row["heatmap_height"], row["heatmap_width"]) for row in rows[::3]]
    # 96 pixels, patches of 8: windows of 12 cells; 200 of 230 pixels are 25 cells of 29
    assert grids == [(12, 12), (25, 29), (12, 12)]
    assert [tuple(row["mask"]["size"]) for row in rows[::3]] == SIZES
    for row, unchanged in zip(rows[:3] + rows[-3:], plain[:3] + plain[-3:], strict=True):
        assert row["peak"] == pytest.approx(unchanged["peak"], rel=1e-3)
        assert np.abs(heatmap(row) - heatmap(unchanged)).max() <= 1 / 255


def test_batch_size_auto_knows_the_views(rows_of, tmp_path):
    path = shard_of_several_sizes(tmp_path)
    rows = rows_of(path, model={"fit": "tile"}, run={"batch_size": "auto"}, **with_caption(path))
    assert len(rows) == len(SIZES) * len(CAPTIONS)


# --- a small object in a large image ---


def held_out_scenes(count):
    """The first scenes of the demo's shards whose first object is large enough: image, its mask, its name."""
    fields = {}
    with tarfile.open(demo_shard_paths("heldout")[0]) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            fields.setdefault(key, {})[extension] = tar.extractfile(member).read()
    for scene in fields.values():
        captions = json.loads(scene["json"])
        is_object = np.array(Image.open(io.BytesIO(scene["seg.png"]))) == captions["class_ids"][0]
        if is_object.mean() > 0.05:
            pixels = np.array(Image.open(io.BytesIO(scene["jpg"])).convert("RGB"))
            yield pixels, is_object, captions["captions"][0]
            count -= 1
        if not count:
            return


def small_in_large(scenes):
    """Each scene's object, of its own size, on a canvas of four times the sides: another scene, blurred."""
    generator = np.random.default_rng(0)
    for (pixels, is_object, caption), (other, _, _) in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        height, width = is_object.shape
        blurred = Image.fromarray(other).resize((8, 8)).resize((4 * width, 4 * height))
        canvas, truth = np.array(blurred), np.zeros((4 * height, 4 * width), bool)
        top, left = int(generator.integers(0, 3 * height)), int(generator.integers(0, 3 * width))
        place = (slice(top, top + height), slice(left, left + width))
        canvas[place][is_object], truth[place] = pixels[is_object], is_object
        yield canvas, truth, caption


def test_windows_find_the_small_object_that_the_whole_image_alone_does_not(rows_of, tmp_path):
    large = list(small_in_large(list(held_out_scenes(5))))
    samples = []
    for index, (canvas, _, caption) in enumerate(large):
        sink = io.BytesIO()
        Image.fromarray(canvas).save(sink, "PNG")
        samples.append(sample(f"{index}", caption=caption, jpg=None, png=sink.getvalue()))
    path = write_shard(tmp_path / "large.tar", samples)

    def mean_iou(name, fit):
        settings = {"model": {"fit": fit}, "masks": {"rule": "fixed", "value": 0.5}}
        rows = rows_of(path, name, **settings)
        masks = [decode_rle(row["mask"]) for row in rows]
        truths = [truth for _, truth, _ in large]
        ious = [(m & t).sum() / (m | t).sum() for m, t in zip(masks, truths, strict=True)]
        return float(np.mean(ious))

    stretched, tiled = mean_iou("stretch", "stretch"), mean_iou("tile", "tile")
    assert tiled > stretched + 0.15
    assert tiled > 0.4


# --- refusals, and what counts as another configuration ---


def test_what_a_model_of_one_size_cannot_take_is_reported_before_anything_starts(tmp_path):
    bound = "vit_relpos_medium_patch16_cls_224"
    pretrained = str(tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_bytes(b"")
    for fit, scales in (("keep", (1.0,)), ("stretch", (1.0, 1.5))):
        with pytest.raises(UserError, match=rf"model.name {bound}: .*one size.*got {fit}"):
            check_model(ModelConfig(name=bound, pretrained=pretrained, fit=fit), scales)
    check_model(ModelConfig(name=bound, pretrained=pretrained, fit="tile"))
    config = demo_job([shard_of_several_sizes(tmp_path)], tmp_path / "out", views={"scales": [2.0]})
    bound_model = {"name": bound, "pretrained": pretrained}
    with pytest.raises(UserError, match="one size"):
        prepare_job(config.model_copy(update={"model": ModelConfig(**bound_model)}))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_known_only_once_loaded_is_refused_then(explainer):
    bound = copy.copy(explainer)
    bound.tower = replace(explainer.tower, takes_any_grid=False, family="relpos")
    config = demo_job([], "unused", views={"scales": [1.0, 2.0]})
    assert views_wanted(config, explainer) == Views(scales=(1.0, 2.0))
    with pytest.raises(UserError, match=r"views\.scales: .*relpos"):
        views_wanted(config, bound)
