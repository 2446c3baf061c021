"""Write the report of an output folder: read totals, scores and pictures within limits, render, publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from pipeline import storage
from pipeline.config.classes import ClassEntry, read_class_list
from pipeline.errors import UserError
from pipeline.output.folder import OutputFolder
from pipeline.output.image_shards import LocatedShards, locate_shards
from pipeline.output.records import utc_now
from pipeline.report.gallery import read_cards, with_pictures
from pipeline.report.mask_maps import MaskMaps
from pipeline.report.page import PageContent, render_page
from pipeline.report.preview import normalisation_of
from pipeline.report.scores import ScoredRows, read_scores
from pipeline.report.selection import choose_rows
from pipeline.report.totals import read_totals

REPORT_FILE = "report.html"
# together they keep a page below five megabytes, whatever texts and pictures it contains
SAMPLES, MAX_SAMPLES = 60, 300
PICTURE_BYTES = 2_600_000
MAX_SHARDS_SHOWN = 16
MAX_LISTED = 5
MAX_SHARD_BYTES_SHOWN = 4 << 30


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        url: of the page.
        size_bytes: of the page.
        rows_shown: number of cards in the gallery.
        pictures: number of cards with pictures.
        unread_shards: canonical URL of each shard whose images could not be read, and the reason.
        damaged: a line for each file of the output folder that cannot be read.
    """

    url: str
    size_bytes: int
    rows_shown: int
    pictures: int
    unread_shards: Mapping[str, str]
    damaged: tuple[str, ...] = ()


def write_report(
    out_dir: str,
    shards: Sequence[str] = (),
    *,
    to: str | None = None,
    samples: int = SAMPLES,
    classes_file: str | None = None,
    seed: int = 0,
) -> Report:
    """Write one self-contained HTML page about an output folder.

    Statistics of large outputs are of a random sample of rows, and the page says so. Images are read from the
    shards of the job; where those cannot be read, the page has no pictures.

    Args:
        out_dir: the job's output folder: local, s3:// or gs://.
        shards: locations of the tars, as `locate_shards` takes them; empty: where the job read them.
        to: path or URL of the page; None: report.html in the output folder.
        samples: maximum number of rows in the gallery.
        classes_file: names of the classes, as `read_class_list` reads them; None: the job's own.
        seed: of the random sample of rows.

    Raises:
        UserError: no job in the folder, or an invalid argument.
        DamagedFileError: job.json or the list of shards cannot be read.
        OutputError: the page cannot be written.
    """
    if not 0 <= samples <= MAX_SAMPLES:
        raise UserError(f"samples: expected a number from 0 to {MAX_SAMPLES}, found {samples}")
    folder = OutputFolder(out_dir)
    job = folder.job()
    config = folder.config(job)
    totals = read_totals(folder, job)
    located = locate_shards(totals.listed, shards)
    generator = np.random.default_rng(seed)
    scores = read_scores(folder, totals.done, generator)
    shown_shards = _shown_shards(scores, totals.listed, located)
    cards, unread = read_cards(
        folder, scores, *choose_rows(scores, _rows_of(scores, shown_shards), samples, generator)
    )
    gallery = with_pictures(
        folder,
        cards,
        located,
        config,
        PICTURE_BYTES // max(1, len(cards)),
        normalisation=normalisation_of(job),
        mask_maps=None if job.model_facts is None else MaskMaps(config, job.model_facts),
    )
    page = render_page(
        PageContent(
            out=storage.shown_url(out_dir),
            job=job.model_dump(),
            config=config,
            totals=totals,
            scores=scores,
            gallery=gallery,
            shards_shown=len(shown_shards),
            class_names=_class_names(classes_file, config.prompts.classes),
            seed=seed,
            made=utc_now(),
        )
    ).encode()
    return Report(
        url=_published(page, to or storage.join_url(out_dir, REPORT_FILE)),
        size_bytes=len(page),
        rows_shown=len(gallery.cards),
        pictures=sum(card.pictures is not None for card in gallery.cards),
        unread_shards=gallery.unread_shards,
        damaged=tuple(dict.fromkeys([*totals.broken_files, *scores.damaged.values(), *unread])),
    )


def _class_names(classes_file: str | None, configured: str | Sequence[ClassEntry] | None) -> dict[int, str]:
    """Return class names from the given file, else from the job's own classes in job.json."""
    entries: Sequence[ClassEntry] = ()
    if classes_file is not None:
        entries = read_class_list(classes_file)
    elif configured is not None and not isinstance(configured, str):
        entries = configured
    return {entry.class_id: entry.name for entry in entries}


def _shown_shards(
    scores: ScoredRows, listed: Sequence[Mapping[str, Any]], located: LocatedShards
) -> set[str]:
    """Return the shards of the gallery: few and not too large together, because each is read from its start.

    If no shard can be read, the gallery shows rows of all shards, without pictures.
    """
    sizes = {row["shard_id"]: row["size_bytes"] or 0 for row in listed}
    read = dict.fromkeys(shard_id for shard_id, _ in scores.groups)
    readable = [shard_id for shard_id in read if shard_id in located.sources]
    chosen: set[str] = set()
    bytes_so_far = 0
    for shard_id in readable[:MAX_SHARDS_SHOWN]:
        bytes_so_far += sizes[shard_id]
        if chosen and bytes_so_far > MAX_SHARD_BYTES_SHOWN:
            break
        chosen.add(shard_id)
    return chosen or set(read)


def _rows_of(scores: ScoredRows, shard_ids: set[str]) -> Bool[np.ndarray, " rows"]:
    shown = np.array([shard_id in shard_ids for shard_id, _ in scores.groups], dtype=bool)
    rows: np.ndarray = shown[scores.group] if len(scores) else np.zeros(0, dtype=bool)
    return rows


def _published(page: bytes, url: str) -> str:
    """Publish the page; return its URL as it may be shown."""
    bare, options = storage.absolute(url), ""
    if "://" in bare:
        bare, _, options = bare.partition("?")
    folder, _, name = bare.rpartition("/")
    storage.publish(f"{folder}?{options}" if options else folder or "/", name, page)
    return storage.shown_url(url)


def render_report(report: Report) -> str:
    """Return the lines for the terminal after a report was written."""
    lines = [
        f"Report: {report.url}",
        f"  {report.size_bytes / 1e6:.1f} MB; {report.rows_shown} rows, {report.pictures} with pictures",
    ]
    lines += [
        f"  no pictures from {url}: {why}" for url, why in list(report.unread_shards.items())[:MAX_LISTED]
    ]
    more = len(report.unread_shards) - MAX_LISTED
    lines += [f"  ... and from {more} more shards"] if more > 0 else []
    lines += [f"  damaged: {line}" for line in report.damaged[:MAX_LISTED]]
    more = len(report.damaged) - MAX_LISTED
    return "\n".join([*lines, f"  ... and {more} more damaged files"] if more > 0 else lines)
