"""What the documents say holds: commands are understood, links lead somewhere, lists are complete."""

import dataclasses
import importlib
import inspect
import json
import re
import signal
import tarfile
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from pydantic import TypeAdapter

import legrad
import pipeline.training
from pipeline.cli import main as cli
from pipeline.cli.common import ENVIRONMENT_ERROR, INCOMPLETE, INVALID_INPUT
from pipeline.config.load import known_keys, parse_config
from pipeline.config.schema import JobConfig
from pipeline.demo import assets
from pipeline.errors import UserError
from pipeline.output.counts import ShardCounts
from pipeline.output.run_state import RunState
from pipeline.output.schema import ACCEPTED, ANNOTATION_SCHEMA, ERROR_SCHEMA
from pipeline.process import SIGTERM_EXIT_CODE
from pipeline.run.progress import Pace, as_line
from tests.helpers.documented_commands import blocks_of, check, commands_of, documented_commands, kind_of
from tests.helpers.documents import (
    CONFIGS,
    PAGES,
    ROOT,
    anchors,
    blocks,
    code_spans,
    links,
    options_of,
    prose,
    rooms,
    section,
    text_of,
)
from tests.helpers.report_jobs import row, write_job

README, CONTRIBUTING = PAGES[:2]


@pytest.mark.parametrize(
    "block", [block for page in (*PAGES, *CONFIGS) for block in blocks(page)], ids=lambda block: block.where
)
def test_every_block_is_of_a_kind_that_is_held_to_the_code(block):
    assert kind_of(block) != "unknown", (
        f"{block.where}: neither code, commands, a tree nor what our programs tell"
    )


@pytest.mark.parametrize("command", documented_commands(), ids=str)
def test_every_command_is_understood_by_the_program_that_it_calls(command):
    check(command)


def test_a_wrong_option_key_target_or_extra_would_be_seen():
    for line in (
        "legrad annotate configs/demo.yaml --no-such-option",
        "legrad annotate configs/demo.yaml run.batchsize=3",
        "legrad annotate configs/gone.yaml",
        "legrad nonsense",
        "legrad export OUT DEST --format gif",
        "legrad status",
        "legrad explain cat.jpg",
        "make nonsense",
        "python -m pipeline.nonsense",
        "python -m pipeline.demo.making.train --nonsense",
        "python tests/bench/nonsense.py",
        "pip install '.[nonsense]'",
        "pytest tests/legrad/test_nonsense.py",
        "ray job nonsense",
        "nonsense",
    ):
        (command,) = commands_of(line, "here")
        with pytest.raises((AssertionError, UserError)):
            check(command)


def options_of_everything():
    """Options of our programs, and of `ray job submit`."""
    from ray.dashboard.modules.job.cli import submit

    found = {name for parameter in submit.params for name in parameter.opts}
    nodes = [typer.main.get_command(cli.app)]
    while nodes:
        node = nodes.pop()
        nodes += getattr(node, "commands", {}).values()
        found |= {name for parameter in node.params for name in parameter.opts}
    programs = [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "tests" / "bench").glob("*.py")]
    return found.union(*(options_of(path) for path in programs))


def test_every_option_that_a_sentence_names_is_there():
    named = {
        (page.name, span.split()[0].split("=")[0])
        for page in PAGES
        for span in code_spans(page)
        if span[:2] == "--"
    }
    known = options_of_everything()
    assert [name for name in sorted(named) if name[1] not in known] == []


SECTIONS = {name: field.annotation.model_fields for name, field in JobConfig.model_fields.items()}
KEY_IN_TEXT = re.compile(rf"(?<![\w./])({'|'.join(SECTIONS)})\.(\w+)(\*|(?:=|: )(\S+(?: \| \S+)*))?")
FILE_NAME = re.compile(r"^\S+\.(py|md|log|yaml)$|> \S+\.log")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_configuration_key_and_value_in_a_sentence_is_one(page):
    found = [
        match
        for span in code_spans(page)
        if not FILE_NAME.search(span)
        for match in KEY_IN_TEXT.finditer(span)
    ]
    for match in found:
        keys, (_, key, follows, values) = SECTIONS[match[1]], match.groups()
        if follows == "*":
            assert any(name.startswith(key) for name in keys), f"{page.name}: {match[0]}"
            continue
        assert key in keys, f"{page.name}: {match[0]}"
        for value in values.split(" | ") if values and "NAME" not in values else ():
            allowed = TypeAdapter(Annotated[keys[key].annotation, keys[key]])
            assert allowed.validate_python(yaml.safe_load(value)) is not None, f"{page.name}: {match[0]}"


@pytest.mark.parametrize("block", blocks_of("yaml"), ids=lambda block: block.where)
def test_every_configuration_in_the_documents_loads(block):
    least = yaml.safe_load(blocks_of("yaml")[0].text)
    assert parse_config({**least, **yaml.safe_load(block.text)})


def test_names_of_ours_in_sentences_are_there():
    missing = []
    for page in PAGES:
        for span in code_spans(page):
            name = re.match(r"(?:legrad|pipeline)(?:\.\w+)+", span)
            if name and not _resolves(name[0]):
                missing.append((page.name, name[0]))
    assert missing == []


