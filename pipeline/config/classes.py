"""The classes to look for: a file of names, or of names with ids, synonyms, plurals and templates."""

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
TOLD_PROBLEMS = 10


def _template(text: str) -> str:
    if "{}" not in text:
        raise ValueError("expected a text with {} where the name goes")
    return text


def one_line(text: str) -> str:
    """Return a text; raise a ValueError where it would not be one line of a file or a terminal."""
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
        class_id: from 1; 0 is the background of label maps, and 255 what they leave open.
        name: what its rows are named by, and what is embedded.
        synonyms: further names by which a sample may mention it.
        plurals: of any of its names, where English has no rule for them.
        templates: in place of the job's; none: the job's.
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
            elements are names or mappings of `name` and, where wanted, `id`, `synonyms`, `plurals` and
            `templates`; a class without an id gets its place in the list, from 1.

    Returns:
        The classes in the file's order; ids and names are unique.

    Raises:
        UserError: the file cannot be read, or an entry is wrong; names the file and the lines or entries.
    """
    text = storage.read_text(url, MAX_FILE_BYTES)
    where = storage.shown_url(url)
    suffix = PurePosixPath(split_url(url).path).suffix.lower()
    if suffix == ".txt":
        items, place = [line.strip() for line in text.rstrip().split("\n")], "line"
    elif suffix in (".yaml", ".yml"):
        items, place = _yaml_list(text, where), "entry"
    else:
        raise UserError(f"{where}: expected a classes file named .txt, .yaml or .yml, got {suffix or 'none'}")
    try:
        return class_entries(items, place)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def check_class(class_id: int, name: str) -> None:
    """Refuse a class of somebody else's files that a classes file cannot list.

    Raises:
        ValueError: the id is out of range, or the name is not one line.
    """
    if not 1 <= class_id <= LARGEST_CLASS_ID:
        raise ValueError(f"class {class_id}: expected ids from 1 to {LARGEST_CLASS_ID}")
    try:
        one_line(name)
    except ValueError as error:
        raise ValueError(f"class {class_id}: {error}, got {received(name)}") from None


def class_lines(names: Mapping[int, str]) -> str:
    """Give the content of a classes file: line i names class i, by its number where no class has that id.

    Raises:
        ValueError: as `check_class`.
    """
    for class_id, name in names.items():
        check_class(class_id, name)
    return "".join(f"{names.get(number, number)}\n" for number in range(1, max(names, default=0) + 1))


def class_entries(items: Sequence[Any], place: str = "entry") -> tuple[ClassEntry, ...]:
    """Validate a list of names or mappings, as `read_class_list` describes it.

    Args:
        items: names, mappings, or entries that are valid already.
        place: what an item is called in errors; they are numbered from 1.

    Raises:
        ValueError: one line for each problem, the first few of many.
    """
    if not items or items == [""]:
        raise ValueError("expected at least one class, got none")
    if len(items) > LARGEST_CLASS_ID:
        raise ValueError(f"expected at most {LARGEST_CLASS_ID} classes, got {len(items)}")
    entries: list[ClassEntry] = []
    problems: list[str] = []
    for number, item in enumerate(items, 1):
        try:
            entries.append(_entry(item, number))
        except ValidationError as error:
            problems += [f"  {place} {number}: {_told(problem)}" for problem in error.errors()]
    if not problems:
        problems = [
            *_repeated(entries, place, lambda entry: entry.class_id, "id"),
            *_repeated(entries, place, lambda entry: entry.name.casefold(), "name"),
        ]
    if problems:
        more = [f"  ... and {len(problems) - TOLD_PROBLEMS} more"] if len(problems) > TOLD_PROBLEMS else []
        raise ValueError("\n".join([f"{len(problems)} problem(s)", *problems[:TOLD_PROBLEMS], *more]))
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


def _told(problem: Any) -> str:
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
            problems.append(f"  {place} {number}: {what} {value!r} is that of {place} {first} too")
    return problems
