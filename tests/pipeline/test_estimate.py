"""Estimates of a job, before it starts and after a few shards."""

import io
import re

import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.errors import UserError
from pipeline.output.counts import ShardCounts
from pipeline.output.measures import Measures
from pipeline.output.runs import RunState
from pipeline.output.schema import ANNOTATION_SCHEMA
from pipeline.output.writer import ShardWriter
from pipeline.run.estimate import dry_run, dry_run_lines, extrapolation_lines, published_bytes
from pipeline.run.job import prepare_job
from pipeline.shards.sample_error import SampleError
from tests.helpers.corpus import captions_json, demo_job, sample, write_corpus, write_shard


def publish_shards(out, shard_ids, size_bytes):
    for folder in ("errors", "annotations"):
        for shard_id in shard_ids:
            storage.publish(str(out / folder), f"{shard_id}.parquet", b"x" * size_bytes)


def test_samples_and_prompts_are_estimated_from_a_few_shards_by_bytes(tmp_path):
    tars = write_corpus(tmp_path / "in", shards=12, samples_per_shard=30)
    found = dry_run(demo_job(tars, tmp_path / "out"))
    assert (found.probe.shards, found.probe.samples, found.probe.prompts) == (3, 90, 90)
    lines = "\n".join(dry_run_lines(found))
    samples, prompts = re.search(r"samples: about (\d+), prompts: about (\d+)", lines).groups()
    assert int(samples) == pytest.approx(360, rel=0.1)
    assert samples == prompts
    assert "shards: 12 in total, 12 left" in lines
    assert "nothing was started or written" in lines
    assert not (tmp_path / "out").exists()


def test_prompts_are_counted_as_the_job_would_take_them(tmp_path):
    captions = [captions_json(["a", "b", "c"]), captions_json(["a"]), captions_json("no list")]
    samples = [sample(str(index), seed=index, txt=None, json=text) for index, text in enumerate(captions)]
    tar = write_shard(tmp_path / "0.tar", samples)
    several = {"input": {"shards": [str(tar)], "caption": "json:captions"}}
    found = dry_run(
        demo_job([tar], tmp_path / "out", prompts={"source": "captions", "max_per_sample": 2}, **several)
    )
    assert (found.probe.samples, found.probe.prompts) == (3, 3)


def test_a_missing_shard_is_reported_and_leaves_the_estimate_unchanged(tmp_path):
    tars = write_corpus(tmp_path / "in", shards=2, samples_per_shard=10)
    gone = tmp_path / "in" / "9999.tar"
    found = dry_run(demo_job([*tars, gone], tmp_path / "out"))
    lines = "\n".join(dry_run_lines(found))
    assert re.search(r"9999\.tar  \? bytes", lines)
    assert f"not in the estimates: 1 shard(s) of unknown size, perhaps missing: file://{gone}" in lines
    assert found.probe.samples == 20


def test_a_shard_that_is_no_tar_is_listed_and_leaves_the_estimate_unchanged(tmp_path):
    tars = write_corpus(tmp_path / "in", shards=1, samples_per_shard=3)
    broken = tmp_path / "in" / "0001.tar"
    broken.write_bytes(b"no tar" * 1000)
    found = dry_run(demo_job([*tars, broken], tmp_path / "out"))
    assert found.probe.samples == 3
    assert any("0001.tar" in line for line in dry_run_lines(found))


def test_a_dry_run_reports_finished_shards_and_their_output_size(tmp_path):
    tars = write_corpus(tmp_path / "in", shards=4, samples_per_shard=5)
    config = demo_job(tars, tmp_path / "out")
    job = prepare_job(config)
    publish_shards(tmp_path / "out", [shard.shard_id for shard in job.shards[:2]], 1000)
    before = sorted((tmp_path / "out").rglob("*"))
    lines = dry_run_lines(dry_run(config))
    assert [line.endswith("  done") for line in lines[:4]] == [True, True, False, False]
    text = "\n".join(lines)
    assert "shards: 4 in total, 2 left" in text
    assert re.search(
        r"output: about (7\.\d|8\.\d) kB \(estimated from 2 finished shard\(s\) with 4\.0 kB\)", text
    )
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_a_dry_run_takes_results_of_another_configuration_as_the_run_itself_would(tmp_path):
    tars = write_corpus(tmp_path / "in", shards=2, samples_per_shard=1)
    job = prepare_job(demo_job(tars, tmp_path / "out"))
    publish_shards(tmp_path / "out", [shard.shard_id for shard in job.shards], 1000)
    before = sorted((tmp_path / "out").rglob("*"))
    masks = {"rule": "fixed", "value": 0.3}
    with pytest.raises(UserError, match="holds results of another configuration"):
        dry_run(demo_job(tars, tmp_path / "out", masks=masks))
    found = dry_run(demo_job(tars, tmp_path / "out", masks=masks, output={"on_mismatch": "overwrite"}))
    assert found.done == frozenset()
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_a_dry_run_marks_damaged_shards_and_done_ones(tmp_path):
    tars = write_corpus(tmp_path / "in", shards=2, samples_per_shard=1)
    config = demo_job(tars, tmp_path / "out")
    job = prepare_job(config)
    for shard, damages in zip(job.shards, (False, True), strict=True):
        with ShardWriter(shard, {**job.metadata, "attempt": shard.shard_id}) as writer:
            writer.add_error(SampleError("read", "truncated", "cut", damages_shard=damages))
            writer.publish(str(tmp_path / "out"))
    lines = dry_run_lines(dry_run(config))
    assert [line.rsplit("  ", 1)[1] for line in lines[:2]] == ["done", "damaged"]


