"""One image explained for several texts."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import legrad
from legrad.pictures import draw_panels
from tests.helpers.text_lengths import Lengths
from tests.helpers.tiny_models import LAYERS, tiny_clip

TEXTS = ("a dog", "a red cactus!", "sky")


@pytest.fixture(scope="module")
def explainer():
    torch.manual_seed(0)
    return legrad.LeGrad(tiny_clip(), tokenizer=Lengths(), layers="all")


@pytest.fixture(scope="module")
def image():
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def explanation(explainer, image):
    return legrad.explain_image(explainer, image, TEXTS)


def test_its_figures_are_those_of_the_explainer(explainer, image, explanation):
    trace = explainer.encode(explainer.preprocess([image]))
    embeddings = explainer.embed_text(TEXTS)
    torch.testing.assert_close(explanation.heatmaps, explainer.heatmaps(trace, embeddings)[0])
    torch.testing.assert_close(explanation.similarities, explainer.similarity(trace, embeddings)[0])
    grids = explainer.relevance(trace, embeddings)[0]
    torch.testing.assert_close(explanation.layer_grids.sum(dim=0), grids)
    assert explanation.layer_indices == tuple(range(LAYERS))


def test_each_text_has_an_overlay_of_the_images_size_and_a_strip(explanation, image):
    assert [overlay.size for overlay in explanation.overlays] == [image.size] * 3
    assert len(explanation.layer_strips) == 3
    arrays = [np.asarray(overlay).tobytes() for overlay in explanation.overlays]
    assert len(set(arrays)) == 3
    first = legrad.overlay(image, explanation.heatmaps[0])
    assert arrays[0] == np.asarray(first).tobytes()


def test_a_strip_is_the_one_that_layer_strip_draws(explainer, image, explanation):
    for text, strip in zip(TEXTS, explanation.layer_strips, strict=True):
        alone = np.asarray(legrad.layer_strip(explainer, image, text)).astype(int)
        assert np.abs(np.asarray(strip) - alone).max() <= 2, "one text alone rounds otherwise than several"


def test_side_by_side_holds_the_image_and_every_text(explanation, image):
    picture = np.asarray(explanation.side_by_side(panel_side=100))
    assert picture.shape[1] == 4 * (100 + 8) - 8
    photo = np.asarray(image.resize((100, 60), Image.Resampling.LANCZOS))
    assert np.array_equal(picture[:60, :100], photo)
    labels = [picture[60:, left : left + 100] for left in (108, 216, 324)]
    assert all((label < 100).any() for label in labels), "a text stands below each heat map"


def test_a_notebook_shows_side_by_side(explanation):
    with Image.open(io.BytesIO(explanation._repr_png_())) as shown:
        assert shown.format == "PNG"
        assert shown.tobytes() == explanation.side_by_side().tobytes()


def test_an_explanation_is_of_the_image_as_rgb(explainer, image):
    explained = legrad.explain_image(explainer, image.convert("RGBA"), ["a dog"])
    assert explained.image.mode == "RGB"


def test_for_clip_the_authors_map_is_the_default(explainer, image, explanation):
    received = legrad.explain_image(explainer, image, TEXTS, as_authors=True)
    assert torch.equal(received.heatmaps, explanation.heatmaps)
    assert torch.equal(received.layer_grids, explanation.layer_grids)


@pytest.mark.parametrize("texts", ["a dog", []])
def test_what_is_no_list_of_texts_is_refused(explainer, image, texts):
    with pytest.raises(legrad.InputError, match="expected a list of"):
        legrad.explain_image(explainer, image, texts)


@pytest.mark.parametrize("text", ["x" * 10_000, "a\nb\tc", "", "<b>", "ü漢字🙂" * 50])
def test_any_label_stays_within_its_panel(text):
    panels = [np.full((20, 60, 3), 128, np.uint8)] * 2
    plain = np.asarray(draw_panels([("a",), ("a",)], panels, per_line=2))
    drawn = np.asarray(draw_panels([(text,), ("a",)], panels, per_line=2))
    assert drawn.shape == plain.shape
    assert np.array_equal(drawn[:, 60:], plain[:, 60:]), "nothing runs into the gap or the next panel"


def test_panels_go_on_in_the_next_line():
    panels = [np.full((20, 60, 3), shade, np.uint8) for shade in (0, 100, 200)]
    picture = np.asarray(draw_panels([("a",)] * 3, panels, per_line=2))
    assert picture.shape[1] == 2 * 68 - 8
    assert (picture[:20, 68:128] == 100).all()
    assert (picture[picture.shape[0] // 2 :][:20, :60] == 200).all()
