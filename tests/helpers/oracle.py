"""LeGrad by plain autograd on attention matrices that are spelled out; shares no code with the package."""

import math

import torch
from torch import Tensor, nn


def oracle_relevance(
    model: nn.Module, images: Tensor, texts: Tensor, layers: int, pool: str = "reference"
) -> Tensor:
    """Relevance [layers, batch, prompts, patches] for unit texts; images of native size."""
    visual = model.visual
    tokens = visual._embeds(images)
    maps = []
    for index, block in enumerate(visual.transformer.resblocks):
        tokens, attention = _block(block, tokens)
        if index >= len(visual.transformer.resblocks) - layers:
            scores = _scores(visual, tokens, texts, pool)
            maps.append(torch.stack([_rectified(score, attention) for score in scores.unbind(dim=1)], dim=1))
    return torch.stack(maps)


def _block(block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    attention = block.attn
    batch, count, width = tokens.shape
    joint = block.ln_1(tokens) @ attention.in_proj_weight.T + attention.in_proj_bias
    queries, keys, values = (
        part.reshape(batch, count, attention.num_heads, -1).transpose(1, 2) for part in joint.chunk(3, dim=-1)
    )
    matrix = torch.softmax(queries @ keys.mT / math.sqrt(queries.shape[-1]), dim=-1)
    context = (matrix @ values).transpose(1, 2).reshape(batch, count, width)
    attended = tokens + block.ls_1(context @ attention.out_proj.weight.T + attention.out_proj.bias)
    return attended + block.ls_2(block.mlp(block.ln_2(attended))), matrix


def _scores(visual: nn.Module, tokens: Tensor, texts: Tensor, pool: str) -> Tensor:
    pooled = visual.ln_post(tokens.mean(dim=1)) if pool == "reference" else visual._pool(tokens)[0]
    features = nn.functional.normalize(pooled @ visual.proj, dim=-1)
    return torch.einsum("bd,bpd->bp", features, texts)


def _rectified(scores: Tensor, attention: Tensor) -> Tensor:
    # Images do not mix, so the gradient of the batch's sum holds each image's own.
    (gradient,) = torch.autograd.grad(scores.sum(), attention, retain_graph=True)
    return gradient.relu().mean(dim=(1, 2))[:, 1:]
