"""LeGrad in closed form: relevance of every patch for every prompt, from one forward pass.

Notation, as in the paper: a block maps tokens x to y = x + W_o concat_h(A_h V_h) + b_o and z = y +
MLP(norm(y)); the layer's score for a prompt t is s = <unit(head(mean(z))), t>. With g = ds / d(concat_h A_h
V_h),

    ds/dA_h[i, j] = <g_h[i], V_h[j]>,      relevance[j] = 1/(heads * queries) sum_h sum_i relu(ds/dA_h[i, j]),

so neither an attention matrix nor a graph is ever kept: g needs the block's tail and the head alone.

Source: Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation
Sensitivity", https://arxiv.org/abs/2404.03214, section 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from legrad.towers import Block, Head, Tower
from legrad.trace import LayerTrace, Trace

# Bounds the temporaries of one step, so that prompts times tokens squared never lies in memory at once.
MEMORY_BUDGET_BYTES = 128 * 2**20


@torch.no_grad()
def relevance_grids(
    tower: Tower,
    trace: Trace,
    unit_text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
    *,
    pooled_tokens: slice,
    memory_budget_bytes: int = MEMORY_BUDGET_BYTES,
) -> Float[Tensor, "layers prompts grid_height grid_width"]:
    """Compute raw relevance for ragged prompts: each prompt belongs to one image of the trace.

    Args:
        tower: description of the tower that made the trace.
        trace: the encoded images.
        unit_text_embeddings: one unit row for each prompt, in float32 or finer.
        image_index: for each prompt, the row of its image in the trace.
        pooled_tokens: the tokens whose mean the score looks at.
        memory_budget_bytes: bound on the temporaries of one step; one prompt's tail is the least taken.

    Returns:
        Relevance, at least zero, unnormalised; layers from first to last explained. float32 (float64 for a
        float64 model), whatever the precision of the model.
    """
    with torch.autocast(image_index.device.type, enabled=False):
        layers = [
            _layer_relevance(
                tower,
                layer,
                unit_text_embeddings,
                image_index,
                pooled_tokens=pooled_tokens,
                memory_budget_bytes=memory_budget_bytes,
            )
            for layer in trace.layers
        ]
    return torch.unflatten(torch.stack(layers), -1, (trace.grid_height, trace.grid_width))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over many terms are kept: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class _Tail:
    """What follows a block's attention, as far as it depends on the images alone.

    Attributes:
        block: the block.
        derivatives: of the MLP's activation, at each pooled token.
        normed: pooled tokens before the MLP, standardised as its norm does.
        inverse_std: 1 / std of those tokens.
    """

    block: Block
    derivatives: Float[Tensor, "batch queries hidden"]
    normed: Float[Tensor, "batch queries width"]
    inverse_std: Float[Tensor, "batch queries 1"]


def _layer_relevance(
    tower: Tower,
    layer: LayerTrace,
    unit_text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
    *,
    pooled_tokens: slice,
    memory_budget_bytes: int,
) -> Float[Tensor, "prompts patches"]:
    pooled = layer.outputs[:, pooled_tokens]
    token_gradients = head_gradient(tower.head, pooled, unit_text_embeddings, image_index) / pooled.shape[1]
    # Gradients are tiny, and all that follows is linear in their scale: half precision would lose them.
    smallest = torch.finfo(token_gradients.dtype).tiny
    scales = token_gradients.abs().amax(dim=-1, keepdim=True).clamp(min=smallest)
    scaled_gradients = (token_gradients / scales).to(layer.values.dtype)

    tail = _tail(tower.blocks[layer.index], layer, pooled_tokens)
    patch_values = layer.values[:, :, tower.prefix_tokens :]
    heads, queries, patches = layer.values.shape[1], layer.values.shape[2], patch_values.shape[2]
    relevance = scales.new_empty(len(image_index), patches)
    for chunk in _prompt_chunks(len(image_index), tail, memory_budget_bytes):
        context_gradients = _context_gradients(tail, scaled_gradients[chunk], image_index[chunk])
        values = patch_values[image_index[chunk]]
        relevance[chunk] = rectified_column_sums(context_gradients, values, memory_budget_bytes)
    return relevance * scales / (heads * queries)


def _tail(block: Block, layer: LayerTrace, pooled_tokens: slice) -> _Tail:
    attended = layer.attended[:, pooled_tokens]
    normed, inverse_std = standardise(attended.to(accumulation_dtype(attended.dtype)), block.mlp_norm)
    derivatives = activation_derivative(block.activation, layer.hidden[:, pooled_tokens])
    return _Tail(block, derivatives, normed, inverse_std)


def _prompt_chunks(prompts: int, tail: _Tail, memory_budget_bytes: int) -> Iterator[slice]:
    """Cut the prompts so that the tail's temporaries, two hidden layers for each, fit the budget."""
    _, queries, hidden = tail.derivatives.shape
    bytes_per_prompt = 2 * queries * hidden * tail.derivatives.element_size()
    step = max(1, memory_budget_bytes // bytes_per_prompt)
    return (slice(start, start + step) for start in range(0, prompts, step))


def head_gradient(
    head: Head,
    pooled: Float[Tensor, "batch pooled width"],
    unit_text_embeddings: Float[Tensor, "prompts embed_dim"],
    image_index: Int[Tensor, " prompts"],
) -> Float[Tensor, "prompts width"]:
    """Differentiate the score <unit(head(mean of pooled tokens)), text> by that mean."""
    dtype = unit_text_embeddings.dtype
    mean = pooled.mean(dim=1, dtype=dtype)
    projection = head.projection().to(dtype)
    normed, inverse_std = standardise(mean, head.norm)
    features = (normed * head.norm.weight.to(dtype) + head.norm.bias.to(dtype)) @ projection
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    unit = (features / lengths)[image_index]
    cosine = (unit * unit_text_embeddings).sum(dim=-1, keepdim=True)
    feature_gradient = (unit_text_embeddings - cosine * unit) / lengths[image_index]
    return layer_norm_backward(
        feature_gradient @ projection.T, head.norm, normed[image_index], inverse_std[image_index]
    )


def _context_gradients(
    tail: _Tail, output_gradients: Float[Tensor, "prompts width"], image_index: Int[Tensor, " prompts"]
) -> Float[Tensor, "prompts heads queries head_dim"]:
    """Carry ds/dz, one vector for all pooled tokens of a prompt, back to g, the gradient by A_h V_h."""
    block, dtype = tail.block, tail.normed.dtype
    hidden_gradients = scale_backward(block.mlp_scale, output_gradients) @ block.mlp_out.weight
    normed_gradients = tail.derivatives[image_index].mul_(hidden_gradients[:, None]) @ block.mlp_in.weight
    through_mlp = layer_norm_backward(
        normed_gradients.to(dtype), block.mlp_norm, tail.normed[image_index], tail.inverse_std[image_index]
    )
    attended_gradients = (through_mlp + output_gradients[:, None]).to(output_gradients.dtype)
    gradients = scale_backward(block.attention_scale, attended_gradients) @ block.attention.out_proj.weight
    return torch.unflatten(gradients, -1, (block.attention.num_heads, -1)).transpose(1, 2)


def rectified_column_sums(
    gradients: Float[Tensor, "prompts heads queries head_dim"],
    values: Float[Tensor, "prompts heads keys head_dim"],
    memory_budget_bytes: int,
) -> Float[Tensor, "prompts keys"]:
    """Sum relu(gradients @ values^T) over heads and queries, holding no more of it than the budget allows."""
    dtype = accumulation_dtype(gradients.dtype)
    flat_gradients, flat_values = gradients.flatten(0, 1), values.flatten(0, 1)
    bytes_per_query = values.shape[2] * values.element_size()
    queries_per_step = min(gradients.shape[2], max(1, memory_budget_bytes // bytes_per_query))
    heads_per_step = max(1, memory_budget_bytes // (bytes_per_query * queries_per_step))
    sums = torch.zeros(flat_values.shape[:2], dtype=dtype, device=values.device)
    for head in range(0, len(flat_values), heads_per_step):
        rows = slice(head, head + heads_per_step)
        keys = flat_values[rows].transpose(1, 2)
        for queries in torch.split(flat_gradients[rows], queries_per_step, dim=1):
            sums[rows] += torch.bmm(queries, keys).relu_().sum(dim=1, dtype=dtype)
    return torch.unflatten(sums, 0, values.shape[:2]).sum(dim=1)


def activation_derivative(activation: nn.Module, inputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Differentiate an elementwise activation at each input."""
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors made in inference mode cannot be differentiated by, copies of them can.
        leaf = (inputs.clone() if inputs.is_inference() else inputs.detach()).requires_grad_()
        outputs = activation(leaf * 1 if getattr(activation, "inplace", False) else leaf)
        (derivative,) = torch.autograd.grad(outputs, leaf, torch.ones_like(outputs))
    return derivative


def standardise(
    inputs: Float[Tensor, "*rows width"], norm: nn.LayerNorm
) -> tuple[Float[Tensor, "*rows width"], Float[Tensor, "*rows 1"]]:
    """Return (inputs - mean) / std as the norm computes them, and 1 / std."""
    centred = inputs - inputs.mean(dim=-1, keepdim=True)
    inverse_std = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + norm.eps)
    return centred * inverse_std, inverse_std


def layer_norm_backward(
    output_gradients: Float[Tensor, "*rows width"],
    norm: nn.LayerNorm,
    normed: Float[Tensor, "*rows width"],
    inverse_std: Float[Tensor, "*rows 1"],
) -> Float[Tensor, "*rows width"]:
    """Carry a gradient back through a LayerNorm, given its standardised inputs."""
    gradients = output_gradients * norm.weight.to(output_gradients.dtype)
    projection = (gradients * normed).mean(dim=-1, keepdim=True)
    return (gradients - gradients.mean(dim=-1, keepdim=True) - normed * projection) * inverse_std


def scale_backward(scale: nn.Module, gradients: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """Carry a gradient back through a LayerScale or the identity."""
    gamma = getattr(scale, "gamma", None)
    return gradients if gamma is None else gradients * gamma.to(gradients.dtype)
