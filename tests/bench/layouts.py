"""The layout of each region of figures on the pages: columns and formats; data files have the values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from figure_values import Figure, Row, read_figure

Render = Callable[[Figure], str]
# title of a column -> format of its cells
Columns = Mapping[str, str]


@dataclass(frozen=True)
class Region:
    """A region of a page.

    Attributes:
        figure: name of the data file.
        render: returns the region's Markdown.
        command: measures the figure for the first time; default: its program without options.
    """

    figure: str
    render: Render
    own_command: str | None = None

    @property
    def command(self) -> str:
        """The command that measures and publishes the figure."""
        return self.own_command or f"python tests/bench/{self.figure}.py --write"


def rendered(name: str) -> str:
    """Return the Markdown of a region.

    Raises:
        KeyError: there is no such region.
    """
    region = REGIONS[name]
    figure = read_figure(region.figure)
    return f"Not measured yet: `{region.command}`." if figure is None else region.render(figure)


def head(figure: Figure, form: str = "") -> str:
    """Return what a figure was measured with: a sentence of the region, and commit and machine of all."""
    document = figure.document
    machine = document["machine"]
    parts = [
        f"Commit {document['commit']}" + ("" if document["is_clean"] is not False else " with changes"),
        document["date"],
        machine["processor"],
        f"{machine['cores']} cores",
        f"load up to {machine['load_1min']}",
    ]
    if isinstance(machine["device"], str):
        parts.append(machine["device"])
    sentence = f" {form.format_map(document)}" if form else ""
    copied = " Copied from this page as it was." if document["is_copied"] is True else ""
    return f"{', '.join(f'{part}' for part in parts)}: `{document['command']}`.{sentence}{copied}"


def table(rows: Iterable[Row], columns: Columns) -> str:
    """Return a Markdown table."""
    cells = [[form.format_map(row) for form in columns.values()] for row in rows]
    return "\n".join([_line(list(columns)), "|---" * len(columns) + "|", *map(_line, cells)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables(form: str, **columns_of: Columns) -> Render:
    """Return a layout of a head and some tables of the data file, by name."""

    def render(figure: Figure) -> str:
        parts = [table(figure.rows(name), columns) for name, columns in columns_of.items()]
        return "\n\n".join([head(figure, form), *parts])

    return render


REGIONS: dict[str, Region] = {
    "cluster_simulation": Region(
        "cluster_simulation",
        tables(
            "",
            scenarios={
                "cluster and job": "{what}",
                "efficiency": "{efficiency:.3f}",
                "good shards given up": "{given_up}",
                "workers started at bad places": "{started_at_bad}",
                "driver, CPU ms a shard": "{driver_ms_a_shard:.2f}",
                "driver busy": "{driver_busy_share:.3f}",
                "duration, simulated": "{duration_s:,.0f} s",
            },
        ),
    ),
}
