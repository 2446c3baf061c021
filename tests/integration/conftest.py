"""A Ray cluster of several simulated machines, jobs on it, and the table of faults."""

import itertools
import json
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from pipeline.console import PrintableConsole
from pipeline.output import footer_cache
from pipeline.run.job import prepare_job
from pipeline.run.progress import open_progress
from pipeline.run.runner import run_job
from tests.helpers.accounts import audit
from tests.helpers.corpus import demo_job, write_word_shards
from tests.helpers.faults import annotate_all, struck_by
from tests.helpers.processes import python_path
from tests.helpers.waiting import PATIENCE_S, TEST_PATIENCE_S

HERE = Path(__file__).parent
MACHINE_NUMBERS = itertools.count(2)
ON_CPUS = {"gpus_per_worker": 0, "cpus_per_worker": 1}
TABLE_FILE = os.environ.get("LEGRAD_FAULT_TABLE")


def pytest_collection_modifyitems(items):
    """Give the tests here time on a machine that is busy with other work."""
    for item in items:
        if item.path.parent == HERE and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TEST_PATIENCE_S))


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user():
    """Keep nothing of the tests' folders in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footer_cache, "SETTLED_AFTER_S", float("inf"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_environment_for_every_ray():
    """Give every Ray of these tests, in this process and in others, the same token and import path.

    A process keeps the first authentication mode and token that its Ray finds, so tests that start or join
    different clusters would otherwise depend on their order.
    """
    from ray._raylet import AuthenticationTokenLoader, Config

    with pytest.MonkeyPatch.context() as patch:
        # workers import the tests' annotators by name
        patch.setenv("PYTHONPATH", python_path())
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        # a run sets this itself, and leaves it set
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        yield


@pytest.fixture(scope="session")
def cluster():
    """A cluster whose head runs no workers; tests add the machines that do."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=head)
    yield started
    started.shutdown()


@pytest.fixture
def machines(cluster, monkeypatch):
    """Return a function that adds a machine to the cluster; remove them after the test.

    Jobs of this test run on the cluster. Each machine has an address of its own, so that the driver, which
    attaches to the machine at its own address, is on the head and not on a machine that a test removes.
    """
    added = []
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)

    def add(num_cpus=1, num_gpus=0):
        address = f"127.0.0.{next(MACHINE_NUMBERS)}"
        memory = {"object_store_memory": 80 << 20}
        resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        added.append(cluster.add_node(**resources, node_ip_address=address, **memory))
        return added[-1]

    yield add
    for node in added:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node)


@pytest.fixture
def struck_job(tmp_path):
    """Return a function that runs a job of word shards in this process while faults strike its workers.

    `meanwhile` gives a context for the run, once the shards are listed. Returns the result, the log and the
    accounts of the output folder; OUT is tmp_path/"out".
    """

    def run(
        names, *faults, samples=6, seconds_per_sample=0.0, meanwhile=lambda tars: nullcontext(), **settings
    ):
        tars = write_word_shards(tmp_path / "in", names, samples)
        (tmp_path / "marks").mkdir(exist_ok=True)
        run_settings = {**ON_CPUS, "progress_interval_s": 0.2, **settings}
        config = demo_job(tars, tmp_path / "out", run=run_settings)
        factory = struck_by(*faults, marks_folder=tmp_path / "marks", seconds_per_sample=seconds_per_sample)
        with (
            (tmp_path / "log").open("w") as log,
            open_progress(PrintableConsole(file=log, width=200), 0.2) as progress,
        ):
            job = prepare_job(config)
            with meanwhile(tars):
                result = run_job(job, progress, factory)
        return result, (tmp_path / "log").read_text(), audit(tmp_path / "out", tars)

    return run


@pytest.fixture
def struck_worker(tmp_path):
    """Return a function that runs a worker over the shards left, in a process of its own and without Ray.

    Returns the process's exit code and the accounts of the output folder, whatever the worker left there.
    """

    def run(names, *faults):
        tars = write_word_shards(tmp_path / "in", names, 6)
        (tmp_path / "marks").mkdir(exist_ok=True)
        job = prepare_job(demo_job(tars, tmp_path / "out"))
        factory = struck_by(*faults, marks_folder=tmp_path / "marks")
        process = multiprocessing.get_context("fork").Process(target=annotate_all, args=(job, factory))
        process.start()
        process.join(PATIENCE_S)
        process.kill()
        return process.exitcode, audit(tmp_path / "out", tars)

    return run


@pytest.fixture
def word_command(tmp_path):
    """Return a function that starts `legrad annotate` on word shards as a process of its own.

    Its output goes to tmp_path/"log", its results to tmp_path/"out".
    """
    started = []

    def start(names, *faults, samples=6, seconds_per_sample=0.0, environment=(), **sections):
        tars = write_word_shards(tmp_path / "in", names, samples)
        (tmp_path / "marks").mkdir(exist_ok=True)
        sections["run"] = {**ON_CPUS, "progress_interval_s": 0.5, **sections.get("run", {})}
        config = demo_job(tars, tmp_path / "out", **sections)
        job, spec = tmp_path / f"{len(started)}.yaml", tmp_path / f"{len(started)}.json"
        job.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        document = {"faults": [asdict(fault) for fault in faults], "marks_folder": str(tmp_path / "marks")}
        spec.write_text(json.dumps({**document, "seconds_per_sample": seconds_per_sample}))
        with (tmp_path / "log").open("a") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.helpers.word_driver", str(job), str(spec)],
                    env={**os.environ, **dict(environment)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return started[-1], tars

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def fault_table():
    """Return a function that records a fault and its accounts in LEGRAD_FAULT_TABLE, for bench/faults.py."""

    def note(fault, injected_how, accounts):
        if TABLE_FILE is None:
            return
        row = {"fault": fault, "injected_how": injected_how, **asdict(accounts)}
        with Path(TABLE_FILE).open("a") as table:
            table.write(f"{json.dumps(row)}\n")

    return note
