"""No change of a model makes its maps silently wrong: it is followed, or refused with the module's name."""

import copy
import io
import pickle
from functools import partial

import cloudpickle
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import legrad
from tests.helpers.oracle import oracle_relevance
from tests.helpers.timm_models import relevance_by_autograd, tiny_timm_clip
from tests.helpers.tiny_models import (
    EMBED_DIM,
    TEXT,
    VISION,
    fill,
    relative_error,
    tiny_clip,
    tiny_images,
    unit_texts,
)


class LoraLinear(nn.Linear):
    """Like loralib's: a subclass with an un-merged adapter, which starts as zero."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.lora_A = nn.Parameter(torch.randn(2, self.in_features, dtype=self.weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, 2, dtype=self.weight.dtype))

    def forward(self, inputs):
        return super().forward(inputs) + inputs @ self.lora_A.T @ self.lora_B.T


class PeftLora(nn.Module):
    """Like peft's: a wrapper around the layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def merge_and_unload(self):
        return self.base_layer

    def forward(self, inputs):
        return self.base_layer(inputs) * 1.1


class OtherNorm(nn.LayerNorm):
    def forward(self, inputs):
        return super().forward(inputs) * 1.2


class OtherAttention(nn.MultiheadAttention):
    def forward(self, *args, **options):
        mixed, weights = super().forward(*args, **options)
        return mixed * 1.1, weights


class OtherBlock(open_clip.transformer.ResidualAttentionBlock):
    def forward(self, *args, **options):
        return super().forward(*args, **options) * 1.1


class OtherTransformer(open_clip.transformer.VisionTransformer):
    def forward(self, images):
        return super().forward(images) * 1.1


class OtherClip(open_clip.CLIP):
    def encode_image(self, image, normalize=False):
        return F.normalize(self.visual(image) + 1, dim=-1)


class Squared(nn.Module):
    """An activation that nobody knows."""

    def forward(self, inputs):
        return inputs.relu().square()


class RandomActivation(nn.Module):
    def forward(self, inputs):
        return F.dropout(inputs.relu(), 0.3, self.training)


class InPlace(nn.Module):
    """An activation that overwrites its inputs, and has no attribute that says so."""

    def forward(self, inputs):
        return inputs.relu_()


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        return inputs.relu()


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def block(model):
    return model.visual.transformer.resblocks[1]


def _become(path, kind, **attributes):
    """Give a module another class, keeping its weights."""

    def change(model):
        module = model.get_submodule(path)
        module.__class__ = kind
        for name, value in attributes.items():
            setattr(module, name, value(module))
        return model

    return change


def _put(path, make):
    """Put another module in the place of one, made from it."""

    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))
        return model

    return change


def _does(action):
    def change(model):
        action(model)
        return model

    return change


def _zeros(rows, columns):
    return lambda module: nn.Parameter(torch.zeros(rows, columns, dtype=module.weight.dtype))


def _own_method(path, name):
    def change(model):
        module = model.get_submodule(path)
        method = getattr(module, name)
        setattr(module, name, partial(method))
        return model

    return change


