"""Compute the sum over heads and queries of relu(g V^T), without storing that product for all prompts.

In half precision on a CUDA device with Triton it is one kernel (`legrad.method.kernels_triton`); otherwise
the product is computed piece by piece.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from legrad.triton_kernel import TritonKernel

# `legrad.method.kernels_triton` on CUDA devices, until it fails.
COLUMN_SUMS_KERNEL = TritonKernel("rectified column sums")
# In float32 the pieces are faster than the kernel, by half on an H100, whose tensor cores lack this product.
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
# Pieces that fit into the cache of a core, in memory that the allocator reuses, take half the time.
CPU_PIECE_BYTES_PER_THREAD = 2**20


def rectified_column_sums(
    gradients: Float[Tensor, "prompts heads queries head_dim"],
    values: Float[Tensor, "images heads keys head_dim"],
    image_index: Int[Tensor, " prompts"],
    memory_budget_bytes: int,
) -> Float[Tensor, "prompts keys"]:
    """Sum relu(gradients @ values^T) over heads and queries, each prompt with the values of its image.

    Args:
        gradients: g, of any strides.
        values: V, of the same dtype and on the same device.
        image_index: for each prompt, the row of its image in `values`; on the same device.
        memory_budget_bytes: bound on the memory for a piece of the product if the kernel is not used; a piece
            has at least one head and one key.

    Returns:
        Non-negative sums; float32, or float64 for float64.
    """

    def by_kernel() -> Float[Tensor, "prompts keys"]:
        from legrad.method import kernels_triton

        return kernels_triton.rectified_column_sums(gradients, values, image_index)

    def in_pieces() -> Float[Tensor, "prompts keys"]:
        return rectified_column_sums_in_pieces(gradients, values, image_index, memory_budget_bytes)

    is_for_kernel = gradients.dtype in KERNEL_DTYPES and gradients.numel()
    if is_for_kernel and COLUMN_SUMS_KERNEL.runs_on(gradients.device):
        return COLUMN_SUMS_KERNEL.run(gradients.device, by_kernel, in_pieces)
    return in_pieces()


def rectified_column_sums_in_pieces(
    gradients: Float[Tensor, "prompts heads queries head_dim"],
    values: Float[Tensor, "images heads keys head_dim"],
    image_index: Int[Tensor, " prompts"],
    memory_budget_bytes: int,
) -> Float[Tensor, "prompts keys"]:
    """Compute `rectified_column_sums` by batched products, on any device and in any floating-point dtype."""
    dtype = torch.promote_types(gradients.dtype, torch.float32)
    prompts, heads, queries, head_dim = gradients.shape
    keys = values.shape[2]
    sums = torch.zeros(prompts, keys, dtype=dtype, device=gradients.device)
    # Elements of the product, and of the values that are gathered for it.
    held = _piece_bytes(gradients.device, memory_budget_bytes) // gradients.element_size()
    key_step = _step(held, queries + head_dim, keys)
    head_step = _step(held, (queries + head_dim) * key_step, heads)
    prompt_step = _step(held, (queries + head_dim) * key_step * head_step, prompts)
    for first_prompt in range(0, prompts, prompt_step):
        rows = slice(first_prompt, first_prompt + prompt_step)
        for first_head in range(0, heads, head_step):
            some_heads = slice(first_head, first_head + head_step)
            columns = gradients[rows, some_heads].transpose(2, 3)
            for first_key in range(0, keys, key_step):
                some_keys = slice(first_key, first_key + key_step)
                some_values = values[:, some_heads, some_keys][image_index[rows]]
                product = (some_values @ columns).relu_()
                sums[rows, some_keys] += product.sum(dim=-1, dtype=dtype).sum(dim=1)
    return sums


def _step(held: int, elements_each: int, count: int) -> int:
    """Return how many of `count` fit into `held` elements, at least one."""
    return min(max(1, held // max(1, elements_each)), max(1, count))


def _piece_bytes(device: torch.device, memory_budget_bytes: int) -> int:
    if device.type != "cpu":
        return memory_budget_bytes
    return min(memory_budget_bytes, CPU_PIECE_BYTES_PER_THREAD * torch.get_num_threads())
