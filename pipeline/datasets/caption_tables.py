"""Read tables of images and captions row by row: CSV, JSON lines and Parquet; a bad row costs only itself."""

from __future__ import annotations

import codecs
import csv
import json
import posixpath
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.corpus.folders import IMAGE_ENDINGS
from pipeline.datasets.captioned import Scalar
from pipeline.datasets.parquet_rows import is_text_list, opened_parquet, rows_of_parquet, scalar_columns
from pipeline.errors import SampleFailure, UserError
from pipeline.text import first_few, printable

DELIMITERS = ",;\t|"
# the names that Hugging Face's imagefolder has, and a common one
IMAGE_COLUMNS, CAPTION_COLUMNS = ("file_name",), ("text", "caption")
# bounds memory: a longer line is read as several, none of which is a row
MAX_LINE_CHARACTERS = 1 << 20
# of an array of objects, which is not read as a table, only looked at
MAX_JSON_TABLE_BYTES = 16 << 20
TEXT_TABLE_ENDINGS = (".csv", ".tsv", ".txt")
JSON_LINES_ENDINGS = (".jsonl", ".ndjson")

Values = dict[str, Any]


class TableRow(NamedTuple):
    """One row of a table.

    Attributes:
        place: the file and the number of the line or row, counted from 1.
        image: the name of the image file as it is written, or what is wrong with the row.
        captions: the captions in the row.
        columns: values of the other columns, without those that are neither text, number nor truth value.
    """

    place: str
    image: str | SampleFailure
    captions: tuple[object, ...] = ()
    columns: dict[str, Scalar] = {}  # noqa: RUF012


@dataclass(frozen=True)
class CaptionTable:
    """A table whose columns are known.

    Attributes:
        path: the file.
        image_column: name of the column with the names of image files.
        caption_column: name of the column with the captions.
        read: returns the place and the values of each row, or what is wrong with it.
    """

    path: Path
    image_column: str
    caption_column: str
    read: Callable[[], Iterator[tuple[str, Values | SampleFailure]]]

    def rows(self) -> Iterator[TableRow]:
        """Yield every row in the order of the file."""
        for place, values in self.read():
            yield self._row(place, values)

    def _row(self, place: str, values: Values | SampleFailure) -> TableRow:
        if isinstance(values, SampleFailure):
            return TableRow(place, values)
        image = values.get(self.image_column)
        if not isinstance(image, str) or not image.strip():
            return TableRow(place, _bad_row(f"the row has no text in column `{self.image_column}`"))
        captions = values.get(self.caption_column)
        others = {
            name: value
            for name, value in values.items()
            if name not in (self.image_column, self.caption_column) and isinstance(value, Scalar)
        }
        return TableRow(
            place, image.strip(), tuple(captions) if isinstance(captions, list) else (captions,), others
        )


def open_caption_table(path: Path, image_column: str | None, caption_column: str | None) -> CaptionTable:
    """Open a table by the ending of its name: .csv, .tsv, .txt, .jsonl, .ndjson or .parquet.

    Args:
        path: the file.
        image_column: column with the names of image files; None: file_name.
        caption_column: column with the captions; None: text, else caption.

    Raises:
        UserError: the file cannot be read, or has no such column.
    """
    readers = {
        **dict.fromkeys(TEXT_TABLE_ENDINGS, _open_delimited),
        **dict.fromkeys(JSON_LINES_ENDINGS, _open_json_lines),
        ".parquet": _open_parquet,
    }
    if path.suffix.lower() not in readers:
        raise UserError(
            f"{path}: expected a table with the ending {', '.join(readers)}{_way_to_a_table(path)}"
        )
    image_names = IMAGE_COLUMNS if image_column is None else (image_column,)
    try:
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "no such file"
            raise UserError(f"{path}: {problem}; expected a table of images and captions")
        _check_encoding(path)
        columns, read = readers[path.suffix.lower()](path, image_names)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    caption_names = CAPTION_COLUMNS if caption_column is None else (caption_column,)
    return CaptionTable(
        path,
        _column(path, columns, image_names, "--image-column"),
        _column(path, columns, caption_names, "--caption-column"),
        read,
    )


def readings_of_table(path: Path) -> Iterator[tuple[list[str], Iterator[Values | SampleFailure]]]:
    """Yield the columns and rows of a table whose columns are unknown, for each way to read it.

    Args:
        path: a file that may be a table by the ending of its name.

    Raises:
        UserError, OSError: it cannot be read as one.
    """
    match path.suffix.lower():
        case ending if ending in TEXT_TABLE_ENDINGS:
            with _opened_text(path) as stream:
                line = stream.readline(MAX_LINE_CHARACTERS)
            for delimiter in DELIMITERS:
                columns = _header(line, delimiter)
                yield columns, (values for _, values in _delimited_rows(path, columns, delimiter))
        case ending if ending in JSON_LINES_ENDINGS:
            columns, read = _open_json_lines(path, ())
            yield columns, (values for _, values in read())
        case ".parquet":
            columns, read = _open_parquet(path, ())
            yield columns, (values for _, values in read())
        case ".json" if path.stat().st_size <= MAX_JSON_TABLE_BYTES:
            document = json.loads(path.read_bytes())
            rows = [row for row in document if isinstance(row, dict)] if isinstance(document, list) else []
            yield list(rows[0]) if rows else [], iter(rows)


def header_advice() -> str:
    """Return how a table without names of columns gets them."""
    return f"begin the table with a line such as {IMAGE_COLUMNS[0]},{CAPTION_COLUMNS[0]}"


