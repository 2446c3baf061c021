"""Tables of results, with the paper's figures beside, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import legrad
from pipeline.reproduce import paper
from pipeline.text import printable


@dataclass(frozen=True)
class Counts:
    """What became of the images of a table.

    Attributes:
        total: images of the dataset.
        wanted: those to be measured: all, or as many as `--limit` says.
        used: measured.
        skipped: readable, but without any of the classes, by kind.
        errors: image or ground truth that cannot be read, by kind.
    """

    total: int
    wanted: int
    used: int
    skipped: Mapping[str, int]
    errors: Mapping[str, int]

    @property
    def error_share(self) -> float:
        """Share of the images that cannot be read."""
        return sum(self.errors.values()) / max(1, self.wanted)

    def text(self) -> str:
        """Return the counts in one line."""
        part = "" if self.wanted == self.total else f" (a random sample of {self.total:,})"
        return (
            f"{self.wanted:,} images{part}: {self.used:,} used, {_by_kind('skipped', self.skipped)}, "
            f"{_by_kind('errors', self.errors)}"
        )


@dataclass(frozen=True)
class Row:
    """One method of a table.

    Attributes:
        title: its name.
        values: percentages by metric; empty for a method of the paper that is not computed here.
        paper: the paper's percentages by metric, as far as the source quotes them.
    """

    title: str
    values: Mapping[str, float]
    paper: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """One table of the paper, on one model.

    Attributes:
        name: as in `--only`.
        title: heading.
        model: the model.
        data: folder of the dataset.
        metrics: headings by metric.
        rows: one for each method.
        counts: of the images.
        notes: how the table differs from the paper's, and why figures are missing.
    """

    name: str
    title: str
    model: str
    data: str
    metrics: Mapping[str, str]
    rows: Sequence[Row]
    counts: Counts
    notes: Sequence[str]

    def as_markdown(self) -> str:
        """Return the table with its counts and notes."""
        heads = [cell for title in self.metrics.values() for cell in (title, "paper")]
        lines = [
            f"## {self.title}",
            "",
            f"{self.model}. {self.counts.text()}.",
            "",
            f"| method | {' | '.join(heads)} |",
            f"|---|{'---|' * len(heads)}",
            *(
                f"| {row.title} | "
                + " | ".join(
                    cell
                    for metric in self.metrics
                    for cell in (_cell(row.values.get(metric)), _cell(row.paper.get(metric)))
                )
                + " |"
                for row in self.rows
            ),
            "",
            *(f"- {note}" for note in self.notes),
        ]
        return "\n".join(lines) + "\n"

    def as_document(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the table as a document, with everything that its results depend on."""
        return {
            "name": self.name,
            "title": self.title,
            "model": self.model,
            "data": printable(self.data),
            "unit": "percent",
            "images": {
                "total": self.counts.total,
                "wanted": self.counts.wanted,
                "used": self.counts.used,
                "skipped": dict(self.counts.skipped),
                "errors": dict(self.counts.errors),
            },
            "rows": [
                {"method": row.title, "values": dict(row.values), "paper": dict(row.paper)}
                for row in self.rows
            ],
            "notes": list(self.notes),
            "paper": {"id": "arXiv:2404.03214", "figures": paper.FIGURES_SOURCE},
            "settings": dict(settings),
        }


def rows_of(
    scores: Mapping[str, Mapping[str, float]], figures: Mapping[str, Mapping[str, float]]
) -> list[Row]:
    """Return a row for each method, in percent, then one for each method that the paper alone has.

    Args:
        scores: by method, as `Methods.names` names them, and metric; from 0 to 1.
        figures: the paper's percentages by metric and method.
    """
    rows = []
    computed = set()
    for method, values in scores.items():
        key = paper.LEGRAD if method.startswith(paper.LEGRAD) else method
        title = legrad.BASELINES[method].title if method in legrad.BASELINES else method
        computed.add(key)
        rows.append(Row(title, {metric: 100 * value for metric, value in values.items()}, _of(figures, key)))
    others = [method for of_metric in figures.values() for method in of_metric if method not in computed]
    rows += [
        Row(f"{method} (not computed here)", {}, _of(figures, method)) for method in dict.fromkeys(others)
    ]
    return rows


def _of(figures: Mapping[str, Mapping[str, float]], method: str) -> dict[str, float]:
    return {metric: values[method] for metric, values in figures.items() if method in values}


def _cell(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.2f}"


def _by_kind(what: str, kinds: Mapping[str, int]) -> str:
    listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds.items())
    return f"{sum(kinds.values()):,} {what}" + (f" ({listed})" if listed else "")