def _resolves(dotted):
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[length:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in links(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_the_repository_that_a_sentence_names_is_there(page):
    folders = "legrad|pipeline|configs|tests|cluster|protocol"
    for span in code_spans(page):
        for name in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./*-]*\w)", span):
            pattern = name.replace("NAME", "*")
            assert [*ROOT.glob(pattern), *page.parent.glob(pattern)], f"{page.name}: {name}"


@pytest.mark.parametrize("page", (*PAGES, *CONFIGS), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_section_that_is_named_in_quotes_or_italics_is_there(page):
    for path, title in re.findall(r'([\w./-]+\.md), section "([^"]+)"', text_of(page)):
        assert f"\n## {title}\n" in text_of(ROOT / path), title
    for title in re.findall(r"see \*([^*]+)\*", text_of(page)):
        assert f"\n## {title}\n" in text_of(page), title


def test_every_column_is_told_and_no_other():
    told = section(README, "What is written")
    names = set(re.findall(r"`([a-z_]+)`", told))
    columns = {*ANNOTATION_SCHEMA.names, *ERROR_SCHEMA.names}
    assert columns - names == set()
    keys = {key.partition(".")[2] for key in known_keys()}
    others = {*ACCEPTED, "null", "uint8", "argmax", "band"}
    assert names - columns - keys - others == set()
    errors = told[told.index("An error row") :].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", errors)) == set(ERROR_SCHEMA.names)


def test_every_file_of_an_output_folder_is_told(tmp_path):
    (tree,) = (block for block in blocks(README) if block.text.startswith("OUT/"))
    told = {line.split()[0].split("/")[1] for line in tree.lines}
    written = {path.name for path in write_job(tmp_path, [[row(0)]]).iterdir()}
    assert written - {".tmp"} <= told
    assert told - written == {"damaged", "failed", "unlisted", "_SUCCESS"}


def test_every_exit_code_is_told():
    (told,) = re.findall(r"Exit codes: (.*?)\n\n", text_of(README), re.DOTALL)
    codes = {int(code) for code in re.findall(r"\b(\d+)\b", told)}
    assert codes == {0, INVALID_INPUT, ENVIRONMENT_ERROR, INCOMPLETE, 128 + signal.SIGINT, SIGTERM_EXIT_CODE}


def test_every_command_stands_in_the_readmes_table():
    table = {
        command.words[1]
        for command in documented_commands()
        if command.where == "README.md" and command.mentioned
    }
    assert set(typer.main.get_command(cli.app).commands) <= table


def test_every_command_is_named_at_the_top_of_the_command_line():
    told = set(re.findall(r"\w+", cli.__doc__.splitlines()[0]))
    assert set(typer.main.get_command(cli.app).commands) - told == set()


def test_the_demos_page_names_every_file_that_lies_beside_it():
    folder = ROOT / "pipeline" / "demo"
    named = {Path(name).name for span in code_spans(folder / "README.md") for name in span.split()}
    there = {path.name for path in folder.iterdir() if path.is_file()}
    assert there - named == {"README.md", "__init__.py"}


def test_every_target_of_the_makefile_is_named():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(r"[a-z-]+", prose(README) + prose(CONTRIBUTING) + "".join(b.text for b in blocks(README)))
    )
    assert targets - named == set()


def test_the_map_of_the_house_names_every_room_and_none_that_is_gone():
    (tree,) = (block for block in blocks(CONTRIBUTING) if kind_of(block) == "tree")
    told = rooms(tree.text)
    for package in ("legrad", "pipeline"):
        there = {
            path.stem
            for path in (ROOT / package).iterdir()
            if (path.suffix == ".py" and not path.stem.startswith("__")) or (path / "__init__.py").exists()
        }
        assert told[package] == there, f"missing {there - told[package]}, gone {told[package] - there}"


def test_the_layout_of_the_readme_names_folders_that_are_there():
    for block in blocks_of("tree"):
        for name in re.findall(r"(?<!\S)(\w+)/(?=\s|$)", block.text):
            assert any((ROOT / folder / name).is_dir() for folder in (".", "pipeline", "legrad", "tests")), (
                name
            )


def test_the_sample_in_the_demos_page_has_the_fields_of_the_shipped_ones():
    (block,) = blocks_of("json")
    with tarfile.open(assets.demo_shard_paths("heldout")[0]) as tar:
        (first, *_) = (member for member in tar if member.name.endswith(".json"))
        assert json.loads(block.text).keys() == json.loads(tar.extractfile(first).read()).keys()


def test_the_line_of_a_log_is_as_the_program_writes_it():
    lines = [line for block in blocks_of("output") for line in block.lines if line.startswith("shards ")]
    state = RunState(
        shards_total=7, shards_skipped=0, shards_done=3, counts=ShardCounts(annotated=225), workers_ready=1
    )
    (told,) = {_without_numbers(line) for line in lines}
    assert told == _without_numbers(as_line(state, Pace(16.0, 0.99)))


def _without_numbers(line):
    return re.sub(r"\?|\d[\d.,]*\d|\d|(?<= )s\b", "0", line).replace("0s", "0")


def public_callables():
    for module in (legrad, pipeline.training):
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isfunction(found):
                yield f"{module.__name__}.{name}", found, found.__doc__
            elif inspect.isclass(found) and not issubclass(found, Exception):
                yield from _methods(f"{module.__name__}.{name}", found)


def _methods(name, cls):
    if not dataclasses.is_dataclass(cls) and "__init__" in vars(cls):
        yield name, cls.__init__, (cls.__doc__ or "") + (cls.__init__.__doc__ or "")
    for key, value in vars(cls).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(function) and not key.startswith("_"):
            yield f"{name}.{key}", function, function.__doc__


@pytest.mark.parametrize(
    ("name", "function", "told"), [pytest.param(*entry, id=entry[0]) for entry in public_callables()]
)
def test_public_functions_with_several_arguments_tell_each_and_what_they_return(name, function, told):
    assert told
    signature = inspect.signature(function)
    arguments = [argument for argument in signature.parameters if argument not in {"self", "cls"}]
    if len(arguments) > 2:
        assert [
            argument
            for argument in arguments
            if f"\n{argument}: " not in inspect.cleandoc(told).replace("    ", "")
        ] == []
        assert signature.return_annotation in {None, "None"} or "Returns:" in told
