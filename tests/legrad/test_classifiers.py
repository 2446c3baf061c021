"""Classifiers of timm and torchvision: every logit of every layer, against autograd on their own pass."""

import copy
import pickle

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import legrad
from legrad.classes import check_class_names
from legrad.families.faithful import TOLERANCES
from tests.helpers.classifiers import (
    CLASSES,
    relevance_of_logits,
    tiny_timm_classifier,
    tiny_torchvision_vit,
)
from tests.helpers.tiny_models import (
    GRID_HEIGHT,
    GRID_WIDTH,
    LAYERS,
    PATCH,
    fill,
    relative_error,
    tiny_clip,
    tiny_images,
    unit_texts,
)

TIMM = {
    "class token": ("vit_base_patch16_224", {}),
    "mean of patches": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "mean of normed patches": ("vit_base_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "attentional pooling": ("vit_base_patch16_siglip_224", {}),
    "DeiT": ("deit_base_patch16_224", {}),
    "DeiT III": ("deit3_base_patch16_224", {}),
    "DeiT with two heads": ("deit_base_distilled_patch16_224", {}),
    "DINOv2": ("vit_base_patch14_dinov2", {}),
    "DINOv2 with registers": ("vit_base_patch14_reg4_dinov2", {}),
    "DINOv2 with gated MLP": ("vit_giant_patch14_dinov2", {}),
    "EVA02": ("eva02_base_patch14_448", {}),
    "EVA01": ("eva_giant_patch14_224", {}),
    "relative positions": ("vit_relpos_base_patch16_224", {}),
    "relative positions and class token": ("vit_relpos_base_patch16_cls_224", {}),
    "shared relative positions": ("vit_srelpos_small_patch16_224", {}),
    "relative positions, post-norm": ("vit_relpos_base_patch16_rpn_224", {}),
}
TORCHVISION = {
    "torchvision": {},
    "torchvision with a hidden layer": {"representation_size": 12},
    "torchvision with dropout": {"dropout": 0.3, "attention_dropout": 0.3},
}
MODELS = (*TIMM, *TORCHVISION)
FAMILIES = {
    "EVA02": "eva-classifier",
    "EVA01": "eva-classifier",
    **{name: "relpos-classifier" for name in TIMM if "relative" in name},
    **dict.fromkeys(TORCHVISION, "torchvision-classifier"),
}
RESIZABLE = [name for name in TIMM if "relative" not in name]


def tiny(name):
    if name in TORCHVISION:
        return tiny_torchvision_vit(**TORCHVISION[name]).double()
    model_name, options = TIMM[name]
    return tiny_timm_classifier(model_name, **options).double()


def images_for(name, batch=2):
    size = {"size": (20, 20)} if name in TORCHVISION else {}
    return tiny_images(batch, dtype=torch.float64, **size)


@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_layer_equal_the_models_own_forward_pass_with_autograd(name, pool):
    model, images = tiny(name), images_for(name)
    expected = relevance_of_logits(model, images, pool=pool)
    explainer = legrad.LeGrad(model, layers="all", pool=pool)
    trace = explainer.encode(images)
    received = explainer.relevance(trace, class_index=range(CLASSES), per_layer=True).flatten(-2)
    assert explainer.tower.family == FAMILIES.get(name, "timm-classifier")
    assert relative_error(explainer.logits(trace), model(images)) < 1e-12
    assert received.shape == expected.shape
    assert [relative_error(received[i], expected[i]) < 1e-12 for i in range(LAYERS)] == [True] * LAYERS


@pytest.mark.parametrize("name", ["class token", "DeiT with two heads", "EVA02", "torchvision"])
def test_classes_of_every_image_and_classes_of_each_image_and_ragged_ones_are_the_same_maps(name):
    model, images = tiny(name), images_for(name, batch=3)
    explainer = legrad.LeGrad(model)
    trace = explainer.encode(images)
    every = explainer.relevance(trace, class_index=list(range(CLASSES)))
    assert every.shape[:2] == (3, CLASSES)
    by_image = torch.tensor([[6, 0], [1, 1], [3, 5]])
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(explainer.relevance(trace, class_index=by_image), every[rows, by_image])
    torch.testing.assert_close(explainer.relevance(trace, class_index=4), every[:, 4:5])
    classes, image_index = [2, 2, 0, 6], torch.tensor([2, 0, 0, 1])
    ragged = explainer.relevance(images, image_index=image_index, class_index=classes)
    torch.testing.assert_close(ragged, every[image_index, torch.tensor(classes)])
    heatmaps = explainer.heatmaps(trace, image_index=image_index, class_index=classes)
    torch.testing.assert_close(
        heatmaps, explainer.heatmaps(trace, class_index=range(CLASSES))[image_index, torch.tensor(classes)]
    )
    logits = model(images)
    torch.testing.assert_close(explainer.logits(images, classes, image_index), logits[image_index, classes])
    torch.testing.assert_close(explainer.logits(trace, by_image), logits.gather(1, by_image))
    torch.testing.assert_close(explainer.logits(trace, 4), logits[:, 4:5])


def test_no_class_gives_no_map():
    explainer = legrad.LeGrad(tiny("class token"))
    received = explainer.relevance(images_for("class token"), class_index=[])
    assert received.shape == (2, 0, GRID_HEIGHT, GRID_WIDTH)


@pytest.mark.parametrize("name", RESIZABLE)
def test_another_size_is_what_timm_makes_of_the_model_for_that_size(name):
    model, size = tiny(name), (7 * PATCH, 4 * PATCH)
    images = tiny_images(2, size=size, dtype=torch.float64)
    resized = copy.deepcopy(model)
    resized.set_input_size(size)
    explainer = legrad.LeGrad(model)
    # timm resamples positions in float32, whatever the model's precision.
    assert relative_error(explainer.logits(images), resized(images)) < 1e-5
    received = explainer.relevance(images, class_index=[0, 5])
    assert received.shape[-2:] == (7, 4)
    expected = legrad.LeGrad(resized).relevance(images, class_index=[0, 5])
    assert relative_error(received, expected) < 1e-5


def test_a_model_that_takes_any_size_gives_its_own_logits_at_any_size():
    model = tiny_timm_classifier("vit_base_patch16_224", dynamic_img_size=True).double()
    images = tiny_images(2, size=(20, 12), dtype=torch.float64)
    explainer = legrad.LeGrad(model, layers="all")
    assert relative_error(explainer.logits(images), model(images)) < 1e-5
    received = explainer.relevance(images, class_index=range(CLASSES), per_layer=True).flatten(-2)
    assert relative_error(received, relevance_of_logits(model, images)) < 1e-5


@pytest.mark.parametrize("pool", ["reference", "model"])
def test_an_oblong_image_is_explained_though_torchvisions_own_pass_takes_squares_only(pool):
    model = tiny("torchvision")
    images = tiny_images(2, size=(12, 28), dtype=torch.float64)
    with pytest.raises(AssertionError, match="Wrong image height"):
        model(images)
    resampled = copy.deepcopy(model)
    prefix, patches = model.encoder.pos_embedding.split([1, 25], dim=1)
    grid = F.interpolate(
        patches.mT.unflatten(-1, (5, 5)), size=(3, 7), mode="bicubic", antialias=True, align_corners=False
    )
    resampled.encoder.pos_embedding = nn.Parameter(torch.cat([prefix, grid.flatten(2).mT], dim=1))
    expected = relevance_of_logits(resampled, images, pool=pool)
    explainer = legrad.LeGrad(model, layers="all", pool=pool)
    received = explainer.relevance(images, class_index=range(CLASSES), per_layer=True).flatten(-2)
    assert relative_error(received, expected) < 1e-12


@pytest.mark.parametrize("name", ["relative positions", "shared relative positions"])
def test_relative_positions_are_bound_to_one_size(name):
    with pytest.raises(legrad.InputError, match="bound to 12 x 20 pixels, received 16 x 16"):
        legrad.LeGrad(tiny(name)).encode(tiny_images(size=(16, 16), dtype=torch.float64))


@pytest.mark.parametrize("name", ["class token", "DeiT with two heads", "DINOv2", "EVA02", "torchvision"])
def test_half_precision_stays_near_single(name):
    model, images = tiny(name).float(), images_for(name).float()
    single = legrad.LeGrad(model).relevance(images, class_index=[0, 3])
    half = copy.deepcopy(model).bfloat16()
    explainer = legrad.LeGrad(half)
    received = explainer.relevance(images.bfloat16(), class_index=[0, 3])
    assert received.dtype == torch.float32
    assert relative_error(received, single) < 0.1
    assert (
        relative_error(explainer.logits(images.bfloat16()), half(images.bfloat16()))
        < TOLERANCES[torch.bfloat16]
    )


def _state(model):
    return {
        "tensors": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "flags": [(module.training, dict(module._forward_hooks)) for module in model.modules()],
        "gradients": [(one.requires_grad, one.grad) for one in model.parameters()],
        "random": torch.get_rng_state(),
    }


def _same(before, after):
    return (
        all(torch.equal(before["tensors"][name], after["tensors"][name]) for name in before["tensors"])
        and before["flags"] == after["flags"]
        and before["gradients"] == after["gradients"]
        and torch.equal(before["random"], after["random"])
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["class token", "DeiT with two heads", "torchvision with dropout"])
def test_the_model_is_left_as_it_was_and_dropout_never_acts(name, training):
    model = tiny(name)
    expected = legrad.LeGrad(model).relevance(images_for(name), class_index=[1])
    model.train(training)
    before = _state(model)
    explainer = legrad.LeGrad(model)
    received = explainer.relevance(images_for(name), class_index=[1])
    explainer.heatmaps(images_for(name), class_index=[1])
    explainer.logits(images_for(name))
    torch.testing.assert_close(received, expected)
    assert _same(before, _state(model))


def test_a_head_of_dropout_norm_and_hidden_layer_is_part_of_the_score():
    for name, place in (("class token", "head"), ("torchvision", "heads")):
        model = tiny(name)
        head = nn.Sequential(
            nn.Dropout(0.5), nn.LayerNorm(32), nn.Linear(32, 16), nn.GELU(), nn.Sequential(nn.Linear(16, 3))
        )
        setattr(model, place, fill(head).double())
        model.eval()
        images = images_for(name)
        explainer = legrad.LeGrad(model, layers="all")
        received = explainer.relevance(images, class_index=range(3), per_layer=True).flatten(-2)
        assert relative_error(received, relevance_of_logits(model, images)) < 1e-12
        assert relative_error(explainer.logits(images), model(images)) < 1e-12


def test_weights_that_change_in_place_and_another_head_are_followed():
    model, images = tiny("class token"), images_for("class token")
    explainer = legrad.LeGrad(model)
    explainer.relevance(images, class_index=[1])
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight.mul_(1.5)
        model.head.weight.add_(0.1)
    changed = explainer.relevance(images, class_index=[1])
    torch.testing.assert_close(changed, legrad.LeGrad(model).relevance(images, class_index=[1]))
    model.head = fill(nn.Linear(32, 2)).double()
    torch.testing.assert_close(explainer.logits(images), model(images))
    with pytest.raises(legrad.InputError, match="the model has 2 classes, received 6"):
        explainer.relevance(images, class_index=[6])


def test_an_explainer_can_be_copied_and_pickled():
    for name in ("DeiT with two heads", "torchvision"):
        model, images = tiny(name), images_for(name)
        names = [f"class {index}" for index in range(CLASSES)]
        explainer = legrad.LeGrad(model, class_names=names)
        expected = explainer.relevance(images, class_index=[0, 6])
        for other in (copy.copy(explainer), copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
            torch.testing.assert_close(other.relevance(images, class_index=[0, 6]), expected)
            assert other.class_names == tuple(names)


class _LowRank(nn.Linear):
    """A layer with an adapter that is not merged."""

    def forward(self, inputs):
        return super().forward(inputs) + 1


class _OtherVit(timm.models.vision_transformer.VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, pre_logits) * 2


class _OtherTorchvisionVit(VisionTransformer):
    pass


def _replaced(path, module):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)

    return change


def _own_method(model):
    model.forward_head = lambda tokens, pre_logits=False: tokens[:, 0]


def _unused_norm(model):
    model.fc_norm = nn.LayerNorm(32)


def _convolutional_stem(model):
    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 2)]
    model.conv_proj = tiny_torchvision_vit(conv_stem_configs=stem).conv_proj


