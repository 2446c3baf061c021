"""Baselines and perturbation curves of classifiers, against autograd and loops over their own pass."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

import legrad
from legrad.quality.perturbation import SHARES, blurred, perturbed_images
from tests.helpers.classifiers import CLASSES, tiny_timm_classifier, tiny_torchvision_vit
from tests.helpers.timm_models import attention_matrices
from tests.helpers.tiny_models import tiny_images

NAMES = {
    "class token": ("vit_base_patch16_224", {}),
    "mean of patches": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "mean of normed patches": ("vit_base_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "attentional pooling": ("vit_base_patch16_siglip_224", {}),
    "DeiT with two heads": ("deit_base_distilled_patch16_224", {}),
    "DINOv2 with registers": ("vit_base_patch14_reg4_dinov2", {}),
    "EVA02": ("eva02_base_patch14_448", {}),
    "relative positions, post-norm": ("vit_relpos_base_patch16_rpn_224", {}),
}
MODELS = (*NAMES, "torchvision")
WITH_ONE_CLASS_TOKEN = ["class token", "torchvision"]
WITH_NORM_BEFORE_ATTENTION = [name for name in MODELS if "post-norm" not in name]
CLASS_OF_PAIR, IMAGE_OF_PAIR = [6, 1, 1, 0], [0, 2, 1, 1]


def tiny(name: str) -> nn.Module:
    if name == "torchvision":
        return tiny_torchvision_vit().double()
    model_name, options = NAMES[name]
    return tiny_timm_classifier(model_name, **options).double()


def images_for(name: str) -> Tensor:
    size = {"size": (20, 20)} if name == "torchvision" else {}
    return tiny_images(3, dtype=torch.float64, **size)


def maps_of(model: nn.Module, method: str, images: Tensor) -> Tensor:
    return legrad.baseline(
        legrad.LeGrad(model), method, images, image_index=IMAGE_OF_PAIR, class_index=CLASS_OF_PAIR
    )


def blocks_of(model: nn.Module) -> nn.Module:
    return model.encoder.layers if isinstance(model, VisionTransformer) else model.blocks


def logit_of_each_token(model: nn.Module, tokens: Tensor) -> Tensor:
    """All logits of a token that the model pools alone."""
    if isinstance(model, VisionTransformer):
        return model.heads(model.encoder.ln(tokens))
    if getattr(model, "attn_pool", None) is not None:
        pooled = model.attn_pool(model.norm(tokens).flatten(0, 1)[:, None])
        return model.head(model.fc_norm(pooled)).unflatten(0, tokens.shape[:2])
    normed = model.norm(tokens)
    if hasattr(model, "head_dist"):
        return (model.head(normed) + model.head_dist(normed)) / 2
    return model.head(model.fc_norm(normed))


def recorded(module: nn.Module, model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a module in a forward pass of one image, and the logits."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    logits = model(image[None])[0]
    handle.remove()
    return outputs[0], logits


@pytest.mark.parametrize("name", WITH_NORM_BEFORE_ATTENTION)
def test_gradcam_weighs_channels_by_gradients_of_the_logit(name):
    model, images = tiny(name), images_for(name)
    maps = maps_of(model, "gradcam", images)
    block, prefix = blocks_of(model)[-1], legrad.LeGrad(model).tower.prefix_tokens
    assert (maps > 0).any()
    norm = block.ln_1 if name == "torchvision" else block.norm1
    for grid, image, class_index in zip(maps, IMAGE_OF_PAIR, CLASS_OF_PAIR, strict=True):
        activations, logits = recorded(norm, model, images[image])
        (gradient,) = torch.autograd.grad(logits[class_index], activations)
        weights = gradient[0, prefix:].mean(dim=0)
        expected = (activations[0, prefix:] @ weights).clamp(min=0).reshape(grid.shape)
        torch.testing.assert_close(grid, expected.float())


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_patch_text_similarity_is_the_logit_of_each_patch_token(name):
    model, images = tiny(name), images_for(name)
    maps, prefix = maps_of(model, "patch_text", images), legrad.LeGrad(model).tower.prefix_tokens
    for grid, image, class_index in zip(maps, IMAGE_OF_PAIR, CLASS_OF_PAIR, strict=True):
        tokens, _ = recorded(blocks_of(model)[-1], model, images[image])
        expected = logit_of_each_token(model, tokens)[0, prefix:, class_index].reshape(grid.shape)
        torch.testing.assert_close(grid, expected.float())


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_ONE_CLASS_TOKEN)
def test_maskclip_is_the_logit_of_each_patchs_value(name):
    model, images = tiny(name), images_for(name)
    maps = maps_of(model, "maskclip", images)
    block = blocks_of(model)[-1]
    for grid, image, class_index in zip(maps, IMAGE_OF_PAIR, CLASS_OF_PAIR, strict=True):
        normed, _ = recorded(block.ln_1 if name == "torchvision" else block.norm1, model, images[image])
        if name == "torchvision":
            attention = block.self_attention
            joint, out = normed @ attention.in_proj_weight.T + attention.in_proj_bias, attention.out_proj
        else:
            joint, out = block.attn.qkv(normed), block.attn.proj
        logits = logit_of_each_token(model, out(joint.chunk(3, dim=-1)[2]))
        torch.testing.assert_close(grid, logits[0, 1:, class_index].reshape(grid.shape).float())


def test_chefercam_is_its_update_of_relevancies_by_autograd_on_the_logit():
    model, images = tiny("class token"), images_for("class token")
    maps = maps_of(model, "chefercam", images)
    assert (maps > 0).any()
    for block in model.blocks:
        block.attn.fused_attn = False
    for grid, image, class_index in zip(maps, IMAGE_OF_PAIR, CLASS_OF_PAIR, strict=True):
        with attention_matrices() as matrices:
            logits = model(images[image, None])[0]
        gradients = torch.autograd.grad(logits[class_index], matrices)
        relevancy = torch.eye(matrices[0].shape[-1], dtype=torch.float64)[None]
        for matrix, gradient in zip(matrices, gradients, strict=True):
            relevancy = relevancy + (matrix * gradient).relu().mean(dim=1) @ relevancy
        torch.testing.assert_close(grid, relevancy[0, 0, 1:].reshape(grid.shape).float())


@pytest.mark.parametrize("name", MODELS)
def test_every_classifier_has_every_baseline_and_a_batch_gives_what_its_images_give(name):
    model, images = tiny(name), images_for(name)
    explainer = legrad.LeGrad(model)
    batched = legrad.baseline_grids(explainer, images, image_index=IMAGE_OF_PAIR, class_index=CLASS_OF_PAIR)
    assert list(batched) == list(legrad.BASELINES)
    for method, grids in batched.items():
        assert grids.isfinite().all()
        if method != "random":
            assert torch.allclose(grids[2], grids[3]) != legrad.BASELINES[method].depends_on_text, method
    for pair, (image, class_index) in enumerate(zip(IMAGE_OF_PAIR, CLASS_OF_PAIR, strict=True)):
        single = legrad.baseline_grids(explainer, images[image, None], class_index=class_index)
        for method in set(batched) - {"random"}:
            torch.testing.assert_close(batched[method][pair], single[method][0, 0], msg=method)


def test_the_forms_of_classes_are_those_of_relevance_and_a_trace_gives_the_maps_of_its_images():
    explainer, images = legrad.LeGrad(tiny("class token")), images_for("class token")
    trace = explainer.encode(images)
    for method in ("gradcam", "sclip", "raw_attention"):
        every = legrad.baseline(explainer, method, images, class_index=range(CLASSES))
        assert every.shape == explainer.relevance(images, class_index=range(CLASSES)).shape
        torch.testing.assert_close(legrad.baseline(explainer, method, trace, class_index=4), every[:, 4:5])
        of_each = torch.tensor([[6, 0], [1, 1], [3, 5]])
        expected = every[torch.arange(3)[:, None], of_each]
        torch.testing.assert_close(legrad.baseline(explainer, method, images, class_index=of_each), expected)
    assert legrad.baseline(explainer, "gradcam", images, class_index=[]).shape[:2] == (3, 0)


def logits_by_loop(model: nn.Module, image: Tensor, grid: Tensor, test: str) -> Tensor:
    """All logits of an image at each share, patch by patch with plain loops."""
    height, width = grid.shape
    rows, columns = image.shape[1] // height, image.shape[2] // width
    sign = -1 if test.endswith("positive") else 1
    order = sorted(range(height * width), key=lambda cell: (sign * grid.flatten()[cell].item(), cell))
    logits = []
    for share in SHARES:
        shown = image.clone() if test.startswith("deletion") else blurred(image[None])[0]
        for cell in order[: round(share * height * width)]:
            row, column = divmod(cell, width)
            place = np.s_[:, row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            shown[place] = 0 if test.startswith("deletion") else image[place]
        logits.append(model(shown[None])[0])
    return torch.stack(logits)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_ONE_CLASS_TOKEN)
def test_curves_are_the_logits_of_a_loop_over_patches_and_accuracy_is_that_of_the_logits(name):
    model, images = tiny(name), images_for(name)
    explainer = legrad.LeGrad(model)
    pairs = {"image_index": IMAGE_OF_PAIR, "class_index": CLASS_OF_PAIR}
    grids = explainer.relevance(images, **pairs)
    right = model(images)[IMAGE_OF_PAIR].argmax(dim=1)
    curves = legrad.insertion_deletion(explainer, images, grids, **pairs, right_class=right, batch_size=3)
    for test, curve in curves.items():
        for pair, (image, class_index) in enumerate(zip(IMAGE_OF_PAIR, CLASS_OF_PAIR, strict=True)):
            logits = logits_by_loop(model, images[image], grids[pair], test)
            np.testing.assert_allclose(curve.score[pair], logits[:, class_index], rtol=1e-5, atol=1e-5)
            assert curve.is_right[pair].tolist() == (logits.argmax(dim=1) == right[pair]).tolist()
    assert curves["deletion_positive"].accuracy[0] == 1
    without = legrad.insertion_deletion(explainer, images, grids, **pairs, tests=["deletion_positive"])
    assert without["deletion_positive"].accuracy is None
    np.testing.assert_array_equal(without["deletion_positive"].score, curves["deletion_positive"].score)


@torch.no_grad()
def test_rivals_of_a_classifier_are_the_classes_that_count():
    model, images = tiny("class token"), images_for("class token")
    explainer, shares = legrad.LeGrad(model), [0.0, 0.5, 1.0]
    grids = explainer.relevance(images, class_index=[2])
    right = torch.tensor([[3], [0], [5]])
    rivals = torch.rand(3, 1, CLASSES, generator=torch.Generator().manual_seed(0)) > 0.5
    rivals.scatter_(2, right[..., None], False)
    curves = legrad.insertion_deletion(
        explainer,
        images,
        grids,
        class_index=[2],
        shares=shares,
        tests=["deletion_negative"],
        right_class=right,
        rivals=rivals,
    )
    for (image, _, step), is_right in np.ndenumerate(curves["deletion_negative"].is_right):
        hidden = perturbed_images(
            images[image, None],
            torch.zeros_like(images[:1]),
            grids[image],
            shares[step],
            test="deletion",
            order="negative",
        )
        logits, own = model(hidden)[0], int(right[image])
        assert is_right == bool((logits[own] > logits[rivals[image, 0]]).all())
