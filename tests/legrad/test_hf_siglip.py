"""The SiglipModel and Siglip2Model of Hugging Face transformers: against autograd, and what is refused."""

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import GemmaTokenizer

import legrad
from legrad.heatmaps import heatmaps_of
from tests.helpers.hf_models import (
    CONTEXT,
    SIDE,
    hf_relevance,
    siglip2_processor,
    siglip_processor,
    siglip_tokenizer,
    tiny_siglip,
    tiny_siglip2,
)
from tests.helpers.tiny_models import (
    EMBED_DIM,
    LAYERS,
    PATCH,
    relative_error,
    tiny_images,
    unit_texts,
)

MODELS = {"SigLIP": tiny_siglip, "SigLIP 2 NaFlex": tiny_siglip2}
PROCESSORS = {"SigLIP": siglip_processor, "SigLIP 2 NaFlex": siglip2_processor}
SIZES = {"its own size": (SIDE, SIDE), "wider": (3 * PATCH, 5 * PATCH), "larger": (6 * PATCH, 6 * PATCH)}
TEXTS = ["a cat", "A Dog", "", "a text that has more letters than fit"]


def _inputs(size=(SIDE, SIDE), batch=2):
    return tiny_images(batch, size=size, dtype=torch.float64), unit_texts(batch, 3, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_equals_autograd_on_attention_that_is_spelled_out(name, pool, size):
    model = MODELS[name]().double()
    images, texts = _inputs(SIZES[size])
    explainer = legrad.LeGrad(model, layers="all", pool=pool)
    received = explainer.relevance(images, texts, per_layer=True).flatten(-2)
    expected = hf_relevance(model, images, texts, pool)
    assert max(relative_error(received[i], expected[i]) for i in range(LAYERS)) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_ragged_prompts_equal_those_of_each_image(name):
    model = MODELS[name]().double()
    images, rows = _inputs(batch=3)[0], unit_texts(4, dtype=torch.float64)
    index = torch.tensor([2, 0, 2, 1])
    received = legrad.LeGrad(model, layers=1).relevance(images, rows, index).flatten(-2)
    expected = hf_relevance(model, images, rows.expand(3, -1, -1))[-1]
    assert relative_error(received, expected[index, torch.arange(4)]) < 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_image_features_are_those_of_the_model_with_its_own_interpolation(size):
    model = tiny_siglip().double()
    images, _ = _inputs(SIZES[size])
    features = model.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    trace = legrad.LeGrad(model).encode(images)
    assert relative_error(trace.image_features, nn.functional.normalize(features, dim=-1)) < 1e-12


def test_patches_are_cut_as_the_processor_of_naflex_cuts_them():
    model, processor = tiny_siglip2().double(), siglip2_processor()
    picture = Image.new("RGB", (5 * PATCH, 3 * PATCH))
    picture.putdata([(9 * x, 5 * x, 200 - 4 * x) for x in range(15 * PATCH**2)])
    # Its own size has as many patches as the model takes, so that neither resizes.
    explainer = legrad.LeGrad(model, processor=processor, image_size=(3 * PATCH, 5 * PATCH))
    trace = explainer.encode(explainer.preprocess([picture]))
    inputs = processor.image_processor(picture, return_tensors="pt", do_resize=False, max_num_patches=15)
    features = model.get_image_features(**inputs).pooler_output
    assert relative_error(trace.image_features, nn.functional.normalize(features, dim=-1)) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_embedded_whole_as_the_model_and_its_processor_do(name):
    model, processor = MODELS[name]().double(), PROCESSORS[name]()
    inputs = processor(
        text=TEXTS, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    expected = nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
    explainer = legrad.LeGrad(model, processor=processor)
    assert relative_error(explainer.embed_text(TEXTS), expected) < 1e-12


def test_texts_are_put_in_lower_case_also_by_a_tokenizer_that_leaves_them():
    tokenizer = siglip_tokenizer(GemmaTokenizer)
    explainer = legrad.LeGrad(tiny_siglip(), tokenizer=tokenizer)
    upper, lower = explainer.embed_text(["A CAT", "a cat"])
    assert torch.equal(upper, lower)
    tokenizer.init_kwargs["do_lower_case"] = False
    upper, lower = legrad.LeGrad(tiny_siglip(), tokenizer=tokenizer).embed_text(["A CAT", "a cat"])
    assert not torch.allclose(upper, lower)


@pytest.mark.parametrize("name", MODELS)
def test_one_image_is_explained_from_picture_and_texts(name):
    explainer = legrad.LeGrad(MODELS[name](), processor=PROCESSORS[name](), fit="keep")
    explanation = legrad.explain_image(explainer, Image.new("RGB", (40, 30), "red"), ["a cat", "a dog"])
    assert explanation.heatmaps.shape == (2, 12, 20)
    assert explainer.transform.mean == explainer.transform.std == (0.5, 0.5, 0.5)


def test_as_the_authors_would_a_neutral_text_corrects_every_map():
    model = tiny_siglip().double()
    explainer = legrad.LeGrad(model, processor=siglip_processor())
    images, texts = _inputs()
    neutral = explainer.embed_text(["a photo of a"])
    expected = explainer.heatmaps(images, texts, neutral_embedding=neutral)
    assert torch.equal(explainer.heatmaps(images, texts, as_authors=True), expected)
    grids = explainer.relevance(images, texts)
    assert relative_error(explainer.heatmaps(images, texts), heatmaps_of(grids, SIDE, SIDE, "grid")) < 1e-12


class _OtherHead(nn.Module):
    """Another pooler."""


REFUSED = {
    "no head": ({"vision_use_head": False}, None, "its pooling head was removed"),
    "other head": (
        {},
        lambda visual: setattr(visual, "head", _OtherHead()),
        r"its head is a _OtherHead.*vision_model\.head",
    ),
    "keys of its own": (
        {},
        lambda visual: setattr(
            visual.head, "attention", nn.MultiheadAttention(EMBED_DIM, 4, batch_first=True, add_bias_kv=True)
        ),
        "its pooler's attention is not the plain one.*vision_model.head.attention",
    ),
    "hook": (
        {},
        lambda visual: visual.head.register_forward_pre_hook(lambda _module, inputs: inputs),
        "a forward pre-hook is registered",
    ),
}


@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("name", MODELS)
def test_what_cannot_be_explained_is_refused_with_class_and_place(name, way):
    settings, change, said = REFUSED[way]
    model = MODELS[name](**settings)
    if change is not None:
        change(model.vision_model)
    with pytest.raises(legrad.UnsupportedModelError, match=said):
        legrad.LeGrad(model)