REFUSED = {
    "no head": (
        "class token",
        lambda model: model.reset_classifier(0),
        "it has no classifier.*num_classes=N",
    ),
    "adapter": ("class token", _replaced("blocks.1.attn.qkv", _LowRank(32, 96)), "qkv is a _LowRank"),
    "adapter in torchvision": (
        "torchvision",
        _replaced("encoder.layers.encoder_layer_1.mlp.0", _LowRank(32, 64)),
        "mlp.0 is a _LowRank",
    ),
    "other head": ("class token", _replaced("head", nn.Bilinear(32, 32, 7)), "head is a Bilinear"),
    "other heads": (
        "torchvision",
        _replaced("heads.head", nn.Bilinear(32, 32, 7)),
        "heads.head is a Bilinear",
    ),
    "hook on the head": (
        "class token",
        lambda model: model.head.register_forward_hook(lambda *_: None),
        "a forward hook is registered",
    ),
    "hook on the model": (
        "class token",
        lambda model: model.register_forward_hook(lambda *_: None),
        "a forward hook is registered",
    ),
    "replaced method": ("class token", _own_method, "method `forward_head` was replaced"),
    "pooling": ("class token", lambda model: setattr(model, "global_pool", "max"), "its pooling is 'max'"),
    "stem": ("torchvision", _convolutional_stem, "patches are made by a Sequential|plain convolution"),
    "norm that DeiT never applies": ("DeiT with two heads", _unused_norm, "norm, which it never applies"),
    "two heads that are no layers": (
        "DeiT with two heads",
        lambda model: model.reset_classifier(0),
        "it has no classifier",
    ),
    "other attention": (
        "torchvision",
        _replaced(
            "encoder.layers.encoder_layer_0.self_attention",
            nn.MultiheadAttention(32, 4, add_zero_attn=True, batch_first=True),
        ),
        "adds keys beyond those of the tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_covered_is_refused_with_the_part_that_differs(case):
    name, change, reason = REFUSED[case]
    model = tiny(name).float()
    explainer = legrad.LeGrad(model)
    change(model)
    with pytest.raises(legrad.UnsupportedModelError, match=reason):
        legrad.LeGrad(model)
    with pytest.raises(legrad.UnsupportedModelError, match=reason):
        explainer.relevance(images_for(name).float(), class_index=[0])


def test_subclasses_and_models_of_other_kinds_are_refused_by_name():
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    with pytest.raises(legrad.UnsupportedModelError, match="_OtherVit"):
        legrad.LeGrad(_OtherVit(**sizes, num_classes=3))
    with pytest.raises(legrad.UnsupportedModelError, match="_OtherTorchvisionVit"):
        legrad.LeGrad(_OtherTorchvisionVit(16, 4, 1, 2, 32, 64, num_classes=3))
    with pytest.raises(legrad.UnsupportedModelError, match="ResNet is convolutional"):
        legrad.LeGrad(timm.create_model("resnet10t"))
    with pytest.raises(legrad.UnsupportedModelError, match="SwinTransformer attends within windows"):
        legrad.LeGrad(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)))


