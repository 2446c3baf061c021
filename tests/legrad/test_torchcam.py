"""torch-cam's LeGrad, an independent implementation for torchvision's models, on the same weights.

Optional: `pip install --no-deps torchcam`, which needs nothing that is not here already.
"""

import pytest
import torch
from torchvision.models import vit_b_32

import legrad
from tests.helpers.classifiers import tiny_torchvision_vit
from tests.helpers.tiny_models import fill, relative_error

methods = pytest.importorskip("torchcam.methods")


def _agreement(model, images, classes, layers):
    blocks = list(model.encoder.layers)[-layers:]
    with methods.LeGrad(model, blocks) as extractor:
        scores = model(images)
        (raw,) = extractor(classes, scores, normalized=False, retain_graph=True)
        (normalized,) = extractor(classes, scores)
    explainer = legrad.LeGrad(model, layers=layers)
    rows = torch.arange(len(images))
    received = explainer.relevance(images, image_index=rows, class_index=classes)
    # torch-cam adds 1e-8 to the range that it divides by, and relevance is about 1e-3.
    assert (legrad.minmax_normalise(received) - normalized).abs().max() < 1e-4
    # It takes the mean over layers.
    return relative_error(received / layers, raw)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_default_maps_are_those_of_torch_cam_on_a_tiny_model(layers):
    model = tiny_torchvision_vit()
    images = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    assert _agreement(model, images, [0, 6, 2], layers) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 4, 12])
def test_the_default_maps_are_those_of_torch_cam_on_vit_b_32(layers):
    model = fill(vit_b_32()).eval()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    assert _agreement(model, images, [3, 970], layers) < 1e-5
