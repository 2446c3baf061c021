"""`ray job submit` on a real cluster of one machine: upload, exit codes, stop and resubmission."""

import json
import os
import re
import signal
import subprocess

import pytest
import yaml

from pipeline.output.folder import OutputFolder
from pipeline.output.runs import latest_run
from pipeline.output.status import read_status
from tests.helpers.accounts import audit
from tests.helpers.corpus import demo_job, write_corpus
from tests.helpers.ray_head import ray_head
from tests.helpers.waiting import PATIENCE_S, held_shard, published, wait_until

pytestmark = pytest.mark.slow

SAMPLES = 40
SHARDS_TO_STOP = 5


@pytest.fixture(scope="module")
def head():
    with ray_head(dashboard=True) as started:
        yield started


@pytest.fixture
def ray_job(head):
    """Runs `ray job ACTION ...`; returns the finished process."""

    def run(action, *arguments, timeout_s=PATIENCE_S, **environment):
        return subprocess.run(
            ["ray", "job", action, "--address", head.dashboard_url, *arguments],
            env={**head.environment, **environment},
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    return run


@pytest.fixture
def job_folder(tmp_path):
    """A folder to upload: shards and the configuration, whose paths are relative to it."""

    def make(shards=2, **run):
        folder = tmp_path / "uploaded"
        tars = write_corpus(folder / "shards", shards, SAMPLES)
        settings = {
            "gpus_per_worker": 0,
            "cpus_per_worker": 2,
            "batch_size": 4,
            "progress_interval_s": 0.5,
            **run,
        }
        document = demo_job([], tmp_path / "out", run=settings).model_dump(mode="json")
        document["input"]["shards"] = "shards/*.tar"
        (folder / "job.yaml").write_text(yaml.safe_dump(document))
        return folder, tars

    return make


def driver_exit_code(head, ray_job, name):
    """What ray keeps of the driver's own exit code."""
    listed = ray_job("list", "--log-style=record").stdout
    # one pretty-printed record a job
    record = next(part for part in listed.split("JobDetails(") if f"submission_id='{name}'" in part)
    return int(re.search(r"driver_exit_code=(\d+)", record).group(1))


def submit(ray_job, folder, name, *arguments):
    return ray_job(
        "submit",
        f"--submission-id={name}",
        f"--working-dir={folder}",
        *arguments,
        "--",
        "legrad",
        "annotate",
        "job.yaml",
    )


def test_a_submitted_job_uploads_its_folder_and_ends_with_0(ray_job, job_folder, tmp_path):
    folder, tars = job_folder()
    ended = submit(ray_job, folder, "complete")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "shards: 2 done" in ended.stdout
    assert f"Results go to {tmp_path / 'out'}\n" in ended.stdout
    # job logs get plain lines
    assert re.search(r"^shards \d/2, .*\d left \| samples", ended.stdout, re.MULTILINE)
    status = read_status(str(tmp_path / "out"))
    assert (status.complete, status.succeeded) == (True, True)
    assert status.counts.annotated == len(tars) * SAMPLES


def test_a_caller_without_the_token_is_refused(ray_job, job_folder, tmp_path):
    folder, _ = job_folder()
    ended = ray_job("submit", f"--working-dir={folder}", "--", "true", RAY_AUTH_TOKEN="f" * 64)
    assert ended.returncode != 0
    assert not (tmp_path / "out").exists()


def test_a_relative_output_folder_is_refused_with_the_place_where_it_would_be(head, ray_job, job_folder):
    folder, _ = job_folder()
    ended = ray_job(
        "submit",
        "--submission-id=relative",
        f"--working-dir={folder}",
        *("--", "legrad", "annotate", "job.yaml", "output.dir=out/run-1"),
    )
    assert driver_exit_code(head, ray_job, "relative") == 1
    assert re.search(
        r"output.dir: out/run-1 is /\S+/_ray_pkg_\w+/out/run-1 in this submitted job, in the job's working "
        r"directory, which Ray deletes; give an absolute path",
        " ".join(ended.stdout.split()),
    )


WAITS_FOR_SIGTERM = """
import pathlib, signal, sys, time
def finish(*_):
    # longer than the three seconds after which Ray kills a job by default
    time.sleep(5)
    pathlib.Path(sys.argv[1], "finished").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, finish)
pathlib.Path(sys.argv[1], "begun").touch()
signal.pause()
"""


@pytest.mark.parametrize("more", [False, True])
def test_a_stopped_job_has_the_time_that_it_was_submitted_with(ray_job, tmp_path, more):
    (tmp_path / "waits.py").write_text(WAITS_FOR_SIGTERM)
    name = f"waits-{more}"
    environment = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"} if more else {}}
    begun = ray_job(
        "submit",
        *(f"--submission-id={name}", "--no-wait", f"--runtime-env-json={json.dumps(environment)}"),
        *("--", "python", str(tmp_path / "waits.py"), str(tmp_path)),
    )
    assert begun.returncode == 0, begun.stdout + begun.stderr
    wait_until((tmp_path / "begun").exists, lambda: ray_job("logs", name).stdout)
    stopped = ray_job("stop", name)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert (tmp_path / "finished").exists() is more


@pytest.mark.parametrize(("overrides", "code"), [(["run.batchsize=3"], 1), (["input.shards=gone.tar"], 3)])
def test_the_drivers_own_exit_code_is_in_the_jobs_status(
    head, ray_job, job_folder, tmp_path, overrides, code
):
    folder, _ = job_folder(1, max_attempts=1)
    name = f"ends-with-{code}"
    ended = ray_job(
        "submit",
        f"--submission-id={name}",
        f"--working-dir={folder}",
        *("--", "legrad", "annotate", "job.yaml", *overrides),
    )
    assert ended.returncode == 1
    assert driver_exit_code(head, ray_job, name) == code
    assert "Traceback" not in ended.stdout


@pytest.mark.parametrize(("frozen", "ended"), [(False, "terminated"), (True, "running")])
def test_a_stopped_job_goes_on_where_it_was_when_it_is_submitted_again(
    ray_job, job_folder, tmp_path, frozen, ended
):
    *tars, last = write_corpus(tmp_path / "shared", SHARDS_TO_STOP, SAMPLES)
    shards = [*map(str, tars), held_shard(last, tmp_path / "go")]
    folder, _ = job_folder()
    document = yaml.safe_load((folder / "job.yaml").read_text())
    document["input"] |= {"shards": shards, "allow_commands": True}
    (folder / "job.yaml").write_text(yaml.safe_dump(document))
    out = tmp_path / "out"
    name = f"stopped-{ended}"
    begun = submit(ray_job, folder, name, "--no-wait")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    wait_until(lambda: published(out), lambda: ray_job("logs", name).stdout)
    if frozen:
        # SIGTERM does not reach it; SIGKILL comes three seconds later
        os.kill(json.loads((out / "job.json").read_text())["pid"], signal.SIGSTOP)
    stopped = ray_job("stop", name)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert f"Job '{name}' was stopped" in ray_job("status", name).stdout
    before = audit(out, shards)
    assert 0 < before.shards_done < SHARDS_TO_STOP
    assert latest_run(OutputFolder(str(out))).ended == ended
    (tmp_path / "go").touch()
    again = submit(ray_job, folder, f"{name}-again")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{before.shards_done} done before" in again.stdout
    after = audit(out, shards)
    assert (after.shards_done, after.shards_left) == (SHARDS_TO_STOP, 0)
    assert json.loads((out / "_SUCCESS").read_text())["annotated"] == SHARDS_TO_STOP * SAMPLES
