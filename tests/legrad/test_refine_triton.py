"""The Triton kernels of refinement against torch: in Triton's interpreter, compiled for GPUs, and on a GPU.

The choice of interpreter is made as Triton is imported, so `CHECKS` run in a process of their own; on a GPU
they run here.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from legrad import Refinement, refine_heatmaps
from legrad.masks import refine
from legrad.masks.refine import refined_maps_by_torch
from legrad.masks.refine_groups import OTHER_LAUNCHES, kernel_cost, map_groups
from legrad.triton_kernel import TritonKernel
from tests.legrad.test_kernels import needs_cuda, needs_triton
from tests.legrad.test_refine import scenes

SMALL = Refinement(iterations=2, dilations=(1, 2), sharpness=0.4)
MAX_BYTES = 2**28
# Between refined maps from 0 to 1: float16 rounds a weight by at most 5e-4 of itself, here up and there down.
TOLERANCE = 2e-4
RAGGED = torch.tensor([2, 0, 3, 2, 0, 2, 3, 2, 2])  # image 1 has no map; 2, 5 and 2 maps, out of order


def kernels(device, images, heatmaps, index, refinement, max_bytes=MAX_BYTES):
    from legrad.masks.refine_triton import refined_maps

    return refined_maps(images.to(device), heatmaps.to(device), index, refinement, max_bytes).cpu()


def assert_close_to_torch(device, images, heatmaps, index, refinement):
    expected = refined_maps_by_torch(images, heatmaps, index, refinement, MAX_BYTES)
    refined = kernels(device, images, heatmaps, index, refinement)
    assert refined.dtype == torch.float32
    torch.testing.assert_close(refined, expected, rtol=0, atol=TOLERANCE, equal_nan=True)


def check_frames_of_odd_sizes_and_smaller_than_a_dilation(device):
    for kernel in ("par", "pamr"):
        for height, width, dilations, iterations in [
            (9, 12, (1, 2), 1),
            (5, 7, (1, 2, 4), 3),
            (4, 3, (1, 6), 2),
            (1, 4, (2,), 3),
            (1, 1, (1,), 2),
            (23, 17, (4, 8, 16, 32), 8),
        ]:
            images, heatmaps = scenes(1, 4, 9, height, width)
            refinement = Refinement(kernel, iterations, dilations, position_weight=0.2)
            assert_close_to_torch(device, images, heatmaps, RAGGED, refinement)


def check_one_to_five_maps_of_each_image(device):
    for count in range(1, 6):
        images, heatmaps = scenes(2, 2, 2 * count)
        assert_close_to_torch(device, images, heatmaps, torch.arange(2).repeat_interleave(count), SMALL)


def check_pixels_of_any_dtype_and_order(device):
    images, heatmaps = scenes(3, 4, 9)
    channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    dtypes = (
        torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64,
    )  # fmt: skip
    for pixels in [channels_last, *(channels_last.to(dtype) for dtype in dtypes), images > 90]:
        for position_weight in (0.0, 0.01):
            refinement = replace(SMALL, position_weight=position_weight)
            assert_close_to_torch(device, pixels, heatmaps, RAGGED, refinement)


def check_normalised_pixels_and_any_number_of_channels(device):
    images, heatmaps = scenes(4, 4, 9)
    assert_close_to_torch(device, (images / 255 - 0.45) / 0.27, heatmaps, RAGGED, SMALL)
    assert_close_to_torch(device, images[:, :1], heatmaps, RAGGED, SMALL)
    assert_close_to_torch(device, torch.cat([images, images.flip(1)[:, :2]], dim=1), heatmaps, RAGGED, SMALL)


def check_maps_of_any_dtype_and_order(device):
    images, heatmaps = scenes(5, 4, 9)
    for maps in (heatmaps.half(), heatmaps.bfloat16(), heatmaps.double(), heatmaps.mT.contiguous().mT):
        assert_close_to_torch(device, images, maps, RAGGED, SMALL)
        assert_close_to_torch(device, images, maps, RAGGED.sort().values, SMALL)


def check_a_map_stays_within_its_range_and_a_constant_map_as_it_is(device):
    for kernel in ("par", "pamr"):
        images, heatmaps = scenes(6, 4, 9)
        heatmaps = heatmaps * 7 - 3
        for row, level in enumerate((0.0, 0.3, -1.7)):
            heatmaps[row] = level
        refined = kernels(device, images, heatmaps, RAGGED, replace(SMALL, kernel=kernel, iterations=5))
        assert torch.equal(refined[:3], heatmaps[:3])
        assert (refined.amin((1, 2)) >= heatmaps.amin((1, 2))).all()
        assert (refined.amax((1, 2)) <= heatmaps.amax((1, 2))).all()


def check_images_of_one_colour(device):
    flat = torch.full((1, 3, 9, 12), 128, dtype=torch.uint8)
    spot = flat.clone()
    spot[0, :, 4, 4] = 130
    for images in (flat, spot):
        _, heatmaps = scenes(7, 1, 1)
        assert_close_to_torch(device, images, heatmaps, torch.zeros(1, dtype=torch.int64), SMALL)


def check_a_map_that_is_not_finite_spoils_no_other(device):
    images, heatmaps = scenes(8, 4, 9)
    heatmaps[1, 4, 4] = math.nan
    assert_close_to_torch(device, images, heatmaps, RAGGED, SMALL)


def check_a_batch_equals_its_singles_however_much_memory_there_is(device):
    images, heatmaps = scenes(9, 4, 9)
    refined = kernels(device, images, heatmaps, RAGGED, SMALL)
    for max_bytes in (1, 10_000, 20_000):
        assert torch.equal(kernels(device, images, heatmaps, RAGGED, SMALL, max_bytes), refined)
    for row, image in enumerate(RAGGED.tolist()):
        single = kernels(device, images[image, None], heatmaps[row, None], torch.tensor([0]), SMALL)
        assert torch.equal(single[0], refined[row])


def check_refine_heatmaps_uses_the_kernels(device):
    images, heatmaps = scenes(10, 2, 6)
    kernel = TritonKernel("refinement", (device,))
    before, refine.REFINEMENT_KERNELS = refine.REFINEMENT_KERNELS, kernel
    try:
        by_image = refine_heatmaps(
            images.to(device), heatmaps.to(device).reshape(2, 3, 9, 12), refinement=SMALL
        )
    finally:
        refine.REFINEMENT_KERNELS = before
    assert kernel.failure is None
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.equal(by_image.cpu().flatten(0, 1), kernels(device, images, heatmaps, index, SMALL))


def check_kernels_are_launched_as_often_as_counted(device):
    from legrad.masks import refine_triton

    triton_kernels = (refine_triton._affinity_kernel, refine_triton._mean_kernel)
    launches = []
    for kernel in triton_kernels:
        kernel.add_pre_run_hook(lambda *arguments, **constants: launches.append(arguments))
    images, heatmaps = scenes(11, 4, 9)
    for max_bytes in (MAX_BYTES, 20_000):
        launches.clear()
        kernels(device, images, heatmaps, RAGGED.sort().values, SMALL, max_bytes)
        groups = map_groups(torch.bincount(RAGGED).tolist(), 16, 9 * 12, max_bytes)
        cost = kernel_cost(groups, 16, 9 * 12, SMALL.iterations, 3 * 9 * 12)
        assert len(launches) == cost.launches - OTHER_LAUNCHES * len(groups)
    for kernel in triton_kernels:
        kernel.pre_run_hooks.pop()


CHECKS = [
    check_kernels_are_launched_as_often_as_counted,
    check_frames_of_odd_sizes_and_smaller_than_a_dilation,
    check_one_to_five_maps_of_each_image,
    check_pixels_of_any_dtype_and_order,
    check_normalised_pixels_and_any_number_of_channels,
    check_maps_of_any_dtype_and_order,
    check_a_map_stays_within_its_range_and_a_constant_map_as_it_is,
    check_images_of_one_colour,
    check_a_map_that_is_not_finite_spoils_no_other,
    check_a_batch_equals_its_singles_however_much_memory_there_is,
    check_refine_heatmaps_uses_the_kernels,
]


INTERPRETED = """
import traceback
from tests.legrad.test_refine_triton import CHECKS
for check in CHECKS:
    try:
        check("cpu")
    except Exception:
        traceback.print_exc()
    else:
        print(check.__name__)
