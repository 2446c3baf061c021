"""Read data files of figures, as values that format strings take.

A number formats as Python's numbers do: `{samples_per_s:,.0f}`. An interval knows the forms of these pages:

    {iou.short}              .911
    {iou.short_half}         .911 ±.030
    {iou.span}               .911 (.880 to .941)
    {iou.percent}            91.1
    {iou.percent_half}       91.1 ±3.0
    {iou.signed_percent_half}   +9.3 ±1.2

A value that is missing formats as `-` in every form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("figures")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; figures copied from a page may lack the interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def short(self) -> str:
        """The value, to three digits and without the zero before the point."""
        return _short(self.value)

    @property
    def half(self) -> str:
        """Half the width of the interval."""
        return "" if self.low is None or self.high is None else f"±{_short((self.high - self.low) / 2)}"

    @property
    def short_half(self) -> str:
        """The value and half the interval."""
        return f"{self.short} {self.half}".strip()

    @property
    def span(self) -> str:
        """The value and both ends of its interval."""
        ends = (
            "" if self.low is None or self.high is None else f" ({_short(self.low)} to {_short(self.high)})"
        )
        return f"{self.short}{ends}"

    @property
    def percent(self) -> str:
        """The value in per cent."""
        return f"{100 * self.value:.1f}"

    @property
    def percent_half(self) -> str:
        """The value and half the interval, in per cent."""
        return f"{self.percent}{self._percent_of_half()}"

    @property
    def signed_percent_half(self) -> str:
        """A difference and half the interval, in per cent."""
        return f"{100 * self.value:+.1f}{self._percent_of_half()}"

    def _percent_of_half(self) -> str:
        return "" if self.low is None or self.high is None else f" ±{50 * (self.high - self.low):.1f}"

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)


class Missing:
    """Stands for a value that was not measured."""

    def __format__(self, spec: str) -> str:
        return "-"

    def __getattr__(self, name: str) -> Missing:
        return self

    def __getitem__(self, key: object) -> Missing:
        return self


@dataclass(frozen=True)
class Figure:
    """A data file.

    Attributes:
        name: of the file, without its suffix.
        document: everything in it; in `tables`, rows by the names of their tables.
    """

    name: str
    document: Mapping[str, Any]

    def rows(self, table: str) -> Sequence[Row]:
        """Return the rows of a table."""
        rows: Sequence[Row] = self.document["tables"].get(table, [])
        return rows

    def row(self, table: str, **chosen: Any) -> Row:
        """Return the first row with some values; one of missing values where there is none."""
        found = (row for row in self.rows(table) if all(row.get(key) == chosen[key] for key in chosen))
        return next(found, MISSING_ROW)


class _MissingRow(dict[str, Any]):
    def __missing__(self, key: str) -> Missing:
        return Missing()


MISSING_ROW: Row = _MissingRow()


def read_figure(name: str, folder: Path = FOLDER) -> Figure | None:
    """Return a figure; None where it has no data file."""
    path = folder / f"{name}.json"
    return Figure(name, _values(json.loads(path.read_text(encoding="utf-8")))) if path.exists() else None


def names_of_figures(folder: Path = FOLDER) -> list[str]:
    """Return the names of all data files, in order."""
    return sorted(path.stem for path in folder.glob("*.json"))


def side_by_side(rows: Iterable[Row], by: str, beside: str) -> list[dict[str, Any]]:
    """Return one row for each value of a column, with the rows of another column's values in it.

    `side_by_side(rows, "map", "set")` has a row for each map, in which `heldout` and `newartist` are rows.
    """
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row[by], _MissingRow({by: row[by]}))[row[beside]] = row
    return list(found.values())


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        if {"value", "low", "high"} <= value.keys():
            return Interval(value["value"], value["low"], value["high"])
        return _MissingRow({key: _values(each) for key, each in value.items()})
    if isinstance(value, list):
        return [_values(each) for each in value]
    return Missing() if value is None else value


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"
