"""What the calls that measure and compare maps say of arguments that do not fit."""

from __future__ import annotations

import pytest

from tests.helpers.refusals import messages_of

REFUSALS = {
    "baseline(explainer, 'grad-cam', images, texts)": (
        "method: expected one of gradcam, patch_text, maskclip, sclip, naclip, chefercam, "
        "mean_query_attention, raw_attention, rollout, centre_prior, random, received 'grad-cam'; nearest: "
        "gradcam"
    ),
    "baseline(explainer, None, images, texts)": "method: expected one of gradcam, ",
    "baseline(explainer, ['gradcam'], images, texts)": "method: expected one of gradcam, ",
    "baseline_grids(explainer, images, texts, methods='gradcam')": (
        "methods: expected a list of keys of legrad.BASELINES, received 'gradcam'"
    ),
    "baseline(explainer, 'gradcam', images, texts[:, :7])": (
        "text_embeddings: expected [batch, prompts, 24] or [prompts, 24], received [3, 7]"
    ),
    "baseline(explainer, 'rollout', images, texts, torch.tensor([0, 1, 2]))": (
        "image_index: expected rows from 0 to 1, received 0 to 2"
    ),
    "baseline(explainer, 'rollout', images.double(), texts)": "images: expected torch.float32",
    "baseline(explainer, 'rollout', images[0], texts)": "images: expected [batch, 3, height, width]",
    "baseline(explainer, 'rollout', trace, texts)": (
        "images: rollout expected preprocessed images, received a trace, which lacks the tokens that enter "
        "the first block"
    ),
    "baseline(explainer, 'gradcam', LeGrad(model, layers=1).encode(images), texts)": (
        "trace: expected blocks 1, 2, received block 2; encode the images with this explainer"
    ),
    "(lambda few: baseline(few, 'gradcam', few.encode(images), texts))(LeGrad(model, layers=1))": (
        "trace: expected one with block 1, received block 2; pass the images, or their trace by an explainer "
        "with layers=2"
    ),
    "baseline(explainer, 'gradcam', LeGrad(tiny_clip()).encode(images), texts)": (
        "trace: made by another model"
    ),
    "insertion_deletion(explainer, images, grids[0], texts)": (
        "relevance_grids: expected [2, 3, 'grid_height', 'grid_width'], one map for each prompt with at most "
        "12 x 20 cells, received [3, 3, 5]"
    ),
    "insertion_deletion(explainer, images, torch.rand(2, 3, 13, 20), texts)": (
        "relevance_grids: expected [2, 3, 'grid_height', 'grid_width']"
    ),
    "insertion_deletion(explainer, images, grids / 0, texts)": "relevance_grids: expected finite",
    "insertion_deletion(explainer, images, grids, texts, shares=[0.5, 0.2])": (
        "shares: expected two or more from 0 to 1, ascending, received [0.5, 0.2]"
    ),
    "insertion_deletion(explainer, images, grids, texts, tests=['deletion'])": (
        "tests: expected some of deletion_positive, deletion_negative, insertion_positive, "
        "insertion_negative, received ['deletion']"
    ),
    "insertion_deletion(explainer, images, grids, texts, tests='deletion_positive')": (
        "tests: expected some of deletion_positive"
    ),
    "insertion_deletion(explainer, images, grids, texts, filling='grey')": (
        "filling: expected 'mean' or 'black', received 'grey'"
    ),
    "insertion_deletion(explainer, images, grids, texts, batch_size=0)": (
        "batch_size: expected a number of images from 1 on, received 0"
    ),
    "insertion_deletion(explainer, images, grids, texts, class_embeddings=texts)": (
        "class_embeddings, right_class: expected both or none, and with rivals both"
    ),
    "insertion_deletion(explainer, images, grids, texts, **classes | {'right_class': own + 3})": (
        "right_class: expected classes from 0 to 2, received 3 to 3"
    ),
    "insertion_deletion(explainer, images, grids, texts, **classes | {'right_class': own[0]})": (
        "right_class: expected whole numbers [2, 3], received torch.int64 [3]"
    ),
    "insertion_deletion(explainer, images, grids, texts, **classes | {'class_embeddings': texts[:, :5]})": (
        "class_embeddings: expected [classes, 24], received [3, 5]"
    ),
    "insertion_deletion(explainer, images, grids, texts, **classes, rivals=own)": (
        "rivals: expected truth values [2, 3, 3], received torch.int64 [2, 3]"
    ),
    "baseline(explainer, 'gradcam', images)": "expected text_embeddings, received neither texts nor classes",
    "baseline(explainer, 'rollout', images, class_index=0)": (
        "class_index: this model (clip) compares images with texts and has no classes; pass text_embeddings"
    ),
    "insertion_deletion(explainer, images, grids, class_index=[0, 1, 2])": (
        "class_index: this model (clip) compares images with texts and has no classes; pass text_embeddings"
    ),
    "baseline(classifier, 'rollout', images, texts)": (
        "text_embeddings: this model (timm-classifier) is a classifier and has no text tower; explain one of "
        "its 7 classes with class_index=..."
    ),
    "baseline(classifier, 'gradcam', images)": "expected class_index=..., as this model is a classifier",
    "baseline(classifier, 'gradcam', images, class_index=7)": (
        "class_index: expected whole numbers from 0 to 6, as the model has 7 classes, received 7"
    ),
    "baseline(classifier, 'gradcam', images, image_index=[0, 2], class_index=[0, 1])": (
        "image_index: expected rows from 0 to 1, received 0 to 2"
    ),
    "insertion_deletion(classifier, images, grids, texts)": "text_embeddings: this model (timm-classifier)",
    "insertion_deletion(classifier, images, grids[:, :2], class_index=[0, 1, 2])": (
        "relevance_grids: expected [2, 3, 'grid_height', 'grid_width']"
    ),
    "insertion_deletion(classifier, images, grids, class_index=[0, 1, 2], **classes)": (
        "class_embeddings: this model (timm-classifier) is a classifier"
    ),
    "insertion_deletion(classifier, images, grids, class_index=[0, 1, 2], right_class=own + 7)": (
        "right_class: expected classes from 0 to 6, received 7 to 7"
    ),
    "insertion_deletion(classifier, images, grids, class_index=[0, 1, 2], rivals=own > 0)": (
        "rivals: expected right_class with them, received none"
    ),
    "map_localisation(heat, truth.T)": (
        "heatmap, truth, valid: expected [height, width] of one size, received [2, 3], [3, 2] and [3, 2]"
    ),
    "map_localisation(heat[None], truth[None])": "heatmap, truth, valid: expected [height, width]",
    "map_localisation(heat, truth.long())": "truth, valid: expected truth values, received int64 and bool",
    "map_localisation(heat, truth, truth)": "valid: expected at least one valid pixel, received none",
    "map_localisation(heat * 3, truth)": "heatmap: expected floating-point values from 0 to 1",
    "map_localisation(heat / 0, truth)": "heatmap: expected floating-point values from 0 to 1",
    "map_localisation(truth, truth)": "heatmap: expected floating-point values from 0 to 1",
    "localisation_scores([])": "maps: expected at least one map, received none",
}


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    """What each call of REFUSALS says, in one run where shapes are not checked, as for users."""
    setup = """
import torch
from legrad import *
from tests.helpers.classifiers import tiny_timm_classifier
from tests.helpers.tiny_models import *

classifier = LeGrad(tiny_timm_classifier("vit_base_patch16_224"))
model, images, texts = tiny_clip(), tiny_images(2), unit_texts(3)
explainer = LeGrad(model)
trace, grids, own = explainer.encode(images), torch.rand(2, 3, 3, 5), torch.zeros(2, 3, dtype=torch.long)
classes = {"class_embeddings": texts, "right_class": own}
heat, truth = torch.full((2, 3), 0.5), torch.zeros(2, 3, dtype=torch.bool)
"""
    return messages_of(REFUSALS, setup)


@pytest.mark.parametrize("call", REFUSALS)
def test_what_does_not_fit_is_refused_with_what_was_expected_and_received(call, messages):
    assert messages.get(call, "nothing was refused").startswith(REFUSALS[call])
