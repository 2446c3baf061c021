"""The output folder of a job: its configuration, finished shards, and when it is complete."""

import json

import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.output.folder import OutputFolder
from pipeline.output.records import job_document
from pipeline.output.status import read_status
from pipeline.output.writer import ShardWriter
from pipeline.run import job as jobs
from pipeline.run.outcome import JobResult, concluded, first_state
from pipeline.shards.sample_error import SampleError
from tests.helpers.corpus import demo_job, write_corpus


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "in", 3, 2)


def row(index):
    return {"key": f"k{index}", "sample_index": index, "prompt_index": 0, "prompt": "p", "status": "ok"}


def commit(job, shard, rows=2, failures=0):
    with ShardWriter(shard, {**job.metadata, "attempt": shard.shard_id}) as writer:
        for index in range(rows):
            writer.add_sample([row(index)], [])
        for index in range(failures):
            writer.add_sample([], [SampleError("decode", "truncated", "m", f"f{index}", rows + index)])
        writer.publish(job.config.output.dir)


def test_a_new_folder_gets_its_job_file_and_the_frozen_list_of_shards(corpus, tmp_path):
    job = jobs.prepare_job(demo_job(corpus, tmp_path / "out"))
    assert [shard.canonical_url for shard in job.todo] == [path.as_uri() for path in corpus]
    document = OutputFolder(str(tmp_path / "out")).job().model_dump()
    assert document["config_hash"] == job.stamp.config_hash
    assert document["weights_digest"].startswith("sha256:")
    assert document["versions"]["torch"]
    table = pq.read_table(tmp_path / "out" / "shards.parquet")
    assert table["shard"].to_pylist() == [path.as_uri() for path in corpus]
    assert table["size_bytes"].to_pylist() == [path.stat().st_size for path in corpus]


def test_a_shard_is_done_if_its_annotations_are_there(corpus, tmp_path):
    config = demo_job(corpus, tmp_path / "out")
    job = jobs.prepare_job(config)
    commit(job, job.shards[1])
    assert [shard.shard_id for shard in jobs.prepare_job(config).todo] == [
        job.shards[0].shard_id,
        job.shards[2].shard_id,
    ]


def test_new_shards_are_added_and_the_job_is_no_longer_complete(corpus, tmp_path):
    config = demo_job(corpus[:2], tmp_path / "out")
    job = jobs.prepare_job(config)
    for shard in job.shards:
        commit(job, shard)
    jobs.record_success(job.folder, 2, 0, read_status(config.output.dir).counts)
    assert jobs.prepare_job(config).todo == []
    assert (tmp_path / "out" / "_SUCCESS").exists()
    grown = jobs.prepare_job(demo_job(corpus, tmp_path / "out"))
    assert [shard.canonical_url for shard in grown.todo] == [corpus[2].as_uri()]
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_files_of_a_job_with_another_configuration_that_started_at_the_same_time_are_no_success(
    corpus, tmp_path
):
    out = tmp_path / "out"
    other = jobs.prepare_job(demo_job(corpus, out, masks={"rule": "fixed", "value": 0.3}))
    job = jobs.prepare_job(demo_job(corpus, out))
    for shard in job.shards:
        commit(other if shard is job.shards[1] else job, shard)
    assert [shard_id for shard_id, _ in read_status(str(out)).mismatched] == [job.shards[1].shard_id]
    again = jobs.prepare_job(demo_job(corpus, out))
    result = concluded(again, JobResult(first_state(again)))
    assert not result.complete
    assert job.shards[1].canonical_url in result.stopped
    assert not (out / "_SUCCESS").exists()
    assert [shard.shard_id for shard in jobs.prepare_job(demo_job(corpus, out)).todo] == [
        job.shards[1].shard_id
    ]


def test_another_configuration_is_an_error_that_names_the_differences(corpus, tmp_path):
    job = jobs.prepare_job(demo_job(corpus, tmp_path / "out"))
    commit(job, job.shards[0])
    changed = r"changed: masks\.rule: otsu before, fixed now\n +masks\.value: 0\.5 before, 0\.3 now\n  choose"
    with pytest.raises(UserError, match=changed):
        jobs.prepare_job(demo_job(corpus, tmp_path / "out", masks={"rule": "fixed", "value": 0.3}))


def test_a_key_without_effect_on_rows_keeps_finished_shards(corpus, tmp_path):
    job = jobs.prepare_job(demo_job(corpus, tmp_path / "out"))
    commit(job, job.shards[0])
    again = jobs.prepare_job(demo_job(corpus, tmp_path / "out", masks={"quantile": 0.1, "value": 0.9}))
    assert again.done == {job.shards[0].shard_id}


def test_a_folder_without_results_accepts_a_corrected_configuration(corpus, tmp_path):
    jobs.prepare_job(demo_job(corpus, tmp_path / "out", model={"layers": 1}))
    corrected = jobs.prepare_job(demo_job(corpus, tmp_path / "out"))
    assert OutputFolder(str(tmp_path / "out")).job().config_hash == corrected.stamp.config_hash


