"""Pictures of heat maps."""

import numpy as np
import pytest
import torch
from PIL import Image

import legrad
from tests.helpers.tiny_models import LAYERS, tiny_clip


class OneText:
    """A tokenizer of the tiny model that knows a single text."""

    def __call__(self, texts):
        return torch.ones(len(texts), 16, dtype=torch.int64)


@pytest.fixture
def image():
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_an_overlay_is_red_where_the_map_is_high_and_blue_where_it_is_low(image):
    heatmap = torch.zeros(3, 5)
    heatmap[:, 4] = 1
    picture = np.asarray(legrad.overlay(image, heatmap)).astype(int)
    assert picture.shape == (30, 50, 3)
    low, high = picture[:, :5].mean(axis=(0, 1)), picture[:, -5:].mean(axis=(0, 1))
    assert high[0] > high[2] + 40
    assert low[2] > low[0]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_of_any_mode_are_drawn(image, mode):
    assert legrad.overlay(image.convert(mode), np.zeros((2, 2), dtype=np.float32)).mode == "RGB"


def test_a_strip_has_a_panel_for_each_layer_and_one_for_their_sum(image):
    explainer = legrad.LeGrad(tiny_clip(), tokenizer=OneText(), layers="all")
    strip = np.asarray(legrad.layer_strip(explainer, image, "anything", panel_side=100))
    panel_width, gap = 100, 8
    assert strip.shape[1] == (LAYERS + 1) * (panel_width + gap) - gap
    lefts = [column * (panel_width + gap) for column in range(LAYERS + 1)]
    panels = [strip[:60, left : left + panel_width] for left in lefts]
    assert all((strip[:60, left - gap : left] == 255).all() for left in lefts[1:])
    assert all(panel.std() > 0 for panel in panels)
    assert not np.array_equal(panels[0], panels[-1])
