"""`model.precision: auto` is resolved once a job, and the folder's results keep it."""

import json

import pytest
import torch

from pipeline.annotate.model import check_device
from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.errors import UserError
from pipeline.run import estimate, precision, runner
from pipeline.run import job as jobs
from tests.helpers.corpus import demo_job, write_corpus
from tests.pipeline.test_job import commit


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "in", 2, 2)


@pytest.fixture
def devices(monkeypatch):
    """Return a function that sets what the devices of the workers compute, or forbids to ask for it."""

    def compute(found):
        def answer(_run):
            assert found is not None, "the devices were asked"
            return found

        monkeypatch.setattr("pipeline.run.job.precision_of_workers", answer)

    return compute


def prepared(corpus, out, asked="auto", **sections):
    return jobs.prepare_job(demo_job(corpus, out, model={"precision": asked}, **sections))


def recorded(out):
    document = json.loads((out / "job.json").read_text())
    return document["config"]["model"]["precision"], document["precision_is_auto"]


def test_auto_is_hashed_and_recorded_as_the_precision_that_it_stands_for(corpus, tmp_path, devices):
    devices("bf16")
    job = prepared(corpus, tmp_path / "auto")
    assert job.config.model.precision == "bf16"
    assert recorded(tmp_path / "auto") == ("bf16", True)
    devices(None)
    named = prepared(corpus, tmp_path / "named", "bf16")
    assert named.stamp.config_hash == job.stamp.config_hash
    assert recorded(tmp_path / "named") == ("bf16", False)


@pytest.mark.parametrize(("first", "found"), [("auto", "bf16"), ("auto", "fp32"), ("fp16", None)])
def test_a_resumed_job_keeps_the_precision_of_its_rows_and_asks_no_device(
    corpus, tmp_path, devices, first, found
):
    devices(found)
    job = prepared(corpus, tmp_path / "out", first)
    commit(job, job.shards[0])
    devices(None)
    again = prepared(corpus, tmp_path / "out")
    assert again.config.model.precision == job.config.model.precision
    assert len(again.todo) == 1
    assert recorded(tmp_path / "out") == (job.config.model.precision, True)
    config = demo_job(corpus, tmp_path / "out", model={"precision": "auto"})
    assert len(estimate.dry_run(config).done) == 1


def test_another_named_precision_is_another_configuration(corpus, tmp_path, devices):
    devices("bf16")
    job = prepared(corpus, tmp_path / "out")
    commit(job, job.shards[0])
    with pytest.raises(UserError, match=r"model\.precision: bf16 before, fp32 now"):
        prepared(corpus, tmp_path / "out", "fp32")


def test_a_folder_that_is_overwritten_gets_the_precision_of_the_devices_now(corpus, tmp_path, devices):
    devices("fp32")
    job = prepared(corpus, tmp_path / "out")
    commit(job, job.shards[0])
    devices("bf16")
    sections = {"masks": {"rule": "fixed", "value": 0.3}, "output": {"on_mismatch": "overwrite"}}
    again = prepared(corpus, tmp_path / "out", **sections)
    assert again.config.model.precision == "bf16"
    assert len(again.todo) == 2


def test_a_job_that_auto_made_bf16_continues_on_cpus_only_if_that_is_asked_for(corpus, tmp_path, devices):
    devices("bf16")
    job = prepared(corpus, tmp_path / "out")
    runner.check_precision(job, cpus_only=False)
    with pytest.raises(UserError, match=r"this run has no GPU: .* set model.precision=bf16"):
        runner.check_precision(job, cpus_only=True)
    runner.check_precision(prepared(corpus, tmp_path / "out", "bf16"), cpus_only=True)
    devices("fp32")
    runner.check_precision(prepared(corpus, tmp_path / "other"), cpus_only=True)


def test_a_worker_whose_gpu_only_emulates_bf16_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 0))
    model = ModelConfig(name="ViT-B-32", pretrained="openai", precision="bf16")
    with pytest.raises(UserError, match=r"this worker's GPU \(Tesla V100\) only emulates"):
        check_device(model, "cuda")
    check_device(model, "cpu")
    check_device(model.model_copy(update={"precision": "fp16"}), "cuda")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    check_device(model, "cuda")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [([], "fp32"), ([(9, 0)], "bf16"), ([(9, 0), (8, 0)], "bf16"), ([(9, 0), (7, 5)], "fp32")],
)
def test_bf16_needs_every_gpu_of_this_machine(monkeypatch, capabilities, expected):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        "torch.cuda.get_device_capability", lambda device: capabilities[torch.device(device).index]
    )
    assert precision.precision_of_workers(RunConfig()) == expected
    assert precision.precision_of_workers(RunConfig(gpus_per_worker=0)) == "fp32"
