"""Shards with one fault each, from tar to published files: nothing lost in silence, doubled or executed."""

import pickle
import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import legrad
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.model import load_explainer
from pipeline.config.schema import ModelConfig
from pipeline.demo import assets
from pipeline.errors import UserError
from pipeline.shards.ground_truth import Scene, scene_of
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample
from pipeline.text import printable
from tests.helpers.corpus import captions_json, demo_job, sample, write_shard
from tests.helpers.hostile_shards import (
    CAPTION_FAULTS,
    END,
    IMAGE_FAULTS,
    JSON_FAULTS,
    KEYS,
    TAR_FAULTS,
    Fault,
    LeavesATrace,
    flipped,
    harmful_pickle,
    image_height,
    png_chunk,
    with_bad,
    with_json,
    with_names,
)

FAULTS = TAR_FAULTS | IMAGE_FAULTS | CAPTION_FAULTS
MAX_MEMBER_BYTES = 2**22


@dataclass(frozen=True)
class Measured:
    """What the published files of a shard say.

    Attributes:
        samples_in: samples that the shard's footer counts.
        annotated: keys with rows, in order.
        failed: (key, kind) of samples with error rows alone, in order.
        shard_errors: kinds of the error rows that belong to no sample.
        duplicated: rows beyond the first of a (sample_index, prompt_index).
    """

    samples_in: int
    annotated: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]
    shard_errors: tuple[str, ...]
    duplicated: int


@pytest.fixture(scope="module")
def explainer():
    return legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers=1
    )


def module_annotator(out, explainer, **sections):
    return ShardAnnotator(demo_job([], out, **sections), explainer, decode_threads=2, metadata={})


@pytest.fixture(scope="module")
def annotate_text(explainer, tmp_path_factory):
    """Annotates the bytes of a shard whose captions are in .txt."""
    out = tmp_path_factory.mktemp("out")
    annotator = module_annotator(out, explainer, input={"max_member_bytes": MAX_MEMBER_BYTES})
    yield lambda path: measured(annotator, path, out)
    annotator.close()


@pytest.fixture(scope="module")
def annotate_json(explainer, tmp_path_factory):
    """Annotates the bytes of a shard whose captions are in .json."""
    out = tmp_path_factory.mktemp("out")
    annotator = module_annotator(out, explainer, input={"caption": "json:caption"})
    yield lambda path: measured(annotator, path, out)
    annotator.close()


def measured(annotator, path, out) -> Measured:
    (shard,) = storage.list_shards(str(path))
    counts = annotator.annotate(shard).counts
    rows, errors = (
        pq.read_table(out / folder / f"{shard.shard_id}.parquet").to_pylist()
        for folder in ("annotations", "errors")
    )
    for row in rows:
        check_pairing(row)
    assert all(error["message"].isprintable() for error in errors)
    of_samples = [error for error in errors if error["sample_index"] is not None]
    outcomes = [row["sample_index"] for row in rows + of_samples]
    assert sorted(set(outcomes)) == list(range(counts.samples_in)), "every sample has an outcome"
    assert (counts.annotated, counts.failed, counts.empty) == (len(rows), len(of_samples), 0)
    return Measured(
        samples_in=counts.samples_in,
        annotated=tuple(row["key"] for row in rows),
        failed=tuple((error["key"], error["kind"]) for error in of_samples),
        shard_errors=tuple(error["kind"] for error in errors if error["sample_index"] is None),
        duplicated=len(outcomes) - len(set(outcomes)),
    )


def check_pairing(row) -> None:
    """The caption names the sample, and the image's height is the sample's own."""
    named = re.search(r"named (\w)", row["prompt"])[1]
    assert row["image_height"] == image_height(named)
    if row["key"] in KEYS:
        assert row["key"] == named


