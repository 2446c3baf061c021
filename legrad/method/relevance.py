"""Compute LeGrad in closed form: relevance of every patch for every prompt, from one forward pass.

Notation, as in the paper: a block maps tokens x to y = x + W_o concat_h(A_h V_h) + b_o and z = y +
MLP(norm(y)); the layer's score for a prompt t is s = <unit(head(mean(z))), t>. With g = ds / d(concat_h A_h
V_h),

    ds/dA_h[i, j] = <g_h[i], V_h[j]>,    relevance[j] = 1/(heads * queries) sum_h sum_i relu(ds/dA_h[i, j]),

so neither attention matrices nor an autograd graph are stored: g only needs the part of the block after the
attention, and the head. If the tower pools by attention, A and V are those of the pooler, with one query.

Source: Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation
Sensitivity", https://arxiv.org/abs/2404.03214, section 3.
"""

from collections.abc import Iterator
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from legrad.method.kernels import rectified_column_sums
from legrad.method.stages import Pullback, Rows, pull_back, run_stages
from legrad.method.towers import Block, Scoring, Tower
from legrad.method.trace import LayerTrace, Trace

# Bound on the temporaries of one step, so that prompts x tokens x tokens is never in memory at once. A CPU is
# fastest if they fit into its last-level cache, a device with few large steps.
CPU_MEMORY_BUDGET_BYTES = 32 * 2**20
DEVICE_MEMORY_BUDGET_BYTES = 512 * 2**20
EVERY = slice(None)


@torch.no_grad()
def relevance_grids(
    tower: Tower,
    trace: Trace,
    unit_text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
    *,
    scoring: Scoring,
    one_by_one: bool = False,
    one_image_at_a_time: bool | None = None,
    memory_budget_bytes: int | None = None,
) -> Float[Tensor, "layers prompts grid_height grid_width"]:
    """Compute raw relevance for ragged prompts: each prompt belongs to one image of the trace.

    Args:
        tower: description of the tower that made the trace.
        trace: the encoded images.
        unit_text_embeddings: one unit row for each prompt, in float32 or finer.
        image_index: for each prompt, the row of its image in the trace.
        scoring: how a layer is scored; must be the one that the trace was made for.
        one_by_one: whether prompt i belongs to image i, for every image.
        one_image_at_a_time: process one image after the other, so that data shared by its prompts stays in
            the processor's cache and is not copied. None: True on a CPU.
        memory_budget_bytes: bound on the temporaries of one step, but at least those of one prompt. None:
            a default for the device.

    Returns:
        Relevance, at least zero, unnormalised; layers from first to last explained. float32 (float64 for a
        float64 model), at any precision of the model.
    """
    device_type = image_index.device.type
    if one_image_at_a_time is None:
        one_image_at_a_time = device_type == "cpu"
    if memory_budget_bytes is None:
        memory_budget_bytes = CPU_MEMORY_BUDGET_BYTES if device_type == "cpu" else DEVICE_MEMORY_BUDGET_BYTES
    with torch.autocast(device_type, enabled=False):
        layers = [
            _layer_relevance(
                tower,
                layer,
                unit_text_embeddings,
                image_index,
                scoring=scoring,
                one_by_one=one_by_one,
                one_image_at_a_time=one_image_at_a_time,
                memory_budget_bytes=memory_budget_bytes,
            )
            for layer in trace.layers
        ]
    grids: Tensor = torch.unflatten(torch.stack(layers), -1, (trace.grid_height, trace.grid_width))
    return grids


def _layer_relevance(
    tower: Tower,
    layer: LayerTrace,
    unit_text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
    *,
    scoring: Scoring,
    one_by_one: bool,
    one_image_at_a_time: bool,
    memory_budget_bytes: int,
) -> Float[Tensor, "prompts patches"]:
    every_row = EVERY if one_by_one else image_index
    pooled_gradients, pull_to_tokens = _score_gradients(scoring, layer, unit_text_embeddings, every_row)
    # Gradients are tiny and would underflow in half precision; everything that follows is linear in them.
    smallest = torch.finfo(pooled_gradients.dtype).tiny
    scales = pooled_gradients.abs().amax(dim=-1, keepdim=True).clamp(min=smallest)
    scaled_gradients = pooled_gradients / scales

    block = scoring.pooler or tower.blocks[layer.index]
    patch_values = layer.values[:, :, tower.prefix_tokens :]
    heads, queries, patches = layer.values.shape[1], layer.outputs.shape[1], patch_values.shape[2]
    prompts_per_step = _prompts_per_step(layer, scoring.pooled_tokens, memory_budget_bytes)
    relevance = scales.new_empty(len(image_index), patches)
    together = one_by_one or not one_image_at_a_time
    every_prompt = [(EVERY, slice(0, len(image_index)))]
    for images, prompts in every_prompt if together else _images_with_prompts(image_index):
        pull_to_context = _context_pullback(block, layer, images, scoring.pooled_tokens)
        for chunk in _chunks(prompts, prompts_per_step):
            rows = chunk if one_by_one else image_index[chunk]
            tail_rows = rows if images == EVERY else EVERY
            gradients = pull_to_context(pull_to_tokens(scaled_gradients[chunk], rows), tail_rows)
            context_gradients = torch.unflatten(gradients, -1, (heads, -1)).transpose(1, 2)
            relevance[chunk] = rectified_column_sums(
                context_gradients, patch_values, image_index[chunk], memory_budget_bytes
            )
    return relevance * scales[:, 0] / (heads * queries)


