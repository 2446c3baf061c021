"""CoCa's attentional pooler, against plain autograd on an explicit attention matrix."""

import math

import pytest
import torch
from open_clip.model import convert_weights_to_lp
from torch import nn
from torch.nn import functional as F

import legrad
from tests.helpers.tiny_models import LAYERS, relative_error, tiny_clip, tiny_images, unit_texts

POOLER = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 6}


def _pooled(pooler, tokens):
    """The pooler's outputs for every query, and its attention matrix."""
    attention, heads = pooler.attn, pooler.attn.num_heads
    if attention.in_proj_weight is None:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    else:
        weights = attention.in_proj_weight.chunk(3)
    inputs = (pooler.ln_q(pooler.query).expand(len(tokens), -1, -1), *[pooler.ln_k(tokens)] * 2)
    queries, keys, values = (
        (part @ weight.T + bias).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part, weight, bias in zip(inputs, weights, attention.in_proj_bias.chunk(3), strict=True)
    )
    matrix = torch.softmax(queries @ keys.mT / math.sqrt(queries.shape[-1]), dim=-1)
    return attention.out_proj((matrix @ values).transpose(1, 2).flatten(2)), matrix


def _oracle(model, images, texts, pool):
    """Relevance [layers, batch, prompts, patches] of the first query, the one that is the feature."""
    visual, maps = model.visual, []
    tokens = visual._embeds(images)
    for block in visual.transformer.resblocks:
        tokens = block(tokens)
        outputs, matrix = _pooled(visual.attn_pool, tokens)
        if pool == "model":
            features = F.normalize(visual.ln_post(outputs)[:, 0] @ visual.proj, dim=-1)
        else:
            features = outputs[:, 0] @ visual.proj
        scores = torch.einsum("bd,bpd->bp", features, texts).sum(dim=0)
        gradients = [torch.autograd.grad(score, matrix, retain_graph=True)[0] for score in scores]
        maps.append(torch.stack([gradient[:, :, 0].relu().mean(dim=1) for gradient in gradients], dim=1))
    return torch.stack(maps)[..., 1:]


@pytest.mark.parametrize("width", [24, 32], ids=["joint projection", "projections apart"])
@pytest.mark.parametrize("pool", ["reference", "model"])
def test_features_and_every_layer_equal_the_models_own_forward_pass_with_autograd(pool, width):
    model = tiny_clip(**POOLER | {"width": width}).double()
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, 3, dtype=torch.float64)
    explainer = legrad.LeGrad(model, layers="all", pool=pool)
    trace = explainer.encode(images)
    torch.testing.assert_close(trace.image_features, model.encode_image(images, normalize=True))
    received = explainer.relevance(trace, texts, per_layer=True)
    assert received.shape[0] == LAYERS
    assert relative_error(received.flatten(-2), _oracle(model, images, texts, pool)) < 1e-10


@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.006)])
def test_half_precision_as_open_clip_sets_it_stays_near_single(dtype, tolerance, pool):
    model, single = tiny_clip(cast_dtype=dtype, **POOLER), tiny_clip(**POOLER)
    convert_weights_to_lp(model, dtype)
    assert model.visual.attn_pool.query.dtype == torch.float32
    images, texts = tiny_images(2), unit_texts(2, 3)
    expected = legrad.LeGrad(single, pool=pool).relevance(images, texts)
    received = legrad.LeGrad(model, pool=pool).relevance(images.to(dtype), texts)
    assert received.dtype == torch.float32
    assert relative_error(received, expected) < tolerance


def test_only_the_first_query_is_explained():
    model = tiny_clip(**POOLER)
    before = legrad.LeGrad(model).relevance(tiny_images(), unit_texts(2))
    nn.init.zeros_(model.visual.attn_pool.query.data[1:])
    torch.testing.assert_close(legrad.LeGrad(model).relevance(tiny_images(), unit_texts(2)), before)