BLOCK = "visual.transformer.resblocks.1"
ADAPTER = _become(f"{BLOCK}.mlp.c_fc", LoraLinear, lora_A=_zeros(2, 32), lora_B=_zeros(128, 2))
# Of each: what a refusal names: the class, the place in the model, the way out.
REFUSED = {
    "adapter that starts as zero": (ADAPTER, "LoraLinear", f"{BLOCK}.mlp.c_fc", "merge_and_unload"),
    "wrapped linear layer": (
        _put(f"{BLOCK}.mlp.c_proj", PeftLora),
        "test_faithful.PeftLora",
        f"{BLOCK}.mlp.c_proj",
        "merge_and_unload",
    ),
    "norm": (_become(f"{BLOCK}.ln_2", OtherNorm), "OtherNorm", f"{BLOCK}.ln_2", "nn.modules.normalization"),
    "norm before attention": (
        _become(f"{BLOCK}.ln_1", OtherNorm),
        "OtherNorm",
        f"{BLOCK}.ln_1",
        "replace it",
    ),
    "last norm": (_become("visual.ln_post", OtherNorm), "OtherNorm", "visual.ln_post", "replace it"),
    "norm of another kind": (
        _put(f"{BLOCK}.ln_2", lambda _: nn.RMSNorm(32).double()),
        "torch.nn.modules.normalization.RMSNorm",
        f"{BLOCK}.ln_2",
        "own module back",
    ),
    "attention": (_become(f"{BLOCK}.attn", OtherAttention), "OtherAttention", f"{BLOCK}.attn", "replace it"),
    "block": (_become(BLOCK, OtherBlock), "OtherBlock", BLOCK, "ResidualAttentionBlock"),
    "tower": (_become("visual", OtherTransformer), "OtherTransformer", "visual", "transformer.VisionTransf"),
    "projection": (
        _put("visual.patch_dropout", lambda _: nn.Linear(32, 32)),
        "Linear",
        "visual.patch_dropout",
        "",
    ),
    "head that is a layer": (
        _does(
            lambda model: (
                delattr(model.visual, "proj"),
                setattr(model.visual, "proj", nn.Linear(32, 24, bias=False)),
            )
        ),
        "torch.nn.modules.linear.Linear",
        "visual.proj",
        "own module back",
    ),
    "blocks in another container": (
        _put("visual.transformer", lambda transformer: nn.Sequential(*transformer.resblocks)),
        "Sequential",
        "resblocks",
        "",
    ),
    "model": (_become("", OtherClip), "OtherClip", "encode_image", "open_clip model inside"),
    "own encode_image": (_own_method("", "encode_image"), "CLIP", "encode_image", "open_clip model inside"),
    "own forward": (_own_method(BLOCK, "forward"), "ResidualAttentionBlock", BLOCK, "del module.forward"),
    "own forward of a layer": (
        _own_method(f"{BLOCK}.mlp.c_fc", "forward"),
        "torch.nn.modules.linear.Linear",
        f"{BLOCK}.mlp.c_fc",
        "del module.forward",
    ),
    "own attention": (
        _own_method(BLOCK, "attention"),
        "ResidualAttentionBlock",
        BLOCK,
        "del module.attention",
    ),
    "own pooling": (_own_method("visual", "_pool"), "VisionTransformer", "visual", "del module._pool"),
    "forward hook": (
        _does(lambda model: block(model).register_forward_hook(lambda *_: None)),
        "ResidualAttentionBlock",
        BLOCK,
        "remove()",
    ),
    "forward pre-hook": (
        _does(lambda model: block(model).mlp.register_forward_pre_hook(lambda *_: None)),
        "Sequential",
        f"{BLOCK}.mlp",
        "remove()",
    ),
    "backward hook": (
        _does(lambda model: block(model).register_full_backward_hook(lambda *_: None)),
        "ResidualAttentionBlock",
        BLOCK,
        "remove()",
    ),
    "backward pre-hook": (
        _does(lambda model: block(model).attn.register_full_backward_pre_hook(lambda *_: None)),
        "MultiheadAttention",
        f"{BLOCK}.attn",
        "remove()",
    ),
    "hook on the activation": (
        _does(lambda model: block(model).mlp.gelu.register_forward_hook(lambda _m, _i, output: output * 2)),
        "GELU",
        f"{BLOCK}.mlp.gelu",
        "remove()",
    ),
    "hook on the tower": (
        _does(lambda model: model.visual.register_forward_hook(lambda _m, _i, output: output * 2)),
        "VisionTransformer",
        "visual",
        "remove()",
    ),
    "parametrization": (
        _does(lambda model: parametrize.register_parametrization(block(model).mlp.c_fc, "weight", Doubled())),
        "Linear",
        f"{BLOCK}.mlp.c_fc",
        "remove_parametrizations",
    ),
    "weight norm": (
        _does(lambda model: nn.utils.parametrizations.weight_norm(block(model).attn.out_proj)),
        "Linear",
        f"{BLOCK}.attn.out_proj",
        "remove_parametrizations",
    ),
    "spectral norm": (
        _does(lambda model: nn.utils.spectral_norm(block(model).mlp.c_fc)),
        "SpectralNorm",
        f"{BLOCK}.mlp.c_fc",
        "remove_spectral_norm",
    ),
    "pruning": (
        _does(lambda model: prune.l1_unstructured(block(model).mlp.c_fc, "weight", 0.5)),
        "prune.L1Unstructured",
        f"{BLOCK}.mlp.c_fc",
        "prune.remove",
    ),
    "compiled block": (
        _put(BLOCK, torch.compile),
        "torch._dynamo.eval_frame.OptimizedModule",
        BLOCK,
        "_orig_mod",
    ),
    "compiled tower": (_put("visual", torch.compile), "OptimizedModule", "visual", "_orig_mod"),
    "parallel tower": (_put("visual", nn.DataParallel), "DataParallel", "visual", ".module"),
    "activation over all channels": (
        _put(f"{BLOCK}.mlp.gelu", lambda _: nn.Softmax(dim=-1)),
        "torch.nn.modules.activation.Softmax",
        f"{BLOCK}.mlp.gelu",
        "Way out",
    ),
    "activation with one weight for each channel": (
        _put(f"{BLOCK}.mlp.gelu", lambda _: nn.PReLU(128).double()),
        "torch.nn.modules.activation.PReLU",
        f"{BLOCK}.mlp.gelu",
        "Way out",
    ),
    "activation with state": (
        _put(f"{BLOCK}.mlp.gelu", lambda _: Counting()),
        "test_faithful.Counting",
        f"{BLOCK}.mlp.gelu",
        "Way out",
    ),
    "removed projection": (
        _does(lambda model: setattr(model.visual, "proj", None)),
        "projection was rem",
        "",
        "",
    ),
    "removed weight": (
        _does(lambda model: setattr(block(model).ln_2, "weight", None)),
        "LayerNorm",
        f"{BLOCK}.ln_2",
        "Way out",
    ),
    "random activation": (
        _put(f"{BLOCK}.mlp.gelu", lambda _: RandomActivation()),
        "test_faithful.RandomActivation",
        f"{BLOCK}.mlp.gelu",
        "Way out",
    ),
}


