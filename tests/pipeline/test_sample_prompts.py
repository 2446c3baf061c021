"""Which prompts a sample gets, and the texts that stand for each."""

import json

import open_clip
import pytest

from pipeline.errors import SampleFailure, UserError
from pipeline.prompts.sample_prompts import (
    Companions,
    Prompt,
    SamplePrompts,
    companions_of,
    default_background,
    with_files_read,
)
from tests.helpers.corpus import demo_job

CLASSES = [
    "dog",
    {"name": "hot dog", "id": 20, "templates": ["food: {}", "{}"]},
    {"name": "cat", "synonyms": ["kitty"], "id": 5},
]


def job(**prompts):
    caption = "json:captions" if prompts.get("source") == "captions" else "txt"
    return demo_job(["0.tar"], "out", input={"caption": caption}, prompts=prompts)


def prompts_of(fields, **settings):
    return SamplePrompts(job(**settings)).of(fields)


def test_a_caption_is_one_prompt_and_captions_are_many():
    assert prompts_of({"txt": b"a dog"}).prompts == (Prompt(0, "a dog"),)
    found = prompts_of({"json": json.dumps({"captions": ["a", 3, "b"]}).encode()}, source="captions")
    assert found.prompts == (Prompt(0, "a"), Prompt(2, "b"))
    assert [(index, failure.kind) for index, failure in found.failures] == [(1, "wrong_type")]


def test_templates_go_around_captions_whose_rows_keep_the_caption():
    found = prompts_of({"txt": b"a {dog}"}, templates=["a photo of {}", "{}, {}"])
    assert found.prompts == (Prompt(0, "a {dog}", texts=("a photo of a {dog}", "a {dog}, a {dog}")),)


def test_every_sample_gets_all_classes_and_needs_no_field():
    settings = {"source": "classes", "classes": CLASSES, "templates": ["a {}", "the {}"]}
    sample_prompts = SamplePrompts(job(**settings))
    prompts = sample_prompts.of({}).prompts
    assert prompts == (
        Prompt(0, "dog", 1, ("a dog", "the dog")),
        Prompt(1, "hot dog", 20, ("food: hot dog", "hot dog")),
        Prompt(2, "cat", 5, ("a cat", "the cat")),
    )
    assert sample_prompts.field is None
    assert sample_prompts.of({}).prompts is prompts


def test_synonyms_are_embedded_where_that_is_asked_for():
    settings = {"source": "classes", "classes": CLASSES, "templates": ["a {}", "the {}"]}
    cat = prompts_of({}, embed_synonyms=True, **settings).prompts[2]
    assert (cat.text, cat.texts) == ("cat", ("a cat", "the cat", "a kitty", "the kitty"))


@pytest.mark.parametrize(
    ("value", "ordinals"),
    [
        ("a dog with a hot dog", [0, 1]),
        (["kitty", "a DOG", "cow"], [0, 2]),
        ("a cow", []),
        ([], []),
    ],
)
def test_only_what_a_text_or_a_list_mentions_is_a_prompt(value, ordinals):
    fields = {"json": json.dumps({"labels": value}).encode()}
    settings = {"source": "classes", "classes": CLASSES, "mentioned_in": "json:labels"}
    found = prompts_of(fields, **settings)
    assert [prompt.index for prompt in found.prompts] == ordinals
    assert [prompt.class_id for prompt in found.prompts] == [[1, 20, 5][ordinal] for ordinal in ordinals]
    assert found.failures == ()


def test_a_label_that_is_no_text_is_a_failure_beside_the_others():
    settings = {"source": "classes", "classes": CLASSES, "mentioned_in": "json:labels"}
    found = prompts_of({"json": b'{"labels": ["cat", 7]}'}, **settings)
    assert [prompt.text for prompt in found.prompts] == ["cat"]
    assert [(index, failure.kind) for index, failure in found.failures] == [(None, "wrong_type")]
    with pytest.raises(SampleFailure, match="no key `labels`"):
        prompts_of({"json": b"{}"}, **settings)


def test_templates_by_name_are_open_clips_own():
    for name, own in (
        ("openai-imagenet", open_clip.OPENAI_IMAGENET_TEMPLATES),
        ("simple-imagenet", open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        texts = prompts_of({"txt": b"dog"}, templates=name).prompts[0].texts
        assert texts == tuple(template("dog") for template in own)


def test_the_shipped_background_is_a_list_of_distinct_texts():
    texts = default_background()
    assert len(set(texts)) == len(texts) >= 20
    assert all(text == text.strip() != "" for text in texts)
    assert companions_of(job(background="default").prompts).background == tuple((text,) for text in texts)


def test_a_background_that_names_a_class_is_skipped():
    classes = ["wall", {"name": "Tree", "synonyms": ["wood"]}]
    prompts = job(
        source="classes",
        classes=classes,
        background=["sky", "walls", "wood", "wooden wall", "sky"],
        templates=["a {}", "{}"],
        max_background=3,
        neutral="a photo of a",
        neutral_threshold=0.7,
    ).prompts
    centre = tuple((f"a {text}", text) for text in default_background())
    assert companions_of(prompts) == Companions(
        (("a sky", "sky"), ("a wooden wall", "wooden wall")),
        3,
        "a photo of a",
        0.7,
        centre,
        ("sky", "wooden wall"),
    )


def test_names_of_files_and_lists_give_way_to_their_content(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("dog\ncat\n")
    named = job(
        source="classes", classes=str(path), background="default", templates="simple-imagenet"
    ).prompts
    read = with_files_read(named)
    path.unlink()
    assert [entry.name for entry in read.classes] == ["dog", "cat"]
    assert read.background == default_background()
    assert len(read.templates) == len(open_clip.SIMPLE_IMAGENET_TEMPLATES)
    assert with_files_read(read) == read
    with pytest.raises(UserError, match="cannot be read"):
        with_files_read(named)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "classes"}, "prompts.source classes needs prompts.classes"),
        ({"classes": "a.txt"}, "prompts.classes needs prompts.source classes, not caption"),
        ({"mentioned_in": "txt"}, "prompts.mentioned_in needs prompts.source classes"),
        ({"source": "classes", "classes": ["dog", "Dog"]}, "entry 2: name 'Dog' is also that of entry 1"),
        ({"templates": ["a photo"]}, "prompts.templates: expected a text with {}"),
        ({"templates": []}, "prompts.templates: "),
        ({"background": ["sky", " "]}, "prompts.background: "),
        ({"neutral_threshold": 1.5}, "prompts.neutral_threshold: "),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(settings, message):
    with pytest.raises(UserError) as raised:
        job(**settings)
    assert message in str(raised.value)


def test_rejected_classes_have_no_rows_unless_they_are_asked_for():
    settings = {"source": "classes", "classes": CLASSES}
    assert job(**settings).rows_written == "accepted"
    assert demo_job([], "out", prompts=settings, output={"rows": "all"}).rows_written == "all"
    assert job().rows_written == "all"
    assert demo_job([], "out", output={"rows": "accepted"}).rows_written == "accepted"


def test_how_many_prompts_to_expect_is_reported_before_a_sample_is_read():
    classes = {"source": "classes", "classes": [f"class {number}" for number in range(50)]}
    expected = [
        ({}, 1),
        ({"source": "captions"}, 4),
        (classes, 32),
        ({**classes, "max_per_sample": 3}, 3),
        ({**classes, "mentioned_in": "txt"}, 4),
    ]
    for settings, number in expected:
        assert SamplePrompts(job(**settings)).usual_number == number
