"""What the documents say holds: their commands are understood and run, their links lead somewhere, nothing is
left out of their lists."""

import dataclasses
import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from typing import Annotated

import open_clip
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from documented_commands import CHECKS, check, commands_of, parsed, runs_here
from documents import (
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
    told_words,
)
from pydantic import TypeAdapter
from report_jobs import row, write_job

import legrad
import pipeline.training
from pipeline import cli, signals
from pipeline.config import JobConfig, known_keys, parse_config
from pipeline.demo import assets
from pipeline.errors import UserError
from pipeline.progress import Pace, RunState, as_line
from pipeline.records import ANNOTATION_SCHEMA, ERROR_SCHEMA, ShardCounts, total_counts
from pipeline.result import JobResult, concluded, first_state
from pipeline.worker import build_annotator

README, CONTRIBUTING = PAGES[:2]
SCENES_OF_A_SHARD = 2


def kind_of(block):
    """What a block is, told from its language and its text."""
    if block.language in {"python", "yaml", "toml"}:
        return block.language
    if block.text.lstrip().startswith("{"):
        return "json"
    first = re.sub(r"^([A-Z_]+=\S*\s+|nohup\s+)*", "", block.lines[0]).split()[0]
    if first in CHECKS:
        return "shell"
    if re.match(r"[\w./<>-]*/[\w./<>-]*\s{2,}\S", block.lines[0]):
        return "tree"
    words = set(re.findall(r"[A-Za-z]{2,}", re.sub(r"\S*/\S*", "", block.text)))
    return "output" if words <= told_words() else "unknown"


def blocks_of(kind):
    return [block for page in (*PAGES, *CONFIGS) for block in blocks(page) if kind_of(block) == kind]


def documented_commands():
    in_blocks = [
        command
        for block in blocks_of("shell")
        for line in block.lines
        for command in commands_of(line, block.where)
    ]
    called = re.compile(r"(([A-Z_]+=\S+|nohup) )*(legrad|make|python|pytest|pip|ray) \S")
    in_sentences = [
        command
        for page in PAGES
        for span in code_spans(page)
        if called.match(span)
        for command in commands_of(span, str(page.relative_to(ROOT)), mentioned=True)
    ]
    return [*in_blocks, *in_sentences]


