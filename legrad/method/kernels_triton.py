"""Compute rectified column sums with one Triton kernel; imported only if a CUDA device runs it."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

PROGRAMS_PER_PROCESSOR = 4  # about enough to hide the latency of loads on one streaming multiprocessor


@triton.jit(do_not_specialize=["prompts", "heads_per_program"])
@no_type_check
def _rectified_column_sums_kernel(  # noqa: PLR0917
    gradients,
    values,
    image_index,
    sums,
    gradient_stride_prompt,
    gradient_stride_head,
    gradient_stride_query,
    gradient_stride_dim,
    value_stride_image,
    value_stride_head,
    value_stride_key,
    value_stride_dim,
    prompts,
    heads,
    queries,
    keys,
    heads_per_program,
    HEAD_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Sum one block of keys of one prompt over some of the heads; no two programs write to one address."""
    key_blocks = tl.cdiv(keys, KEY_BLOCK)
    prompt = (tl.program_id(0) // key_blocks).to(tl.int64)
    head_group = tl.program_id(1).to(tl.int64)
    first_head = head_group * heads_per_program
    head_count = tl.minimum(heads_per_program, heads - first_head)

    dims = tl.arange(0, PADDED_HEAD_DIM)
    key_rows = (tl.program_id(0) % key_blocks).to(tl.int64) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    query_columns = tl.arange(0, QUERY_BLOCK)
    image_values = values + tl.load(image_index + prompt).to(tl.int64) * value_stride_image
    value_block = image_values + key_rows[:, None] * value_stride_key + dims[None, :] * value_stride_dim
    value_mask = (key_rows < keys)[:, None] & (dims < HEAD_DIM)[None, :]
    gradient_block = gradients + prompt * gradient_stride_prompt + dims[:, None] * gradient_stride_dim

    total = tl.zeros([KEY_BLOCK], dtype=tl.float32)
    query_blocks = tl.cdiv(queries, QUERY_BLOCK)
    # One flat loop over heads and blocks of queries: the next head's loads overlap this head's product.
    for step in range(head_count * query_blocks):
        head = first_head + step // query_blocks
        query = (step % query_blocks) * QUERY_BLOCK + query_columns
        head_gradients = gradient_block + head * gradient_stride_head
        value = tl.load(value_block + head * value_stride_head, mask=value_mask, other=0.0)
        gradient = tl.load(
            head_gradients + query.to(tl.int64)[None, :] * gradient_stride_query,
            mask=(dims < HEAD_DIM)[:, None] & (query < queries)[None, :],
            other=0.0,
        )
        if INTERPRETED:  # Triton's interpreter cannot multiply bfloat16
            value, gradient = value.to(tl.float32), gradient.to(tl.float32)
        product = tl.dot(value, gradient, input_precision="ieee")
        # Propagate NaN, as torch's relu does and the hardware's maximum does not.
        total += tl.sum(tl.maximum(product, 0.0, propagate_nan=tl.PropagateNan.ALL), axis=1)
    tl.store(sums + (head_group * prompts + prompt) * keys + key_rows, total, mask=key_rows < keys)


def rectified_column_sums(
    gradients: Float[Tensor, "prompts heads queries head_dim"],
    values: Float[Tensor, "images heads keys head_dim"],
    image_index: Int[Tensor, " prompts"],
    *,
    query_block: int | None = None,
    key_block: int = 64,
    warps: int = 4,
    stages: int | None = None,
) -> Float[Tensor, "prompts keys"]:
    """Sum relu(gradients @ values^T) over heads and queries in one kernel; the product is never stored.

    Args:
        gradients: float16, bfloat16 or float32, of any strides.
        values: of the same dtype, of any strides.
        image_index: for each prompt, the row of its image in `values`; not checked.
        query_block: largest number of queries in one product; a power of two, at least 16. None: as many as
            fit into registers.
        key_block: number of keys of one program; a power of two, at least 16.
        warps: warps of one program.
        stages: loads in flight. None: as many as fit into registers.

    Returns:
        float32. The order of summation depends only on shapes and device.
    """
    prompts, heads, queries, head_dim = gradients.shape
    keys = values.shape[2]
    # In float32 the operands are in registers; larger blocks would spill.
    is_wide = gradients.dtype == torch.float32
    query_block, stages = query_block or (32 if is_wide else 64), stages or (2 if is_wide else 3)
    programs = prompts * triton.cdiv(keys, key_block)
    heads_per_program = _heads_per_program(heads, programs, gradients.device)
    head_groups = triton.cdiv(heads, heads_per_program)
    sums = torch.empty(head_groups, prompts, keys, dtype=torch.float32, device=gradients.device)
    _rectified_column_sums_kernel[(programs, head_groups)](
        gradients,
        values,
        image_index,
        sums,
        *gradients.stride(),
        *values.stride(),
        prompts,
        heads,
        queries,
        keys,
        heads_per_program,
        HEAD_DIM=head_dim,
        PADDED_HEAD_DIM=max(16, triton.next_power_of_2(head_dim)),
        QUERY_BLOCK=min(query_block, max(16, triton.next_power_of_2(queries))),
        KEY_BLOCK=key_block,
        INTERPRETED=gradients.device.type != "cuda",
        num_warps=warps,
        num_stages=stages,
    )
    return sums[0] if head_groups == 1 else sums.sum(dim=0)


def _heads_per_program(heads: int, programs: int, device: torch.device) -> int:
    """Split heads among programs, so that few prompts still occupy every processor."""
    if device.type != "cuda":  # Triton's interpreter
        return max(1, heads // 2)
    wanted = PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    groups = min(heads, max(1, wanted // programs))
    return -(-heads // groups)
