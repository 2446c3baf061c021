"""Configurations and classes of other people: refused in one screen, in bounded time and memory."""

import random
import re

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.config import classes as class_list
from pipeline.config import load as configs
from pipeline.config.classes import read_class_list
from pipeline.config.load import load_config, parse_config
from pipeline.config.yaml_text import parse_yaml
from pipeline.datasets.coco import open_coco
from pipeline.datasets.writing import write_shards
from pipeline.errors import UserError
from pipeline.export.write import ExportOptions, export_job
from pipeline.storage import read_text
from tests.helpers.dataset_trees import write_coco
from tests.helpers.report_jobs import row, write_job

LINES = [
    "input: {shards: a.tar}",
    "model: {name: ViT-B-32, pretrained: openai}",
    "output: {dir: out}",
]
LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 10)
)
DEEP = "[" * 20_000 + "]" * 20_000


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("\n".join(LINES))
    return path


def refused(call, *arguments):
    """Return the message of a refused call, which is always one screen of printable text."""
    with pytest.raises(UserError) as raised:
        call(*arguments)
    message = str(raised.value)
    assert len(message.splitlines()) <= 24
    assert len(message) < 4000
    assert message.replace("\n", "").isprintable()
    return message


HOSTILE_YAML = {
    "billion laughs": (LAUGHS, "aliases .* are not supported"),
    "an alias to itself": ("a: &a [*a]", "aliases .* are not supported"),
    "merged mappings": ("a: &a {b: 1}\nc: {<<: *a}", "aliases .* are not supported|expected a text as key"),
    "deep lists": (DEEP, "nested more than 16 levels deep"),
    "deep lists never closed": ("[" * 20_000, "nested more than 16 levels deep"),
    "deep mappings": ("{a: " * 20_000 + "}" * 20_000, "nested more than 16 levels deep"),
    "deep block lists": ("- " * 20_000 + "a", "nested more than 16 levels deep"),
    "a key twice": ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' is there twice"),
    "a key twice, once in quotes": ('{a: 1, "a": 2}', "is there twice"),
    "a key that is a number": ("1: a", "expected a text as key, got '1'"),
    "a key that is true": ("on: a", "expected a text as key, got 'on'"),
    "a key that is null": ("~: a", "expected a text as key"),
    "a key that is a list": ("[a, b]: c", "expected a text as key, got 'sequence'"),
    "an integer of 5,000 digits": ("a: " + "9" * 5000, "a value cannot be read"),
    "a date that is none": ("a: 2020-13-45", "a value cannot be read"),
    "Python's own tags": ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
}


@pytest.mark.parametrize(("text", "pattern"), HOSTILE_YAML.values(), ids=HOSTILE_YAML.keys())
def test_yaml_that_multiplies_nests_or_overwrites_is_refused_everywhere(tmp_path, config_file, text, pattern):
    for name, read in (("job.yaml", load_config), ("classes.yaml", read_class_list)):
        path = tmp_path / name
        path.write_text(text)
        message = refused(read, str(path))
        assert name in message
        assert re.search(pattern, message)
    config_file.write_text("\n".join(LINES))
    if "\n" not in text and not text.startswith("{"):
        message = refused(load_config, config_file, [f"prompts.classes={text}"])
        assert "prompts.classes=...: is not valid YAML" in message


@settings(max_examples=200)
@given(st.text(st.sampled_from("[]{}:,-&*!|>'\"?#%@` \n\tab1~.\x00\x1b"), max_size=80))
@example("? " * 200)
@example("'" * 300)
@example("!" * 300)
@example("&a " * 100)
def test_any_text_is_a_plain_value_or_one_error(text):
    try:
        value = parse_yaml(text, "here")
    except UserError as error:
        assert str(error).startswith("here: is not valid YAML")
        return
    yaml.safe_dump(value)


def test_what_is_plain_is_read_as_before():
    text = "a: [1, 2.5, true, null, 'x']\nb: {c: |\n  text\n  }\n".replace("|\n  text\n  ", "text")
    assert parse_yaml(text, "here") == yaml.safe_load(text)
    assert parse_yaml("", "here") is None


OVERRIDES = ["a=1", "a.b.c=1", ".".join("a" * 20_000) + "=1", "input.shards", "x" * 10**5]


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: override[:12])
def test_an_override_of_another_form_is_refused_in_a_line(config_file, override):
    assert len(refused(load_config, config_file, [override]).splitlines()) <= 2


