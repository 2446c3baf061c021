"""Which keys change rows: one description, held against what the pipeline does with each key."""

import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from legrad.canvases import Views, canvas_grids, views_of
from legrad.images import ImageTransform
from legrad.text_cache import EmbeddedTexts
from pipeline.annotate.grid_steps import GridTexts, grid_steps_of, with_centre
from pipeline.annotate.maps import MapSettings, refinement_of, sample_maps
from pipeline.annotate.rows import annotation_rows
from pipeline.annotate.sample_states import ExplainedPrompt, ExplainedSample
from pipeline.annotate.texts import BatchTextEmbedder, choose_maps, context_texts
from pipeline.config.load import config_hash, known_keys, parse_config
from pipeline.config.row_keys import describe_differences, row_keys
from pipeline.errors import SampleFailure, UserError
from pipeline.prompts.sample_prompts import SamplePrompts, job_companions, with_files_read
from tests.helpers.corpus import demo_job

GRID = (3, 4)
PATCH = 4
TRANSFORM = ImageTransform(GRID[0] * PATCH, GRID[1] * PATCH, (0.5,) * 3, (0.5,) * 3, patch_size=PATCH)
FIELDS = {
    "txt": b"A dog and two cats.",
    "json": json.dumps({"captions": ["a cow", "a dog", "grass"], "cls": ["kitten"]}).encode(),
}
CLASSES = [
    {"id": 3, "name": "dog", "synonyms": ["hound"]},
    {"id": 1, "name": "cat", "plurals": ["felines"], "templates": ["one {}"]},
    "cow",
]

MARKS = [
    {"shard": "s", "key": "a", "prompt_index": 0, "mark": "good"},
    {"shard": "s", "key": "a", "prompt_index": 1, "mark": "bad"},
]

share = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
VALUES = {
    "input": {
        "maps": st.sampled_from([None, "out/a", "out/b"]),
        "shards": st.sampled_from(["a.tar", ["b.tar"]]),
        "image": st.sampled_from(["jpg", "png;jpg", "JPG"]),
        "caption": st.sampled_from(["txt", "TXT", "json:captions", "JSON:captions"]),
        "max_image_pixels": st.sampled_from([100, 200]),
        "max_member_bytes": st.sampled_from([100, 200]),
        "resize": st.sampled_from(["exact", "fast"]),
        "allow_commands": st.booleans(),
    },
    "model": {
        "name": st.sampled_from(["ViT-B-32", "ViT-B-16"]),
        "pretrained": st.sampled_from(["openai", "laion400m_e32"]),
        "precision": st.sampled_from(["fp32", "bf16"]),
        "layers": st.sampled_from([2, 3, "all"]),
        "affinity": st.sampled_from(["none", "keys"]),
        "image_size": st.sampled_from([None, 32, [32, 32], [32, 64]]),
        "fit": st.sampled_from(["stretch", "keep", "tile"]),
    },
    "views": {
        "flip": st.booleans(),
        "scales": st.sampled_from([[1.0], [1.0, 2.0]]),
        "tile_zoom": st.sampled_from([1.0, 2.0, 3.0]),
        "tile_overlap": st.sampled_from([0.0, 0.5]),
        "max_tiles": st.sampled_from([1, 4, 16]),
    },
    "prompts": {
        "source": st.sampled_from(["caption", "captions", "classes"]),
        "max_per_sample": st.sampled_from([1, 2, 3, 32]),
        "classes": st.sampled_from([None, CLASSES, CLASSES[1:2], [{"id": 3, "name": "dog"}, *CLASSES[1:]]]),
        "mentioned_in": st.sampled_from([None, "txt", "TXT", "json:cls"]),
        "templates": st.sampled_from([["{}"], ["a {}"], ["a {}", "the {}"], "simple-imagenet"]),
        "embed_synonyms": st.booleans(),
        "background": st.sampled_from(["none", "default", ["grass", "sky", "grass"], ["hounds", "sky"]]),
        "max_background": st.sampled_from([1, 2, 4]),
        "neutral": st.sampled_from([None, "a photo of a"]),
        "neutral_threshold": share,
        "marks": st.sampled_from([None, [], MARKS[:1], MARKS[1:], MARKS]),
        "keep_marked": st.sampled_from(["good", "not-bad"]),
    },
    "masks": {
        "rule": st.sampled_from(["fixed", "otsu", "quantile", "band"]),
        "value": share,
        "quantile": share,
        "low": st.sampled_from([0.1, 0.3]),
        "high": st.sampled_from([0.5, 0.8]),
        "band_center": st.sampled_from(["half", "otsu"]),
        "combine": st.sampled_from(["independent", "argmax"]),
        "refine": st.sampled_from(["none", "par", "pamr"]),
        "refine_iterations": st.sampled_from([1, 2]),
        "refine_dilations": st.sampled_from([None, [1], [1, 2]]),
        "refine_sharpness": st.sampled_from([None, 0.1, 0.3, 0.7]),
        "max_side": st.sampled_from([None, 8, 1000]),
        "min_similarity": st.sampled_from([None, -1.0, 0.0, 0.5]),
        "min_peak": st.sampled_from([None, 0.0, 0.9]),
        "min_area": st.sampled_from([None, 0.0, 0.3]),
        "min_foreground_contrast": st.sampled_from([None, 0.0, 0.4]),
        "min_lead": st.sampled_from([None, -2.0, 0.0, 0.3]),
        "smooth": st.sampled_from([0.0, 1.0]),
        "contrast": st.sampled_from([0.0, 0.5]),
        "contrast_with": st.sampled_from(["all", "background"]),
        "min_component": st.sampled_from([0.0, 0.1]),
        "max_hole": st.sampled_from([0.0, 0.1]),
        "instances": st.sampled_from(["none", "none", "watershed"]),
        "min_peak_drop": st.sampled_from([0.05, 0.5]),
        "segmenter": st.sampled_from([None, None, "some/sam"]),
        "segmenter_revision": st.sampled_from([None, "main"]),
        "segmenter_min_iou": st.sampled_from([0.1, 0.5]),
    },
    "output": {
        "dir": st.sampled_from(["out", "elsewhere"]),
        "heatmap": st.booleans(),
        "rows": st.sampled_from([None, "all", "accepted"]),
        "on_mismatch": st.sampled_from(["refuse", "overwrite"]),
    },
}
KEYS = [f"{section}.{key}" for section, keys in VALUES.items() for key in keys]
documents = st.fixed_dictionaries({name: st.fixed_dictionaries(keys) for name, keys in VALUES.items()})


def of_job(document):
    """A configuration as a job holds it, with the content of its files."""
    prompts = dict(document["prompts"])
    if prompts["source"] != "classes":
        prompts |= {"classes": None, "mentioned_in": None}
    try:
        config = parse_config({**document, "prompts": prompts})
    except UserError:
        assume(False)
    return config.model_copy(update={"prompts": with_files_read(config.prompts)})


def noise(text):
    return np.random.default_rng(zlib.crc32(text.encode()))


class Embedder:
    """Embeds each ensemble by chance, the same at every call."""

    def embed_ensembles(self, ensembles, tokens=()):
        rows = [torch.from_numpy(noise(repr(ensemble)).uniform(-1, 1, 2)) for ensemble in ensembles]
        return EmbeddedTexts(torch.stack(rows), (False,) * len(rows))