def once(commands):
    """Each call once, where it stands first."""
    return list({command.words: command for command in reversed(commands)}.values())[::-1]


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
        "python -m pipeline.demo.train --nonsense",
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
    others = {"ok", "null", "uint8", "argmax", "band"}
    assert names - columns - keys - others == set()
    errors = told[told.index("An error row") :].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z_]+)`", errors)) == set(ERROR_SCHEMA.names)


def test_every_file_of_an_output_folder_is_told(tmp_path):
    (tree,) = (block for block in blocks(README) if block.text.startswith("OUT/"))
    told = {line.split()[0].split("/")[1] for line in tree.lines}
    written = {path.name for path in write_job(tmp_path, [[row(0)]]).iterdir()}
    assert written <= told
    assert told - written == {"failed", "_SUCCESS"}


def test_every_exit_code_is_told():
    (told,) = re.findall(r"Exit codes: (.*?)\n\n", text_of(README), re.DOTALL)
    codes = {int(code) for code in re.findall(r"\b(\d+)\b", told)}
    assert codes == {0, cli.USER_MISTAKE, cli.FAULT, cli.INCOMPLETE, 128 + signal.SIGINT, signals.EXIT_CODE}


def test_every_command_stands_in_the_readmes_table():
    table = {
        command.words[1]
        for command in documented_commands()
        if command.where == "README.md" and command.mentioned
    }
    assert set(typer.main.get_command(cli.app).commands) <= table


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


# Below, commands and code are run: on small shards of the shipped scenes, in a folder like a fresh checkout.


def small_shard(source, target):
    """The first scenes of a shard."""
    with tarfile.open(source) as tar, tarfile.open(target, "w") as small:
        keys = []
        for member in tar:
            key = member.name.partition(".")[0]
            if key not in keys:
                keys.append(key)
            if len(keys) > SCENES_OF_A_SHARD:
                return
            small.addfile(member, tar.extractfile(member))


def annotate_here(job, progress, max_shards=None):
    """What `run_job` does, without ray."""
    annotator = build_annotator(job.config, {**job.stamp.as_metadata(), "attempt": "a"}, cpus=1, device="cpu")
    counts = total_counts(annotator.annotate(shard).counts for shard in job.todo)
    annotator.close()
    state = dataclasses.replace(first_state(job), shards_done=len(job.todo), counts=counts)
    return concluded(job, JobResult(state))


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def run_legrad(patched, command):
    """Run a command line in this process; returns its exit code."""
    patched.setattr(sys, "argv", ["legrad", *command.words[1:]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, patched):
    """A folder like the root of a checkout after the demo, with few scenes; commands run here without ray."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "configs").symlink_to(ROOT / "configs")
    shards = root / "pipeline" / "demo" / "shards"
    shards.mkdir(parents=True)
    for path in (ROOT / "pipeline" / "demo").iterdir():
        if path.is_file():
            (shards.parent / path.name).symlink_to(path)
    for name in assets.SHARD_SETS:
        for path in assets.demo_shard_paths(name):
            small_shard(path, shards / path.name)
    (root / "out").mkdir()
    (root / "out" / "mine").symlink_to("demo")
    patched.chdir(root)
    patched.setattr(assets, "demo_shard_folder", lambda: shards)
    patched.setattr("pipeline.annotate_job.run_job", annotate_here)
    (command,) = commands_of("legrad annotate configs/demo.yaml", "")
    assert run_legrad(patched, command) == 0
    return root


def as_parameter(command):
    """The demo evaluates for long, and the list of models looks at every model that open_clip has."""
    takes_long = parsed(command)[0] in {"demo", "models"}
    return pytest.param(command, id=str(command), marks=[pytest.mark.slow] if takes_long else [])


@pytest.mark.parametrize(
    "command", [as_parameter(command) for command in once(documented_commands()) if runs_here(command)]
)
def test_a_command_that_needs_no_more_than_a_checkout_runs(command, checkout, patched, capsys):
    assert run_legrad(patched, command) == 0
    assert capsys.readouterr().out


def python_pages():
    """Pages with Python, and their blocks; queries have a test of their own."""
    queries = section(README, "Query the masks")
    found = {}
    for block in blocks_of("python"):
        if block.page != README or block.text not in queries:
            found.setdefault(block.page, []).append(block)
    return [pytest.param(found[page], id=str(page.relative_to(ROOT))) for page in found]


@pytest.mark.parametrize("page_blocks", python_pages())
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_python_in_the_documents_runs_and_gives_the_shapes_in_its_comments(page_blocks, checkout):
    namespace = {}
    for block in page_blocks:
        text, sizes = _on_the_demo_model(block.text)
        for name in re.findall(r'"(\w+\.jpg)"', text):
            _write_picture(checkout, name)
        exec(compile(text, block.where, "exec"), namespace)
        for variable, told in re.findall(r"^(\w+) = .*#.*?\[([\d, ]+)\]", text, re.MULTILINE):
            shape = [sizes.get(number, int(number)) for number in told.split(", ")]
            assert list(namespace[variable].shape) == shape, f"{block.where}: {variable}"


def _on_the_demo_model(text):
    """The code with the shipped model for one of the hub, and which of its sizes stand for which."""
    named = re.search(r'from_open_clip\("([\w-]+)", "(\w+)"', text)
    if not named:
        return text, {}
    model, ours = (
        open_clip.get_model_config(named[1]),
        json.loads(assets.demo_model_config_path().read_text()),
    )
    assert named[2] in open_clip.list_pretrained_tags_by_model(named[1])
    assets.register_demo_model()
    call = f'from_open_clip("{assets.DEMO_MODEL_NAME}", {str(assets.demo_weights_path())!r}'
    sizes = {
        str(model["vision_cfg"]["image_size"]): ours["vision_cfg"]["image_size"],
        str(model["embed_dim"]): ours["embed_dim"],
    }
    return text.replace(named[0], call), sizes


def _write_picture(folder, name):
    with tarfile.open(next((folder / "pipeline" / "demo" / "shards").iterdir())) as tar:
        (first, *_) = (member for member in tar if member.name.endswith(".jpg"))
        (folder / name).write_bytes(tar.extractfile(first).read())


def _run_for_real(command, folder):
    """As a person runs it, with Ray; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(  # noqa: PLW1510 - told with its output
        [sys.executable, "-m", "pipeline", *command.words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        command
        for command in once(documented_commands())
        if runs_here(command) and parsed(command)[0] in {"demo", "annotate"}
    ],
    ids=str,
)
def test_a_job_in_the_documents_runs_on_ray_and_tells_what_the_readme_shows(command, tmp_path):
    for name in ("configs", "pipeline"):
        (tmp_path / name).symlink_to(ROOT / name)
    told = _run_for_real(command, tmp_path)
    for block in blocks_of("output"):
        if parsed(command)[0] == "demo" and "`make demo`" in block.before:
            for line in block.lines:
                words = re.escape(line).replace(r"\.\.\.", ".*").replace("out/demo", r"\S*out/demo")
                assert re.search(words, told), f"{block.where}: {line}"
    annotations = sorted((tmp_path / "out" / "demo" / "annotations").iterdir())
    assert sum(pq.read_metadata(path).num_rows for path in annotations) > 0
    assert {path.name for path in (tmp_path / "out" / "demo").iterdir()} >= {"job.json", "_SUCCESS", "runs"}
