"""Parts of which regions of figures are laid out: heads, tables and sentences, made of format strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from figure_values import Figure, Row, side_by_side

Render = Callable[[Figure], str]
# title of a column -> format of its cells
Columns = Mapping[str, str]


@dataclass(frozen=True)
class Region:
    """A region of a page.

    Attributes:
        figure: name of the data file.
        parts: each returns a paragraph or a table of the region.
        own_command: measures the figure for the first time; default: its program without options.
        has_head: whether the region begins with what the figure was measured with.
    """

    figure: str
    parts: Sequence[Render]
    own_command: str | None = None
    has_head: bool = True

    @property
    def command(self) -> str:
        """The command that measures and publishes the figure."""
        return self.own_command or f"python tests/bench/{self.figure}.py --write"

    def render(self, figure: Figure) -> str:
        """Return the region's Markdown."""
        parts = [head, *self.parts] if self.has_head else self.parts
        return "\n\n".join(part(figure) for part in parts)


def head(figure: Figure) -> str:
    """Return what a figure was measured with: commit, date, machine and command."""
    document = figure.document
    machine = document["machine"]
    parts = [
        f"commit {document['commit']}{' with changes' if document['is_clean'] is False else ''}",
        document["date"],
        machine["processor"],
        *([f"{machine['cores']} cores"] if isinstance(machine["cores"], int) else []),
        *([f"load up to {machine['load_1min']}"] if isinstance(machine["load_1min"], float) else []),
        *([machine["device"]] if isinstance(machine["device"], str) else []),
    ]
    shown = ", ".join(part for part in parts if isinstance(part, str) and part)
    needs = f" Needs {document['needs']}." if isinstance(document["needs"], str) else ""
    copied = " Copied from this page as it was before data files." if document["is_copied"] is True else ""
    return f"`{document['command']}`: {shown}.{needs}{copied}"


def table(rows: Iterable[Row], columns: Columns) -> str:
    """Return a Markdown table; a sentence where there is no row."""
    cells = [[form.format_map(row) for form in columns.values()] for row in rows]
    if not cells:
        return f"Not measured by that run: {', '.join(list(columns)[1:])}."
    return "\n".join([_line(list(columns)), "|---" * len(columns) + "|", *map(_line, cells)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def columns_of(name: str, columns: Columns, **chosen: object) -> Render:
    """Return a layout of a table of the data file: of all its rows, or those with some values."""

    def render(figure: Figure) -> str:
        rows = (row for row in figure.rows(name) if all(row[key] == chosen[key] for key in chosen))
        return table(rows, columns)

    return render


def sets_side_by_side(name: str, by: str, columns: Columns, only: Sequence[str] = ()) -> Render:
    """Return a layout of a table with a row for each value of `by`, in which the sets' rows are named."""

    def render(figure: Figure) -> str:
        rows = side_by_side(figure.rows(name), by, "set")
        chosen = {row[by]: row for row in rows}
        return table([chosen[value] for value in only if value in chosen] if only else rows, columns)

    return render


def lines_of(name: str, lines: Mapping[str, str], titles: tuple[str, str] = ("what", "measured")) -> Render:
    """Return a layout of a table with a line for each format, of the first row of a table in the data."""

    def render(figure: Figure) -> str:
        row = figure.row(name)
        cells = [{"what": what, "measured": form.format_map(row)} for what, form in lines.items()]
        return table(cells, {titles[0]: "{what}", titles[1]: "{measured}"})

    return render


def sentence(form: str, name: str | None = None, **chosen: object) -> Render:
    """Return a layout of a sentence: of the row of a table, or of the settings and the machine."""

    def render(figure: Figure) -> str:
        return form.format_map(figure.document if name is None else figure.row(name, **chosen))

    return render