@pytest.mark.parametrize(
    "value",
    [
        "[https://user:hunter2@host/a.tar",
        "[https://user:hunter2@host/a.tar?token=hunter2, b]",
        "'https://user:hunter2@host/a.tar?token=hunter2",
        "[\"pipe:curl -H 'Authorization: hunter2' x\"",
    ],
)
def test_a_value_of_an_override_that_is_not_yaml_is_not_repeated_as_it_may_hold_a_secret(config_file, value):
    message = refused(load_config, config_file, [f"input.shards={value}"])
    assert "input.shards=...: is not valid YAML: line 1, column" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("key", ["model", "prompts.source", "run.batch_size", "views.scales"])
@pytest.mark.parametrize("form", ["{}", "['{}']", "{{a: '{}'}}"])
def test_a_url_in_the_wrong_place_is_shown_without_its_secret_also_when_it_is_cut(config_file, key, form):
    url = f"s3://user:{'hunter2' * 10}@bucket/{'k' * 90}?token=hunter2"
    assert "hunter2" not in refused(load_config, config_file, [f"{key}={form.format(url)}"])


@pytest.mark.parametrize(
    ("read", "limit"), [(load_config, configs.MAX_FILE_BYTES), (read_class_list, class_list.MAX_FILE_BYTES)]
)
def test_a_file_of_any_size_is_read_no_further_than_its_limit(tmp_path, read, limit):
    path = tmp_path / "huge.yaml"
    path.write_bytes(b"")
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    assert f"more than {limit} bytes, the limit" in refused(read, str(path))
    assert f"more than {limit} bytes, the limit" in refused(read_text, "/dev/zero", limit)


NUMBERS = [
    ("masks.value", ".nan"),
    ("masks.value", "nan"),
    ("masks.value", ".inf"),
    ("masks.value", "true"),
    ("masks.min_peak", ".inf"),
    ("masks.min_peak", "1" + "0" * 400),
    ("masks.min_foreground_contrast", ".nan"),
    ("masks.smooth", ".nan"),
    ("masks.contrast", ".nan"),
    ("masks.contrast", "true"),
    ("masks.min_lead", "3"),
    ("masks.refine_sharpness", ".inf"),
    ("masks.refine_dilations", "[true]"),
    ("masks.refine_dilations", "[]"),
    ("views.scales", "[.nan]"),
    ("views.scales", "[true]"),
    ("views.scales", "[]"),
    ("views.max_tiles", "true"),
    ("model.layers", "true"),
    ("model.layers", "0x" + "f" * 20_000),
    ("model.image_size", "[true, 224]"),
    ("model.image_size", "224.5"),
    ("input.max_image_pixels", "1" + "0" * 30),
    ("input.max_member_bytes", "true"),
    ("prompts.max_per_sample", "1" + "0" * 30),
    ("prompts.max_per_sample", "'1" + "0" * 30 + "'"),
    ("run.batch_size", "1" + "0" * 18),
    ("run.workers", "true"),
    ("run.decode_threads", "1000000"),
    ("run.gpus_per_worker", ".inf"),
    ("run.stall_timeout_s", ".inf"),
    ("run.stall_timeout_s", "1.0e+300"),
    ("run.progress_interval_s", ".nan"),
    ("run.error_budget", ".nan"),
    ("run.max_failed_shards", "1" + "0" * 30),
]


@pytest.mark.parametrize(("key", "value"), NUMBERS, ids=[f"{key}={value[:20]}" for key, value in NUMBERS])
def test_what_is_no_number_of_a_size_that_has_a_use_is_refused_by_its_key(config_file, key, value):
    assert f"  {key} (from the command line): " in refused(load_config, config_file, [f"{key}={value}"])


EMPTY = [
    *[("output.dir", value) for value in ("''", "' '", "true", "'a\\nb'", '"a\\nb"')[:3]],
    *[("input.shards", value) for value in ("''", "[]", "['']", "[a.tar, ' ']", "null", "3")],
    *[("input.image", value) for value in ("''", "'jpg;;png'", "';'", "'json:'")],
    *[("input.caption", value) for value in ("''", "'json:'", "':a'")],
    *[("model.name", value) for value in ("''", "true", "3")],
    *[("prompts.templates", value) for value in ("[]", "['']", "'mine'")],
    *[("prompts.classes", value) for value in ("''", "[]", "['']", "[3]", "[[a]]", "[true]")],
    *[("prompts.background", value) for value in ("['']", "[3]", "''")],
    ("prompts.neutral", "''"),
    ("output.dir", '"a\\nb"'),
    ("output.heatmap", "3"),
]


@pytest.mark.parametrize(("key", "value"), EMPTY, ids=[f"{key}={value}" for key, value in EMPTY])
def test_what_is_empty_or_of_another_type_is_refused_by_its_key(config_file, key, value):
    message = refused(load_config, config_file, ["prompts.source=classes", f"{key}={value}"])
    assert f"  {key} (from the command line): " in message


