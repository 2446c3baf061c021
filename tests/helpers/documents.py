"""What the documents say, for tests that hold them to it: blocks, headings, links, code in the text."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "configs" / "README.md",
    ROOT / "pipeline" / "demo" / "README.md",
    ROOT / "tests" / "bench" / "README.md",
    ROOT / "tests" / "fuzz" / "README.md",
    ROOT / "SECURITY.md",
)
CONFIGS = tuple(sorted((ROOT / "configs").rglob("*.yaml"))) + tuple(
    sorted((ROOT / "pipeline" / "demo").glob("*.yaml"))
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:\A|(?<=\n\n))(?:    .*\n|\n(?=    ))+")


@dataclass(frozen=True)
class Block:
    """A block of code: where it begins, its language as given, its text, and the line of text before it."""

    page: Path
    line: int
    language: str
    text: str
    before: str

    @property
    def where(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def lines(self):
        """Not empty, and joined where a backslash ends them."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


@cache
def text_of(page):
    return page.read_text(encoding="utf-8")


def _block(page, start, language, text):
    before = text_of(page)[:start]
    return Block(page, before.count("\n") + 1, language, text, before.rstrip().rpartition("\n")[2])


@cache
def blocks(page):
    """The fenced and the indented blocks of a page, in order; of a configuration, what its head sets off."""
    text = text_of(page)
    if page.suffix == ".yaml":
        head = text[: next(match.start() for match in re.finditer(r"^(?!#)", text, re.MULTILINE))]
        shown = "\n".join(re.sub(r"(?<=\S)\s{3,}\S.*", "", line[4:]) for line in _set_off(head))
        return (Block(page, 1, "sh", shown, ""),) if shown else ()
    fenced = [_block(page, match.start(), match[1], match[2]) for match in _FENCE.finditer(text)]
    rest = _FENCE.sub(lambda match: re.sub(r"[^\n]", "", match[0]), text)
    indented = [
        _block(page, match.start(), "", re.sub(r"^    ", "", match[0], flags=re.MULTILINE))
        for match in _INDENTED.finditer(rest)
        if match[0].strip()
    ]
    return tuple(sorted([*fenced, *indented], key=lambda block: block.line))


def _set_off(head):
    return [line for line in head.splitlines() if line.startswith("#   ")]


@cache
def prose(page):
    """A page without its blocks."""
    return _FENCE.sub("", text_of(page))


@cache
def code_spans(page):
    """The inline code of a page, in order, each once."""
    return tuple(
        dict.fromkeys(span.replace("\\|", "|") for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page)))
    )


def section(page, title):
    """The text below a heading of the second level, to the next one."""
    _, found, rest = text_of(page).partition(f"\n## {title}\n")
    assert found, f"{page.relative_to(ROOT)} has no section {title!r}"
    return rest.partition("\n## ")[0]


@cache
def anchors(page):
    """What a link to a heading of the page is called, as GitHub makes it."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """Targets of the links and pictures of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def rooms(text):
    """A tree's names: by folder, the modules and folders that stand in it.

    A line `folder/   what it is` opens a folder, and lines that are indented name what is in it, with commas,
    up to two spaces.
    """
    found, folder = {}, ""
    for line in text.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0]
        if not line.startswith(" "):
            folder = names.rstrip("/")
            found.setdefault(folder, set())
        else:
            found[folder] |= {name.rstrip("/") for name in re.split(r",\s*", names) if name}
    return found


@cache
def told_words():
    """Every word in a text of the application's source."""
    return frozenset(
        word
        for path in sorted((ROOT / "pipeline").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in re.findall(r"[A-Za-z]+", node.value)
    )


@cache
def options_of(path):
    """The options that a program with argparse takes, read from its source."""
    return frozenset(
        argument.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
        for argument in node.args
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("-")
    )
