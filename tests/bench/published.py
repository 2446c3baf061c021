"""Record what a program measures: print each row, and with `--write` keep all rows in tests/bench/figures.

The first line printed says what the program measures and omits, with its settings, commit and machine.

    arguments = figure_parser(__doc__).parse_args()
    with recording(__file__, arguments, data=["pipeline/demo/shards/heldout-*.tar"]) as record:
        record("masks", {"variant": "default", "iou": estimate, "cpu_ms": 41.2})

Rows are values (numbers, texts, and intervals as objects with value, low and high); how they are formatted is
in `layouts.py`. `figures.py` makes the pages from the data files.
"""

from __future__ import annotations

import argparse
import ast
import json
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from environment import UNKNOWN_COMMIT, changed_files, environment, load_1min
from measured_files import ROOT, measured_files

FOLDER = Path(__file__).with_name("figures")
SIGNIFICANT_DIGITS = 6
# options of every program, which are no settings of a measurement
OPTIONS = ("write", "allow_dirty", "commit")

Row = Mapping[str, Any]
Record = Callable[[str, Row], None]


def figure_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every program has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("publishing")
    group.add_argument(
        "--write", action="store_true", help="keep the rows in tests/bench/figures, and renew the pages"
    )
    group.add_argument(
        "--allow-dirty",
        action="store_true",
        help="write although files that are measured differ from the commit; the data file says so",
    )
    group.add_argument("--commit", metavar="HASH", help="the measured commit, where there is no git checkout")
    return parser


@contextmanager
def recording(
    program: str,
    arguments: argparse.Namespace,
    *,
    name: str | None = None,
    data: Iterable[str] = (),
    also: Iterable[str] = (),
    needs: str | None = None,
    omitted: str | None = None,
) -> Iterator[Record]:
    """Yield a function that takes the name of a table and a row of it; write the data file in the end.

    Nothing is written where the body raises.

    Args:
        program: `__file__` of the program.
        arguments: its options, of `figure_parser`.
        name: of the data file; default: that of the program.
        data: paths or patterns of files in the repository, other than Python's, that are measured.
        also: paths or patterns of further Python files that are measured: those that run in other processes.
        needs: what the program needs that not every machine has, such as "a CUDA device".
        omitted: what is not in the figures although a reader might expect it; the first line names it.

    Raises:
        SystemExit: `--write` is given and files that are measured differ from the commit.
    """
    started_s, path = time.monotonic(), Path(program).resolve().relative_to(ROOT).as_posix()
    sources = {"programs": [path, *also], "data": list(data)}
    files = measured_files(**sources)
    head = environment() | ({"commit": arguments.commit} if arguments.commit else {})
    is_clean = _is_clean(head["commit"], files, arguments)
    document = {
        "program": path,
        "command": _command(path),
        "needs": needs,
        "settings": {
            key: value for key, value in vars(arguments).items() if key not in OPTIONS and value is not None
        },
        **head,
        "is_clean": is_clean,
        "date": datetime.now(UTC).date().isoformat(),
    }
    name = name or Path(path).stem
    described = {"measures": summary_of(program), **({"omits": omitted} if omitted else {})}
    print(json.dumps({**described, "figure": name, **_plain(document)}), flush=True)
    tables: defaultdict[str, list[Row]] = defaultdict(list)

    def record(table: str, row: Row) -> None:
        tables[table].append(_plain(row))
        head["machine"]["load_1min"] = max(head["machine"]["load_1min"], load_1min())
        print(json.dumps({"table": table, **tables[table][-1]}), flush=True)

    yield record
    if arguments.write:
        took_s = round(time.monotonic() - started_s)
        write_data(name, {**document, "took_s": took_s, "tables": tables, **sources, "files": files})


def summary_of(program: str) -> str:
    """Return the first paragraph of a program's docstring, which says what it measures."""
    text = ast.get_docstring(ast.parse(Path(program).read_bytes())) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _command(path: str) -> str:
    """Return the command line without the options that say nothing of the measurement."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--allow-dirty", action="store_true")
    parser.add_argument("--commit")
    return shlex.join(["python", path, *parser.parse_known_args()[1]])


def write_data(name: str, document: Mapping[str, Any]) -> None:
    """Write a data file, and renew the pages."""
    from figures import renew_pages

    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(_as_json(_plain(document)), encoding="utf-8")
    print(f"wrote tests/bench/figures/{name}.json; pages renewed: {renew_pages() or 'none'}", file=sys.stderr)


def _is_clean(commit: str, files: Iterable[str], arguments: argparse.Namespace) -> bool | None:
    """Return whether the measured files are those of the commit; None where there is no git checkout."""
    if commit == UNKNOWN_COMMIT and arguments.write:
        raise SystemExit("no git checkout here: name the measured commit with --commit HASH")
    if arguments.commit:
        return None
    changed = changed_files(files)
    if changed and arguments.write and not arguments.allow_dirty:
        shown = ", ".join(changed[:5])
        raise SystemExit(
            f"{len(changed)} measured files differ from commit {commit}: {shown}. Commit them first, or "
            "write all the same with --allow-dirty"
        )
    return not changed


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: numbers to six significant digits, objects without types."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if value == value else None
    return value


def _as_json(document: Mapping[str, Any]) -> str:
    """Return indented JSON with one line a row of a table, and one a file."""
    parts = []
    for key, value in document.items():
        if key == "tables":
            tables = ",\n".join(f"  {json.dumps(name)}: {_lines(rows)}" for name, rows in value.items())
            parts.append(f' "tables": {{\n{tables}\n }}')
        elif key == "files":
            files = ",\n".join(f"  {json.dumps(path)}: {json.dumps(each)}" for path, each in value.items())
            parts.append(f' "files": {{\n{files}\n }}')
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(rows: Iterable[Row]) -> str:
    return "[\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