def test_a_classifier_has_no_texts_and_a_clip_has_no_classes():
    classifier, clip = legrad.LeGrad(tiny("class token")), legrad.LeGrad(tiny_clip())
    images, clip_images = images_for("class token"), tiny_images()
    rows = torch.eye(CLASSES, dtype=torch.float64)
    refusals = [
        (
            lambda: classifier.embed_text(["a cat"]),
            "embed_text: .* is a classifier and has no text tower.*class_index=",
        ),
        (lambda: classifier.relevance(images, rows), "text_embeddings: .* is a classifier.*class_index="),
        (lambda: classifier.relevance(images), "expected class_index=..., as this model is a classifier"),
        (lambda: classifier.heatmaps(images, rows), "text_embeddings: .* is a classifier"),
        (
            lambda: classifier.similarity(classifier.encode(images), rows),
            "similarity: .* is a classifier.*`logits`",
        ),
        (
            lambda: classifier.heatmaps(images, class_index=0, neutral_embedding=rows[0]),
            "neutral_embedding: .* is a classifier",
        ),
        (lambda: clip.relevance(clip_images, class_index=0), "compares images with texts"),
        (lambda: clip.relevance(clip_images, unit_texts(1), class_index=0), "class_index: .*compares images"),
        (lambda: clip.relevance(clip_images), "expected text_embeddings"),
        (lambda: clip.heatmaps(clip_images, class_index=0), "compares images with texts"),
        (lambda: clip.logits(clip_images), "compares images with texts.*similarity"),
        (lambda: clip.find_class("cat"), "compares images with texts"),
        (lambda: legrad.LeGrad(tiny_clip(), class_names=["cat"]), "compares images with texts"),
    ]
    for call, message in refusals:
        with pytest.raises(legrad.InputError, match=message):
            call()