def check(found: Measured, fault: Fault) -> None:
    lost = fault.samples_in - found.samples_in
    assert found.annotated == fault.annotated
    assert found.failed == tuple((printable(key), kind) for key, kind in fault.failed)
    assert found.shard_errors == fault.shard_errors
    assert lost == len(fault.lost)
    assert not lost or found.shard_errors, "what no row of a sample names is in an error of the shard"
    assert found.samples_in == len(found.annotated) + len(found.failed)
    assert found.duplicated == 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_its_own_sample_and_is_reported(name, annotate_text, tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(FAULTS[name].make())
    check(annotate_text(path), FAULTS[name])


@pytest.mark.parametrize("name", JSON_FAULTS)
def test_a_fault_in_json_costs_its_own_sample_and_is_reported(name, annotate_json, tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(JSON_FAULTS[name].make())
    check(annotate_json(path), JSON_FAULTS[name])


def test_keys_become_no_paths(explainer, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    keys = (f"{tmp_path}/escaped", f"{'../' * 30}{tmp_path}/escaped", "../escaped", "x/y/escaped", "escaped")
    shard = b"".join(with_names({"c": key})()[: -len(END)] for key in keys) + END
    (tmp_path / "0.tar").write_bytes(shard)
    annotator = module_annotator(tmp_path / "out", explainer)
    (source,) = storage.list_shards(str(tmp_path / "0.tar"))
    annotator.annotate(source)
    annotator.close()
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    name = f"{source.shard_id}.parquet"
    assert files == ["0.tar", f"out/annotations/{name}", f"out/errors/{name}"]


PICKLED = ["pkl", "pickle", "p", "pyd", "pth", "pt", "npy", "npz", "cls", "joblib", "ten", "mp"]


def test_pickled_members_are_ignored_and_never_unpickled(annotate_text, tmp_path):
    harmful = harmful_pickle(tmp_path / "trace")
    path = tmp_path / "shard.tar"
    path.write_bytes(with_bad(**dict.fromkeys(PICKLED, harmful))())
    assert annotate_text(path).annotated == tuple(KEYS)
    for field, kind in (("jpg", "format_not_allowed"), ("txt", "not_utf8")):
        path.write_bytes(with_bad(**{field: harmful})())
        assert annotate_text(path).failed == (("c", kind),)
    assert not (tmp_path / "trace").exists()


def test_a_pickle_in_place_of_json_is_an_error(annotate_json, tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(with_json(harmful_pickle(tmp_path / "trace"))())
    assert annotate_json(path).failed == (("c", "not_utf8"),)
    assert not (tmp_path / "trace").exists()


def test_the_pickle_of_these_tests_would_leave_a_trace(tmp_path):
    pickle.loads(harmful_pickle(tmp_path / "trace"))
    assert (tmp_path / "trace").exists()


def pickled_state(folder):
    return {"visual.proj": LeavesATrace(folder / "trace")}


def by_torch(folder, path):
    torch.save(pickled_state(folder), path)


def by_old_torch(folder, path):
    torch.save(pickled_state(folder), path, _use_new_zipfile_serialization=False)


def by_pickle(folder, path):
    path.write_bytes(pickle.dumps(pickled_state(folder)))


def by_numpy(folder, path):
    with path.open("wb") as file:
        np.save(file, np.array([LeavesATrace(folder / "trace")], dtype=object), allow_pickle=True)


def by_numpy_archive(folder, path):
    with path.open("wb") as file:
        np.savez(file, params=np.array([LeavesATrace(folder / "trace")], dtype=object))


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (by_torch, "weights.pt"),
        (by_torch, "weights.bin"),
        (by_old_torch, "weights.pth"),
        (by_pickle, "weights.pt"),
        (by_pickle, "weights.safetensors"),
        (by_torch, "weights.safetensors"),
        (by_numpy, "weights.npy"),
        (by_numpy_archive, "weights.npz"),
    ],
)
def test_code_in_a_checkpoint_is_never_run_whatever_the_file_is_called(write, name, tmp_path):
    write(tmp_path, tmp_path / name)
    assert not (tmp_path / "trace").exists()
    model = ModelConfig(name=assets.DEMO_MODEL_NAME, pretrained=str(tmp_path / name))
    assets.register_demo_model()
    with pytest.raises(UserError, match=name):
        load_explainer(model, "cpu")
    assert not (tmp_path / "trace").exists()


def grey_png(width=4, height=4, extra=b"", data=None):
    ihdr = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(20)) if data is None else data)
    return b"\x89PNG\r\n\x1a\n" + ihdr + extra + pixels + png_chunk(b"IEND", b"")


LABEL_MAP = grey_png()
TEXT = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 1)))
OBJECTS = b'{"captions": ["a dog"], "class_ids": [1]}'


@pytest.mark.parametrize(
    ("document", "label_map"),
    [
        (b"[" * 1_000_000, LABEL_MAP),
        (b'{"captions": ["a dog"], "class_ids": [1e999]}', LABEL_MAP),
        (b"\xff" + OBJECTS, LABEL_MAP),
        (OBJECTS, grey_png(10**5, 10**5)),
        (OBJECTS, LABEL_MAP[:40]),
        (OBJECTS, grey_png(data=b"rubbish")),
        (OBJECTS, LABEL_MAP[:-12]),
        (OBJECTS, flipped(LABEL_MAP, 45)),
        (OBJECTS, b"%!PS-Adobe-3.0 EPSF-3.0"),
    ],
)
def test_ground_truth_is_trusted_no_more_than_anything_else(document, label_map):
    good = {"jpg": b"", "json": OBJECTS, "seg.png": LABEL_MAP}
    assert isinstance(scene_of(RawSample(0, "a", good), "jpg"), Scene)
    found = scene_of(RawSample(0, "a", good | {"json": document, "seg.png": label_map}), "jpg")
    assert isinstance(found, SampleError)
    assert found.kind == "bad_ground_truth"


@pytest.mark.parametrize("texts", [TEXT * 100, png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**22)))])
def test_texts_beside_a_label_map_are_ignored(texts):
    fields = {"jpg": b"", "json": OBJECTS, "seg.png": grey_png(extra=texts)}
    scene = scene_of(RawSample(0, "a", fields), "jpg")
    np.testing.assert_array_equal(scene.label_map, np.zeros((4, 4)))


def test_a_sample_without_prompts_costs_no_look_at_its_image(explainer, tmp_path):
    path = write_shard(tmp_path / "0.tar", [sample("a", jpg=b"no image", json=captions_json([]))])
    settings = {"input": {"caption": "json:captions"}, "prompts": {"source": "captions"}}
    annotator = ShardAnnotator(
        demo_job([path], tmp_path / "out", **settings), explainer, decode_threads=1, metadata={}
    )
    counts = annotator.annotate(storage.list_shards(str(path))[0]).counts
    annotator.close()
    assert (counts.empty, counts.failed) == (1, 0)
