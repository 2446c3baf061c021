"""The CLIPModel of Hugging Face transformers: against autograd, against open_clip, and what is refused."""

import copy
import pickle

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModel
from transformers.activations import GELUActivation

import legrad
from legrad.images import ImageTransform
from tests.helpers.hf_models import CONTEXT, SIDE, clip_processor, hf_relevance, tiny_hf_clip
from tests.helpers.tiny_models import (
    EMBED_DIM,
    LAYERS,
    PATCH,
    fill,
    relative_error,
    tiny_images,
    unit_texts,
)

SIZES = {"its own size": (SIDE, SIDE), "wider": (3 * PATCH, 5 * PATCH), "larger": (6 * PATCH, 6 * PATCH)}
ACTIVATIONS = ["quick_gelu", "gelu", "gelu_pytorch_tanh", "silu", "gelu_new"]
TEXTS = ["a cat", "A Dog", "", "a text that has more letters than fit"]


def _picture(height=30, width=40):
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def _inputs(size=(SIDE, SIDE), batch=2):
    return tiny_images(batch, size=size, dtype=torch.float64), unit_texts(batch, 3, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", ["reference", "model"])
def test_every_layer_equals_autograd_on_attention_that_is_spelled_out(pool, size):
    model = tiny_hf_clip().double()
    images, texts = _inputs(SIZES[size])
    explainer = legrad.LeGrad(model, layers="all", pool=pool)
    received = explainer.relevance(images, texts, per_layer=True).flatten(-2)
    expected = hf_relevance(model, images, texts, pool)
    assert max(relative_error(received[i], expected[i]) for i in range(LAYERS)) < 1e-12


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_its_configuration_equals_autograd(activation):
    model = tiny_hf_clip(hidden_act=activation).double()
    images, texts = _inputs()
    received = legrad.LeGrad(model, layers="all").relevance(images, texts, per_layer=True).flatten(-2)
    assert relative_error(received, hf_relevance(model, images, texts)) < 1e-12


def test_ragged_prompts_equal_those_of_each_image():
    model = tiny_hf_clip().double()
    images = _inputs(batch=3)[0]
    index = torch.tensor([2, 0, 2, 1])
    rows = unit_texts(4, dtype=torch.float64)
    received = legrad.LeGrad(model, layers=1).relevance(images, rows, index).flatten(-2)
    expected = hf_relevance(model, images, rows.expand(3, -1, -1))[-1]
    assert relative_error(received, expected[index, torch.arange(4)]) < 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_image_features_are_those_of_the_model_with_its_own_interpolation(size):
    model = tiny_hf_clip().double()
    images, _ = _inputs(SIZES[size])
    features = model.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    trace = legrad.LeGrad(model).encode(images)
    assert relative_error(trace.image_features, nn.functional.normalize(features, dim=-1)) < 1e-12


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_keeps_its_way_of_attention_and_all_else(attention):
    model = tiny_hf_clip().double().train()
    model.set_attn_implementation(attention)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, texts = _inputs()
    received = legrad.LeGrad(model).relevance(images, texts)
    assert relative_error(received, legrad.LeGrad(tiny_hf_clip().double()).relevance(images, texts)) < 1e-12
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == attention


def _from_open_clip(theirs: nn.Module) -> CLIPModel:
    """The same weights in a CLIPModel."""
    end = 63
    model = tiny_hf_clip(
        text={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "intermediate_size": 64,
            "hidden_act": "quick_gelu",
            "vocab_size": 64,
            "bos_token_id": 62,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        intermediate_size=128,
    ).double()
    with torch.no_grad():
        for tower, blocks in (
            (model.vision_model, theirs.visual.transformer.resblocks),
            (model.text_model, theirs.transformer.resblocks),
        ):
            for layer, block in zip(tower.encoder.layers, blocks, strict=True):
                _copy_block(layer, block)
        visual, embeddings = theirs.visual, model.vision_model.embeddings
        embeddings.class_embedding.copy_(visual.class_embedding)
        embeddings.patch_embedding.weight.copy_(visual.conv1.weight)
        embeddings.position_embedding.weight.copy_(visual.positional_embedding)
        model.vision_model.pre_layrnorm.load_state_dict(visual.ln_pre.state_dict())
        model.vision_model.post_layernorm.load_state_dict(visual.ln_post.state_dict())
        model.visual_projection.weight.copy_(visual.proj.T)
        model.text_model.embeddings.token_embedding.weight.copy_(theirs.token_embedding.weight)
        model.text_model.embeddings.position_embedding.weight.copy_(theirs.positional_embedding)
        model.text_model.final_layer_norm.load_state_dict(theirs.ln_final.state_dict())
        model.text_projection.weight.copy_(theirs.text_projection.T)
    return model


def _copy_block(layer, block):
    attention, weights, biases = (
        layer.self_attn,
        block.attn.in_proj_weight.chunk(3),
        block.attn.in_proj_bias.chunk(3),
    )
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        part.weight.copy_(weight)
        part.bias.copy_(bias)
    attention.out_proj.load_state_dict(block.attn.out_proj.state_dict())
    layer.layer_norm1.load_state_dict(block.ln_1.state_dict())
    layer.layer_norm2.load_state_dict(block.ln_2.state_dict())
    layer.mlp.fc1.load_state_dict(block.mlp.c_fc.state_dict())
    layer.mlp.fc2.load_state_dict(block.mlp.c_proj.state_dict())


def test_the_same_weights_in_open_clip_give_the_same_maps_and_texts():
    vision = {"layers": LAYERS, "width": 32, "head_width": 8, "patch_size": PATCH, "image_size": SIDE}
    text = {"context_length": CONTEXT, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    theirs = fill(open_clip.CLIP(EMBED_DIM, vision, text, quick_gelu=True)).double().eval()
    ours = _from_open_clip(theirs)
    images, texts = _inputs()
    explainers = [legrad.LeGrad(model, layers="all") for model in (ours, theirs)]
    maps, expected = (explainer.heatmaps(images, texts) for explainer in explainers)
    assert relative_error(maps, expected) < 1e-12
    tokens = torch.tensor([[62, 3, 5, 63, *[0] * 12], [62, *range(14), 63]])
    for explainer in explainers:
        explainer.tokenizer = lambda texts: tokens[: len(texts)]
    embeddings, expected = (explainer.embed_text(["first", "second"]) for explainer in explainers)
    assert relative_error(embeddings, expected) < 1e-12


def test_texts_are_embedded_as_the_model_and_its_processor_do():
    model, processor = tiny_hf_clip().double(), clip_processor()
    inputs = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    expected = nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
    explainer = legrad.LeGrad(model, processor=processor)
    assert relative_error(explainer.embed_text(TEXTS), expected) < 1e-12
    by_tokenizer = legrad.LeGrad(model, tokenizer=processor.tokenizer)
    assert relative_error(by_tokenizer.embed_text(TEXTS), expected) < 1e-12


def test_the_end_that_early_configurations_name_wrongly_is_the_highest_token():
    model, processor = tiny_hf_clip(text={"eos_token_id": 2}).double(), clip_processor()
    inputs = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    expected = nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
    assert relative_error(legrad.LeGrad(model, processor=processor).embed_text(TEXTS), expected) < 1e-12


def test_a_text_tower_with_hooks_gets_whole_contexts():
    model, processor = tiny_hf_clip(), clip_processor()
    lengths = []
    model.text_model.encoder.layers[0].register_forward_hook(
        lambda _module, _inputs, output: lengths.append(output.shape[1])
    )
    legrad.LeGrad(model, processor=processor).embed_text(["a"])
    assert lengths == [CONTEXT]


def test_images_are_prepared_by_the_settings_of_the_processor():
    images = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        resample=Image.Resampling.BILINEAR,
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
    )
    explainer = legrad.LeGrad(tiny_hf_clip(), processor=images)
    assert explainer.transform == ImageTransform(
        SIDE, SIDE, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", patch_size=PATCH
    )
    # Smooth, so that resampling whole levels or fractions of them gives nearly the same.
    rows, columns = np.mgrid[0:30, 0:40]
    picture = Image.fromarray(np.stack([4 * rows, 3 * columns, rows + columns], axis=-1).astype(np.uint8))
    received = explainer.preprocess([picture])
    expected = images(picture, return_tensors="pt")["pixel_values"]
    assert float((received - expected).abs().max()) < 2 / 255 / 0.4
    images.image_mean = [0.5, 0.5, 0.5]
    assert float((explainer.preprocess([picture]) - received).abs().max()) > 0.1
    assert explainer.transform.mean == (0.5, 0.5, 0.5)


def test_without_processor_images_are_prepared_as_for_openais_models():
    transform = legrad.LeGrad(tiny_hf_clip()).transform
    assert (transform.height, transform.width, transform.interpolation) == (SIDE, SIDE, "bicubic")
    assert transform.mean == open_clip.constants.OPENAI_DATASET_MEAN
    assert transform.std == open_clip.constants.OPENAI_DATASET_STD


@pytest.mark.parametrize(
    "change, mean, std",
    [
        ({"do_normalize": False}, 0.0, 1.0),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, 0.5, 0.2),
        ({"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}, 0.5, 0.25),
    ],
)
def test_values_are_scaled_as_the_processor_says(change, mean, std):
    transform = legrad.LeGrad(tiny_hf_clip(), processor=CLIPImageProcessor(**change)).transform
    assert transform.mean == pytest.approx((mean,) * 3)
    assert transform.std == pytest.approx((std,) * 3)


@pytest.mark.parametrize(
    "processor, said",
    [
        (CLIPImageProcessor(resample=Image.Resampling.LANCZOS), "resamples by lanczos; expected bicubic"),
        (clip_processor().tokenizer, "expected the model's processor or image processor, received a CLIPTok"),
    ],
)
def test_a_processor_that_does_not_say_how_is_refused(processor, said):
    with pytest.raises(legrad.InputError, match=said):
        legrad.LeGrad(tiny_hf_clip(), processor=processor)


def test_one_image_is_explained_from_picture_and_texts():
    explainer = legrad.LeGrad(tiny_hf_clip(), processor=clip_processor())
    explanation = legrad.explain_image(explainer, _picture(), ["a cat", "a dog"])
    assert explanation.heatmaps.shape == (2, SIDE, SIDE)
    images = explainer.preprocess([_picture(), _picture(20, 20)])
    trace, texts = explainer.encode(images), explainer.embed_text(["a", "b", "c"])
    assert explainer.similarity(trace, texts).shape == (2, 3)
    assert explainer.heatmaps(trace, texts).shape == (2, 3, SIDE, SIDE)
    kept = legrad.LeGrad(tiny_hf_clip(), processor=clip_processor(), fit="keep")
    assert kept.preprocess([_picture()]).shape == (1, 3, 12, 20)


def test_a_copy_of_an_explainer_explains_the_copied_model():
    explainer = legrad.LeGrad(tiny_hf_clip(), processor=clip_processor())
    images, texts = tiny_images(size=(SIDE, SIDE)), unit_texts(3)
    expected = explainer.relevance(images, texts)
    for other in (copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
        assert torch.equal(other.relevance(images, texts), expected)
        assert torch.equal(other.embed_text(TEXTS), explainer.embed_text(TEXTS))


def test_hooks_by_which_transformers_keeps_hidden_states_change_nothing():
    model = tiny_hf_clip()
    images, texts = tiny_images(size=(SIDE, SIDE)), unit_texts(3)
    explainer = legrad.LeGrad(model)
    expected = explainer.relevance(images, texts)
    model.vision_model(images, output_hidden_states=True)
    assert torch.equal(explainer.relevance(images, texts), expected)
    assert torch.equal(legrad.LeGrad(model).relevance(images, texts), expected)


class _OtherModel(CLIPModel):
    """A subclass, which may compute something else."""


class _OtherLinear(nn.Linear):
    """A subclass, which may compute something else."""


class _OtherConv2d(nn.Conv2d):
    """A subclass, which may compute something else."""


def _replaced(path, module):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)

    return change


def _hooked(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda _m, _i, output: output * 2)


REFUSED = {
    "subclass": (
        lambda model: setattr(model, "__class__", _OtherModel),
        ["_OtherModel", "not a subclass", "CLIPModel.from_pretrained"],
    ),
    "replaced method": (
        lambda model: setattr(model, "get_image_features", lambda images: images),
        ["CLIPModel.get_image_features", "received a replaced one"],
    ),
    "adapter": (
        _replaced("vision_model.encoder.layers.1.self_attn.q_proj", _OtherLinear(32, 32)),
        ["vision_model.encoder.layers.1.self_attn.q_proj", "_OtherLinear"],
    ),
    "other projection": (
        _replaced("visual_projection", _OtherLinear(32, EMBED_DIM, bias=False)),
        ["visual_projection", "_OtherLinear"],
    ),
    "hooked projection": (_hooked("visual_projection"), ["a forward hook is registered"]),
    "hooked block": (
        _hooked("vision_model.encoder.layers.2"),
        ["a forward hook is registered", "vision_model.encoder.layers.2"],
    ),
    "replaced forward": (
        lambda model: setattr(model.vision_model.encoder.layers[0].mlp, "forward", lambda tokens: tokens),
        ["its method `forward` was replaced", "vision_model.encoder.layers.0.mlp"],
    ),
    "other embedding": (
        _replaced(
            "vision_model.embeddings.patch_embedding", _OtherConv2d(3, 32, PATCH, stride=PATCH, bias=False)
        ),
        ["embedded by", "vision_model.embeddings.patch_embedding"],
    ),
    "other block": (
        _replaced("vision_model.encoder.layers.1", nn.Identity()),
        ["block 1: it is a Identity", "vision_model.encoder.layers.1"],
    ),
    "no vision tower": (_replaced("vision_model", nn.Identity()), ["a Identity is not covered"]),
    "scaled attention": (
        lambda model: setattr(model.vision_model.encoder.layers[1].self_attn, "scale", 1.0),
        ["block 1: its attention is scaled by 1"],
    ),
}


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_explained_is_refused_with_class_and_place(way, moment):
    change, named = REFUSED[way]
    model = tiny_hf_clip()
    explainer = legrad.LeGrad(model) if moment == "after" else None
    change(model)
    with pytest.raises(legrad.UnsupportedModelError) as refusal:
        if explainer is None:
            legrad.LeGrad(model)
        else:
            explainer.encode(tiny_images(size=(SIDE, SIDE)))
    assert [name for name in named if name not in str(refusal.value)] == []


def test_a_class_whose_forward_was_replaced_is_refused(monkeypatch):
    model = tiny_hf_clip(hidden_act="gelu")
    monkeypatch.setattr(GELUActivation, "forward", lambda self, tokens: tokens)
    with pytest.raises(legrad.UnsupportedModelError, match=r"vision_model\.encoder\.layers\.0"):
        legrad.LeGrad(model)


def test_a_vision_tower_alone_is_refused_with_the_classes_that_are_taken():
    alone = CLIPVisionModel(tiny_hf_clip().config.vision_config)
    with pytest.raises(legrad.UnsupportedModelError, match="CLIPModel, SiglipModel and Siglip2Model"):
        legrad.LeGrad(alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_maps_near_those_of_single(dtype):
    single = tiny_hf_clip()
    half = copy.deepcopy(single).to(dtype)
    images, texts = tiny_images(size=(SIDE, SIDE)), unit_texts(2, 3)
    received = legrad.LeGrad(half).relevance(images.to(dtype), texts)
    expected = legrad.LeGrad(single).relevance(images, texts)
    assert received.dtype == torch.float32
    assert relative_error(received, expected) < 8 * torch.finfo(dtype).eps


def test_what_is_no_model_is_refused_with_what_was_expected():
    for wrong in (nn.Sequential(), nn.Linear(2, 2)):
        with pytest.raises(legrad.UnsupportedModelError, match="expected an open_clip model with a `visual`"):
            legrad.LeGrad(wrong)


def test_what_accelerate_has_placed_is_refused_with_the_way_out():
    model = tiny_hf_clip()
    model.vision_model.encoder.layers[0]._hf_hook = object()
    with pytest.raises(legrad.UnsupportedModelError, match="remove_hook_from_submodules"):
        legrad.LeGrad(model)