def rows_of(config):
    """What the application makes of a sample by the configuration, on relevance drawn for each text."""
    views = Views(tile=config.model.fit == "tile", **config.views.model_dump())
    canvases = [canvas_grids(views, TRANSFORM, *size) for size in ((50, 300), (90, 80), (6, 6))]
    seen = [views_of(views, grids, GRID) for grids in canvases]
    try:
        prompts = SamplePrompts(config).of(FIELDS, shard="s", key="a").prompts
    except SampleFailure as failure:
        # the message repeats the field as the configuration spells it, JSON: or json:
        return [seen, str(failure).lower()]
    if not prompts:
        return seen
    companions = job_companions(config)
    embedder = BatchTextEmbedder(Embedder(), companions, within=1e-9)
    batch = embedder.embed([prompts])
    texts, similarities = embedder.resolve(batch, batch.unit_rows.T[:1])
    cosines = similarities[0]
    chosen = choose_maps(similarities, texts, config.prompts.max_per_sample, companions.max_background)[0]
    grids = torch.stack(
        [
            torch.from_numpy(noise(repr(texts.unit_rows[row].tolist())).random(GRID))
            for row in chosen.text_rows
        ]
    ).float()
    pixels = torch.from_numpy(noise("image").integers(0, 256, (1, 12, 16, 3), dtype=np.uint8))
    neutral_threshold = None if companions.neutral is None else companions.neutral_threshold
    steps = grid_steps_of(config.masks, config.contrast_share, stores_maps=config.output.heatmap)
    steps = with_centre(steps, companions.centre, Embedder())
    map_settings = MapSettings("upsampled", neutral_threshold, steps, refinement_of(config.masks, PATCH))
    grid_texts = GridTexts(texts.unit_rows[chosen.text_rows], cosines[chosen.text_rows])
    sample = ExplainedSample(
        index=0,
        key="a",
        image_height=20,
        image_width=30,
        prompts=tuple(
            ExplainedPrompt(
                prompts[position].index,
                prompts[position].text,
                prompts[position].class_id,
                False,
                float(cosines[texts.map_rows[0][position]]),
            )
            for position in chosen.prompts.tolist()
        ),
        maps=sample_maps(grids, [chosen], grid_texts, map_settings, pixels=pixels, image_sizes=[(20, 30)])[0],
        dropped_prompts=len(prompts) - len(chosen.prompts),
        context=context_texts(chosen, cosines, batch.ensembles, companions),
    )
    return [seen, sample.dropped_prompts, annotation_rows(sample, config)]


def segmenter_digest(config):
    """A digest that differs with the segmenter and its revision."""
    segmenter = config.masks.segmenter
    return None if segmenter is None else f"{segmenter} {config.masks.segmenter_revision}"


def written(config, digest="w"):
    """What job.json says of a configuration, once read back."""
    document = {
        "config": config.model_dump(mode="json"),
        "weights_digest": digest,
        "segmenter_digest": segmenter_digest(config),
    }
    return json.loads(json.dumps(document))


def keys_named(before, now, digest="w"):
    lines = describe_differences(written(before), now, digest, segmenter_digest(now), most=99).split("\n")
    return [line.strip().partition(": ")[0] for line in lines]


def hash_of(config):
    return config_hash(config, "w", segmenter_digest(config))


def test_the_strategies_know_every_key_but_those_of_run():
    assert set(KEYS) == {key for key in known_keys() if "." in key and not key.startswith("run.")}


@settings(max_examples=100)
@given(documents, st.sampled_from(KEYS), st.data())
def test_an_idle_key_changes_neither_hash_nor_rows_and_an_active_one_is_named(document, dotted, data):
    section, key = dotted.split(".")
    value = data.draw(VALUES[section][key].filter(lambda value: value != document[section][key]))
    before, now = of_job(document), of_job({**document, section: {**document[section], key: value}})
    same = hash_of(before) == hash_of(now)
    same_segmenter = segmenter_digest(before) == segmenter_digest(now)
    assert same == (row_keys(before) == row_keys(now) and same_segmenter)
    if same:
        assert repr(rows_of(before)) == repr(rows_of(now))
    else:
        # classes go with their source
        brought = {"prompts.classes", "prompts.mentioned_in"} if dotted == "prompts.source" else set()
        counted = dotted if same_segmenter else "the segmenter's files"
        assert {counted} <= set(keys_named(before, now)) <= {counted, *brought}


