"""Resolve `model.precision: auto` for the devices that the workers of a job will get."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from legrad.loading import device_precision
from pipeline.config.schema import RunConfig

AUTO_ON_CPUS = "fp32"


def precision_of_workers(run: RunConfig) -> str:
    """Return the precision that `auto` stands for: bf16 if all GPUs of the job compute it, otherwise fp32.

    On a cluster, a short task runs on a machine with each kind of GPU, because this process may have no GPU.
    If no machine has one yet, the task waits. Machines that join later are not asked: a worker whose GPU does
    not compute the precision of the job is refused when it loads the model.

    Args:
        run: the configuration's run section.

    Raises:
        UserError: nothing answers at RAY_ADDRESS, or no GPU joins for `run.wait_for_devices_s`.
    """
    if not run.gpus_per_worker:
        return AUTO_ON_CPUS
    if os.environ.get("RAY_ADDRESS", "") in ("", "local"):
        return _common([precision_here()])
    # imports Ray, which a job on this machine needs only once it has work
    from pipeline.run.cluster import ray_session, run_on_each_kind_of_gpu

    with ray_session():
        return _common(run_on_each_kind_of_gpu(precision_here, run))


def precision_here() -> str:
    """Return the precision that all GPUs that this process sees compute; fp32 without GPUs."""
    return _common(device_precision(f"cuda:{index}") for index in range(torch.cuda.device_count()))


def _common(precisions: Iterable[str]) -> str:
    found = set(precisions)
    return found.pop() if len(found) == 1 else AUTO_ON_CPUS
