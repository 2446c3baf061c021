"""Machines that join, lack a GPU, or are drained while a job runs; GPUs are only claimed."""

import re
import time

import pytest

from tests.helpers.accounts import audit
from tests.helpers.faults import Fault, daemon_of, workers_seen
from tests.helpers.waiting import PATIENCE_S, wait_until

NAMES = [f"{number:02d}" for number in range(10)]
UNTIL_GO = [Fault(name, "begin", "wait_for_go") for name in NAMES]
PREEMPTION = 2


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def wait_for(tmp_path, log):
    """Return a function that waits until a condition on the log and the workers seen holds."""

    def wait(process, condition):
        wait_until(lambda: condition(log.read_text(), workers_seen(tmp_path)), log.read_text, process)

    return wait


@pytest.fixture
def finish(tmp_path, log):
    """Return a function that lets shards be finished and checks that the job completes."""

    def go(process, tars):
        (tmp_path / "go").touch()
        assert process.wait(timeout=PATIENCE_S) == 0, log.read_text()
        assert audit(tmp_path / "out", tars).shards_done == len(tars)
        return workers_seen(tmp_path)

    return go


def test_a_job_that_starts_before_its_machines_uses_all_that_join(machines, word_command, wait_for, finish):
    # the fixture names the cluster, whose head has no CPU core
    process, tars = word_command(NAMES, *UNTIL_GO)
    wait_for(process, lambda log, _: "Waiting for machines, at most 600 s (run.wait_for_devices_s)" in log)
    joined = {daemon_of(machines()), daemon_of(machines())}
    wait_for(process, lambda _, workers: {worker.machine for worker in workers} == joined)
    assert {worker.cpus for worker in finish(process, tars)} == {1}


@pytest.mark.slow
def test_a_number_of_workers_is_reached_as_machines_join(machines, word_command, wait_for, finish):
    first = machines()
    process, tars = word_command(NAMES, *UNTIL_GO, run={"workers": 3})
    wait_for(process, lambda _, workers: [worker.machine for worker in workers] == [daemon_of(first)])
    there = {daemon_of(first), daemon_of(machines()), daemon_of(machines())}
    wait_for(process, lambda _, workers: {worker.machine for worker in workers} == there)
    assert len(finish(process, tars)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_without_a_gpu_a_job_waits_for_a_while_and_ends_with_one_line(
    machines, word_command, tmp_path, log, precision
):
    machines()
    run = {"gpus_per_worker": 1, "wait_for_devices_s": 5}
    process, _ = word_command(["a"], run=run, model={"precision": precision})
    assert process.wait(timeout=PATIENCE_S) == 1, log.read_text()
    lines = log.read_text().splitlines()
    assert any(re.search(r"Waiting for .*, at most 5 s \(run.wait_for_devices_s\)", line) for line in lines)
    assert lines[-1].startswith("legrad: no machine can hold a worker: a worker needs 1 GPU")
    assert "Traceback" not in log.read_text()
    assert workers_seen(tmp_path) == []


@pytest.mark.slow
def test_a_job_waits_for_the_machine_with_a_gpu_and_runs_only_there(machines, word_command, wait_for, finish):
    machines(num_cpus=4)
    process, tars = word_command(NAMES, *UNTIL_GO, run={"gpus_per_worker": 1}, model={"precision": "auto"})
    wait_for(process, lambda log, _: "Waiting for a GPU, at most 600 s (run.wait_for_devices_s)" in log)
    with_gpu = machines(num_cpus=2, num_gpus=1)
    (worker,) = finish(process, tars)
    assert (worker.machine, worker.device) == (daemon_of(with_gpu), "cuda")


@pytest.mark.slow
def test_a_machine_that_is_drained_gets_no_further_shard(
    cluster, machines, word_command, tmp_path, log, wait_for, finish
):
    from ray._raylet import GcsClient

    leaving, staying = machines(), machines()
    process, tars = word_command(NAMES, seconds_per_sample=0.3)
    both = {daemon_of(leaving), daemon_of(staying)}
    wait_for(process, lambda _, workers: {worker.machine for worker in workers} == both)
    deadline_ms = int((time.time() + PATIENCE_S) * 1000)
    is_accepted, reason = GcsClient(address=cluster.address).drain_node(
        leaving.node_id, PREEMPTION, "a test", deadline_ms
    )
    assert is_accepted, reason
    wait_for(process, lambda log, _: "being drained" in log)
    # those that it was given before may have reached it a moment later
    in_flight = re.search(r"being drained.*in flight: (.*)", log.read_text()).group(1)
    begun = shards_at(leaving, tmp_path) | set(re.findall(r"/(\d\d)\.tar", in_flight))
    finish(process, tars)
    assert shards_at(leaving, tmp_path) <= begun
    assert len(shards_at(staying, tmp_path)) >= len(NAMES) - len(begun)


def shards_at(machine, tmp_path):
    """The shards that workers on a machine have begun."""
    seen = [worker for worker in workers_seen(tmp_path) if worker.machine == daemon_of(machine)]
    return {shard for worker in seen for shard in worker.shards}
