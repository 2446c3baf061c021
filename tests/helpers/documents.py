"""Parts of the repository's Markdown pages: blocks of code, inline code, links, tables, commands."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.helpers.processes import REPOSITORY

PAGES = sorted(
    path
    for pattern in ("*.md", "legrad/**/*.md", "pipeline/**/*.md", "configs/**/*.md", "tests/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
PROGRAMS = {"legrad", "make", "pip", "pytest", "python"}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# what may precede a command: variables of its environment, nohup, or another command that starts it
_BEFORE_COMMAND = re.compile(r"^(\w+=\S+\s+|nohup\s+|.*\s--\s+)*")


@dataclass(frozen=True)
class Block:
    """A fenced block of code: its place, its language (may be empty) and its text."""

    where: str
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A call of one of PROGRAMS: its place and words, and whether arguments may be missing."""

    where: str
    words: tuple[str, ...]
    is_partial: bool

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words)}"


def name_of(page: Path) -> str:
    """Return a page's path below the repository."""
    return str(page.relative_to(REPOSITORY))


@cache
def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(f"{name_of(page)}:{text[: match.start()].count(chr(10)) + 1}", match[1], match[2])
        for match in _FENCE.finditer(text)
    ]


@cache
def prose(page: Path) -> str:
    """Return a page without its blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def code_spans(page: Path) -> list[str]:
    """Return the inline code of a page."""
    return [span.replace("\\|", "|") for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))]


def links(page: Path) -> list[str]:
    """Return the targets of the links and pictures of a page that lead to files."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not target.startswith("http")]


@cache
def anchors(page: Path) -> set[str]:
    """Return the names by which links reach the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def first_cells(header: str) -> list[str]:
    """Return the first cell of each row of all tables on all pages whose first header is the given one."""
    tables = re.compile(rf"^\| {header} \|.*\n\|[-|: ]+\n((?:\|.*\n)+)", re.MULTILINE)
    rows = [
        line for page in PAGES for match in tables.finditer(prose(page)) for line in match[1].splitlines()
    ]
    return [row.split(" | ")[0].strip("| ") for row in rows]


def commands(page: Path) -> list[Command]:
    """Return the commands of PROGRAMS on a page; those in a sentence, or with `...`, may lack arguments."""
    lines = [
        (block.where, line, "..." in line)
        for block in blocks(page)
        if block.language in {"", "sh", "bash", "console", "text"}
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    lines += [(name_of(page), span, True) for span in code_spans(page)]
    found = []
    for where, line, is_partial in lines:
        call = _BEFORE_COMMAND.sub("", line.strip())
        if call.split(" ")[0] in PROGRAMS and " " in call:
            words = shlex.split(
                re.sub(r" [>&|].*", "", re.sub(r"(?<= )\[([^\]]*)\]", r"\1", call)), comments=True
            )
            found.append(Command(where, tuple(words), is_partial))
    return found