def test_a_long_list_is_cut(tmp_path):
    tars = write_corpus(tmp_path / "in", shards=30, samples_per_shard=1)
    lines = dry_run_lines(dry_run(demo_job(tars, tmp_path / "out")))
    assert "... and 10 more" in lines
    assert len(lines) < 30


def test_a_limited_run_gives_an_estimate_by_bytes_and_worker_time(tmp_path):
    small = write_corpus(tmp_path / "small", shards=1, samples_per_shard=1)
    size = small[0].stat().st_size
    large = tmp_path / "large.tar"
    large.write_bytes(small[0].read_bytes() + bytes(9 * size))
    job = prepare_job(demo_job([*small, large], tmp_path / "out"))
    (done,) = [shard for shard in job.shards if shard.size_bytes == size]
    publish_shards(tmp_path / "out", [done.shard_id], 500)
    state = RunState(
        shards_total=2,
        shards_skipped=0,
        shards_done=1,
        counts=ShardCounts(annotated=10, rows=30),
        measures=Measures(ready_s=100.0),
        workers_ready=2,
        elapsed_s=999.0,
    )
    text = "\n".join(extrapolation_lines(job, state, [done]))
    # ten times as many bytes are left, eleven times as many in all
    assert "1 shard(s) left: about 16m40s with one worker, 8m20s with 2 worker(s)" in text
    assert "about 110 samples, 330 rows, 11.0 kB of output" in text


def test_where_sizes_are_unknown_shards_count_alike(tmp_path):
    tars = write_corpus(tmp_path / "in", shards=1, samples_per_shard=1)
    job = prepare_job(demo_job([*tars, tmp_path / "gone.tar"], tmp_path / "out"))
    (done,) = [shard for shard in job.shards if shard.size_bytes]
    state = RunState(shards_total=2, shards_skipped=0, shards_done=1, measures=Measures(ready_s=60.0))
    text = "\n".join(extrapolation_lines(job, state, [done]))
    assert "about 1m00s with one worker" in text


def test_without_a_finished_shard_there_is_no_estimate(tmp_path):
    job = prepare_job(demo_job(write_corpus(tmp_path / "in", 1, 1), tmp_path / "out"))
    assert extrapolation_lines(job, RunState(1, 0), []) == ["no estimate: no shard was annotated"]


def test_published_bytes_are_those_of_both_files_on_disk(tmp_path):
    sink = io.BytesIO()
    pq.write_table(ANNOTATION_SCHEMA.empty_table(), sink)
    storage.publish(str(tmp_path / "annotations"), "a.parquet", sink.getvalue())
    storage.publish(str(tmp_path / "errors"), "a.parquet", b"12345")
    storage.publish(str(tmp_path / "errors"), "b.parquet", b"12345")
    assert published_bytes(str(tmp_path), ["a"]) == {"a": len(sink.getvalue()) + 5}
    assert published_bytes(str(tmp_path / "none"), ["a"]) == {"a": 0}


def test_a_dry_run_looks_for_no_device_and_connects_to_no_cluster(tmp_path, monkeypatch):
    # nothing answers there
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    tars = write_corpus(tmp_path / "in", shards=1, samples_per_shard=2)
    sections = {"run": {"gpus_per_worker": 1}, "model": {"precision": "auto"}}
    assert dry_run(demo_job(tars, tmp_path / "out", **sections)).probe.samples == 2