def test_classes_are_found_by_name():
    names = ["cat", "dog", *map(str, range(2, CLASSES))]
    explainer = legrad.LeGrad(tiny("torchvision"), class_names=names)
    assert (explainer.find_class("DOG"), explainer.find_class(0), explainer.find_class("1")) == (1, 0, 1)
    with pytest.raises(legrad.InputError, match=r"nearest: 0 \(cat\)"):
        explainer.find_class("cats")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat"], "expected a list of 7 names, one for each class, received 1 names"),
        ("abcdefg", "received a single string"),
        ([*"abcdef", None], "received others than strings among them"),
    ],
)
def test_class_names_that_do_not_fit_the_model_are_refused(names, message):
    tower = legrad.LeGrad(tiny("torchvision")).tower
    with pytest.raises(legrad.InputError, match=message):
        check_class_names(names, tower)


def test_images_are_prepared_as_the_weights_were_trained_but_never_cropped():
    model = tiny("class token")
    model.pretrained_cfg = model.pretrained_cfg | {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    transform = legrad.LeGrad(model).transform
    assert (transform.height, transform.width) == (12, 20)
    assert (transform.mean, transform.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert transform.interpolation == "bicubic"
    of_torchvision = legrad.LeGrad(tiny("torchvision")).transform
    assert (of_torchvision.height, of_torchvision.interpolation) == (20, "bilinear")
    assert of_torchvision.mean == (0.485, 0.456, 0.406)


def test_a_classifier_of_dinov2_is_timms_model_with_the_head_trained_on_its_features():
    """What the documents say about a linear head that was trained on the features of the backbone."""
    backbone = tiny_timm_classifier("vit_base_patch14_reg4_dinov2")
    backbone.reset_classifier(0)
    linear = fill(nn.Linear(32, 3))
    images = tiny_images()
    expected = linear(backbone(images))
    backbone.head = linear
    torch.testing.assert_close(legrad.LeGrad(backbone).logits(images), expected)


def test_one_image_is_explained_for_classes_by_name_and_by_number():
    names = ["cat", "dog", *map(str, range(2, CLASSES))]
    explainer = legrad.LeGrad(tiny("torchvision").float(), class_names=names, affinity="keys")
    levels = torch.randint(0, 256, (30, 40, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(levels.to(torch.uint8).numpy())
    explanation = legrad.explain_image(explainer, image, ["Dog", "0"])
    assert explanation.texts == ("Dog", "0: cat")
    pixels = explainer.preprocess([image])
    torch.testing.assert_close(explanation.similarities, explainer.logits(pixels, [1, 0])[0])
    torch.testing.assert_close(explanation.heatmaps, explainer.heatmaps(pixels, class_index=[1, 0])[0])
    assert explanation.score_name == "logit"
    assert explanation.side_by_side().width > explanation.layer_strips[0].width / 3
    with pytest.raises(legrad.InputError, match="no class is named 'bird'"):
        legrad.explain_image(explainer, image, ["bird"])


def test_many_images_are_explained_for_names_and_numbers_of_classes(tmp_path):
    names = ["cat", "dog, hound", "eel", "fox", "gnu", "hen", "ibex"]
    explainer = legrad.LeGrad(tiny("torchvision").float(), class_names=names, affinity="keys")
    images = [Image.effect_noise((40, 30), 80), Image.effect_noise((20, 50), 80)]
    explanations = legrad.explain_images(explainer, images, [["Hound", 0], ["gnu"]])
    assert explanations.texts == (("Hound", "0: cat"), ("gnu",))
    for image, texts, maps, logits in zip(
        images, (["dog", "cat"], [4]), explanations.maps, explanations.similarities, strict=True
    ):
        alone = legrad.explain_image(explainer, image, texts)
        torch.testing.assert_close(maps, alone.heatmaps)
        torch.testing.assert_close(logits, alone.similarities)
    table = legrad.Explanations.load(explanations.save(tmp_path / "saved")).to_dataframe()
    assert table["logit"].tolist() == torch.cat(explanations.similarities).tolist()
    assert "similarity" not in table


def test_views_are_merged_for_classes():
    explainer = legrad.LeGrad(tiny("class token").float())
    image = Image.effect_noise((40, 30), 80)
    (alone,) = legrad.view_relevance(explainer, [image], class_index=[1, 0], views=legrad.Views())
    pixels = explainer.preprocess([image])
    torch.testing.assert_close(alone, explainer.relevance(pixels, class_index=[1, 0])[0])
    (merged,) = legrad.view_relevance(explainer, [image], class_index=1, views=legrad.Views(flip=True))
    mirrored = explainer.relevance(pixels.flip(-1), class_index=1).flip(-1)
    torch.testing.assert_close(merged, (alone[:1] + mirrored[0]) / 2)