def _images_with_prompts(image_index: Int[Tensor, " prompts"]) -> Iterator[tuple[slice, slice]]:
    """Yield each run of consecutive prompts of one image, with that image."""
    images, counts = (column.tolist() for column in torch.unique_consecutive(image_index, return_counts=True))
    ends = accumulate(counts)
    for image, count, end in zip(images, counts, ends, strict=True):
        yield slice(image, image + 1), slice(end - count, end)


def _chunks(prompts: slice, step: int) -> Iterator[slice]:
    starts = range(prompts.start, prompts.stop, step)
    return (slice(start, min(start + step, prompts.stop)) for start in starts)


def _score_gradients(
    scoring: Scoring,
    layer: LayerTrace,
    unit_text_embeddings: Float[Tensor, "prompts embed_dim"],
    rows: Rows,
) -> tuple[Float[Tensor, "prompts 1 width"], Pullback]:
    """Differentiate each prompt's score with respect to the mean of the pooled tokens.

    Returns:
        The gradients with respect to the mean, divided by the number of averaged tokens, and the pullback
        from there to the block's output tokens: [prompts, 1, width] if all of them share one gradient.
    """
    dtype = unit_text_embeddings.dtype
    tokens = layer.outputs[:, scoring.pooled_tokens]
    if scoring.token_stages:
        tokens = tokens.to(dtype)
    normed, token_inputs = run_stages(scoring.token_stages, tokens)
    mean = normed.mean(dim=1, keepdim=True, dtype=dtype)
    features, head_inputs = run_stages(scoring.head, mean)
    feature_gradients = _feature_gradients(features[:, 0], unit_text_embeddings, rows, scoring.is_unit)
    pull_to_mean = pull_back(scoring.head, head_inputs, dtype)
    gradients = pull_to_mean(feature_gradients[:, None], rows) / tokens.shape[1]
    return gradients, pull_back(scoring.token_stages, token_inputs, dtype)


def _feature_gradients(
    features: Float[Tensor, "batch embed_dim"],
    unit_text_embeddings: Float[Tensor, "prompts embed_dim"],
    rows: Rows,
    is_unit: bool,
) -> Float[Tensor, "prompts embed_dim"]:
    """Differentiate <unit(feature), text>, or <feature, text>, with respect to the feature."""
    if not is_unit:
        return unit_text_embeddings
    smallest = torch.finfo(features.dtype).tiny
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp(min=smallest)
    unit = (features / lengths)[rows]
    cosine = (unit * unit_text_embeddings).sum(dim=-1, keepdim=True)
    gradients: Tensor = (unit_text_embeddings - cosine * unit) / lengths[rows]
    return gradients


def _context_pullback(block: Block, layer: LayerTrace, images: slice, pooled_tokens: slice) -> Pullback:
    """Linearise a block from z back to concat_h(A_h V_h), at the pooled tokens."""
    dtype = layer.values.dtype
    pull_mlp = pull_back(block.mlp, _selected(layer.mlp_inputs, images, pooled_tokens), dtype)
    pull_out = pull_back(block.out, _selected(layer.out_inputs, images, pooled_tokens), dtype)

    def pull(gradients: Tensor, rows: Rows) -> Tensor:
        through_residual = gradients.to(dtype)
        attended = through_residual
        if block.mlp:
            attended = (pull_mlp(through_residual, rows) + through_residual).to(dtype)
        return pull_out(attended, rows).to(dtype)

    return pull


def _selected(
    stage_inputs: tuple[Tensor | None, ...], images: slice, tokens: slice
) -> tuple[Tensor | None, ...]:
    return tuple(None if inputs is None else inputs[images, tokens] for inputs in stage_inputs)


def _prompts_per_step(layer: LayerTrace, pooled_tokens: slice, memory_budget_bytes: int) -> int:
    """Return how many prompts fit the budget, if each needs two temporaries of the widest stage input."""
    kept = [inputs for inputs in (*layer.out_inputs, *layer.mlp_inputs) if inputs is not None]
    widest = max((inputs.shape[-1] for inputs in kept), default=layer.outputs.shape[-1])
    queries = layer.outputs[:, pooled_tokens].shape[1]
    bytes_per_prompt = 2 * queries * widest * layer.outputs.element_size()
    return max(1, memory_budget_bytes // bytes_per_prompt)