@settings(max_examples=60)
@given(documents, documents)
def test_what_is_reported_of_two_configurations_are_keys_that_changed_and_count_in_one(first, second):
    before, now = of_job(first), of_job(second)
    if hash_of(before) == hash_of(now):
        return
    named = keys_named(before, now)
    assert named
    named = [name for name in named if name != "the segmenter's files"]
    assert set(named) <= set(row_keys(before)) | set(row_keys(now))
    for dotted in named:
        section, key = dotted.split(".")
        assert getattr(getattr(before, section), key) != getattr(getattr(now, section), key)


def job(**sections):
    document = {
        "input": {"shards": "a.tar"},
        "model": {"name": "ViT-B-32", "pretrained": "openai"},
        "output": {"dir": "out"},
    }
    merged = {name: {**document.get(name, {}), **sections.get(name, {})} for name in {**document, **sections}}
    config = parse_config(merged)
    return config.model_copy(update={"prompts": with_files_read(config.prompts)})


def described(before, now, digest_now="w"):
    return describe_differences(written(before), now, digest_now)


CAPTIONS = {"input": {"caption": "json:captions"}, "prompts": {"source": "captions"}}
CLASSES_JOB = {"source": "classes", "classes": ["dog", "cat"]}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"masks": {"quantile": 0.3}}),
        ({}, {"masks": {"low": 0.1, "high": 0.9, "band_center": "otsu"}}),
        ({"masks": {"rule": "otsu"}}, {"masks": {"rule": "otsu", "value": 0.1}}),
        ({"masks": {"refine": "none"}}, {"masks": {"refine": "none", "refine_iterations": 3}}),
        ({}, {"masks": {"refine_sharpness": 0.3}}),
        ({}, {"masks": {"min_area": 0}}),
        ({}, {"masks": {"min_similarity": -1, "min_peak": 0, "min_foreground_contrast": 0}}),
        ({}, {"views": {"tile_zoom": 3, "tile_overlap": 0.5, "max_tiles": 3}}),
        ({}, {"prompts": {"max_per_sample": 3, "embed_synonyms": True, "neutral_threshold": 0.1}}),
        (
            {"masks": {"contrast": 0}, "output": {"heatmap": False}},
            {
                "masks": {"contrast": 0, "contrast_with": "background"},
                "prompts": {"background": "default"},
                "output": {"heatmap": False},
            },
        ),
        ({}, {"masks": {"contrast": 0.6, "contrast_with": "background"}, "prompts": {"max_background": 2}}),
        ({}, {"masks": {"contrast": 0.5, "contrast_with": "background", "min_lead": 0.1}}),
        (
            {**CAPTIONS, "masks": {"contrast": 0}},
            {**CAPTIONS, "masks": {"contrast": 0, "contrast_with": "background", "min_lead": -2}},
        ),
        (
            {**CAPTIONS, "masks": {"contrast": 0.3, "contrast_with": "background"}},
            {**CAPTIONS, "masks": {"contrast": 0.5, "contrast_with": "background"}},
        ),
        ({"prompts": CLASSES_JOB}, {"prompts": CLASSES_JOB, "masks": {"contrast": 0}}),
        ({}, {"output": {"rows": "all"}}),
        ({}, {"input": {"caption": "TXT", "shards": "b.tar", "allow_commands": True}}),
        ({}, {"run": {"batch_size": 3}}),
        ({"model": {"image_size": 224}}, {"model": {"image_size": [224, 224]}}),
        (
            {"prompts": CLASSES_JOB},
            {"prompts": {**CLASSES_JOB, "max_per_sample": 2}, "input": {"caption": "x"}},
        ),
        ({"prompts": CLASSES_JOB}, {"prompts": CLASSES_JOB, "output": {"rows": "accepted"}}),
    ],
)
def test_finished_work_stays_valid_where_only_idle_keys_changed(before, now):
    assert config_hash(job(**before), "w") == config_hash(job(**now), "w")


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"views": {"flip": True}}, "views.flip: false before, true now"),
        ({}, {"masks": {"value": 0.4, "quantile": 0.1}}, "masks.value: 0.5 before, 0.4 now"),
        (CAPTIONS, {**CAPTIONS, "masks": {"min_lead": 0.1}}, "masks.min_lead: null before, 0.1 now"),
        (
            {"masks": {"contrast": 0.5}},
            {"masks": {"contrast": 0.5}, "prompts": {"background": ["sky"]}},
            'prompts.background: [] before, ["sky"] now',
        ),
        ({}, {"masks": {"rule": "otsu"}}, "masks.rule: fixed before, otsu now"),
        ({}, {"output": {"rows": "accepted"}}, "output.rows: null before, accepted now"),
        (
            {"prompts": CLASSES_JOB},
            {"prompts": {"source": "classes", "classes": ["dog", "cow"]}},
            "prompts.classes: 2 entries before, 2 now; entry 2: "
            '{"class_id": 2, "name": "cat", "synonyms": [], "plurals": [], "templates": []} before, '
            '{"class_id": 2, "name": "cow", "synonyms": [], "plurals": [], "templates": []} now',
        ),
    ],
)
def test_a_change_is_reported_with_both_values_and_nothing_else_is(before, now, message):
    assert described(job(**before), job(**now)) == message