def test_another_configuration_overwrites_if_output_on_mismatch_says_so(corpus, tmp_path):
    first = jobs.prepare_job(demo_job(corpus, tmp_path / "out"))
    commit(first, first.shards[0])
    changed = demo_job(corpus, tmp_path / "out", masks={"rule": "fixed"}, output={"on_mismatch": "overwrite"})
    job = jobs.prepare_job(changed)
    assert len(job.todo) == 3
    assert any("removed 2 files" in warning for warning in job.warnings)
    assert list((tmp_path / "out" / "annotations").iterdir()) == []


def test_run_settings_may_change_between_runs(corpus, tmp_path):
    job = jobs.prepare_job(demo_job(corpus, tmp_path / "out"))
    commit(job, job.shards[0])
    assert jobs.prepare_job(demo_job(corpus, tmp_path / "out", run={"batch_size": 3})).warnings == ()


def test_other_versions_are_a_warning_and_no_error(corpus, tmp_path):
    config = demo_job(corpus, tmp_path / "out")
    job = jobs.prepare_job(config)
    commit(job, job.shards[0])
    path = tmp_path / "out" / "job.json"
    document = json.loads(path.read_text())
    document["versions"]["torch"] = "0.0.1"
    path.write_text(json.dumps(document))
    assert any("torch 0.0.1 ->" in warning for warning in jobs.prepare_job(config).warnings)


@pytest.mark.parametrize("retry", [True, False])
def test_given_up_shards_are_tried_again_if_run_retry_failed_is_set(corpus, tmp_path, retry):
    config = demo_job(corpus, tmp_path / "out", run={"retry_failed": retry})
    job = jobs.prepare_job(config)
    jobs.record_failure(job.folder, job.shards[0], 3, "killed")
    again = jobs.prepare_job(config)
    assert (job.shards[0] in again.todo) is retry
    assert (job.shards[0].shard_id in again.given_up) is not retry


def test_no_secret_of_a_url_is_written(corpus, tmp_path):
    signed = f"file://{corpus[0]}"
    config = demo_job([signed], tmp_path / "out")
    hidden = config.model_copy(
        update={
            "input": config.input.model_copy(update={"shards": ["s3://id:hunter2@bucket/{0..1}.tar?sig=abc"]})
        }
    )
    written = job_document(hidden, jobs.prepare_job(config).stamp).decode()
    assert "hunter2" not in written
    assert "sig=abc" not in written
    assert "s3://bucket/{0..1}.tar" in written


def test_status_counts_shards_done_failed_and_left(corpus, tmp_path):
    config = demo_job(corpus, tmp_path / "out")
    job = jobs.prepare_job(config)
    commit(job, job.shards[0], rows=3, failures=2)
    jobs.record_failure(job.folder, job.shards[1], 3, "it kills its worker")
    status = read_status(config.output.dir)
    assert (status.shards_total, status.done, status.left) == (
        3,
        (job.shards[0].shard_id,),
        (job.shards[2].shard_id,),
    )
    assert status.failed == ((job.shards[1].canonical_url, "it kills its worker"),)
    assert (status.counts.samples_in, status.counts.annotated, status.counts.failed) == (5, 3, 2)
    assert status.counts.errors_by_kind == {"decode/truncated": 2}
    assert not status.complete


def test_status_names_a_shard_whose_two_files_are_of_different_attempts(corpus, tmp_path):
    config = demo_job(corpus, tmp_path / "out")
    job = jobs.prepare_job(config)
    for shard in job.shards:
        commit(job, shard)
    name = f"{job.shards[0].shard_id}.parquet"
    other = f"{job.shards[1].shard_id}.parquet"
    (tmp_path / "out" / "errors" / name).write_bytes((tmp_path / "out" / "errors" / other).read_bytes())
    (tmp_path / "out" / "errors" / other).write_bytes(b"torn")
    status = read_status(config.output.dir)
    assert {shard_id for shard_id, _ in status.mismatched} == {job.shards[0].shard_id, job.shards[1].shard_id}
    assert not status.complete


def test_status_of_a_folder_without_a_job_is_an_input_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no job\.json"):
        read_status(str(tmp_path))


def test_the_listed_shards_are_the_shards_annotated(corpus, tmp_path):
    config = demo_job([str(corpus[0].parent / "*.tar")], tmp_path / "out")
    job = jobs.prepare_job(config)
    frozen = [(row["shard_id"], row["shard"]) for row in OutputFolder(config.output.dir).shard_rows()]
    assert frozen == [(shard.shard_id, shard.canonical_url) for shard in job.shards]


def test_relative_paths_mean_the_same_files_for_workers_elsewhere(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = jobs.prepare_job(demo_job(["in/*.tar"], "out"))
    assert job.config.output.dir == str(tmp_path / "out")
    assert [shard.url for shard in job.shards] == [str(path) for path in corpus]


def test_credentials_in_the_output_folder_are_refused(corpus):
    with pytest.raises(UserError, match="credentials come from the environment") as raised:
        demo_job(corpus, "s3://id:hunter2@bucket/out")
    assert "hunter2" not in str(raised.value)
