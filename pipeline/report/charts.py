"""Charts as geometry: what the page's templates draw as SVG, with the same figures in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 40
BINS = 30
MAX_BARS = 30
PACE_STEPS = 20
# a tail longer than this many times the rest is cut off, and said so
TAIL_PERCENTILE, LONG_TAIL = 99.5, 1.5


@dataclass(frozen=True)
class Tick:
    """A label at a place on an axis, in the chart's units."""

    position: float
    label: str


@dataclass(frozen=True)
class Bar:
    """One bin: its place, the heights of both parts from the bottom up, and its figures in words."""

    x: float
    width: float
    accepted_y: float
    accepted_height: float
    rejected_y: float
    rejected_height: float
    label: str


@dataclass(frozen=True)
class Histogram:
    """How a score is spread over rows.

    Attributes:
        name: of the score.
        unit: what the axis says.
        bars: bins, left to right.
        x_ticks: labels below.
        y_ticks: labels to the left: rows.
        median_x: where the median stands.
        summary: the figures in words.
        has_rejected: whether any bin holds rejected rows.
    """

    name: str
    unit: str
    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    median_x: float
    summary: str
    has_rejected: bool


@dataclass(frozen=True)
class LineChart:
    """Samples a second over the time of a run: `points` is the attribute of an SVG polyline."""

    points: str
    area: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    summary: str


@dataclass(frozen=True)
class ClassBar:
    """Rows of one class: shares of the longest bar, 0 to 100, and the figures."""

    name: str
    accepted: int
    rejected: int
    accepted_percent: float
    rejected_percent: float
    mean_similarity: float


def histogram(
    name: str,
    unit: str,
    values: Float[np.ndarray, " rows"],
    accepted: Bool[np.ndarray, " rows"],
    limits: tuple[float, float] | None = None,
) -> Histogram | None:
    """Count values into bins of equal width, accepted rows below and rejected ones above.

    Args:
        name: of the score.
        unit: what the axis says.
        values: one a row; those that are not finite are left out.
        accepted: which rows have a mask.
        limits: of the axis; None: those of the values, but for a long tail.

    Returns:
        The chart; None where there is no value.
    """
    finite = np.isfinite(values)
    values, accepted = values[finite].astype(np.float64), accepted[finite]
    if not len(values):
        return None
    low, high = limits or _limits(values)
    edges = np.linspace(low, high, BINS + 1)
    clipped = values.clip(low, high)
    good, bad = (np.histogram(clipped[part], edges)[0] for part in (accepted, ~accepted))
    y_ticks = _ticks(0, max(1, int((good + bad).max())), 4, whole=True)
    top = max(tick for tick in y_ticks)

    def place(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 2)

    def rows_high(count: float) -> float:
        return round(count / top * (HEIGHT - TOP - BOTTOM), 2)

    bottom, bin_width = HEIGHT - BOTTOM, place(edges[1]) - place(edges[0])
    bars = tuple(
        Bar(
            x=place(edges[number]),
            width=round(max(0.5, bin_width - 1), 2),
            accepted_y=round(bottom - rows_high(ok), 2),
            accepted_height=rows_high(ok),
            rejected_y=round(bottom - rows_high(ok + no), 2),
            rejected_height=rows_high(no),
            label=f"{edges[number]:.3g} to {edges[number + 1]:.3g}: {ok:,} accepted, {no:,} rejected",
        )
        for number, (ok, no) in enumerate(zip(good.tolist(), bad.tolist(), strict=True))
        if ok or no
    )
    return Histogram(
        name=name,
        unit=unit,
        bars=bars,
        x_ticks=tuple(Tick(place(tick), f"{tick:g}") for tick in _ticks(low, high, 5) if low <= tick <= high),
        y_ticks=tuple(Tick(round(bottom - rows_high(tick), 2), f"{tick:,.0f}") for tick in y_ticks),
        median_x=place(float(np.clip(np.median(values), low, high))),
        summary=_summary(values, high),
        has_rejected=bool(bad.any()),
    )


