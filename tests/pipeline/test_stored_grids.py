"""Maps in the annotation rows: how grids are stored, and what is stored beside them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import legrad
from legrad.text_cache import TextEmbedder
from pipeline.annotate.engine import Engine
from pipeline.annotate.grid_steps import as_stored, grid_steps_of
from pipeline.annotate.model import load_explainer, model_facts, transform_of_facts
from pipeline.annotate.rows import annotation_rows
from pipeline.annotate.sample_states import PreparedSample
from pipeline.annotate.sample_work import WorkSettings
from pipeline.annotate.stored_samples import StoredItem, StoredWork
from pipeline.config.schema import ModelConfig
from pipeline.demo import assets
from pipeline.errors import ShardError
from pipeline.output.stored_grids import stored_bytes, stored_grid
from pipeline.prompts.sample_prompts import Companions, Prompt
from tests.helpers.corpus import demo_job

TEXTS = ("a dog", "a red car", "a dog")
BACKGROUNDS = ("sky", "a wall", "grass")
COMPANIONS = Companions(
    tuple((f"a photo of {text}",) for text in BACKGROUNDS),
    2,
    "a photo of a",
    centre=(("a chair",), ("water",)),
    background_names=BACKGROUNDS,
)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(2**-40, 2**20), st.integers(0, 10**6))
def test_a_grid_is_read_back_to_half_a_step_of_its_peak_and_stored_again_to_the_bit(
    height, width, peak, seed
):
    grid = np.random.default_rng(seed).random((height, width), np.float32) * np.float32(peak)
    stored = stored_bytes(grid, float(grid.max()))
    shares = stored_grid(stored, height, width)
    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares, grid / grid.max(), rtol=0, atol=0.5 / 65535 + 1e-7)
    assert shares.max() == 1
    again = shares * grid.max()
    assert stored_bytes(again, float(again.max())) == stored


@given(st.integers(1, 5), st.floats(2**-40, 2**20), st.integers(0, 10**6))
def test_grids_rounded_by_the_device_step_are_stored_and_restored_to_the_bit(maps, peak, seed):
    grids = torch.from_numpy(np.random.default_rng(seed).random((maps, 3, 4), np.float32) * np.float32(peak))
    rounded = as_stored(grids)
    assert torch.equal(as_stored(rounded), rounded)
    assert torch.equal(rounded.amax((1, 2)), grids.amax((1, 2)))
    for grid in rounded.numpy():
        peak = float(grid.max())
        restored = stored_grid(stored_bytes(grid, peak), 3, 4) * np.float32(peak)
        np.testing.assert_array_equal(restored, grid)


def test_rounding_keeps_zeros_and_what_is_not_finite():
    grids = torch.tensor([[[0.0, 0.0]], [[1.0, torch.nan]], [[1.0, torch.inf]], [[-1.0, 3.0]]])
    rounded = as_stored(grids)
    assert rounded[0].tolist() == [[0, 0]]
    assert not rounded[1].isfinite().all()
    assert not rounded[2].isfinite().all()
    assert rounded[3].tolist() == [[0, 3]]


def test_a_grid_of_zeros_stays_one_and_a_grid_of_an_earlier_version_is_read_by_its_length():
    assert not stored_grid(stored_bytes(np.zeros((2, 3), np.float32), 0.0), 2, 3).any()
    earlier = np.array([[0, 51], [102, 255]], np.uint8)
    np.testing.assert_allclose(stored_grid(earlier.tobytes(), 2, 2), [[0, 0.2], [0.4, 1]])
    little_endian = bytes([0, 0, 0xFF, 0xFF, 0x01, 0x00])
    np.testing.assert_allclose(stored_grid(little_endian, 1, 3), [[0, 1, 1 / 65535]])


def test_a_grid_of_another_length_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"has 5 bytes; a grid of 2 x 2 has 4 or 8"):
        stored_grid(b"12345", 2, 2)


@pytest.fixture(scope="module")
def explainer():
    return legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers=1
    )


@pytest.fixture(scope="module")
def explained(explainer):
    """A sample of noise with three prompts, of which two are equal."""
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    prompts = tuple(Prompt(index, text) for index, text in enumerate(TEXTS))
    config = demo_job(["a.tar"], "out", masks={"combine": "independent"})
    steps = grid_steps_of(config.masks, 0.0, stores_maps=True)
    engine = Engine(explainer, 32, 8, companions=COMPANIONS, grid_steps=steps)
    return engine.explain([PreparedSample(0, "k", 90, 120, (pixels,), prompts)])[0]


def rows_of(explained, **output):
    config = demo_job(["a.tar"], "out", masks={"combine": "independent"}, output=output)
    return annotation_rows(explained, config)


def test_the_first_row_has_the_maps_of_background_texts_that_do_not_compete_and_of_the_neutral_text(
    explained, explainer
):
    first, *others = rows_of(explained)
    context = first["context_heatmaps"]
    assert [entry["kind"] for entry in context] == ["background", "background", "neutral"]
    assert {entry["text"] for entry in context} <= {*BACKGROUNDS, "a photo of a"}
    assert context[-1]["text"] == "a photo of a"
    assert all(row["context_heatmaps"] is None for row in others)
    ensembles = [f"a photo of {entry['text']}" for entry in context[:2]] + ["a photo of a"]
    embeddings = explainer.embed_text(ensembles)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    trace = explainer.encode(explainer.transform.normalise(torch.from_numpy(pixels)[None], torch.float32))
    grids = explainer.relevance(trace, embeddings)[0].numpy()
    cosines = explainer.similarity(trace, embeddings)[0].tolist()
    for entry, grid, cosine in zip(context, grids, cosines, strict=True):
        assert entry["similarity"] == pytest.approx(cosine, abs=1e-5)
        assert entry["peak"] == pytest.approx(grid.max(), rel=1e-4)
        shares = stored_grid(entry["heatmap"], *grid.shape)
        np.testing.assert_allclose(shares, grid / grid.max(), atol=1e-4)


def test_each_row_has_the_distances_to_earlier_rows_and_background_texts(explained, explainer):
    rows = rows_of(explained)
    backgrounds = [f"a photo of {entry['text']}" for entry in rows[0]["context_heatmaps"][:2]]
    embedder = TextEmbedder(explainer)
    unit_rows = embedder.embed_ensembles([(text,) for text in (*TEXTS, *backgrounds)]).unit_rows
    centre = embedder.embed_ensembles(COMPANIONS.centre).unit_rows.double().mean(dim=0)
    expected = legrad.text_distances(unit_rows, centre).numpy()
    for position, row in enumerate(rows):
        found = np.frombuffer(row["text_distances"], "<f4")
        np.testing.assert_allclose(found, expected[position, [*range(position), 3, 4]], atol=1e-6)
    assert np.frombuffer(rows[2]["text_distances"], "<f4")[0] == 0


def test_a_job_without_heat_maps_has_neither_column(explained):
    rows = rows_of(explained, heatmap=False)
    assert {"context_heatmaps", "text_distances"}.isdisjoint(rows[0])
    assert rows[0]["heatmap"] is None


@pytest.mark.parametrize("options", [{}, {"image_size": [64, 96]}, {"fit": "keep"}, {"fit": "tile"}], ids=str)
def test_the_facts_of_a_model_are_known_without_its_weights(options):
    model = ModelConfig(name=assets.DEMO_MODEL_NAME, pretrained="demo", precision="fp32", **options)
    loaded = load_explainer(model, "cpu")
    facts = model_facts(model)
    assert transform_of_facts(facts) == loaded.transform
    assert facts.normalisation == loaded.tower.normalisation
    assert type(facts).model_validate_json(facts.model_dump_json()) == facts


DAMAGES = {
    "heatmap": [None, b"", b"\0" * 144],
    "heatmap_height": [None, -12, 5],
    "peak": [None, float("nan")],
    "similarity": [None, float("inf")],
    "text_distances": [None, b"", b"\xff" * 8],
    "context_heatmaps": [
        None,
        [{"text": "sky", "kind": "neutral", "similarity": 0.1, "peak": 1.0, "heatmap": b"\0" * 288}] * 2,
        [{"text": "sky", "kind": "other", "similarity": 0.1, "peak": 1.0, "heatmap": b"\0" * 288}],
        [{"text": None, "kind": "background", "similarity": None, "peak": None, "heatmap": None}] * 2,
    ],
}


@pytest.mark.parametrize(
    ("column", "value"), [(column, value) for column, values in DAMAGES.items() for value in values], ids=repr
)
def test_rows_whose_maps_are_damaged_fail_their_shard_with_the_sample_named(explained, column, value):
    rows = rows_of(explained)
    first = {**rows[0], column: value}
    config = demo_job(["a.tar"], "out", prompts={"neutral": "a photo of a"})
    work = StoredWork(WorkSettings(config, None, None, None))
    (restored,) = work.prepare([StoredItem("k", 0, tuple(rows))])
    assert restored.key == "k"
    with pytest.raises(ShardError, match="sample k: its stored maps cannot be read"):
        work.prepare([StoredItem("k", 0, (first, *rows[1:]))])
