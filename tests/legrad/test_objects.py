"""What objects print, when they are equal, and how they are kept."""

import copy
import io
import pickle

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import legrad
from tests.helpers.tiny_models import tiny_clip, tiny_images, unit_texts

POOLED = {"attentional_pool": True, "attn_pooler_heads": 4}


class OneText:
    """A tokenizer of the tiny model that knows a single text."""

    def __call__(self, texts):
        return torch.ones(len(texts), 16, dtype=torch.int64)


@pytest.fixture
def explainer():
    return legrad.LeGrad(tiny_clip(), tokenizer=OneText())


@pytest.fixture
def trace(explainer):
    return explainer.encode(tiny_images(2))


def test_an_explainer_prints_what_it_explains_in_a_line(explainer):
    assert repr(explainer) == (
        "LeGrad(CLIP, family clip, blocks 1, 2 of 3, 12 x 20 pixels, pool reference, cpu, float32)"
    )
    half = legrad.LeGrad(tiny_clip().bfloat16(), layers="all", pool="model", image_size=16)
    assert (
        repr(half)
        == "LeGrad(CLIP, family clip, blocks 0, 1, 2 of 3, 16 x 16 pixels, pool model, cpu, bfloat16)"
    )


def test_a_trace_prints_its_shape_in_a_line(trace):
    assert repr(trace).startswith("Trace(2 images, grid 3 x 5, blocks 1, 2, cpu, float32, 0.")
    assert repr(trace.layers[0]) == "LayerTrace(block 1, 2 x 16 x 32, cpu, float32)"


def test_an_explanation_prints_its_image_and_texts_in_a_line(explainer):
    image = Image.new("RGB", (50, 30))
    explanation = legrad.explain_image(explainer, image, ["a cat", "a dog"])
    assert repr(explanation) == "Explanation(image of 50 x 30 pixels, 2 texts: 'a cat', 'a dog'; blocks 1, 2)"
    many = legrad.explain_image(explainer, image, ["x" * 99, *"abcdef"])
    assert repr(many).endswith("7 texts: 'xxxxxxxxxxxxxxxxxxxxxxxx', 'a', 'b', ...; blocks 1, 2)")


def test_masks_print_their_number_and_areas_in_a_line():
    grids = torch.zeros(9, 4, 6)
    grids[0, :2, :3] = 1
    masks = legrad.grid_to_masks(grids, 40, 60, legrad.MaskRule("otsu"))
    assert repr(masks) == f"ImageMasks(9 masks of 60 x 40 pixels, areas {masks.areas[0]}, 0, 0, 0, 0, 0, ...)"
    assert len(repr(legrad.Refinement(dilations=(1,)))) < 200


def test_traces_are_equal_if_their_values_are(explainer, trace):
    same = explainer.encode(tiny_images(2))
    assert trace == same == copy.deepcopy(trace)
    assert hash(trace) == hash(same)
    assert trace.layers == same.layers
    assert trace.layers[0] != trace.layers[1]
    for other in (
        explainer.encode(tiny_images(2, seed=7)),
        explainer.encode(tiny_images(3)),
        legrad.LeGrad(explainer.model, layers=1).encode(tiny_images(2)),
        legrad.LeGrad(explainer.model, affinity="keys").encode(tiny_images(2)),
        legrad.LeGrad(tiny_clip().double()).encode(tiny_images(2, dtype=torch.float64)),
        "a trace",
        None,
    ):
        assert trace != other


def test_a_trace_moves_to_a_device_with_all_its_tensors(trace):
    moved = trace.to("meta")
    tensors = [tensor for _, tensor in moved.named_tensors() if tensor is not None]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.layers[0].outputs is moved.layers[0].block_outputs
    assert moved.nbytes == trace.nbytes
    assert trace.to("cpu") == trace


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_trace_on_a_gpu_equals_its_copy_on_the_cpu(trace):
    assert trace.to("cuda") == trace
    assert trace.to("cuda").to("cpu") == trace


