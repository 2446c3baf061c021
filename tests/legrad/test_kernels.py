"""The rectified column sums against plain einsum: in pieces, in Triton's interpreter and on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from legrad.method import kernels
from legrad.method.kernels import rectified_column_sums, rectified_column_sums_in_pieces

BUDGET_BYTES = 2**24
# prompts, images, heads, queries, keys, head_dim; each with something that no block size divides
SHAPES = [
    (1, 1, 1, 1, 1, 8),
    (3, 2, 3, 50, 49, 64),
    (7, 2, 2, 33, 65, 72),
    (1, 1, 2, 197, 66, 80),
    (2, 2, 1, 31, 129, 88),
    (2, 2, 2, 65, 17, 104),
    (2, 2, 5, 1, 70, 128),
    (30, 9, 1, 18, 19, 16),
]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_case(prompts, images, heads, queries, keys, head_dim, dtype=torch.float32, seed=0):
    """Gradients and values laid out as in the method, [tokens, heads * head_dim], so not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(prompts, queries, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    with_prefix = torch.randn(images, keys + 1, heads, head_dim, generator=generator).to(dtype)
    image_index = torch.randint(images, (prompts,), generator=generator)
    return gradients, with_prefix.transpose(1, 2)[:, :, 1:], image_index


def expected_sums(gradients, values, image_index):
    product = torch.einsum("phqd,phkd->phqk", gradients.double(), values.double()[image_index])
    return product.relu().sum(dim=(1, 2))


def relative_error(sums, expected):
    return float((sums.double() - expected).norm() / expected.norm().clamp(min=1e-300))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_in_pieces_equal_the_whole_product(shape, dtype):
    case = random_case(*shape, dtype)
    sums = rectified_column_sums(*case, BUDGET_BYTES)
    assert sums.dtype == torch.promote_types(dtype, torch.float32)
    # Half precision rounds each element of the product; the sum of many rounds no more.
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative_error(sums, expected_sums(*case)) < tolerance


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(*[st.integers(1, n) for n in (6, 3, 4, 40, 40, 20)]),
    budget=st.integers(1, 100_000),
    seed=st.integers(0, 99),
)
def test_no_budget_changes_the_sums(shape, budget, seed):
    case = random_case(*shape, torch.float64, seed)
    sums = rectified_column_sums_in_pieces(*case, budget)
    assert relative_error(sums, expected_sums(*case)) < 1e-12


@pytest.mark.parametrize(("prompts", "queries"), [(0, 5), (2, 0)])
def test_nothing_to_sum_gives_zeros(prompts, queries):
    gradients, values = torch.ones(prompts, 2, queries, 8), torch.ones(1, 2, 3, 8)
    image_index = torch.zeros(prompts, dtype=torch.int64)
    sums = rectified_column_sums(gradients, values, image_index, BUDGET_BYTES)
    assert torch.equal(sums, torch.zeros(prompts, 3))


def test_what_is_no_number_is_not_hidden():
    gradients, values, image_index = random_case(2, 1, 2, 5, 6, 8)
    gradients[1, 0, 2, 3] = torch.nan
    sums = rectified_column_sums(gradients, values, image_index, BUDGET_BYTES)
    assert sums[0].isfinite().all()
    assert sums[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_many_queries_are_kept_in_float32(dtype):
    # 4097 * 64 is beyond float16's range, and between two numbers of bfloat16.
    gradients, values = torch.ones(1, 1, 4097, 8, dtype=dtype), torch.full((1, 1, 3, 8), 8, dtype=dtype)
    sums = rectified_column_sums(gradients, values, torch.zeros(1, dtype=torch.int64), BUDGET_BYTES)
    assert torch.equal(sums, torch.full((1, 3), 4097.0 * 64))


INTERPRETED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_kernels import BUDGET_BYTES, SHAPES, expected_sums, random_case, relative_error
from legrad.method import kernels
case = random_case(*SHAPES[0])
kernels.rectified_column_sums(*case, BUDGET_BYTES)
assert "legrad.method.kernels_triton" not in sys.modules, "Triton is for devices alone"
from legrad.method.kernels_triton import rectified_column_sums

worst = {{}}
for shape in SHAPES:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        case = random_case(*shape, dtype)
        sums = rectified_column_sums(*case)
        assert sums.dtype == torch.float32 and sums.shape == (shape[0], shape[4])
        worst[str(dtype)] = max(worst.get(str(dtype), 0.0), relative_error(sums, expected_sums(*case)))
gradients, values, image_index = random_case(2, 1, 2, 5, 6, 8)
gradients[1, 0, 2, 3] = torch.nan
assert rectified_column_sums(gradients, values, image_index).isnan().any(dim=1).tolist() == [False, True]
assert max(worst.values()) < 1e-6, worst
print("interpreted")
"""


@needs_triton
def test_the_kernel_equals_the_whole_product_in_tritons_interpreter():
    # The choice of interpreter is made as Triton is imported: in a process of its own.
    finished = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout.strip() == "interpreted", finished.stderr[-2000:]


@pytest.mark.gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (64, 8, 12, 197, 196, 64), (2, 2, 16, 577, 576, 64)], ids=str)
def test_the_kernel_equals_the_whole_product_on_a_gpu(shape, dtype):
    case = [tensor.cuda() for tensor in random_case(*shape, dtype)]
    sums = rectified_column_sums(*case, BUDGET_BYTES)
    assert relative_error(sums, expected_sums(*case)) < 1e-5
    assert torch.equal(sums, rectified_column_sums(*case, BUDGET_BYTES))
    assert kernels.COLUMN_SUMS_KERNEL.failure is None
