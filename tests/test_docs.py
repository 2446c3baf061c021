"""The documents agree with the code: commands parse, Python runs, links resolve, tables are complete."""

import importlib.util
import json
import pkgutil
import re
import tarfile
import tomllib
from pathlib import Path
from typing import Annotated

import click
import open_clip
import pytest
import timm
import typer
import yaml
from pydantic import TypeAdapter

from pipeline.cli.main import app
from pipeline.config.load import load_config, parse_config
from pipeline.config.schema import JobConfig
from pipeline.demo import assets
from pipeline.errors import UserError
from pipeline.output.schema import ERROR_SCHEMA, annotation_schema
from tests.helpers.documents import (
    PAGES,
    Command,
    anchors,
    blocks,
    code_spans,
    commands,
    first_cells,
    links,
    name_of,
)
from tests.helpers.processes import REPOSITORY
from tests.helpers.report_jobs import varied_rows, write_job

DEMO_CONFIG = REPOSITORY / "configs" / "demo.yaml"
SECTIONS = {name: field.annotation.model_fields for name, field in JobConfig.model_fields.items()}
KEY_IN_TEXT = re.compile(rf"(?<![\w./])({'|'.join(SECTIONS)})\.(\w+)(\*|(?:=|: )(\S+(?: \| \S+)*))?")
ON_EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=name_of)


def check_legrad(words, is_partial):
    """Parse a command line of `legrad` without running it; a partial one only as far as it goes."""
    node = typer.main.get_command(app)
    while words and hasattr(node, "commands") and not words[0].startswith("-"):
        alternatives, *words = words
        for name in alternatives.split("|"):
            assert name in node.commands, f"no command {name!r}"
        node = node.commands[name]
    known = {option for parameter in node.params for option in parameter.opts}
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    assert options <= known | {"--help"}, f"no option {options - known}"
    if not is_partial:
        node.make_context("legrad", list(words))
    if node.name == "annotate" and words:
        path = REPOSITORY / words[0]
        overrides = [word for word in words[1:] if re.match(r"\w+\.\w+=", word)]
        load_config(
            path if path.is_file() else DEMO_CONFIG,
            [word for word in overrides if word != "section.key=value"],
        )


def check_python(words):
    """Find the module or file and its options in its source."""
    if words[:2] in (["-m", "pytest"], ["-m", "pip"]):
        return
    found = importlib.util.find_spec(words[1]) if words[0] == "-m" else None
    path = Path(found.origin) if found else REPOSITORY / words[0]
    source = path.read_text(encoding="utf-8")
    if "figure_parser" in source:
        source += (REPOSITORY / "tests" / "bench" / "published.py").read_text(encoding="utf-8")
    options = {word.split("=")[0] for word in words if word.startswith("--")}
    # every program explains itself; typer makes options of arguments
    known = [
        option == "--help"
        or f'"{option}"' in source
        or f"{option[2:].replace('-', '_')}: Annotated[" in source
        for option in options
    ]
    assert all(known), f"no such option of {path.name}"


def check(command):
    """Fail where the program would not understand the command."""
    program, *words = command.words
    if program == "legrad":
        check_legrad(words, command.is_partial)
    elif program == "python":
        check_python(words)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= set(targets), "no such target"
    else:
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        paths = [word.split("::")[0] for word in words if word.startswith("tests/")]
        assert all((REPOSITORY / path).exists() for path in paths), "no such file"
        assert set(re.findall(r"\.\[([\w-]+)\]", " ".join(words))) <= set(project["optional-dependencies"]), (
            "no such extra"
        )


@ON_EACH_PAGE
def test_every_command_is_understood_by_the_program_that_it_calls(page):
    for command in commands(page):
        try:
            check(command)
        except Exception as error:
            raise AssertionError(f"{command}: {error}") from error


@pytest.mark.parametrize(
    "line",
    [
        "legrad annotate configs/demo.yaml --no-such-option",
        "legrad annotate configs/demo.yaml run.batchsize=3",
        "legrad nonsense",
        "legrad export OUT DEST --format gif",
        "legrad status",
        "make nonsense",
        "python -m pipeline.demo.making.train --nonsense",
        "python tests/bench/nonsense.py",
        "pip install .[nonsense]",
        "pytest tests/legrad/test_nonsense.py",
    ],
)
def test_a_command_that_is_wrong_would_be_seen(line):
    with pytest.raises((AssertionError, UserError, OSError, typer.BadParameter, click.UsageError)):
        check(Command("here", tuple(line.split()), is_partial=False))


