"""MaskCLIP, SCLIP and NACLIP on tiny models, each against its formula on the model's own modules."""

import copy

import pytest
import torch
from torch.nn import functional as F

from legrad.errors import InputError
from legrad.families import describe_tower
from legrad.method.trace import trace_images
from legrad.quality.dense_baselines import DENSE_BASELINES, maskclip, naclip, neighbourhood, sclip
from tests.helpers.timm_models import tiny_timm_clip
from tests.helpers.tiny_models import GRID_HEIGHT, GRID_WIDTH, tiny_clip, tiny_images, unit_texts

GRID = (GRID_HEIGHT, GRID_WIDTH)
HEADS, HEAD_DIM = 4, 8
IMAGE_INDEX = torch.tensor([0, 2, 2, 1])
FAMILIES = {
    "clip": tiny_clip,
    "coca": lambda: tiny_clip(attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=6),
    "siglip": lambda: tiny_timm_clip("ViT-B-16-SigLIP"),
    "timm-vit": lambda: tiny_timm_clip("vit_medium_patch16_gap_256"),
    "eva": lambda: tiny_timm_clip("EVA02-B-16"),
    "eva, post-norm": lambda: tiny_timm_clip("EVA02-E-14"),
    "pe": lambda: tiny_timm_clip("PE-Core-B-16", attn_pool_num_heads=4),
    "relpos": lambda: tiny_timm_clip("vit_relpos_medium_patch16_cls_224"),
}


def grids_of(baseline, model, images, texts, index=IMAGE_INDEX):
    tower = describe_tower(model)
    return baseline(tower, trace_images(tower, images, 2, tower.own), texts, index)


def projections(block, tokens):
    """Queries, keys and values [batch, heads, tokens, head_dim] of a block of open_clip's transformer."""
    joint = block.ln_1(tokens) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
    return [part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in joint.chunk(3, dim=-1)]


def out(block, mixed):
    return block.attn.out_proj(mixed.transpose(1, 2).flatten(2))


def attention(rows, addition=0.0):
    return torch.softmax(rows @ rows.mT / HEAD_DIM**0.5 + addition, dim=-1)


def last_tokens(model, images, name):
    """What the last block of a CLIP gives in place of its output."""
    visual = model.visual
    *blocks, last = visual.transformer.resblocks
    tokens = visual._embeds(images)
    for block in blocks:
        tokens = block(tokens)
    queries, keys, values = projections(last, tokens)
    if name == "MaskCLIP":
        return out(last, values)
    if name == "NACLIP":
        return out(last, attention(keys, gaussian_by_hand()) @ values)
    attended = tokens + out(last, (attention(queries) + attention(keys)) @ values)
    return attended + last.mlp(last.ln_2(attended))


def gaussian_by_hand():
    """NACLIP's addition for a class token and the patches row by row."""
    places = [(row, column) for row in range(GRID_HEIGHT) for column in range(GRID_WIDTH)]
    addition = torch.zeros(1 + len(places), 1 + len(places), dtype=torch.float64)
    for i, (row, column) in enumerate(places):
        for j, (other_row, other_column) in enumerate(places):
            distance_squared = (row - other_row) ** 2 + (column - other_column) ** 2
            addition[1 + i, 1 + j] = torch.tensor(-distance_squared / 50).exp()
    return addition


@pytest.mark.parametrize("name", DENSE_BASELINES)
@pytest.mark.parametrize("pooling", [{}, {"pool_type": "avg", "final_ln_after_pool": True}])
def test_each_baseline_is_the_cosine_of_its_formula_on_a_clip(name, pooling):
    model = tiny_clip(**pooling).double()
    images, texts = tiny_images(3, dtype=torch.float64), unit_texts(4, dtype=torch.float64)
    tokens = last_tokens(model, images, name)[:, 1:]
    features = F.normalize(model.visual.ln_post(tokens) @ model.visual.proj, dim=-1)
    expected = torch.einsum("ptd,pd->pt", features[IMAGE_INDEX], texts).unflatten(-1, GRID)
    received = grids_of(DENSE_BASELINES[name], model, images, texts)
    torch.testing.assert_close(received, expected.float())


def test_in_siglip_each_patch_passes_the_pooler_alone():
    model = tiny_timm_clip("ViT-B-16-SigLIP").double()
    images = tiny_images(3, dtype=torch.float64)
    trunk = model.visual.trunk
    tokens = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images)))
    *blocks, last = trunk.blocks
    for block in blocks:
        tokens = block(tokens)
    values = last.attn.qkv(last.norm1(tokens)).chunk(3, dim=-1)[2]
    dense = trunk.norm(last.attn.proj(values))
    features = torch.stack(
        [trunk.attn_pool(dense[:, place : place + 1]) for place in range(dense.shape[1])], 1
    )
    features = F.normalize(model.visual.head(features), dim=-1)
    texts = F.normalize(torch.randn(4, features.shape[-1], dtype=torch.float64), dim=-1)
    expected = torch.einsum("ptd,pd->pt", features[IMAGE_INDEX], texts).unflatten(-1, GRID)
    torch.testing.assert_close(grids_of(maskclip, model, images, texts), expected.float())


@pytest.mark.parametrize("name", DENSE_BASELINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_every_baseline_and_a_batch_gives_what_its_images_give_alone(family, name):
    model, baseline = FAMILIES[family](), DENSE_BASELINES[name]
    images, generator = tiny_images(3), torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(4, describe_tower(model).embed_dim, generator=generator), dim=-1)
    batched = grids_of(baseline, model, images, texts)
    assert batched.shape == (4, *GRID)
    assert batched.abs().max() <= 1 + 1e-6
    assert batched[1].std() > 0
    assert not torch.allclose(batched[1], batched[2])
    for prompt, image in enumerate(IMAGE_INDEX.tolist()):
        alone = grids_of(baseline, model, images[image, None], texts[prompt, None], torch.tensor([0]))
        torch.testing.assert_close(batched[prompt], alone[0], rtol=1e-4, atol=1e-5)


def test_a_neighbour_adds_most_to_itself_less_with_the_distance_and_nothing_to_other_tokens():
    addition = neighbourhood(2, 3, 2)
    assert addition.shape == (8, 8)
    assert not addition[:2].any()
    assert not addition[:, :2].any()
    assert addition[2, 2] == 1
    assert addition[2, 3] == addition[2, 5] > addition[2, 6] > addition[2, 4]


@pytest.mark.parametrize("baseline", [maskclip, sclip, naclip])
def test_a_trace_of_one_block_is_refused(baseline):
    model = tiny_clip()
    tower = describe_tower(model)
    trace = trace_images(tower, tiny_images(), 1, tower.own)
    with pytest.raises(InputError, match="the last 2 blocks, received block 2"):
        baseline(tower, trace, unit_texts(1), torch.tensor([0]))


@pytest.mark.parametrize("name", DENSE_BASELINES)
def test_the_model_is_left_as_it_was(name):
    model = tiny_clip()
    before = copy.deepcopy(model.state_dict())
    grids = grids_of(DENSE_BASELINES[name], model, tiny_images(3), unit_texts(4))
    assert not grids.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