def test_a_configuration_of_a_foreign_record_is_refused_however_deep_or_wide_it_is():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert refused(parse_config, {"input": {"shards": deep}})
    wide = {"run": {f"key{number}": "x" * 10**4 for number in range(1000)}}
    assert "more" in refused(parse_config, wide)
    assert refused(parse_config, {"x\x1b[2J": 1, "model": {"name": "\x1b[2J" * 100}})
    while deep:
        deep = deep.pop()


NAMES = ["a\nb", "a\rb", "a\x1b[2J", "a\tb", "a\x00b", "a\x85b", "a\u2028b", "a\u202eb", "x" * 5000]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_class_name_that_is_not_one_line_is_refused_by_its_place(tmp_path, config_file, name):
    document = [{"name": "dog"}, {"name": name}, {"name": "cat"}]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(document))
    assert "entry 2: name: " in refused(read_class_list, str(tmp_path / "c.yaml"))
    (tmp_path / "s.yaml").write_text(yaml.safe_dump([{"name": "dog", "synonyms": [name]}]))
    assert "entry 1: synonyms.0: " in refused(read_class_list, str(tmp_path / "s.yaml"))
    if "\n" not in name:
        (tmp_path / "c.txt").write_bytes(f"dog\n{name}\ncat".encode())
        assert "line 2: name: " in refused(read_class_list, str(tmp_path / "c.txt"))
    sections = {line.partition(":")[0]: yaml.safe_load(line.partition(":")[2]) for line in LINES}
    prompts = {"source": "classes", "classes": document}
    assert "prompts.classes: " in refused(parse_config, {**sections, "prompts": prompts})


def test_names_of_other_scripts_and_joined_emoji_are_names(tmp_path):
    names = ["Zaunkönig", "犬", "می‌خواهم", "👩‍🚒", "hot dog", "naïve café"]
    (tmp_path / "c.txt").write_text("\r\n".join(names), newline="")
    assert [entry.name for entry in read_class_list(str(tmp_path / "c.txt"))] == names


def test_a_classes_file_of_more_lines_than_there_are_ids_is_reported_in_a_line(tmp_path):
    (tmp_path / "c.txt").write_text("\n".join(map(str, range(40_000))))
    assert "40000 classes; the limit is 32767" in refused(read_class_list, str(tmp_path / "c.txt"))


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\x00b", "a\u202eb"], ids=repr)
def test_a_category_of_coco_that_the_class_list_cannot_hold_is_refused_before_anything_is_written(
    tmp_path, name
):
    write_coco(tmp_path / "coco", [], images={1: (8, 8)}, categories={1: "dog", 2: name})
    dataset = open_coco(tmp_path / "coco")
    assert "class 2: " in refused(write_shards, dataset, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("space", ["\n", "\r\n", "\t", "\x85", "\u2028", "\x0b"], ids=repr)
def test_white_space_in_a_category_of_coco_shifts_no_line_of_the_class_list(tmp_path, space):
    categories = {1: "dog", 2: f"hot{space}dog", 3: "cat"}
    write_coco(tmp_path / "coco", [], images={1: (8, 8)}, categories=categories)
    write_shards(open_coco(tmp_path / "coco"), str(tmp_path / "out"))
    listed = read_class_list(str(tmp_path / "out" / "classes.txt"))
    assert [(entry.class_id, entry.name) for entry in listed] == [(1, "dog"), (2, "hot dog"), (3, "cat")]


@pytest.mark.parametrize(
    ("class_id", "prompt"), [(2**31 - 1, "dog"), (32_768, "dog"), (0, "dog"), (-1, "dog"), (3, "a\nb")]
)
def test_a_class_of_a_foreign_output_that_the_class_list_cannot_hold_is_one_line(tmp_path, class_id, prompt):
    job = write_job(tmp_path / "job", [[row(0, prompt=prompt, class_id=class_id)]], runs=False)
    message = refused(export_job, str(job), str(tmp_path / "coco"), ExportOptions("coco"))
    assert f"class {class_id}: " in message
    assert not (tmp_path / "coco" / "classes.txt").exists()


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_a_configuration_with_any_bytes_changed_loads_or_is_one_screen(tmp_path_factory, seed):
    generator = random.Random(seed)
    more = ["masks: {rule: band, low: 0.1, high: .5}", "views: {scales: [1, 2]}"]
    content = bytearray("\n".join([*LINES, *more]), "utf-8")
    for _ in range(generator.randint(1, 6)):
        place = generator.randrange(len(content))
        replaced = generator.choice([b"", b"[", b"{", b"\x00", b"\xff", b"&a ", b"*a", b".inf", b"\n", b"~"])
        content[place : place + generator.randint(0, 4)] = replaced
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(bytes(content))
    try:
        load_config(path)
    except UserError as error:
        assert len(str(error).splitlines()) <= 24