def test_the_weights_are_named_where_their_digest_differs_and_only_there():
    tag = job(model={"pretrained": "laion400m_e32"})
    assert described(job(), tag, digest_now="v") == (
        "the model's files (weights, configuration or tokenizer): openai (w) before, laion400m_e32 (v) now"
    )
    assert "nothing in the configuration" in described(job(), tag)


def test_the_segmenter_is_named_where_its_digest_differs_and_its_place_does_not_count():
    before = of_place("some/sam")
    earlier = {**written(before), "segmenter_digest": "s1"}
    moved = of_place("/elsewhere/sam")
    assert config_hash(before, "w", "s1") == config_hash(moved, "w", "s1") != config_hash(before, "w", "s2")
    assert config_hash(before, "w", "s1") != config_hash(of_place(None), "w")
    report = describe_differences(earlier, moved, "w", "s2")
    assert report == "the segmenter's files: some/sam (s1) before, /elsewhere/sam (s2) now"


def of_place(segmenter):
    return demo_job(["a.tar"], "out", masks={"rule": "fixed", "segmenter": segmenter})


def test_a_secret_and_a_control_character_in_a_value_are_not_shown():
    signed = job(model={"pretrained": "https://user:key@host/w.pt?sig=key"})
    message = described(signed, job(prompts={"neutral": "x\x1b[2J"}), digest_now="v")
    assert "key" not in message
    assert "\x1b" not in message
    assert "prompts.neutral: null before, x\\x1b[2J now" in message


def test_at_most_ten_keys_are_reported_and_the_rest_is_counted():
    limits = ("min_similarity", "min_peak", "min_area", "min_foreground_contrast", "smooth", "max_hole")
    changed = job(
        masks={**dict.fromkeys(limits, 0.1), "min_component": 0.1, "combine": "argmax", "rule": "otsu"},
        views={"flip": True},
        model={"layers": 3, "precision": "bf16"},
    )
    lines = described(job(), changed).split("\n")
    assert len(lines) == 11
    assert lines[-1].strip() == "... and 2 more"


@pytest.mark.parametrize(
    "earlier",
    [
        {},
        {"config": None},
        {"config": []},
        {"config": {"model": 3}, "weights_digest": ["w"]},
        {"config": {"masks": {"of_another_version": 1}}, "weights_digest": "w"},
    ],
)
def test_a_record_that_cannot_be_read_is_reported_as_that(earlier):
    assert "this version cannot read" in describe_differences(earlier, job(), "w")
