"""Workers and questions reach the machines that they are meant for; the GPU is only claimed."""

import pytest
import ray

from pipeline.config.schema import RunConfig
from pipeline.run import cluster
from pipeline.run.job import prepare_job
from pipeline.run.plan import WorkerPlan, WorkerShape, plan_workers
from pipeline.run.precision import precision_of_workers
from pipeline.run.progress import SharedProgress
from pipeline.run.runner import run_job
from tests.helpers.corpus import demo_job, write_corpus
from tests.helpers.light_annotator import light
from tests.helpers.ray_head import ray_head


@pytest.fixture(scope="module", autouse=True)
def head():
    with ray_head(dashboard=False, gpus=1) as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", started.address)
        yield started


def test_each_kind_of_gpu_is_asked_for_its_precision():
    with cluster.ray_session():
        (machine,) = cluster.machines_alive()
        assert (machine.cpus, machine.gpus) == (2, 1)
        assert cluster.run_on_each_kind_of_gpu(lambda: "answer", RunConfig()) == ["answer"]
    # the claimed GPU cannot be seen by torch
    assert precision_of_workers(RunConfig()) == "fp32"


def test_workers_that_differ_start_on_their_machine(tmp_path, monkeypatch):
    planned = []

    def plan(run, machines, shards, **asked):
        (machine,) = machines
        planned.append(plan_workers(run, machines, shards, **asked))
        shape = WorkerShape(1, node_id=machine.node_id)
        return WorkerPlan({machine.node_id: (shape,)}, 1, shape, ("a note",))

    monkeypatch.setattr("pipeline.run.workforce.plan_workers", plan)
    # in a process that joins several clusters, Ray counts a metric of one name several times
    monkeypatch.setattr("pipeline.run.runner.RunMetrics", lambda *_: SharedProgress([]))
    said = []

    class Listener:
        def update(self, state):
            pass

        def say(self, message):
            said.append(message)

    config = demo_job(write_corpus(tmp_path / "in", 2, 1), tmp_path / "out", model={"precision": "fp32"})
    result = run_job(prepare_job(config), SharedProgress([Listener()]), light)
    assert result.complete
    assert "a note" in said
    assert [shape.gpus for shape in planned[0].shapes] == [1]
    assert not ray.is_initialized()
