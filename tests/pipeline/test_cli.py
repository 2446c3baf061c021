"""The command line: what it prints, and with which code it ends."""

from importlib.metadata import version

import pytest
import yaml

from pipeline.cli.demo import demo_config
from pipeline.output.counts import ShardCounts
from pipeline.output.runs import RunState
from pipeline.run.job import prepare_job
from pipeline.run.outcome import JobResult
from tests.helpers.corpus import demo_job, write_corpus


@pytest.fixture
def config_file(tmp_path):
    config = demo_job(write_corpus(tmp_path / "in", 2, 1), tmp_path / "out")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@pytest.mark.parametrize(
    "arguments",
    [["annotate"], ["nonsense"], ["status"], ["annotate", "a.yaml", "--no-such-option"], ["evaluate", "out"]],
)
def test_usage_errors_exit_with_1(legrad, arguments):
    code, _, err = legrad(*arguments)
    assert code == 1
    assert "Traceback" not in err


def test_help_names_every_command_and_ends_with_0(legrad):
    code, out, _ = legrad("--help")
    assert code == 0
    assert all(command in out for command in ("annotate", "status", "evaluate", "models", "demo"))


def test_the_version_is_printed(legrad):
    assert legrad("--version")[:2] == (0, f"legrad {version('legrad-pipeline')}\n")


def test_a_dry_run_lists_and_estimates_and_writes_nothing(legrad, config_file, tmp_path):
    code, out, _ = legrad("annotate", config_file, "--dry-run")
    assert code == 0
    assert "0000.tar" in out
    assert "0001.tar" in out
    assert "samples: about 2, prompts: about 2" in out
    assert not (tmp_path / "out").exists()


def test_a_limited_run_annotates_that_many_shards_and_gives_an_estimate(
    legrad, config_file, monkeypatch, tmp_path
):
    def done(job, progress, max_shards):
        first = job.shards[0].shard_id
        for folder in ("errors", "annotations"):
            (tmp_path / "out" / folder).mkdir()
            (tmp_path / "out" / folder / f"{first}.parquet").write_bytes(b"x" * 1000)
        counts = ShardCounts(annotated=max_shards, rows=3)
        return JobResult(RunState(shards_total=2, shards_skipped=0, shards_done=1, counts=counts))

    monkeypatch.setattr("pipeline.run.runner.run_job", done)
    code, out, _ = legrad("annotate", config_file, "--limit", "1")
    assert code == 3
    assert "0001.tar; run the command again without --limit to resume" in out
    assert "estimate from 1 of 2 shards" in out
    assert "about 2 samples, 6 rows, 4.0 kB of output" in out


def test_a_wrong_key_is_reported_on_one_screen_without_a_traceback(legrad, config_file):
    code, _, err = legrad("annotate", config_file, "run.batchsize=3")
    assert code == 1
    assert "did you mean run.batch_size?" in err
    assert "Traceback" not in err
    assert len(err.splitlines()) < 24


def test_a_model_that_cannot_be_explained_is_reported_before_any_work(legrad, config_file, tmp_path):
    code, _, err = legrad("annotate", config_file, "model.name=RN50", "model.pretrained=openai")
    assert code == 1
    assert "RN50" in err
    assert "Traceback" not in err


def test_missing_weights_are_reported(legrad, config_file, tmp_path):
    code, _, err = legrad(
        "annotate", config_file, f"model.pretrained={tmp_path}/gone.pt", "model.name=ViT-B-32"
    )
    assert code == 1
    assert "gone.pt" in err


@pytest.mark.parametrize(("complete", "code"), [(True, 0), (False, 3)])
def test_annotate_ends_with_0_where_all_is_done_and_3_where_something_is_left(
    legrad, config_file, monkeypatch, complete, code
):
    state = RunState(shards_total=2, shards_skipped=0, shards_done=2 if complete else 1)
    result = JobResult(state, () if complete else (("file:///x.tar", "it kills its worker"),))
    monkeypatch.setattr("pipeline.run.runner.run_job", lambda job, progress, max_shards: result)
    ended, out, _ = legrad("annotate", config_file)
    assert ended == code
    assert ("file:///x.tar: it kills its worker" in out) is not complete


def test_a_job_in_which_every_sample_failed_names_the_dry_run(legrad, config_file, monkeypatch):
    state = RunState(shards_total=2, shards_skipped=0, shards_done=2, counts=ShardCounts(failed=2))
    monkeypatch.setattr("pipeline.run.runner.run_job", lambda job, progress, max_shards: JobResult(state))
    _, out, _ = legrad("annotate", config_file)
    assert "no sample was annotated; run the command again with --dry-run to see why" in out


def test_annotate_ends_by_naming_the_workers_and_the_places_left_alone(legrad, config_file, monkeypatch):
    state = RunState(
        shards_total=2,
        shards_skipped=0,
        shards_done=2,
        workers_ready=6,
        workers_wanted=8,
        workers_lost=14,
        left_alone=tuple(f"10.0.0.{number}: 3 workers lost" for number in range(12)),
    )
    monkeypatch.setattr("pipeline.run.runner.run_job", lambda job, progress, max_shards: JobResult(state))
    _, out, _ = legrad("annotate", config_file)
    assert out.startswith("Results go to /")
    assert "workers: 6 of 8, 14 lost\n" in out
    assert "place left alone: 10.0.0.9: 3 workers lost\n... and 2 more; see legrad status" in out


def test_ctrl_c_exits_with_130_and_says_how_to_resume(legrad, config_file, monkeypatch):
    def interrupted(job, progress, max_shards):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.run.runner.run_job", interrupted)
    code, out, err = legrad("annotate", config_file)
    assert code == 130
    assert "interrupted; run the same command again to resume" in out
    assert "Traceback" not in err


def test_a_bug_of_ours_ends_with_2_and_a_traceback(legrad, config_file, monkeypatch):
    def broken(job, progress, max_shards):
        raise ZeroDivisionError

    monkeypatch.setattr("pipeline.run.runner.run_job", broken)
    code, _, err = legrad("annotate", config_file)
    assert code == 2
    assert "ZeroDivisionError" in err


def test_an_output_that_cannot_be_written_ends_with_2_and_its_path(legrad, config_file, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = legrad("annotate", config_file, f"output.dir={tmp_path}/file/out")
    assert code == 2
    assert f"{tmp_path}/file/out" in err
    assert "Traceback" not in err


def test_status_ends_with_3_while_shards_are_left_and_1_without_a_job(legrad, tmp_path):
    prepare_job(demo_job(write_corpus(tmp_path / "in", 2, 1), tmp_path / "out"))
    code, out, _ = legrad("status", tmp_path / "out")
    assert code == 3
    assert "incomplete" in out
    assert legrad("status", tmp_path / "in")[0] == 1


@pytest.mark.slow
def test_models_lists_what_is_supported_and_on_request_why_the_rest_is_not(legrad):
    code, out, _ = legrad("models")
    assert code == 0
    assert "ViT-B-16" in out
    assert "RN50" not in out
    assert "RN50" in legrad("models", "--refused")[1]


def test_the_demo_config_points_at_what_the_package_ships(tmp_path):
    config = demo_config(tmp_path)
    assert len(config.input.shards) == 7
    assert config.output.dir == str(tmp_path)
    assert config.prompts.source == "captions"
