"""Shards that `legrad shards` wrote are annotated with the default keys `input.*`; others by their fields."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import legrad
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.datasets.conversion import write_samples
from pipeline.datasets.image_folder import open_image_folder
from pipeline.datasets.parquet_images import open_parquet_images
from pipeline.demo import assets
from tests.helpers.corpus import demo_job, image_bytes, write_shard
from tests.helpers.dataset_trees import write


@pytest.fixture(scope="module")
def explainer():
    name = assets.register_demo_model()
    return legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=2)


@pytest.fixture
def annotated(explainer, tmp_path):
    """Prompts by key, after a job with sections of a configuration; no sample may fail."""

    def run(shards, **sections):
        config = demo_job([str(shards)], tmp_path / "annotated", **sections)
        annotator = ShardAnnotator(config, explainer, decode_threads=2, metadata={"config_hash": "h"})
        try:
            reports = [annotator.annotate(shard) for shard in storage.list_shards(str(shards))]
        finally:
            annotator.close()
        errors = pq.read_table(tmp_path / "annotated" / "errors").to_pylist()
        assert (errors, [report.damage for report in reports]) == ([], [""] * len(reports))
        rows = pq.read_table(tmp_path / "annotated" / "annotations").to_pylist()
        return [(row["key"], row["prompt"]) for row in rows]

    return run


def test_a_folder_of_images_with_captions_is_annotated_with_the_default_keys(annotated, tmp_path):
    for number, file_format in enumerate(("JPEG", "PNG", "WEBP", "BMP", "GIF")):
        write(tmp_path / "in" / f"{number}.{file_format.lower()}", image_bytes(number, 48, 64, file_format))
    rows = [
        f"{number}.{name},text {number}" for number, name in enumerate(("jpeg", "png", "webp", "bmp", "gif"))
    ]
    write(tmp_path / "in" / "metadata.csv", "\n".join(["file_name,text", *rows]))
    write_samples(open_image_folder(tmp_path / "in").samples, str(tmp_path / "out"))
    assert annotated(tmp_path / "out" / "*.tar") == [(f"{number}", f"text {number}") for number in range(5)]


def test_a_parquet_file_is_annotated_with_the_default_keys_and_by_its_lists(annotated, tmp_path):
    table = pa.table(
        {"image": [image_bytes(0), image_bytes(1)], "texts": [["a dog", "a pet"], ["a cat", "a pet"]]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_parquet_images([str(tmp_path / "a.parquet")], "image", "texts")
    write_samples(source, str(tmp_path / "out"))
    shards = tmp_path / "out" / "*.tar"
    assert annotated(shards) == [("a-00000000", "a dog"), ("a-00000001", "a cat")]
    several = annotated(shards, input={"caption": "json:captions"}, prompts={"source": "captions"})
    assert [prompt for _, prompt in several] == ["a dog", "a pet", "a cat", "a pet"]


def test_members_as_hugging_face_names_them_are_read_by_their_fields(annotated, tmp_path):
    metadata = json.dumps({"caption": "a dog", "size": 3}).encode()
    members = [("0.image.jpg", image_bytes(0)), ("0.metadata.json", metadata)]
    shard = write_shard(tmp_path / "0.tar", [members])
    fields = {"image": "image.jpg;image.png", "caption": "metadata.json:caption"}
    assert annotated(shard, input=fields) == [("0", "a dog")]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_compressed_shard_has_the_rows_of_the_plain_one(annotated, tmp_path, compression):
    members = [[(f"{key}.jpg", image_bytes(key)), (f"{key}.txt", b"a dog")] for key in range(3)]
    plain = write_shard(tmp_path / "0.tar", members)
    packed = tmp_path / "packed.tar.x"
    with pa.CompressedOutputStream(packed, compression) as stream:
        stream.write(plain.read_bytes())
    assert annotated(packed) == [(str(key), "a dog") for key in range(3)]
