"""Write measured tables into tests/bench/README.md, where each program has a place between two marks."""

from collections.abc import Sequence
from pathlib import Path

README = Path(__file__).with_name("README.md")
END = "<!-- end -->"


def publish(program: str, lines: Sequence[str], page: Path = README) -> None:
    """Replace what is between the marks of a program.

    Args:
        program: file name of the program, which its first mark names.
        lines: Markdown that takes the place.
        page: where the marks are.

    Raises:
        ValueError: the page has no place for the program.
    """
    begin = f"<!-- {program} --write: begin -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(END)
    if not found or not found_end:
        raise ValueError(f"{page} has no lines {begin!r} and {END!r}")
    page.write_text("\n".join([f"{before}{begin}", *lines, f"{END}{after}"]), encoding="utf-8")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [_line(columns), "|---" * len(columns) + "|", *map(_line, rows)]


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
