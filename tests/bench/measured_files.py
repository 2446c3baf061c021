"""List the files that a figure measures, with digests that comments and docstrings do not change.

Code: what a program imports from this repository, directly or through others (`grimp` reads the imports), and
the program itself. How figures are recorded and shown (`RECORDING`) is not measured. Data: patterns that the
program names, such as weights, shards and configurations.

What counts as a change: of a Python file, any change of its syntax tree other than docstrings; of any other
file, any change of its bytes. Digests and not commits are compared, since a shallow clone or a squashed
branch lacks commits, and since most commits to a file change nothing that is measured.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grimp

ROOT = Path(__file__).parents[2]
PACKAGES = ("legrad", "pipeline", "tests")
RECORDING = (
    *("cost_layouts", "environment", "figure_values", "figures", "layout_parts", "layouts"),
    *("mask_layouts", "measured_files", "published"),
)
DIGITS = 12
# fields of a syntax tree that differ between versions of Python, or repeat what other fields say
_IGNORED_FIELDS = {"ctx", "kind", "type_comment", "type_params"}
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def measured_files(programs: Iterable[str], data: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """Return the digest of each file that is measured, by its path in the repository, in order.

    Args:
        programs: paths or patterns of Python files whose imports are followed.
        data: paths or patterns of other files.
        root: the repository.

    Raises:
        FileNotFoundError: a pattern matches no file.
    """
    starts = [root / path for path in matching(programs, root)]
    paths = {*(file.relative_to(root).as_posix() for file in code_files(starts, root)), *matching(data, root)}
    return {path: digest(root / path) for path in sorted(paths)}


def matching(patterns: Iterable[str], root: Path = ROOT) -> list[str]:
    """Return the paths of the files that match patterns, relative to the repository."""
    found: list[str] = []
    for pattern in patterns:
        paths = sorted(root.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"no file matches {pattern!r} in {root}")
        found += (path.relative_to(root).as_posix() for path in paths)
    return found


def code_files(starts: Iterable[Path], root: Path = ROOT) -> set[Path]:
    """Return Python files and the files of this repository that they import, directly or through others."""
    graph = _import_graph(root)
    found: set[Path] = set()
    waiting = list(starts)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in imported_names(path):
            sibling = path.parent / f"{name}.py"
            if sibling.exists() and name not in RECORDING:
                waiting.append(sibling)
            elif name in graph.modules:
                modules = {name, *graph.find_upstream_modules(name)}
                found.update(_module_path(module, root) for module in modules)
    return found


def imported_names(path: Path) -> Iterator[str]:
    """Yield the names that a file imports, also inside functions; `from a import b` yields `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def digest(path: Path) -> str:
    """Return a digest of what counts in a file."""
    return _digest_of(path, path.stat().st_mtime_ns)


@cache
def _digest_of(path: Path, _mtime_ns: int) -> str:
    content = path.read_bytes()
    if path.suffix == ".py":
        content = repr(_what_counts(ast.parse(content))).encode()
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _what_counts(value: Any) -> Any:
    if isinstance(value, list):
        return [_what_counts(each) for each in value]
    if not isinstance(value, ast.AST):
        return value
    fields = {name: each for name, each in ast.iter_fields(value) if name not in _IGNORED_FIELDS}
    if isinstance(value, _WITH_DOCSTRING) and ast.get_docstring(value, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    counted = [(name, _what_counts(each)) for name, each in fields.items() if each not in (None, [])]
    return type(value).__name__, counted


@cache
def _import_graph(root: Path) -> grimp.ImportGraph:
    sys.path.insert(0, str(root))
    try:
        return grimp.build_graph(*PACKAGES, cache_dir=None)
    finally:
        sys.path.remove(str(root))


def _module_path(module: str, root: Path) -> Path:
    path = root / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