@pytest.mark.parametrize("vision", [{}, POOLED, {"ls_init_value": 0.5}])
@pytest.mark.parametrize("affinity", ["none", "keys"])
def test_a_trace_is_saved_and_loaded_by_an_explainer_of_the_same_weights(vision, affinity, tmp_path):
    explainer = legrad.LeGrad(tiny_clip(**vision), affinity=affinity)
    trace, texts = explainer.encode(tiny_images(2)), unit_texts(3)
    legrad.save_trace(explainer, trace, tmp_path / "a.trace")
    other = legrad.LeGrad(tiny_clip(**vision), affinity=affinity)
    loaded = legrad.load_trace(other, str(tmp_path / "a.trace"))
    assert loaded == trace
    assert torch.equal(other.relevance(loaded, texts), explainer.relevance(trace, texts))
    legrad.save_trace(other, loaded, tmp_path / "a.trace")  # replaces the file
    assert legrad.load_trace(explainer, tmp_path / "a.trace") == trace


def _fine_tuned(model):
    with torch.no_grad():
        model.visual.transformer.resblocks[0].mlp.c_fc.weight += 1e-3
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: _fine_tuned(tiny_clip()),
        lambda: tiny_clip(layers=2),
        lambda: tiny_clip().double(),
        lambda: tiny_clip(**POOLED),
    ],
)
def test_the_file_of_another_towers_trace_is_refused(other, explainer, trace, tmp_path):
    legrad.save_trace(explainer, trace, tmp_path / "a.trace")
    with pytest.raises(legrad.InputError, match="made by another vision tower, with other weights"):
        legrad.load_trace(legrad.LeGrad(other()), tmp_path / "a.trace")


def _without_outputs(tensors, metadata):
    del tensors["layers.1.outputs"]


def _with_another_batch(tensors, metadata):
    tensors["layers.1.outputs"] = tensors["layers.1.outputs"][:1].clone()


def _with_narrow_values(tensors, metadata):
    tensors["layers.1.values"] = tensors["layers.1.values"][..., :3].clone()


def _with_another_grid(tensors, metadata):
    metadata["trace"] = metadata["trace"].replace("[3, 5]", "[4, 5]")


def _with_a_block_too_many(tensors, metadata):
    metadata["trace"] = metadata["trace"].replace('"layers": [1, 2]', '"layers": [1, 2, 99]')


def _without_facts(tensors, metadata):
    metadata["trace"] = "[]"


def _of_another_format(tensors, metadata):
    metadata["format"] = "legrad trace 0"


@pytest.mark.parametrize(
    "damage",
    [
        _without_outputs,
        _with_another_batch,
        _with_narrow_values,
        _with_another_grid,
        _with_a_block_too_many,
        _without_facts,
        _of_another_format,
    ],
)
def test_a_damaged_file_of_a_trace_is_refused(damage, explainer, trace, tmp_path):
    path = tmp_path / "a.trace"
    legrad.save_trace(explainer, trace, path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damage(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(legrad.InputError, match=r"is damaged|is of the format"):
        legrad.load_trace(explainer, path)


def test_a_file_that_is_no_trace_is_refused(explainer, trace, tmp_path):
    with pytest.raises(legrad.InputError, match="there is no file"):
        legrad.load_trace(explainer, tmp_path / "none")
    (tmp_path / "a.pt").write_bytes(pickle.dumps("no trace"))
    with pytest.raises(legrad.InputError, match="is no file of save_trace"):
        legrad.load_trace(explainer, tmp_path / "a.pt")
    with pytest.raises(legrad.InputError, match="cannot write"):
        legrad.save_trace(explainer, trace, tmp_path / "no folder" / "a.trace")


def test_a_pickled_trace_is_for_any_explainer_of_the_same_structure(explainer, trace):
    sink = io.BytesIO()
    torch.save(trace, sink)
    loaded = torch.load(io.BytesIO(sink.getvalue()), weights_only=False)
    assert loaded == trace
    assert torch.equal(explainer.relevance(loaded, unit_texts(2)), explainer.relevance(trace, unit_texts(2)))
