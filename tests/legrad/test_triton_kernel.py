"""What happens where Triton does not work: its kernels give way to torch, once and for all."""

import logging
import subprocess
import threading

import pytest
import torch

import legrad
from legrad import refine_heatmaps
from legrad.masks import refine
from legrad.method import kernels
from legrad.triton_kernel import TritonKernel
from tests.legrad.test_kernels import needs_triton

CPU = torch.device("cpu")
COMPILER_MISSING = RuntimeError(
    "Failed to find C compiler. Please specify via CC environment variable.\nMore."
)


class FailingLaunch:
    """A launch that counts its attempts and raises."""

    def __init__(self, error):
        self.error, self.attempts = error, 0

    def __call__(self):
        self.attempts += 1
        raise self.error


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    "error",
    [
        COMPILER_MISSING,
        subprocess.CalledProcessError(1, ["gcc"]),
        ImportError("libcuda.so.1: cannot open shared object file"),
        RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 166912"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_kernel_that_fails_gives_way_once_and_is_never_tried_again(error, caplog):
    kernel, launch = TritonKernel("sums", ("cpu",)), FailingLaunch(error)
    assert [kernel.run(CPU, launch, lambda: "by torch") for _ in range(3)] == ["by torch"] * 3
    assert launch.attempts == 1
    assert not kernel.runs_on(CPU)
    (line,) = warnings_of(caplog)
    assert line.startswith(f"Triton cannot run the kernel 'sums' ({type(error).__name__}: ")
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_no_reason_to_give_up_a_kernel(error, caplog):
    kernel = TritonKernel("sums", ("cpu",))
    with pytest.raises(type(error)):
        kernel.run(CPU, FailingLaunch(error), lambda: "by torch")
    assert kernel.run(CPU, lambda: "by the kernel", lambda: "by torch") == "by the kernel"
    assert not warnings_of(caplog)


def test_one_kernel_that_fails_leaves_the_others_alone():
    failing, working = TritonKernel("sums", ("cpu",)), TritonKernel("means", ("cpu",))
    failing.run(CPU, FailingLaunch(COMPILER_MISSING), lambda: None)
    assert working.run(CPU, lambda: "by the kernel", lambda: "by torch") == "by the kernel"


@pytest.mark.parametrize("works_at_first", [False, True])
def test_threads_that_meet_a_failing_kernel_report_it_once(works_at_first, caplog):
    kernel, launch = TritonKernel("sums", ("cpu",)), FailingLaunch(COMPILER_MISSING)
    if works_at_first:
        kernel.run(CPU, lambda: None, lambda: None)
    start, results = threading.Barrier(4), []

    def use():
        start.wait()
        results.append(kernel.run(CPU, launch, lambda: "by torch"))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["by torch"] * 4
    assert len(warnings_of(caplog)) == 1
    assert works_at_first or launch.attempts == 1


def test_kernels_are_for_cuda_devices_by_default():
    assert not TritonKernel("sums").runs_on(CPU)


# Triton compiles for no CPU, so here it raises by itself, as on a machine without a C compiler.


@needs_triton
def test_refinement_goes_on_where_triton_raises(monkeypatch, caplog):
    images = torch.randint(0, 256, (2, 3, 9, 12), dtype=torch.uint8)
    heatmaps, refinement = torch.rand(2, 3, 9, 12), legrad.Refinement(iterations=2, dilations=(1, 2))
    expected = refine_heatmaps(images, heatmaps, refinement=refinement)
    monkeypatch.setattr(refine, "REFINEMENT_KERNELS", TritonKernel("refinement", ("cpu",)))
    for _ in range(2):
        assert torch.equal(refine_heatmaps(images, heatmaps, refinement=refinement), expected)
    assert len(warnings_of(caplog)) == 1


@needs_triton
def test_relevance_goes_on_where_triton_raises(monkeypatch, caplog):
    gradients, values = torch.rand(3, 2, 5, 16).half(), torch.rand(1, 2, 7, 16).half()
    case = (gradients, values, torch.zeros(3, dtype=torch.int64), 2**20)
    expected = kernels.rectified_column_sums(*case)
    monkeypatch.setattr(kernels, "COLUMN_SUMS_KERNEL", TritonKernel("sums", ("cpu",)))
    for _ in range(2):
        assert torch.equal(kernels.rectified_column_sums(*case), expected)
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize(
    "heatmaps",
    [torch.rand(1, 9, 12, requires_grad=True), torch.rand(1, 0, 9, 12)],
    ids=["maps with gradient", "no maps"],
)
def test_what_only_torch_can_refine_does_not_reach_the_kernels(heatmaps, monkeypatch):
    kernel = TritonKernel("refinement", ("cpu",))
    monkeypatch.setattr(refine, "REFINEMENT_KERNELS", kernel)
    refinement = legrad.Refinement(iterations=2, dilations=(1, 2))
    refined = refine_heatmaps(torch.zeros(1, 3, 9, 12), heatmaps, refinement=refinement)
    assert refined.requires_grad == heatmaps.requires_grad
    assert kernel.failure is None