def _limits(values: Float[np.ndarray, " rows"]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    tail = float(np.percentile(values, TAIL_PERCENTILE))
    if high - low > LONG_TAIL * (tail - low) > 0:
        high = tail
    # one value alone, or values that differ by rounding, still make an axis
    margin = max(abs(low), abs(high), 1e-6) * 1e-3
    return (low, high) if high - low > margin else (low - 10 * margin, high + 10 * margin)


def _summary(values: Float[np.ndarray, " rows"], high: float) -> str:
    low, quarter, median, three_quarters, most = np.percentile(values, [0, 25, 50, 75, 100])
    beyond = int((values > high).sum())
    text = (
        f"{len(values):,} rows: median {median:.3g}, middle half {quarter:.3g} to {three_quarters:.3g}, "
        f"all {low:.3g} to {most:.3g}."
    )
    return f"{text} The last bar also holds {beyond:,} rows beyond {high:.3g}." if beyond else text


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    return [float(tick) for tick in MaxNLocator(nbins=most, integer=whole).tick_values(low, high)]


def pace_chart(history: Sequence[tuple[float, int]]) -> LineChart | None:
    """Draw samples a second between the points of a run's history.

    Args:
        history: seconds since the run's start, and samples until then.

    Returns:
        The chart; None where fewer than two points leave nothing to draw.
    """
    # workers tell of whole batches, so short steps would jump between none and many
    spacing = -(-len(history) // PACE_STEPS) or 1
    points = np.array([*history[:-1:spacing], *history[-1:]], dtype=np.float64).reshape(-1, 2)
    seconds = points[:, 0]
    if len(points) < 2 or not np.isfinite(points).all() or (np.diff(seconds) <= 0).any():
        return None
    # a worker that dies takes samples with it
    paces = np.diff(points[:, 1]).clip(min=0) / np.diff(seconds)
    unit_s, unit = (
        (3600, "hours") if seconds[-1] > 7200 else (60, "minutes") if seconds[-1] > 120 else (1, "seconds")
    )
    y_ticks = _ticks(0, max(float(paces.max()), 1e-3), 4)
    top, bottom = y_ticks[-1], HEIGHT - BOTTOM

    def x_at(second: float) -> float:
        return round(float(LEFT + second / seconds[-1] * (WIDTH - LEFT - RIGHT)), 2)

    def y_at(pace: float) -> float:
        return round(bottom - pace / top * (HEIGHT - TOP - BOTTOM), 2)

    # each pace holds between two points, so the line goes by steps
    corners = [
        (x_at(second), y_at(pace))
        for start, end, pace in zip(seconds[:-1], seconds[1:], paces, strict=True)
        for second in (start, end)
    ]
    line = " ".join(f"{x},{y}" for x, y in corners)
    mean = (points[-1, 1] - points[0, 1]) / (seconds[-1] - seconds[0])
    return LineChart(
        points=line,
        area=f"{corners[0][0]},{bottom} {line} {corners[-1][0]},{bottom}",
        x_ticks=tuple(
            Tick(x_at(tick * unit_s), f"{tick:g}")
            for tick in _ticks(0, seconds[-1] / unit_s, 5)
            if tick * unit_s <= seconds[-1]
        ),
        y_ticks=tuple(Tick(y_at(tick), f"{tick:,g}") for tick in y_ticks),
        x_label=f"{unit} since the start",
        summary=f"Samples a second, loading included: mean {mean:,.1f}, highest {paces.max():,.1f}.",
    )


def class_bars(
    names: Mapping[int, str],
    class_ids: np.ndarray,
    accepted: Bool[np.ndarray, " rows"],
    similarity: Float[np.ndarray, " rows"],
) -> tuple[tuple[ClassBar, ...], int]:
    """Count rows by class, most frequent first.

    Returns:
        The bars of the most frequent classes, and how many classes are left out.
    """
    counts = Counter(class_ids[class_ids >= 0].tolist()).most_common()
    longest = max((rows for _, rows in counts), default=1)

    def bar(class_id: int, rows: int) -> ClassBar:
        own = class_ids == class_id
        good = int((own & accepted).sum())
        return ClassBar(
            name=names.get(class_id, f"class {class_id}"),
            accepted=good,
            rejected=rows - good,
            accepted_percent=round(100 * good / longest, 2),
            rejected_percent=round(100 * (rows - good) / longest, 2),
            mean_similarity=float(np.nanmean(similarity[own])) if np.isfinite(similarity[own]).any() else 0.0,
        )

    return tuple(bar(*pair) for pair in counts[:MAX_BARS]), max(0, len(counts) - MAX_BARS)
