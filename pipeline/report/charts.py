"""Charts of a report: SVG images drawn by matplotlib, each with its figures in words."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# in pixels: at this resolution a point of a font is one
WIDTH, HEIGHT, DOTS_PER_INCH = 360, 200, 72
BINS = 30
MAX_BARS = 30
PACE_STEPS = 20
# a tail longer than this many times the rest is gathered in the last bin, and the summary says so
TAIL_PERCENTILE, LONG_TAIL = 99.5, 1.5
# as in report.css for a light page; a dark one inverts the lightness of the image
ACCEPTED_COLOUR, REJECTED_COLOUR = "#2f6fb7", "#b9562a"
INK, FAINT, LINE = "#151a23", "#586273", "#c3cad4"
TICK_STEPS = [1, 2, 2.5, 5, 10]
STYLE: dict[Any, Any] = {
    # text stays text, which is smaller than outlines of letters
    "svg.fonttype": "none",
    # the same chart has the same bytes
    "svg.hashsalt": "legrad",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 13,
    "text.parse_math": False,
    "text.color": FAINT,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": FAINT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.xmargin": 0,
    "grid.color": LINE,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        name: the heading.
        uri: the SVG as a data URI.
        description: what the axes are, in words.
        summary: the figures in words.
        has_rejected: whether rejected rows are among the values.
    """

    name: str
    uri: str
    description: str
    summary: str
    has_rejected: bool = False


@dataclass(frozen=True)
class ClassBar:
    """Rows of one class: counts, and shares of the longest bar from 0 to 100."""

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
) -> Chart | None:
    """Draw how many rows have which score, accepted rows below and rejected ones above.

    Args:
        name: of the score.
        unit: label of the axis.
        values: one a row; those that are not finite are omitted.
        accepted: which rows have a mask.
        limits: of the axis; None: those of the values, without a long tail.

    Returns:
        The chart; None where there is no value.
    """
    finite = np.isfinite(values)
    values, accepted = values[finite].astype(np.float64), accepted[finite]
    if not len(values):
        return None
    low, high = limits or _limits(values)
    counts, edges = _stacked_counts(values, accepted, low, high)

    def draw(axes: Axes) -> None:
        axes.stairs(counts[0], edges, fill=True, color=ACCEPTED_COLOUR)
        axes.stairs(counts.sum(axis=0), edges, baseline=counts[0], fill=True, color=REJECTED_COLOUR)
        axes.axvline(np.clip(np.median(values), low, high), color=INK, linestyle="--", linewidth=1.5)
        axes.set(xlabel=unit, xlim=(low, high))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=TICK_STEPS, integer=True))

    rejected = int((~accepted).sum())
    return Chart(
        name=name,
        uri=_svg_uri(draw),
        description=f"Histogram of {len(values):,} rows by {unit}: {len(values) - rejected:,} accepted, "
        f"{rejected:,} rejected.",
        summary=_summary(values, high),
        has_rejected=rejected > 0,
    )


def _stacked_counts(
    values: Float[np.ndarray, " rows"], accepted: Bool[np.ndarray, " rows"], low: float, high: float
) -> tuple[Float[np.ndarray, "2 bins"], Float[np.ndarray, " edges"]]:
    """Return the accepted and the rejected rows of each bin, and the edges of the bins."""
    edges = np.linspace(low, high, BINS + 1)
    clipped = values.clip(low, high)
    counts = [np.histogram(clipped[part], edges)[0] for part in (accepted, ~accepted)]
    return np.stack(counts).astype(np.float64), edges


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


def throughput_chart(started: str, history: Sequence[tuple[float, int]]) -> Chart | None:
    """Draw the throughput of a run in samples per second.

    Args:
        started: when the run started.
        history: seconds since the start of the run, and samples until then.

    Returns:
        The chart; None for fewer than two points, or times that do not increase.
    """
    # workers report whole batches, so short steps would jump between none and many
    spacing = -(-len(history) // PACE_STEPS) or 1
    points = np.array([*history[:-1:spacing], *history[-1:]], dtype=np.float64).reshape(-1, 2)
    seconds = points[:, 0]
    if len(points) < 2 or not np.isfinite(points).all() or (np.diff(seconds) <= 0).any():
        return None
    # the samples in flight of a lost worker are subtracted again
    rates = np.diff(points[:, 1]).clip(min=0) / np.diff(seconds)
    unit_s, unit = (
        (3600, "hours") if seconds[-1] > 7200 else (60, "minutes") if seconds[-1] > 120 else (1, "seconds")
    )

    def draw(axes: Axes) -> None:
        axes.stairs(rates, seconds / unit_s, fill=True, color=ACCEPTED_COLOUR, alpha=0.16)
        axes.stairs(rates, seconds / unit_s, baseline=None, color=ACCEPTED_COLOUR, linewidth=1.8)
        axes.set(xlabel=f"{unit} since the start", xlim=(0, seconds[-1] / unit_s))
        axes.set_ylim(0, max(1.05 * float(rates.max()), 1e-3))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=TICK_STEPS))

    mean = (points[-1, 1] - points[0, 1]) / (seconds[-1] - seconds[0])
    return Chart(
        name=f"Samples per second, run of {started}",
        uri=_svg_uri(draw),
        description=f"Samples per second over {seconds[-1] / unit_s:.3g} {unit}.",
        summary=f"Samples per second, loading included: mean {mean:,.1f}, highest {rates.max():,.1f}.",
    )


def _svg_uri(draw: Callable[[Axes], None]) -> str:
    """Draw a chart on a clear ground."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / DOTS_PER_INCH, HEIGHT / DOTS_PER_INCH), layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=TICK_STEPS))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
        draw(axes)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def class_bars(
    names: Mapping[int, str],
    class_ids: np.ndarray,
    accepted: Bool[np.ndarray, " rows"],
    similarity: Float[np.ndarray, " rows"],
) -> tuple[tuple[ClassBar, ...], int]:
    """Count rows by class, most frequent first.

    Returns:
        The bars of the most frequent classes, and how many classes are omitted.
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