@ON_EACH_PAGE
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@ON_EACH_PAGE
def test_every_file_and_name_of_ours_in_a_sentence_is_there(page):
    for span in code_spans(page):
        for path in re.findall(r"(?<![\w/.-])(?:(?:legrad|pipeline|configs|tests)/[\w./*-]*\w)", span):
            pattern = path.replace("NAME", "*")
            assert [*REPOSITORY.glob(pattern), *page.parent.glob(pattern)], path
        for name in re.findall(r"^(?:legrad|pipeline)(?:\.\w+)+", span):
            pkgutil.resolve_name(name)


@ON_EACH_PAGE
def test_every_configuration_key_and_value_is_one(page):
    for span in code_spans(page):
        for section, key, follows, values in KEY_IN_TEXT.findall(
            re.sub(r"\S+\.(py|md|log|yaml)\b", "", span)
        ):
            keys = [
                name for name in SECTIONS[section] if name == key or (follows == "*" and name.startswith(key))
            ]
            assert keys, span
            for value in values.split(" | ") if values and "NAME" not in values else ():
                field = SECTIONS[section][key]
                TypeAdapter(Annotated[field.annotation, field]).validate_python(yaml.safe_load(value))


@ON_EACH_PAGE
def test_every_configuration_in_a_block_loads(page):
    least = {"input": {"shards": "a.tar"}, "model": {"name": "ViT-B-16", "pretrained": "openai"}}
    for block in blocks(page):
        if block.language == "yaml":
            parse_config({**least, "output": {"dir": "out"}, **yaml.safe_load(block.text)})


def test_the_tables_of_columns_and_commands_are_complete():
    columns = {name for cell in first_cells("column") for name in re.findall(r"`(\w+)`", cell)}
    every = annotation_schema(with_instances=True, with_maps=True)
    assert columns == {*every.names} | (columns & {*ERROR_SCHEMA.names})
    listed = {cell.split()[1].strip("`") for cell in first_cells("command") if cell.startswith("`legrad ")}
    assert listed == set(typer.main.get_command(app).commands)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The working directory of the documents' Python: the results of a job, and pictures."""
    out = write_job(tmp_path / "job", [varied_rows(40, classes=2)], runs=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo").symlink_to(out)
    (tmp_path / "out" / "mine").symlink_to(out)
    with tarfile.open(assets.demo_shard_paths("heldout")[0]) as tar:
        picture = next(member for member in tar if member.name.endswith(".jpg"))
        (tmp_path / "picture").write_bytes(tar.extractfile(picture).read())
    make = timm.create_model  # without the hub
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **sizes: make(name, **sizes))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@ON_EACH_PAGE
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_python_runs_and_gives_the_shapes_in_its_comments(page, checkout):
    namespace = {}
    for block in blocks(page):
        # test_queries.py and test_table_formats.py run queries of stores, hubs and table formats
        if block.language != "python" or re.search(
            "s3://|load_dataset|pyiceberg|deltalake|from_pretrained", block.text
        ):
            continue
        text, sizes = on_the_demo_model(block.text)
        for name in re.findall(r'"([\w-]+\.jpg)"', text):
            (checkout / name).write_bytes((checkout / "picture").read_bytes())
        exec(compile(text, block.where, "exec"), namespace)
        for variable, shape in re.findall(r"^(\w+) = .*#.*?\[([\d, ]+)\]", text, re.MULTILINE):
            expected = [sizes.get(size, int(size)) for size in shape.split(", ")]
            assert list(namespace[variable].shape) == expected, f"{block.where}: {variable}"


def on_the_demo_model(text):
    """Return code with the shipped model in place of one of the hub, and its sizes in place of that one's."""
    named = re.search(r'from_open_clip\("([\w-]+)", "(\w+)"', text)
    if not named:
        return text, {}
    assert named[2] in open_clip.list_pretrained_tags_by_model(named[1])
    model = open_clip.get_model_config(named[1])
    ours = json.loads(assets.demo_model_config_path().read_text())
    call = f'from_open_clip("{assets.register_demo_model()}", {str(assets.demo_weights_path())!r}'
    sizes = {
        str(model["vision_cfg"]["image_size"]): ours["vision_cfg"]["image_size"],
        str(model["embed_dim"]): ours["embed_dim"],
    }
    return text.replace(named[0], call), sizes
