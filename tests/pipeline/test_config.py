"""The configuration: validated on load, overridable, hashed by what changes the rows."""

import pytest
import yaml

from pipeline.config.load import config_hash, load_config, parse_config
from pipeline.errors import UserError

MINIMAL = {
    "input": {"shards": "a.tar"},
    "model": {"name": "ViT-B-32", "pretrained": "openai"},
    "output": {"dir": "out"},
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def changed(section, **values):
    return parse_config({**MINIMAL, section: {**MINIMAL.get(section, {}), **values}})


def test_a_minimal_file_loads_with_the_documented_defaults(config_file):
    config = load_config(config_file)
    assert (config.model.layers, config.model.precision, config.prompts.max_per_sample) == (2, "auto", 32)
    assert (config.run.error_budget, config.output.on_mismatch, config.rows_written) == (0.2, "refuse", "all")


@pytest.mark.parametrize("pattern", ["@list.txt", "*.tar", "{0..3}.tar"])
def test_a_pattern_of_shards_can_be_an_override(config_file, pattern):
    assert load_config(config_file, [f"input.shards={pattern}"]).input.shards == pattern


def test_an_override_wins_over_the_file_and_is_parsed_as_yaml(config_file):
    config = load_config(
        config_file, ["model.layers=all", "input.shards=[x.tar, y.tar]", "masks.max_side=null"]
    )
    assert config.model.layers == "all"
    assert config.input.shards == ["x.tar", "y.tar"]
    assert config.masks.max_side is None


@pytest.mark.parametrize(
    ("override", "nearest"),
    [("model.layer=3", "model.layers"), ("run.batchsize=4", "run.batch_size"), ("outptu.dir=x", "output")],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(config_file, override, nearest):
    with pytest.raises(UserError, match=f"did you mean {nearest}"):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    ("before", "now"),
    [("min_contrast", "min_foreground_contrast"), ("refine_contrast", "refine_sharpness")],
)
def test_a_key_that_was_renamed_is_refused_with_its_new_name(config_file, before, now):
    blamed = rf"masks.{before}=0.3 \(from the command line\): this key is now called masks.{now}$"
    with pytest.raises(UserError, match=blamed):
        load_config(config_file, [f"masks.{before}=0.3"])
    assert getattr(load_config(config_file, [f"masks.{now}=0.3"]).masks, now) == 0.3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.precision=fp8", "model.precision.*'fp8'"),
        ("run.error_budget=1.5", "run.error_budget.*1.5"),
        ("masks.value=-1", "masks.value"),
        ("run.batch_size=0", "run.batch_size"),
        ("views.scales=[1.0, 1.0]", r"views.scales \(from the command line\): the scales must differ"),
        ("views.scales=[0]", "views.scales.*greater than 0"),
        ("prompts.source=captions", "input.caption must be json:NAME, got 'txt'"),
    ],
)
def test_a_bad_value_is_reported_with_its_key_and_what_came(config_file, override, message):
    with pytest.raises(UserError, match=message):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    ("text", "overrides", "heading", "line"),
    [
        ("", ["masks.valeu=0.3"], "command line: 1", "masks.valeu=0.3 (from the command line): unknown key"),
        ("", ["masks=3"], "command line: 1", "masks (from the command line): is a section; expected keys"),
        (
            "",
            ["Masks.value=0.3"],
            "command line: 1",
            "Masks (from the command line): unknown key; did you mean masks",
        ),
        ("masks: {valeu: 1}\n", ["masks.value=0.3"], "{0}: 1", "masks.valeu: unknown key"),
        ("masks: {valeu: 1}\n", ["run.workers=x"], "{0}: 2", "run.workers (from the command line): "),
        (
            "",
            ["prompts.source=captions"],
            "{0} with the keys of the command line: 1",
            "input.caption must be json:NAME",
        ),
        ("", ["output.dri=s3://user:key@bucket/x"], "command line: 1", "output.dri=s3://bucket/x (from"),
    ],
)
def test_an_error_is_blamed_on_the_file_or_on_the_override(config_file, text, overrides, heading, line):
    config_file.write_text(config_file.read_text() + text)
    with pytest.raises(UserError) as refused:
        load_config(config_file, overrides)
    message = str(refused.value)
    assert message.startswith(heading.format(config_file) + " problem(s)")
    assert line in message


@pytest.mark.parametrize("override", ["model.layers", "=3", "model..layers=2", "model.layers=[1"])
def test_a_malformed_override_is_refused(config_file, override):
    with pytest.raises(UserError):
        load_config(config_file, [override])


def test_every_problem_is_reported_at_once():
    with pytest.raises(UserError) as message:
        parse_config({"input": {}, "model": {"name": "x"}, "output": {"dir": "o"}})
    assert "2 problem(s)" in str(message.value)
    assert "input.shards: required" in str(message.value)
    assert "model.pretrained: required" in str(message.value)


@pytest.mark.parametrize("content", ["[1, 2]", "just text", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    path = tmp_path / "job.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"job\.yaml"):
        load_config(path)


def test_a_missing_file_is_reported_by_name(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml.*No such file"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("run", {"batch_size": 7, "workers": 3}),
        ("input", {"shards": ["b.tar"]}),
        ("output", {"dir": "elsewhere", "on_mismatch": "overwrite"}),
    ],
)
def test_the_hash_ignores_what_does_not_change_the_rows(section, values):
    assert config_hash(changed(section, **values), "w") == config_hash(parse_config(MINIMAL), "w")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"layers": 3}),
        ("model", {"fit": "tile"}),
        ("views", {"flip": True}),
        ("views", {"scales": [1.0, 1.5]}),
        ("masks", {"rule": "otsu"}),
        ("masks", {"min_area": 0.1}),
        ("masks", {"smooth": 0.7}),
        ("prompts", {"neutral": "a photo of a"}),
        ("input", {"caption": "json:text"}),
        ("output", {"heatmap": False}),
        ("output", {"rows": "accepted"}),
    ],
)
def test_the_hash_changes_with_whatever_changes_the_rows(section, values):
    assert config_hash(changed(section, **values), "w") != config_hash(parse_config(MINIMAL), "w")


def test_the_hash_follows_the_weights_not_their_path():
    assert config_hash(changed("model", pretrained="a.pt"), "w") == config_hash(
        changed("model", pretrained="b.pt"), "w"
    )
    assert config_hash(parse_config(MINIMAL), "w") != config_hash(parse_config(MINIMAL), "other")


@pytest.mark.parametrize(
    ("prompts", "contrast", "share"),
    [
        ({}, None, 0.0),
        ({"background": "default"}, None, 0.6),
        ({"background": ["sky"]}, 0.2, 0.2),
        ({"background": []}, None, 0.0),
        ({}, 0.2, 0.2),
        ({"source": "classes", "classes": ["dog"], "background": "default"}, None, 0.0),
        (
            {"source": "classes", "classes": ["dog"], "background": "default", "mentioned_in": "txt"},
            None,
            0.6,
        ),
    ],
)
def test_texts_contrast_by_default_where_samples_name_their_prompts_and_there_is_a_background(
    prompts, contrast, share
):
    config = parse_config({**MINIMAL, "prompts": prompts, "masks": {"contrast": contrast}})
    assert config.contrast_share == share
