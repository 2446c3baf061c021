"""The commands of the documents, taken apart, and held against the programs that they call."""

import importlib.metadata
import importlib.util
import itertools
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

import typer

from pipeline.cli.main import app
from pipeline.config.load import load_config
from tests.helpers.documents import CONFIGS, PAGES, ROOT, blocks, code_spans, options_of, told_words

ENVIRONMENT = re.compile(r"[A-Z_]+=")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*(\.yaml)?(\.\.\.)?$")
ENDS = {"&&", "||", ";", "|"}
REMOTE = re.compile(r"(s3|gs|https?)://")


@dataclass(frozen=True)
class Command:
    """One call of a program.

    Attributes:
        where: page and line.
        words: as a shell splits them, without the environment before and the redirection behind.
        elided: whether `...` stood for words that are left out.
        mentioned: whether it stands in a sentence, where what it takes may be left out.
        folder: the working directory.
    """

    where: str
    words: tuple
    elided: bool = False
    mentioned: bool = False
    folder: Path = field(default=ROOT)

    def __str__(self):
        return f"{self.where} {' '.join(self.words)}"

    @property
    def program(self):
        return self.words[0]


def commands_of(line, where, *, mentioned=False):
    """The calls in a line; `[x]` is there, and `a|b` makes a call for each."""
    line = re.sub(r"(?<=\s)\[([^\]]*)\]", r"\1", line)
    for is_end, part in itertools.groupby(shlex.split(line, comments=True), ENDS.__contains__):
        if is_end:
            continue
        words = list(itertools.takewhile(lambda word: word not in {">", "<", "&"}, part))
        while words and (ENVIRONMENT.match(words[0]) or words[0] == "nohup"):
            words.pop(0)
        elided = "..." in words
        kept = [word for word in words if word not in {"...", "key=value", "section.key=value"}]
        if kept:
            yield from _alternatives(Command(where, tuple(kept), elided, mentioned))


def _alternatives(command):
    choices = [
        word.split("|") if re.fullmatch(r"[\w-]+(\|[\w-]+)+", word) else [word] for word in command.words
    ]
    return [replace(command, words=words) for words in itertools.product(*choices)]


def check(command):
    """Fail where the program would not understand the command."""
    assert command.program in CHECKS, f"{command}: no rule says how to check {command.program!r}"
    CHECKS[command.program](command)


def parsed(command):
    """A call of `legrad`, parsed by the command line itself, without running it: names, values, or None.

    None where all arguments are left out, or an option ends the program at once.
    """
    node, names, words = typer.main.get_command(app), [], list(command.words[1:])
    while hasattr(node, "commands"):
        if not words:
            assert command.elided or command.mentioned, f"{command}: ends before its command"
            return None
        if words[0].startswith("-"):
            assert words[0] in {name for parameter in node.params for name in parameter.opts} | {"--help"}, (
                f"{command}: no such option"
            )
            return None
        names.append(words.pop(0))
        assert names[-1] in node.commands, f"{command}: legrad has no command {' '.join(names)!r}"
        node = node.commands[names[-1]]
    words = ["1" if word == "N" else word.removesuffix("...") for word in words]
    if command.mentioned and words and words[-1] in {name for option in node.params for name in option.opts}:
        words.pop()
    try:
        context = node.make_context(" ".join(names), words)
    except Exception as error:
        if (command.elided or command.mentioned) and type(error).__name__ == "MissingParameter":
            return None
        raise AssertionError(f"{command}: {getattr(error, 'format_message', error.__str__)()}") from error
    return " ".join(names), context.params


def settings_of(command, params):
    """The configuration of `legrad annotate`; None where the file is a placeholder."""
    overrides = params["overrides"] or ()
    if PLACEHOLDER.match(params["config"]):
        return load_config(ROOT / "configs" / "demo.yaml", overrides) if overrides else None
    return load_config(command.folder / params["config"], overrides)


def _legrad(command):
    understood = parsed(command)
    if understood and understood[0] == "annotate":
        settings_of(command, understood[1])


def runs_here(command):
    """Whether a machine with this checkout alone can run it: shipped model and shards, out/demo."""
    understood = parsed(command) if command.program == "legrad" and not command.elided else None
    if understood is None:
        return False
    name, params = understood
    texts = [str(word) for word in command.words]
    if any(REMOTE.search(text) or PLACEHOLDER.match(text) for text in texts):
        return False
    if name == "annotate":
        config = settings_of(command, params)
        return config is not None and config.model.pretrained == "demo"
    if name == "explain":
        return params["model"] == "demo"
    if name.startswith("shards"):
        return params["root"].exists()
    return name == "demo" or (name == "models" and not params["fetch"]) or params.get("out") == "out/demo"


def _python(command):
    words = list(command.words[1:])
    if words[:2] == ["-m", "pipeline"]:
        return _legrad(replace(command, words=("legrad", *words[2:])))
    if words[:2] == ["-m", "pytest"]:
        return _pytest(replace(command, words=tuple(words[1:])))
    if words[0] == "-m":
        found = importlib.util.find_spec(words[1])
        assert found, f"{command}: no such module"
        path = Path(found.origin)
    else:
        path = command.folder / words[0]
        assert path.is_file(), f"{command}: no such file"
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in options_of(path), f"{command}: {path.name} has no option {word}"
    return None


def _make(command):
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in command.words[1:]:
        assert word in targets, f"{command}: the Makefile has no target {word!r}"


def _ray(command):
    from ray.scripts.scripts import cli

    own = command.words[1:]
    if "--" in own:
        own, inner = own[: own.index("--")], own[own.index("--") + 1 :]
        folder = command.folder / own[own.index("--working-dir") + 1]
        assert folder.is_dir(), f"{command}: no such working directory"
        check(replace(command, words=inner, folder=folder))
        own = (*own, "true")
    node, words = cli, list(own)
    while words and hasattr(node, "commands"):
        name = words.pop(0)
        assert name in node.commands, f"{command}: ray has no command {name!r}"
        node = node.commands[name]
    if words:
        node.make_context("ray", words)


def _pip(command):
    known = importlib.metadata.metadata("legrad-pipeline").get_all("Provides-Extra")
    for extras in re.findall(r"\[([^\]]+)\]", " ".join(command.words)):
        for extra in extras.split(","):
            assert extra in known, f"{command}: no extra {extra!r}"


def _files(command):
    for word in command.words[1:]:
        if "/" in word and not PLACEHOLDER.match(word) and "=" not in word:
            path = command.folder / word.partition("::")[0]
            assert path.exists() or word.startswith(".venv/"), f"{command}: no such file {word}"


def _pytest(command):
    _files(command)


def _nothing_of_ours(command):
    """The shell's own, without a name of ours."""


CHECKS = {
    "legrad": _legrad,
    "python": _python,
    "pytest": _pytest,
    "make": _make,
    "ray": _ray,
    "pip": _pip,
    "kubectl": _files,
    "more:": _files,
    "ruff": _files,
    ".": _files,
    "export": _nothing_of_ours,
    "mypy": _nothing_of_ours,
}


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
    """All blocks of a kind, page by page."""
    return [block for page in (*PAGES, *CONFIGS) for block in blocks(page) if kind_of(block) == kind]


def documented_commands():
    """The calls in all blocks, then those in sentences."""
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
