"""Reproduce the paper's tables from a folder of the owners' data, image by image, in this process."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import legrad
from pipeline import storage
from pipeline.annotate.model import describe_model, load_explainer, weights_digest
from pipeline.config.schema import ModelConfig
from pipeline.datasets.truth_dataset import TruthDataset
from pipeline.errors import UserError
from pipeline.reproduce import paper, perturbation, points, segmentation
from pipeline.reproduce.journal import open_journal, read_records
from pipeline.reproduce.measuring import (
    BATCH_SIZE,
    ERROR,
    SKIPPED,
    USED,
    Measure,
    Methods,
    Record,
    measure_batch,
)
from pipeline.reproduce.owners_data import FINDERS, Found, Missing
from pipeline.reproduce.tables import Counts, Table, rows_of
from pipeline.storage.urls import is_local

RESULTS_SUFFIX, MARKDOWN_SUFFIX, JSON_SUFFIX = ".images.jsonl", ".md", ".json"
ORDER_SEED = 0
MAX_ERROR_SHARE = 0.2  # as run.error_budget by default


@dataclass(frozen=True)
class Kind:
    """How one table is made."""

    title: str
    measure: Measure
    score: Callable[[Iterator[Record], str], dict[str, float]]
    metrics: dict[str, str]
    note: str


KINDS = {
    "imagenet-s": Kind(
        "Segmentation on ImageNet-S",
        segmentation.measure,
        segmentation.score,
        segmentation.METRICS,
        "Maps are cut at 0.5 and measured at the size of the image; every class of an image is one map.",
    ),
    "openimages-v7": Kind(
        "Open vocabulary on Open Images V7",
        points.measure,
        points.score,
        points.METRICS,
        "Maps of the classes with a positive point in the image are cut at 0.5; IoU of a class over the "
        "points that are labelled for it in these images, mean over classes.",
    ),
    "perturbation": Kind(
        "Perturbation on ImageNet",
        perturbation.measure,
        perturbation.score,
        perturbation.METRICS,
        "Area under the accuracy while 0 to 90 % of the pixels are blackened, least relevant first "
        "(negative, higher is better) or most relevant first (positive, lower is better); maps of the class "
        "that the model names (predicted) or of the right one (target).",
    ),
}


@dataclass(frozen=True)
class Reproduced:
    """The outcome of a run.

    Attributes:
        tables: the tables that were made.
        missing: tables whose data is not in the folder.
        failing: tables with too many images that cannot be read, or with none that can be used.
    """

    tables: Sequence[Table]
    missing: dict[str, Missing]
    failing: Sequence[str]

    @property
    def is_complete(self) -> bool:
        """Whether every requested table was made of enough images."""
        return not self.missing and not self.failing


@dataclass(frozen=True)
class Listener:
    """What a run reports on its way; each takes what happened.

    Attributes:
        found: (table, its data, number of images to measure, number that an earlier run has measured).
        advanced: (table, number of images measured so far, number of images to measure).
    """

    found: Callable[[str, Found, int, int], None]
    advanced: Callable[[str, int, int], None]


def look_for(root: Path, only: str | None) -> dict[str, Found | Missing]:
    """Return, for each requested table, where its data is, or that it is missing.

    Raises:
        UserError: there is no such folder or table, or the folder has the data of no requested table.
    """
    if not root.is_dir():
        raise UserError(f"ROOT: no folder {root}; expected one with the owners' data of the tables")
    if only is not None and only not in FINDERS:
        raise UserError(f"--only: expected {', '.join(FINDERS)}, got {only!r}")
    looked = {name: find(root) for name, find in FINDERS.items() if only in (None, name)}
    missing = {name: each for name, each in looked.items() if isinstance(each, Missing)}
    if len(missing) == len(looked):
        raise UserError(f"{root}: no data of any table\n" + "\n".join(missing_lines(missing)))
    return looked


def missing_lines(missing: dict[str, Missing]) -> list[str]:
    """Return two lines for each table whose data is missing: where it was looked for, where to get it."""
    return [
        f"  {name}: looked for {'; '.join(each.looked_for)}\n    get it from {each.get}"
        for name, each in missing.items()
    ]


def reproduce(
    looked: dict[str, Found | Missing],
    model: ModelConfig,
    device: str,
    out_dir: str,
    *,
    limit: int | None,
    listener: Listener,
) -> Reproduced:
    """Measure the images of every table whose data is there, and write the tables; resume an earlier run.

    Args:
        looked: see `look_for`.
        model: the model.
        device: device of the model.
        out_dir: local folder for the results of images and the tables.
        limit: largest number of images of a table, a random sample; None: all.
        listener: receives what happens.

    Raises:
        UserError: the data is not laid out as its owners ship it, the model cannot be loaded, or the folder
            has results of other settings.
        OutputError: the results cannot be written.
    """
    if not is_local(out_dir):
        raise UserError(f"--to: expected a local folder, because results are appended; got {out_dir}")
    found = {name: each for name, each in looked.items() if isinstance(each, Found)}
    datasets = {name: each.open() for name, each in found.items()}
    digest = weights_digest(model)
    methods = Methods(load_explainer(model, device, expected_digest=digest))
    settings = _settings(model, digest, methods)
    tables, failing = [], []
    for name, dataset in datasets.items():
        names = _in_order(dataset)
        wanted = names[:limit]
        header = {"table": name, **settings, "images": len(names), "names": _digest(names)}
        path = Path(storage.absolute(out_dir)) / f"{name}{RESULTS_SUFFIX}"
        with open_journal(path, header, wanted, BATCH_SIZE) as journal:
            listener.found(name, found[name], len(wanted), journal.done)
            while journal.done < len(wanted):
                batch = wanted[journal.done : journal.done + BATCH_SIZE]
                journal.append(measure_batch(methods, dataset, batch, KINDS[name].measure))
                listener.advanced(name, journal.done, len(wanted))
            counts = _counts(read_records(path, len(wanted)), len(names))
            if not counts.used or counts.error_share > MAX_ERROR_SHARE:
                failing.append(name)
            if counts.used:
                tables.append(_table(name, found[name], model, methods=methods, counts=counts, path=path))
                _write(out_dir, tables[-1], settings)
    missing = {name: each for name, each in looked.items() if isinstance(each, Missing)}
    return Reproduced(tables, missing, failing)


def _settings(model: ModelConfig, digest: str, methods: Methods) -> dict[str, Any]:
    """Return everything that the results of images depend on."""
    transform = methods.explainer.transform
    return {
        "version": legrad.__version__,
        "model": describe_model(model),
        "weights_digest": digest,
        "precision": model.precision,
        "input_size": [transform.height, transform.width],
        "template": paper.TEMPLATE,
        "threshold": paper.THRESHOLD,
        "methods": list(methods.names),
        "batch_size": BATCH_SIZE,
    }


def _in_order(dataset: TruthDataset) -> list[str]:
    """Return the names of the images in an order that is random, but always the same."""
    names = sorted(dataset.image_names)
    return [names[place] for place in np.random.default_rng(ORDER_SEED).permutation(len(names))]


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest()[:16]


def _counts(records: Iterator[Record], total: int) -> Counts:
    by_state = {state: Counter[str]() for state in (USED, SKIPPED, ERROR)}
    for record in records:
        by_state[record["state"]][record.get("kind", "")] += 1
    wanted = sum(each.total() for each in by_state.values())
    return Counts(total, wanted, by_state[USED].total(), dict(by_state[SKIPPED]), dict(by_state[ERROR]))


def _table(
    name: str, found: Found, model: ModelConfig, *, methods: Methods, counts: Counts, path: Path
) -> Table:
    kind = KINDS[name]
    # one pass over the file for each method keeps a single sum in memory
    scores = {method: kind.score(read_records(path, counts.wanted), method) for method in methods.names}
    figures = paper.figures(name, model.name)
    notes = [
        kind.note,
        *([found.note] if found.note else []),
        f"Paper: {paper.FIGURES_SOURCE}. {paper.missing_figures(name, model.name)}",
    ]
    if figures:
        notes.append(
            "The paper's figure of LeGrad is beside both numbers of layers: the source gives no number."
        )
    return Table(
        name,
        kind.title,
        describe_model(model),
        str(found.place),
        kind.metrics,
        rows_of(scores, figures),
        counts,
        notes,
    )


def _write(out_dir: str, table: Table, settings: dict[str, Any]) -> None:
    storage.publish(out_dir, f"{table.name}{MARKDOWN_SUFFIX}", table.as_markdown().encode())
    document = json.dumps(table.as_document(settings), indent=1) + "\n"
    storage.publish(out_dir, f"{table.name}{JSON_SUFFIX}", document.encode())
