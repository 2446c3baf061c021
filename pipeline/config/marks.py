"""Read marks: the rows that a person called good or bad in a report, as a filter of rows."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import storage
from pipeline.errors import UserError
from pipeline.storage.urls import split_url
from pipeline.text import printable, received

COLUMNS = ("shard", "key", "prompt_index", "prompt", "mark")
NEEDED_COLUMNS = ("shard", "key", "prompt_index", "mark")
MAX_FILE_BYTES = 32 << 20
MAX_MARKS = 100_000
REPORTED_PROBLEMS = 10
ELLIPSIS = "…"
# spreadsheets take a text that begins so for a formula; the report writes an apostrophe before it
_GUARDED = re.compile(r"'+[=+\-@\t\r]")

Keep = Literal["good", "not-bad"]


class MarkEntry(BaseModel):
    """The mark of one row.

    Attributes:
        shard: canonical URL of the shard, as the column `shard` of the annotations has it.
        key: of the sample.
        prompt_index: ordinal of the prompt in its sample.
        prompt: the prompt, printable, perhaps cut and ended by an ellipsis; None: it is not checked.
        mark: good or bad.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: str = Field(min_length=1)
    key: str
    prompt_index: int = Field(ge=0, le=2**15 - 1)
    prompt: str | None = None
    mark: Literal["good", "bad"]

    @property
    def row(self) -> tuple[str, str, int]:
        """What identifies the marked row: shard, key and prompt index."""
        return self.shard, self.key, self.prompt_index


@dataclass(frozen=True)
class Marks:
    """Marks as a filter of rows.

    Attributes:
        keep: good: keep the rows marked good. not-bad: keep all rows but those marked bad.
        acting: the marks that decide: under good those that are good, otherwise those that are bad.
    """

    keep: Keep
    acting: Mapping[tuple[str, str, int], MarkEntry]

    @property
    def digest(self) -> str:
        """Digest of what the filter keeps."""
        rows = sorted(map(list, self.acting))
        return hashlib.sha256(json.dumps([self.keep, rows]).encode()).hexdigest()

    @cached_property
    def acting_by_shard(self) -> Mapping[str, frozenset[tuple[str, str, int]]]:
        """The rows of `acting` by their shard."""
        by_shard: dict[str, set[tuple[str, str, int]]] = defaultdict(set)
        for row in self.acting:
            by_shard[row[0]].add(row)
        return {shard: frozenset(rows) for shard, rows in by_shard.items()}

    def keeps(self, shard: str, key: str, prompt_index: int, prompt: str | None = None) -> bool:
        """Return whether a row is kept.

        Args:
            shard: canonical URL of its shard.
            key: of its sample.
            prompt_index: ordinal of its prompt in the sample.
            prompt: its text, which must be the marked one; None: it is not checked.

        Raises:
            UserError: the mark is of another prompt, so the marks belong to other prompts than these.
        """
        entry = self.acting.get((shard, key, prompt_index))
        if entry is not None and prompt is not None and not _is_of(entry, prompt):
            raise UserError(
                f"prompt {prompt_index} of sample {printable(key)} in {shard} is {received(prompt)}, but was "
                f"marked {entry.mark} as {received(entry.prompt)}; use marks of a job with the same prompts"
            )
        return (entry is not None) == (self.keep == "good")

    def is_within(self, earlier: Marks) -> bool:
        """Return whether every row that these marks keep is one that earlier marks keep too."""
        rows, earlier_rows = self.acting.keys(), earlier.acting.keys()
        if self.keep == "good":
            return rows <= earlier_rows if earlier.keep == "good" else rows.isdisjoint(earlier_rows)
        return earlier.keep == "not-bad" and earlier_rows <= rows


def read_marks(url: str, keep: Keep = "not-bad") -> Marks:
    """Read a file of marks as a filter.

    Args:
        url: see `read_mark_list`.
        keep: see `Marks`.

    Raises:
        UserError: see `read_mark_list`.
    """
    return marks_of(read_mark_list(url), keep)


def marks_of(entries: Sequence[MarkEntry], keep: Keep) -> Marks:
    """Return marks as a filter.

    Raises:
        UserError: a row has both marks.
    """
    by_row: dict[tuple[str, str, int], MarkEntry] = {}
    for entry in entries:
        if by_row.setdefault(entry.row, entry).mark != entry.mark:
            raise UserError(
                f"marks: prompt {entry.prompt_index} of sample {printable(entry.key)} in {entry.shard} is "
                "marked both good and bad; keep one of the two"
            )
    decides = "good" if keep == "good" else "bad"
    return Marks(keep, {row: entry for row, entry in by_row.items() if entry.mark == decides})