def _way_to_a_table(path: Path) -> str:
    """Return how to make a table of another file, as the end of a message."""
    match path.suffix.lower():
        case ".json":
            return _array_advice(path, path.with_suffix(".jsonl"))
        case ".xlsx" | ".xls" | ".ods":
            return "; save the sheet as CSV in UTF-8"
    return ""


def _way_from_an_array(path: Path) -> str:
    with path.open("rb") as stream:
        is_array = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return _array_advice(path, path.with_stem(f"{path.stem}-lines")) if is_array else ""


def _array_advice(path: Path, lines: Path) -> str:
    files = (shlex.quote(str(file)) for file in (path, lines))
    return "; an array of objects becomes one with: jq -c '.[]' {} > {}".format(*files)


def _check_encoding(path: Path) -> None:
    with path.open("rb") as stream:
        mark = stream.read(len(codecs.BOM_UTF16_LE))
    if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file = shlex.quote(str(path))
        copy = shlex.quote(str(path.with_stem(f"{path.stem}-utf8")))
        raise UserError(f"{path}: is UTF-16; convert it to UTF-8: iconv -f UTF-16 -t UTF-8 {file} > {copy}")


def _column(path: Path, columns: Sequence[str], wanted: Sequence[str], option: str) -> str:
    for name in wanted:
        if columns.count(name) > 1:
            raise UserError(f"{path}: has {columns.count(name)} columns `{name}`; expected one")
        if name in columns:
            return name
    if not columns:
        raise UserError(f"{path}: has no columns; expected a table of images and captions")
    found = first_few([printable(name[:40]) for name in columns], 12)
    if any(posixpath.splitext(name)[1].lower() in IMAGE_ENDINGS for name in columns):
        raise UserError(
            f"{path}: the first line names an image, not the columns ({found}); {header_advice()}"
        )
    raise UserError(
        f"{path}: has no column {' or '.join(f'`{name}`' for name in wanted)}; columns: {found}; name the "
        f"column with {option}"
    )


def _open_delimited(
    path: Path, image_names: Sequence[str]
) -> tuple[list[str], Callable[[], Iterator[tuple[str, Values | SampleFailure]]]]:
    with _opened_text(path) as stream:
        line = stream.readline(MAX_LINE_CHARACTERS)
    headers = {delimiter: _header(line, delimiter) for delimiter in DELIMITERS}
    delimiter = next((mark for mark in DELIMITERS if set(image_names) & set(headers[mark])), ",")
    columns = headers[delimiter]
    return columns, lambda: _delimited_rows(path, columns, delimiter)


def _header(line: str, delimiter: str) -> list[str]:
    names = next(csv.reader([line], delimiter=delimiter), [])
    return [name.strip() or f"column_{number}" for number, name in enumerate(names, 1)]


def _delimited_rows(
    path: Path, columns: Sequence[str], delimiter: str
) -> Iterator[tuple[str, Values | SampleFailure]]:
    with _opened_text(path) as stream:
        lines = iter(lambda: stream.readline(MAX_LINE_CHARACTERS), "")
        # strict: a quotation mark that is not closed would swallow the rows after it
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        next(rows, None)
        while True:
            # a row begins after the last line of the row before
            place = f"{path.name}:{rows.line_num + 1}"
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, _bad_row(f"{error}; a quotation mark may be missing")
                continue
            if not cells:
                continue
            if len(cells) != len(columns):
                yield (
                    place,
                    _bad_row(
                        f"the row has {len(cells)} cells, the header {len(columns)}; put texts with "
                        f"{delimiter!r} in quotation marks"
                    ),
                )
                continue
            yield place, _checked_text(dict(zip(columns, cells, strict=True)))


def _open_json_lines(
    path: Path, _image_names: Sequence[str]
) -> tuple[list[str], Callable[[], Iterator[tuple[str, Values | SampleFailure]]]]:
    def read() -> Iterator[tuple[str, Values | SampleFailure]]:
        with _opened_text(path) as stream:
            lines = iter(lambda: stream.readline(MAX_LINE_CHARACTERS), "")
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path.name}:{number}", _json_object(line)

    problems: list[str] = []
    for _, values in read():
        if isinstance(values, dict):
            return list(values), read
        problems += [] if problems else [values.message]
    problem = problems[0] if problems else "the file is empty"
    raise UserError(f"{path}: no line is a JSON object: {problem}{_way_from_an_array(path)}")


def _json_object(line: str) -> Values | SampleFailure:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _bad_row(f"the line is not JSON: {type(error).__name__}: {error}")
    if not isinstance(values, dict):
        return _bad_row(f"expected a JSON object, received {type(values).__name__}")
    return _checked_text(values)


def _open_parquet(
    path: Path, _image_names: Sequence[str]
) -> tuple[list[str], Callable[[], Iterator[tuple[str, Values | SampleFailure]]]]:
    with opened_parquet(str(path)) as file:
        lists = [column.name for column in file.schema_arrow if is_text_list(column.type)]
        columns = [*scalar_columns(file.schema_arrow), *lists]

    def read() -> Iterator[tuple[str, Values | SampleFailure]]:
        for index, values in rows_of_parquet(str(path), columns):
            try:
                yield f"{path.name}:{index + 1}", values()
            except SampleFailure as failure:
                yield f"{path.name}:{index + 1}", failure

    return columns, read


def _opened_text(path: Path) -> Any:
    # bytes that are not UTF-8 become lone surrogates, so that only the rows with them are refused
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _checked_text(values: Values) -> Values | SampleFailure:
    try:
        "".join(text for pair in values.items() for text in pair if isinstance(text, str)).encode()
    except UnicodeEncodeError:
        return SampleFailure("read", "row_not_utf8", "the row is not UTF-8; convert the table with iconv")
    return values


def _bad_row(message: str) -> SampleFailure:
    return SampleFailure("read", "bad_row", message)