"""


def in_a_process(script, **variables):
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def interpreted():
    return in_a_process(INTERPRETED, TRITON_INTERPRET="1")


@pytest.mark.medium
@needs_triton
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_in_tritons_interpreter(check, interpreted):
    assert check.__name__ in interpreted.stdout.split(), interpreted.stderr[-4000:]


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_on_a_gpu(check):
    check("cuda")


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("kernel", ["par", "pamr"])
def test_a_step_of_64_images_on_a_gpu(kernel):
    images, heatmaps = scenes(11, 64, 96, 224, 224)
    index = torch.arange(96) // 2 % 64
    expected = refined_maps_by_torch(
        images.cuda(), heatmaps.cuda(), index, Refinement(kernel), MAX_BYTES
    ).cpu()
    refined = kernels("cuda", images, heatmaps, index, Refinement(kernel))
    torch.testing.assert_close(refined, expected, rtol=0, atol=TOLERANCE)


COMPILED = """
import pathlib, subprocess, tempfile
import torch
import triton
from triton.backends.compiler import GPUTarget
from legrad import Refinement
from legrad.masks import refine_triton


class CompilingDriver:
    # Names a GPU to compile for, without having one.

    def __init__(self, capability):
        self.get_current_device = lambda: capability
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)


def compile_only(kernel):
    launch = kernel.run
    kernel.run = lambda *operands, warmup, **rest: compiled.append(launch(*operands, warmup=True, **rest))


def resource_usage(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return subprocess.check_output(command, text=True)


compiled = []
compile_only(refine_triton._affinity_kernel)
compile_only(refine_triton._mean_kernel)
for capability in (80, 90):
    triton.runtime.driver.set_active(CompilingDriver(capability))
    for height, width, maps in [(224, 224, 4), (101, 33, 7)]:
        pixels = torch.zeros(4, height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        heatmaps, index = torch.zeros(maps, height, width), torch.arange(maps) % 4
        for kernel in ("par", "pamr"):
            refine_triton.refined_maps(pixels, heatmaps, index, Refinement(kernel), 2**28)
# Affinities of two kinds and two kinds of iterations, for two capabilities: frames of any size share them.
distinct = {id(kernel): kernel for kernel in compiled}
assert len(distinct) == 8, len(distinct)
for usage in map(resource_usage, distinct.values()):
    assert all(part in usage for part in ("STACK:0 ", "SHARED:0 ", "LOCAL:0 ")), usage
print("compiled")
"""


@pytest.mark.medium
@needs_triton
def test_the_kernels_compile_for_gpus_once_for_all_frames_and_keep_their_tiles_in_registers(tmp_path):
    finished = in_a_process(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
    assert finished.stdout.strip() == "compiled", finished.stderr[-2000:]