def _refusal(change, moment):
    """What is said where a model is changed before, or after, an explainer is made of it."""
    model = tiny_clip().double()
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, dtype=torch.float64)
    if moment == "before":
        with pytest.raises(legrad.UnsupportedModelError) as refusal:
            legrad.LeGrad(change(model))
        return str(refusal.value)
    explainer = legrad.LeGrad(model)
    trace = explainer.encode(images)
    change(model)
    said = set()
    for call in (
        lambda: explainer.encode(images),
        lambda: explainer.relevance(images, texts),
        lambda: explainer.relevance(trace, texts),
        lambda: explainer.heatmaps(trace, texts),
    ):
        with pytest.raises(legrad.UnsupportedModelError) as refusal:
            call()
        said.add(str(refusal.value))
    (only,) = said
    return only


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_explained_is_refused_with_class_place_and_way_out(way, moment):
    change, *named = REFUSED[way]
    said = _refusal(change, moment)
    assert [name for name in named if name not in said] == []
    assert "Way out: " in said or not named[-1]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_of_all_modules_are_refused(register, moment):
    handles = []
    try:
        said = _refusal(_does(lambda _: handles.append(register(lambda *_: None))), moment)
    finally:
        handles[0].remove()
    assert "registered for all modules" in said
    assert "remove()" in said


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_class_whose_forward_was_replaced_is_refused_with_the_block_where_features_part(
    moment, monkeypatch
):
    kind = open_clip.transformer.ResidualAttentionBlock
    forward = kind.forward

    def patched(self, *args, **options):
        return forward(self, *args, **options) * 1.1

    said = _refusal(_does(lambda _: monkeypatch.setattr(kind, "forward", patched)), moment)
    assert "visual.transformer.resblocks.0, a open_clip.transformer.ResidualAttentionBlock" in said


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_class_that_changes_only_tokens_that_the_model_does_not_pool_is_refused(moment, monkeypatch):
    kind = open_clip.transformer.ResidualAttentionBlock
    forward = kind.forward

    def patched(self, *args, **options):
        tokens = forward(self, *args, **options)
        is_last = self.ln_1.bias is last_bias[0]
        return torch.cat([tokens[:, :1], tokens[:, 1:] * 3], dim=1) if is_last else tokens

    last_bias = []

    def change(model):
        last_bias.append(model.visual.transformer.resblocks[-1].ln_1.bias)
        monkeypatch.setattr(kind, "forward", patched)

    said = _refusal(_does(change), moment)
    assert "own tokens" in said
    assert "visual.transformer.resblocks.2" in said


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "forward"),
    [
        (nn.GELU, lambda self, inputs: inputs.relu()),
        (open_clip.transformer.LayerNorm, lambda self, inputs: inputs * self.weight + self.bias),
    ],
)
def test_a_class_with_another_derivative_than_its_own_is_refused(kind, forward, moment, monkeypatch):
    said = _refusal(_does(lambda _: monkeypatch.setattr(kind, "forward", forward)), moment)
    assert f"{kind.__qualname__}, has another derivative" in said


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (torch.compile, ["OptimizedModule", "_orig_mod"]),
        (nn.DataParallel, ["torch.nn.parallel.data_parallel.DataParallel", "model.module"]),
        (PeftLora, ["PeftLora", "merge_and_unload"]),
        (lambda model: model.visual, ["open_clip.transformer.VisionTransformer", "create_model"]),
        (torch.jit.script, ["Script"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_model_that_is_wrapped_is_refused_with_what_to_take_in_its_place(wrap, named):
    with pytest.raises(legrad.UnsupportedModelError) as refusal:
        legrad.LeGrad(wrap(tiny_clip()))
    assert [name for name in named if name not in str(refusal.value)] == []


def _with_other_weights(model):
    other = tiny_clip().double()
    for parameter in other.parameters():
        parameter.data *= 1.1
    return other


def _train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.encode_image(tiny_images(2, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


FOLLOWED = {
    "nothing": _does(lambda model: None),
    "other weights": _does(lambda model: model.load_state_dict(_with_other_weights(model).state_dict())),
    "other tensors": _does(
        lambda model: model.load_state_dict(_with_other_weights(model).state_dict(), assign=True)
    ),
    "a step of training": _does(_train),
    "another block": _put(BLOCK, lambda _: block(_with_other_weights(None))),
    "another tower": _put("visual", lambda _: _with_other_weights(None).visual),
    "another layer": _put(f"{BLOCK}.mlp.c_fc", lambda _: nn.Linear(32, 128).double()),
    "fewer blocks": _does(lambda model: model.visual.transformer.resblocks.pop(0)),
    "another activation": _put(f"{BLOCK}.mlp.gelu", lambda _: nn.Tanh()),
    "an activation of one's own": _put(f"{BLOCK}.mlp.gelu", lambda _: Squared()),
    "an activation that overwrites its inputs": _put(f"{BLOCK}.mlp.gelu", lambda _: InPlace()),
    "a chain of activations": _put(
        f"{BLOCK}.mlp.gelu", lambda _: nn.Sequential(nn.ReLU(inplace=True), nn.Tanh())
    ),
    "fewer heads": _does(
        lambda model: (setattr(block(model).attn, "num_heads", 2), setattr(block(model).attn, "head_dim", 16))
    ),
    "another pooling": _does(lambda model: setattr(model.visual, "pool_type", "avg")),
    "another epsilon": _does(lambda model: setattr(block(model).ln_2, "eps", 0.5)),
    "training mode": _does(nn.Module.train),
    "a hook where patches are cut": _does(
        lambda model: model.visual.conv1.register_forward_hook(lambda _m, _i, output: output * 1.5)
    ),
    "blocks compiled in place": _does(lambda model: block(model).compile()),
    "checkpointed gradients": _does(lambda model: model.set_grad_checkpointing(True)),
    "frozen weights": _does(lambda model: model.requires_grad_(False)),
    "weights on other memory": _does(lambda model: model.to(torch.float64)),
}


@pytest.mark.parametrize("pool", ["reference", "model"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("way", FOLLOWED)
def test_what_can_be_explained_is_followed(way, moment, pool):
    model = tiny_clip().double()
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, 3, dtype=torch.float64)
    if moment == "after":
        explainer = legrad.LeGrad(model, pool=pool)
        explainer.relevance(images, texts)
        FOLLOWED[way](model)
    else:
        explainer = legrad.LeGrad(FOLLOWED[way](model), pool=pool)
    received = explainer.relevance(images, texts, per_layer=True).flatten(-2)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._compiled_call_impl = None
    plain.requires_grad_(True)
    assert relative_error(received, oracle_relevance(plain, images, texts, 2, pool)) < 1e-10


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.visual.transformer.float(),
        lambda model: setattr(model.visual.conv1, "stride", (2, 2)),
        lambda model: setattr(model.visual, "positional_embedding", nn.Parameter(torch.zeros(61, 32))),
    ],
)
def test_a_model_that_cannot_encode_an_image_itself_is_refused(change, moment):
    model = tiny_clip().double()
    if moment == "after":
        explainer = legrad.LeGrad(model)
    change(model)
    with pytest.raises(legrad.UnsupportedModelError, match=r"CLIP: the model itself cannot encode .*Way out"):
        explainer = explainer if moment == "after" else legrad.LeGrad(model)
        explainer.relevance(tiny_images(dtype=torch.float64), unit_texts(2, dtype=torch.float64))


@pytest.mark.parametrize("in_place", [True, False])
def test_preprocessing_that_changes_is_followed_at_once(in_place):
    model = tiny_clip()
    model.visual.preprocess_cfg = {"size": [12, 20], "mean": 0.5, "std": 0.5, "interpolation": "bicubic"}
    explainer = legrad.LeGrad(model)
    if not in_place:
        model.visual.preprocess_cfg = dict(model.visual.preprocess_cfg)
    model.visual.preprocess_cfg["mean"] = 0.0
    white = Image.new("RGB", (40, 30), "white")
    assert torch.equal(explainer.preprocess([white]), torch.full((1, 3, 12, 20), 2.0))


def test_looking_at_an_activation_leaves_it_as_it_was():
    model = tiny_clip()
    activation = block(model).mlp.gelu = nn.BatchNorm1d(3)
    before = copy.deepcopy(activation.state_dict())
    with pytest.raises(legrad.UnsupportedModelError, match="BatchNorm1d"):
        legrad.LeGrad(model.train())
    assert all(torch.equal(value, before[name]) for name, value in activation.state_dict().items())


def test_a_hook_that_is_removed_makes_the_model_explained_again():
    model = tiny_clip()
    explainer = legrad.LeGrad(model)
    expected = explainer.relevance(tiny_images(), unit_texts(2))
    handle = block(model).register_forward_hook(lambda *_: None)
    with pytest.raises(legrad.UnsupportedModelError):
        explainer.relevance(tiny_images(), unit_texts(2))
    handle.remove()
    assert torch.equal(explainer.relevance(tiny_images(), unit_texts(2)), expected)


def test_a_trace_of_other_modules_is_refused():
    model = tiny_clip()
    explainer = legrad.LeGrad(model)
    trace = explainer.encode(tiny_images())
    with pytest.raises(legrad.InputError, match="another model"):
        legrad.LeGrad(tiny_clip()).relevance(trace, unit_texts(2))
    model.visual.transformer.resblocks[1] = block(tiny_clip())
    with pytest.raises(legrad.InputError, match="modules of this one were replaced"):
        explainer.heatmaps(trace, unit_texts(2))


def test_more_layers_than_are_left_are_refused():
    model = tiny_clip()
    explainer = legrad.LeGrad(model, layers=3)
    model.visual.transformer.resblocks.pop(0)
    with pytest.raises(legrad.InputError, match="from 1 to 2, received 3"):
        explainer.encode(tiny_images())


def test_a_model_without_values_is_judged_by_its_classes():
    with torch.device("meta"):
        model = open_clip.CLIP(EMBED_DIM, VISION, TEXT)
    assert legrad.LeGrad(model).tower.family == "clip"
    model.visual.ln_post.__class__ = OtherNorm
    with pytest.raises(legrad.UnsupportedModelError, match=r"test_faithful\.OtherNorm"):
        legrad.LeGrad(model)


SIGLIP = {
    "adapter": ("visual.trunk.blocks.1.attn.qkv", LoraLinear),
    "norm": ("visual.trunk.blocks.1.norm2", OtherNorm),
    "last norm": ("visual.trunk.norm", OtherNorm),
    "pooler": (
        "visual.trunk.attn_pool",
        type("Pooler", (open_clip.timm_model.timm.layers.AttentionPoolLatent,), {}),
    ),
    "trunk": (
        "visual.trunk",
        type("Trunk", (open_clip.timm_model.timm.models.vision_transformer.VisionTransformer,), {}),
    ),
    "tower": ("visual", type("Tower", (open_clip.timm_model.TimmModel,), {})),
}


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("way", SIGLIP)
def test_subclasses_in_a_trunk_of_timm_are_refused(way, moment):
    path, kind = SIGLIP[way]
    model = tiny_timm_clip("ViT-B-16-SigLIP")
    explainer = legrad.LeGrad(model)
    model.get_submodule(path).__class__ = kind
    with pytest.raises(legrad.UnsupportedModelError) as refusal:
        legrad.LeGrad(model) if moment == "before" else explainer.encode(tiny_images())
    assert kind.__qualname__ in str(refusal.value)
    assert path in str(refusal.value)
    assert "Way out: " in str(refusal.value)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_head_that_is_put_behind_a_trunk_of_timm_is_followed(moment):
    model = tiny_timm_clip("ViT-B-16-SigLIP").double()
    images, texts = tiny_images(2, dtype=torch.float64), unit_texts(2, 3, dtype=torch.float64)
    explainer = legrad.LeGrad(model, pool="model")
    model.visual.head = nn.Linear(explainer.embed_dim, EMBED_DIM).double()
    if moment == "before":
        explainer = legrad.LeGrad(model, pool="model")
    expected = relevance_by_autograd(model, images, texts, prefix_tokens=0)[-2:]
    assert relative_error(explainer.relevance(images, texts, per_layer=True).flatten(-2), expected) < 1e-10


@pytest.mark.parametrize("name", ["fc1_g", "fc1_x"])
def test_a_bias_that_is_removed_from_one_half_of_a_gated_mlp_is_followed(name):
    model = tiny_timm_clip("EVA02-B-16").double()
    images = tiny_images(2, dtype=torch.float64)
    explainer = legrad.LeGrad(model)
    model.visual.trunk.blocks[1].mlp.get_submodule(name).bias = None
    with torch.no_grad():
        expected = model.encode_image(images, normalize=True)
    torch.testing.assert_close(explainer.encode(images).image_features, expected)


MODELS = {
    "clip": tiny_clip,
    "coca": lambda: tiny_clip(attentional_pool=True, attn_pooler_heads=4),
    "siglip": lambda: tiny_timm_clip("ViT-B-16-SigLIP"),
    "eva": lambda: tiny_timm_clip("EVA02-B-16"),
    "pe": lambda: tiny_timm_clip("PE-Core-B-16", attn_pool_num_heads=4),
    "relpos": lambda: tiny_timm_clip("vit_relpos_medium_patch16_cls_224"),
}


def _by_cloudpickle(explainer):
    return pickle.loads(cloudpickle.dumps(explainer))


def _by_torch(explainer):
    file = io.BytesIO()
    torch.save(explainer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda explainer: pickle.loads(pickle.dumps(explainer)),
    "cloudpickle": _by_cloudpickle,
    "torch.save": _by_torch,
}


def _zero(model):
    for parameter in model.parameters():
        parameter.data.zero_()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_explains_the_copied_model_and_neither_follows_the_other(way, name):
    explainer = legrad.LeGrad(MODELS[name](), layers=1, pool="model")
    images, texts = tiny_images(), torch.eye(2, explainer.embed_dim)
    expected = explainer.relevance(images, texts)
    copied, again = COPIES[way](explainer), COPIES[way](explainer)
    _zero(explainer.model)
    assert torch.equal(copied.relevance(images, texts), expected)
    changed = explainer.relevance(images, texts)
    _zero(again.model)
    assert torch.equal(copied.relevance(images, texts), expected)
    assert not torch.equal(changed, expected)
    assert (copied.transform, copied.embed_dim) == (explainer.transform, explainer.embed_dim)


def test_a_copy_that_is_not_deep_shares_the_model():
    explainer = legrad.LeGrad(tiny_clip())
    copied = copy.copy(explainer)
    assert copied.model is explainer.model
    block(explainer.model).mlp.c_fc.weight.data *= 1.1
    images, texts = tiny_images(), unit_texts(2)
    assert torch.equal(copied.relevance(images, texts), explainer.relevance(images, texts))


def test_an_explainer_and_its_trace_are_copied_together():
    explainer = legrad.LeGrad(tiny_clip())
    trace = explainer.encode(tiny_images())
    expected = explainer.relevance(trace, unit_texts(2))
    other, other_trace = pickle.loads(pickle.dumps((explainer, trace)))
    assert torch.equal(other.relevance(other_trace, unit_texts(2)), expected)


def test_a_default_device_of_the_caller_does_not_act():
    model = tiny_clip()
    with torch.device("meta"):
        explainer = legrad.LeGrad(model)
    assert explainer.tower.family == "clip"


class OtherText(open_clip.transformer.TextTransformer):
    def forward(self, text):
        return super().forward(text) + 1


class SeesAll(open_clip.transformer.ResidualAttentionBlock):
    def forward(self, tokens, attn_mask=None):
        return super().forward(tokens)


def _mixed(_module, _inputs, tokens):
    """Mix tokens, with the padding too."""
    return tokens + tokens.mean(dim=1, keepdim=True)


def _text(model):
    return model.text if isinstance(model, open_clip.CustomTextCLIP) else model


TEXT_CHANGES = {
    "tower": lambda model: setattr(model.text, "__class__", OtherText),
    "hook on the tower": lambda model: model.text.register_forward_hook(
        lambda _m, _i, output: output * torch.arange(EMBED_DIM)
    ),
    "own encode_text": lambda model: setattr(
        model, "encode_text", partial(type(model).encode_text.__get__(model))
    ),
    "no mask": lambda model: setattr(_text(model), "attn_mask", None),
    "another mask": lambda model: setattr(_text(model), "attn_mask", torch.zeros(16, 16)),
    "mask changed in place": lambda model: _text(model).attn_mask.zero_(),
    "block": lambda model: setattr(_text(model).transformer.resblocks[0], "__class__", SeesAll),
    "hook on a block": lambda model: _text(model).transformer.resblocks[0].register_forward_hook(_mixed),
    "hook on the words": lambda model: _text(model).token_embedding.register_forward_hook(_mixed),
    "hook on the norm": lambda model: _text(model).ln_final.register_forward_hook(
        lambda _m, _i, tokens: tokens + tokens.mean(dim=-2, keepdim=True)
    ),
    "own forward of a block": lambda model: setattr(
        _text(model).transformer.resblocks[0], "forward", lambda tokens, **_: _mixed(None, None, tokens)
    ),
    "own forward of the transformer": lambda model: setattr(
        _text(model).transformer, "forward", lambda tokens, **_: _mixed(None, None, tokens)
    ),
    "another pooling": lambda model: setattr(
        _text(model), "text_pool_type" if _text(model) is model else "pool_type", "last"
    ),
}


@pytest.mark.parametrize(
    ("way", "kind"),
    [(way, open_clip.CustomTextCLIP) for way in TEXT_CHANGES]
    + [(way, open_clip.CLIP) for way in TEXT_CHANGES if "tower" not in way],
)
def test_a_text_tower_that_computes_something_else_gets_its_texts_whole(way, kind):
    text = TEXT | {"vocab_size": 49408, "layers": 2}
    model = fill(kind(EMBED_DIM, VISION, text)).eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
    explainer = legrad.LeGrad(model, tokenizer=tokenizer)
    TEXT_CHANGES[way](model)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(["a dog", "two cats on a hill"]), normalize=True)
    torch.testing.assert_close(explainer.embed_text(["a dog", "two cats on a hill"]), expected)