def read_mark_list(url: str) -> tuple[MarkEntry, ...]:
    """Read a file of marks, as a report saves it.

    Args:
        url: path or URL of a .csv file with a line of column names, or of a .json file with a list of
            objects. Columns or keys: shard, key, prompt_index, mark (good or bad) and, optionally, prompt.
            Others are ignored, and so are entries whose mark is empty.

    Raises:
        UserError: the file cannot be read, or an entry is invalid; the error names the lines or entries.
    """
    where = storage.shown_url(url)
    suffix = PurePosixPath(split_url(url).path).suffix.lower()
    if suffix not in (".csv", ".json"):
        raise UserError(
            f"{where}: expected a file of marks named .csv or .json, found {suffix or 'no extension'}"
        )
    text = storage.read_text(url, MAX_FILE_BYTES)
    try:
        items = list(_csv_items(text) if suffix == ".csv" else _json_items(text))
        return _entries(items, "line" if suffix == ".csv" else "entry")
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def require_marked_shards(marks: Sequence[MarkEntry], shard_urls: Collection[str]) -> None:
    """Check that marks are about a job's shards.

    Args:
        marks: of the configuration.
        shard_urls: canonical URLs of the job's shards.

    Raises:
        UserError: no mark is about any of the shards.
    """
    if marks and shard_urls and not {entry.shard for entry in marks} & set(shard_urls):
        raise UserError(
            f"marks: none of the {len(marks)} mark(s) is about a shard of this job; marked: "
            f"{storage.shown_url(marks[0].shard)}; in the job: {min(shard_urls)}. If the shards have moved, "
            "replace the folder in the column shard of the marks"
        )


def _is_of(entry: MarkEntry, prompt: str) -> bool:
    marked, shown = entry.prompt, printable(prompt)
    if marked is None:
        return True
    return marked == shown or (marked.endswith(ELLIPSIS) and shown.startswith(marked[: -len(ELLIPSIS)]))


def _csv_items(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each line's number and values; spreadsheets of some countries separate by semicolons."""
    header = text.partition("\n")[0]
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), restval="", strict=True
    )
    try:
        names = [(name or "").strip() for name in reader.fieldnames or ()]
        if missing := [name for name in NEEDED_COLUMNS if name not in names]:
            raise ValueError(
                f"column(s) {', '.join(missing)} not found; the first line names {received(header.strip())}, "
                f"expected {', '.join(COLUMNS)}"
            )
        reader.fieldnames = names
        for values in reader:
            yield reader.line_num, {name: _unguarded(values[name]) for name in COLUMNS if name in values}
    except csv.Error as error:
        raise ValueError(f"line {reader.reader.line_num}: {error}") from None


def _unguarded(text: str) -> str:
    return text[1:] if _GUARDED.match(text) else text


def _json_items(text: str) -> Iterator[tuple[int, Any]]:
    try:
        document = json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(document, list):
        raise ValueError(f"expected a list of marks, found {received(document)}")
    for number, item in enumerate(document, 1):
        yield number, {name: item.get(name) for name in COLUMNS} if isinstance(item, dict) else item


def _entries(items: Sequence[tuple[int, Any]], place: str) -> tuple[MarkEntry, ...]:
    if len(items) > MAX_MARKS:
        raise ValueError(f"has {len(items)} marks; the limit is {MAX_MARKS}")
    entries: list[MarkEntry] = []
    problems: list[str] = []
    for number, item in items:
        if isinstance(item, dict) and item.get("mark") in ("", None):
            continue
        try:
            entries.append(MarkEntry.model_validate(_tidy(item)))
        except ValidationError as error:
            problems += [f"  {place} {number}: {_problem_text(problem)}" for problem in error.errors()]
    if problems:
        more = len(problems) - REPORTED_PROBLEMS
        tail = [f"  ... and {more} more"] if more > 0 else []
        raise ValueError("\n".join([f"{len(problems)} problem(s)", *problems[:REPORTED_PROBLEMS], *tail]))
    return tuple(entries)


def _tidy(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    mark = item.get("mark")
    return {
        **item,
        "prompt": item.get("prompt") or None,
        "mark": mark.strip().lower() if isinstance(mark, str) else mark,
    }


def _problem_text(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"]
    return f"{key + ': ' if key else ''}{message[0].lower()}{message[1:]}, found {received(problem['input'])}"
