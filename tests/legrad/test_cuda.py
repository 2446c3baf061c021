"""The same numbers on a CUDA device as on the CPU."""

import copy

import pytest
import torch

import legrad
from tests.helpers.classifiers import tiny_timm_classifier
from tests.helpers.tiny_models import relative_error, tiny_clip, tiny_images, unit_texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("pool", ["reference", "model"])
def test_grids_and_features_on_cuda_equal_those_on_the_cpu(pool):
    model, images, texts = tiny_clip(), tiny_images(3, size=(24, 40)), unit_texts(5)
    image_index = torch.tensor([2, 0, 0, 1, 2])
    on_cpu = legrad.LeGrad(model, pool=pool).encode(images)
    expected = legrad.LeGrad(model, pool=pool).relevance(on_cpu, texts, image_index)
    explainer = legrad.LeGrad(model.cuda(), pool=pool)
    trace = explainer.encode(images.cuda())
    assert relative_error(trace.image_features.cpu(), on_cpu.image_features) < 1e-5
    for index in (image_index, image_index.cuda()):
        received = explainer.relevance(trace, texts.cuda(), index)
        assert received.device == trace.image_features.device
        assert relative_error(received.cpu(), expected) < 1e-5


@pytest.mark.parametrize("pool", ["reference", "model"])
def test_maps_and_logits_of_a_classifier_on_cuda_equal_those_on_the_cpu(pool):
    model, images = tiny_timm_classifier("deit_base_distilled_patch16_224"), tiny_images(3)
    pairs = {"image_index": torch.tensor([2, 0, 0, 1]), "class_index": [6, 1, 1, 0]}
    on_cpu = legrad.LeGrad(model, pool=pool)
    expected, logits = on_cpu.relevance(images, **pairs), on_cpu.logits(images)
    explainer = legrad.LeGrad(copy.deepcopy(model).cuda(), pool=pool)
    trace = explainer.encode(images.cuda())
    assert relative_error(explainer.relevance(trace, **pairs).cpu(), expected) < 1e-5
    assert relative_error(explainer.logits(trace).cpu(), logits) < 1e-5


def test_relevance_spread_along_keys_on_cuda_equals_that_on_the_cpu():
    model, images, texts = tiny_clip(), tiny_images(3, size=(24, 40)), unit_texts(5)
    image_index = torch.tensor([2, 0, 0, 1, 2])
    expected = legrad.LeGrad(model, affinity="keys").relevance(images, texts, image_index)
    explainer = legrad.LeGrad(model.cuda(), affinity="keys")
    received = explainer.relevance(images.cuda(), texts.cuda(), image_index)
    assert relative_error(received.cpu(), expected) < 1e-5


def test_baselines_and_perturbation_on_cuda_equal_those_on_the_cpu():
    model, images, texts = tiny_clip(), tiny_images(3, size=(24, 40)), unit_texts(5)
    image_index = torch.tensor([2, 0, 0, 1, 2])
    classes = {"class_embeddings": unit_texts(4, seed=9), "right_class": torch.tensor([0, 1, 2, 3, 0])}
    explainer = legrad.LeGrad(model)
    expected = legrad.baseline_grids(explainer, images, texts, image_index)
    curves = legrad.insertion_deletion(explainer, images, expected["gradcam"], texts, image_index, **classes)
    explainer = legrad.LeGrad(model.cuda())
    received = legrad.baseline_grids(explainer, images.cuda(), texts.cuda(), image_index)
    for name, grids in received.items():
        assert grids.device.type == "cuda"
        assert relative_error(grids.cpu(), expected[name]) < 1e-4, name
    classes["class_embeddings"] = classes["class_embeddings"].cuda()
    on_cuda = legrad.insertion_deletion(
        explainer, images.cuda(), expected["gradcam"], texts.cuda(), image_index, **classes
    )
    for name, curve in curves.items():
        assert abs(on_cuda[name].score - curve.score).max() < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_on_cuda_is_right_to_its_own_rounding(dtype, tolerance):
    model, images, texts = tiny_clip(), tiny_images(2, size=(64, 64)), unit_texts(2, 3)
    expected = legrad.LeGrad(model).relevance(images, texts)
    received = legrad.LeGrad(model.cuda().to(dtype)).relevance(images.cuda().to(dtype), texts.cuda())
    assert received.dtype == torch.float32
    assert relative_error(received.cpu(), expected) < tolerance


def test_texts_of_the_cpu_are_refused_by_a_model_on_cuda():
    explainer = legrad.LeGrad(tiny_clip().cuda())
    with pytest.raises(legrad.InputError, match="expected device cuda:0, as the images, received cpu"):
        explainer.relevance(tiny_images().cuda(), unit_texts(2))


def test_preprocessing_on_cuda_is_bit_equal_to_the_cpu():
    transform = legrad.LeGrad(tiny_clip()).transform
    pixels = torch.randint(0, 256, (2, transform.height, transform.width, 3), dtype=torch.uint8)
    on_cuda = transform.normalise(pixels.cuda(), torch.float32)
    assert torch.equal(on_cuda.cpu(), transform.normalise(pixels, torch.float32))
