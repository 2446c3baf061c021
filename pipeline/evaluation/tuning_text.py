"""The outcome of a search for mask settings, for a terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from legrad.quality.metrics import Estimate
from pipeline.evaluation.tuning import Tuning, Values, skipped_text
from pipeline.text import printable


def render_tuning(tuning: Tuning, out: str) -> RenderableType:
    """Return a table of all trials, whether the best one is confirmed, and what to do.

    Args:
        tuning: the outcome.
        out: the folder with the stored maps, as the user named it.
    """
    chosen_on, confirmed_on = tuning.scenes
    table = Table(
        "settings of masks",
        tuning.metric,
        "difference",
        title=f"All settings tried, scored on {chosen_on:,} of {chosen_on + confirmed_on:,} samples; in per "
        "cent ± half the 95 % interval",
        title_justify="left",
    )
    for trial in tuning.trials:
        is_best = trial.values == tuning.best
        table.add_row(
            Text(_short(trial.values) + (" (best)" if is_best and trial.values else "")),
            _percent(trial.chosen_on),
            _percent(trial.difference, sign="+") if trial.values else "",
            style="bold" if is_best else None,
        )
    return Group(table, *(Text(line) for line in _conclusion(tuning, out)))


def _short(values: Values) -> str:
    """Return settings without the section, so that a row of the table fits a line of a terminal."""
    return settings_text(values).replace("masks.", "") or "as in the job"


def settings_text(values: Values) -> str:
    """Return settings as arguments of `legrad remask`."""
    return " ".join(
        f"masks.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
    )


def _conclusion(tuning: Tuning, out: str) -> Iterator[str]:
    if tuning.omitted:
        yield f"Skipped samples: {skipped_text(tuning.omitted)}"
    if not tuning.best:
        yield "No other settings scored higher: keep those of the job."
        return
    yield (
        f"On the other {tuning.scenes[1]:,} samples, {tuning.metric} is {_percent(tuning.after)} with the "
        f"best settings and {_percent(tuning.before)} with the job's: a difference of "
        f"{_percent(tuning.confirmed, sign='+')}."
    )
    if not tuning.is_confirmed:
        yield (
            "The gain is not confirmed, since the interval of the difference reaches 0 or less. Keep the "
            "job's settings, or name more shards with ground truth."
        )
        return
    yield "The gain is confirmed. In the configuration of the next job:"
    yield "masks:"
    for key, value in tuning.best.items():
        yield f"  {key}: {value if isinstance(value, str) else json.dumps(value)}"
    command = f"legrad remask {shlex.quote(printable(out))} NEW {settings_text(tuning.best)}"
    yield f"To make such masks from the stored maps now, in a new folder NEW: {command}"


def _percent(estimate: Estimate | None, *, sign: str = "") -> str:
    if estimate is None:
        return "-"
    return f"{100 * estimate.value:{sign}.1f} ±{50 * (estimate.high - estimate.low):.1f}"
