"""Read and write classes files: names, or names with ids, synonyms, plurals and templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from pipeline import storage
from pipeline.config.yaml_text import parse_yaml
from pipeline.errors import UserError
from pipeline.storage.urls import split_url
from pipeline.text import printable, received

LARGEST_CLASS_ID = 2**15 - 1
MAX_FILE_BYTES = 4 << 20
MAX_TEXT_CHARACTERS = 1000
REPORTED_PROBLEMS = 10


def _template(text: str) -> str:
    if "{}" not in text:
        raise ValueError("expected a text with {} in place of the name")
    return text


def one_line(text: str) -> str:
    """Return a text that is one line; raise a ValueError otherwise."""
    if text != printable(text):
        raise ValueError("expected a text without line feeds and control characters")
    return text


Name = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_TEXT_CHARACTERS),
    AfterValidator(one_line),
]
Template = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARACTERS), AfterValidator(_template)]


class ClassEntry(BaseModel):
    """One class.

    Attributes:
        class_id: from 1; in label maps, 0 is the background and 255 is ignored.
        name: the prompt in the rows of the class, and the text that is embedded.
        synonyms: further names by which a sample may mention the class.
        plurals: irregular plurals of any of its names.
        templates: used in place of the job's; empty: the job's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_id: int = Field(
        strict=True, ge=1, le=LARGEST_CLASS_ID, validation_alias=AliasChoices("id", "class_id")
    )
    name: Name
    synonyms: tuple[Name, ...] = ()
    plurals: tuple[Name, ...] = ()
    templates: tuple[Template, ...] = ()


def read_class_list(url: str) -> tuple[ClassEntry, ...]:
    """Read a classes file.

    Args:
        url: path or URL of a text file, whose line i names the class of id i, or of a YAML list, whose
            elements are names or mappings of `name` and, optionally, `id`, `synonyms`, `plurals` and
            `templates`; the default id is the place in the list, from 1.

    Returns:
        The classes in the file's order; ids and names are unique.

    Raises:
        UserError: the file cannot be read, or an entry is wrong; the error names the lines or entries.
    """
    text = storage.read_text(url, MAX_FILE_BYTES)
    where = storage.shown_url(url)
    suffix = PurePosixPath(split_url(url).path).suffix.lower()
    if suffix == ".txt":
        items, place = [line.strip() for line in text.rstrip().split("\n")], "line"
    elif suffix in (".yaml", ".yml"):
        items, place = _yaml_list(text, where), "entry"
    else:
        raise UserError(
            f"{where}: expected a classes file named .txt, .yaml or .yml, got {suffix or 'no extension'}"
        )
    try:
        return class_entries(items, place)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def check_class(class_id: int, name: str) -> None:
    """Check that a classes file can list a class.

    Raises:
        ValueError: the id is out of range, or the name is not one line.
    """
    if not 1 <= class_id <= LARGEST_CLASS_ID:
        raise ValueError(f"class {class_id}: ids go from 1 to {LARGEST_CLASS_ID}")
    try:
        one_line(name)
    except ValueError as error:
        raise ValueError(f"class {class_id}: {error}, got {received(name)}") from None


def class_lines(names: Mapping[int, str]) -> str:
    """Return the content of a classes file: line i is the name of class i, or i if there is no such class.

    Raises:
        ValueError: as `check_class`.
    """
    for class_id, name in names.items():
        check_class(class_id, name)
    return "".join(f"{names.get(number, number)}\n" for number in range(1, max(names, default=0) + 1))


def class_entries(items: Sequence[Any], place: str = "entry") -> tuple[ClassEntry, ...]:
    """Validate a list of names or mappings, as `read_class_list` describes it.

    Args:
        items: names, mappings or entries.
        place: the word for an item in errors, such as line; items are numbered from 1.

    Raises:
        ValueError: one line for each problem, the first few of many.
    """
    if not items or items == [""]:
        raise ValueError("names no class")
    if len(items) > LARGEST_CLASS_ID:
        raise ValueError(f"{len(items)} classes; the limit is {LARGEST_CLASS_ID}")
    entries: list[ClassEntry] = []
    problems: list[str] = []
    for number, item in enumerate(items, 1):
        try:
            entries.append(_entry(item, number))
        except ValidationError as error:
            problems += [f"  {place} {number}: {_problem_text(problem)}" for problem in error.errors()]
    if not problems:
        problems = [
            *_repeated(entries, place, lambda entry: entry.class_id, "id"),
            *_repeated(entries, place, lambda entry: entry.name.casefold(), "name"),
        ]
    if problems:
        more = (
            [f"  ... and {len(problems) - REPORTED_PROBLEMS} more"]
            if len(problems) > REPORTED_PROBLEMS
            else []
        )
        raise ValueError("\n".join([f"{len(problems)} problem(s)", *problems[:REPORTED_PROBLEMS], *more]))
    return tuple(entries)


def _yaml_list(text: str, where: str) -> list[Any]:
    document = parse_yaml(text, where)
    if not isinstance(document, list):
        raise UserError(f"{where}: expected a list of classes, got {type(document).__name__}")
    return document


def _entry(item: Any, number: int) -> ClassEntry:
    if isinstance(item, str):
        item = {"name": item}
    if isinstance(item, dict) and not {"id", "class_id"} & set(item):
        item = {**item, "id": number}
    return ClassEntry.model_validate(item)


def _problem_text(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = f"unknown key; known: id, {', '.join(list(ClassEntry.model_fields)[1:])}"
    elif not key:
        message = "expected a name or a mapping"
    return f"{key + ': ' if key else ''}{message[0].lower()}{message[1:]}, got {received(problem['input'])}"


def _repeated(
    entries: Sequence[ClassEntry], place: str, key: Callable[[ClassEntry], object], what: str
) -> list[str]:
    first_number: dict[object, int] = {}
    problems = []
    for number, entry in enumerate(entries, 1):
        first = first_number.setdefault(key(entry), number)
        if first != number:
            value = entry.class_id if what == "id" else entry.name
            problems.append(f"  {place} {number}: {what} {value!r} is also that of {place} {first}")
    return problems
