"""Render the HTML page of a report, with a Content-Security-Policy that forbids every request."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from pipeline.config.schema import JobConfig
from pipeline.output.counts import error_kinds_text
from pipeline.output.runs import RUNNING, RunRecord, workers_text
from pipeline.output.schema import EMPTY_MASK
from pipeline.report.card_values import ascii_json, card_values, class_name, status_word
from pipeline.report.charts import Chart, class_bars, histogram, throughput_chart
from pipeline.report.gallery import Gallery, shortened
from pipeline.report.preview import preview_values
from pipeline.report.scores import ScoredRows
from pipeline.report.totals import ErrorKind, Totals
from pipeline.text import as_duration, as_share

MAX_LISTED = 20
MAX_CONFIG_CHARACTERS = 30_000
KEY_CHARACTERS, SHARD_CHARACTERS = 120, 160
SCRIPTS = ("maps.js", "marks.js", "report.js", "preview.js", "marking.js")


@dataclass(frozen=True)
class PageContent:
    """The content of the page.

    Attributes:
        out: the output folder, without credentials.
        job: the content of OUT/job.json.
        config: the job's configuration.
        totals: of the whole folder.
        scores: of the sampled rows.
        gallery: the rows of the gallery.
        shards_shown: number of shards from which the gallery was chosen.
        class_names: class id to name.
        seed: of the random sample of rows.
        made: time of the report in UTC.
    """

    out: str
    job: Mapping[str, Any]
    config: JobConfig
    totals: Totals
    scores: ScoredRows
    gallery: Gallery
    shards_shown: int
    class_names: Mapping[int, str]
    seed: int
    made: str


def render_page(content: PageContent) -> str:
    """Render the page as one file that includes style, script and pictures; all texts are escaped."""
    templates = files("pipeline.report") / "templates"
    style = (templates / "report.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "".join((templates / name).read_text(encoding="utf-8") for name in SCRIPTS)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names, charts = _class_names(content), _charts(content.scores)
    shards = list(dict.fromkeys(card.row["whole_shard"] for card in content.gallery.cards))
    places = {url: place for place, url in enumerate(shards)}
    return environment.get_template(
        "report.html.j2"
    ).render(
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(style),  # noqa: S704 (a file of this package)
        script=Markup(script),  # noqa: S704
        out=content.out,
        made=_moment(content.made),
        complete=content.totals.complete,
        facts=_facts(content),
        notes=_notes(content),
        charts=charts,
        scores_note=_scores_note(content),
        gallery_note=_gallery_note(content),
        cards=[card_values(card, names, places) for card in content.gallery.cards],
        shards=ascii_json(shards),
        job_name=f"{content.job.get('config_hash')} {content.out}",
        preview=preview_values(content.gallery.cards, content.config),
        has_truth=any(card.iou is not None for card in content.gallery.cards),
        has_ignored=any(card.ignored_share is not None for card in content.gallery.cards),
        has_rejected=any(chart.has_rejected for chart in charts),
        has_heat=any(card.pictures and card.pictures.heat for card in content.gallery.cards),
        classes=_classes_shown(content.gallery, names),
        statuses=[
            (status, status_word(status))
            for status in sorted({str(card.row["status"]) for card in content.gallery.cards})
        ],
        class_chart=_class_chart(content, names),
        errors=_errors(content.totals),
        failed=[(shortened(url), shortened(error)) for url, error in content.totals.failed],
        damaged=[(shortened(url), shortened(reason)) for url, reason in content.totals.damaged],
        damaged_more=content.totals.damaged_count - len(content.totals.damaged),
        failed_more=content.totals.failed_count - len(content.totals.failed),
        unread=[
            (shortened(url), reason)
            for url, reason in list(content.gallery.unread_shards.items())[:MAX_LISTED]
        ],
        runs=[_run(run) for run in reversed(content.totals.runs)],
        provenance=_provenance(content),
        config_yaml=_config_yaml(content.job),
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _facts(content: PageContent) -> list[dict[str, str]]:
    totals, scores = content.totals, content.scores
    facts = [_fact("shards done", f"{len(totals.done):,} / {len(totals.listed):,}", _shards_detail(totals))]
    counts = totals.counts
    if counts is not None:
        outcome = f"{counts.annotated:,} annotated, {counts.empty:,} empty, {counts.failed:,} failed"
        facts.append(_fact("samples", f"{counts.samples_in:,}", outcome))
        dropped = f"{counts.dropped_prompts:,} prompts dropped"
        facts.append(_fact("rows", f"{counts.rows:,}", dropped))
        kinds = len(counts.errors_by_kind)
        detail = f"of {kinds} kind{'s' if kinds > 1 else ''}" if kinds else "no errors"
        facts.append(_fact("error rows", f"{counts.error_rows:,}", detail))
    if len(scores):
        rejected = Counter(str(status) for status in scores.status[~scores.accepted])
        words = [f"{count:,} {status_word(name)}" for name, count in rejected.most_common(2)]
        empty = int((scores.status == EMPTY_MASK).sum())
        detail = ", ".join(
            [*(words or ["none rejected"]), *([f"{empty:,} with an empty mask"] if empty else [])]
        )
        facts.append(_fact("accepted", f"{100 * float(scores.accepted.mean()):.3g} %", detail))
    if totals.runs:
        run = totals.runs[-1]
        workers = f"samples; workers {_workers(run)}"
        facts.append(_fact("last run", f"{run.samples_per_s:,.1f}/s", workers))
    return facts


def _fact(name: str, value: str, detail: str) -> dict[str, str]:
    return {"name": name, "value": value, "detail": detail}


def _shards_detail(totals: Totals) -> str:
    left = len(totals.listed) - len(totals.done) - totals.failed_count
    parts = [
        (totals.damaged_count, "damaged"),
        (totals.failed_count, "failed"),
        (totals.mismatched, "to be annotated again"),
        (left, "left"),
    ]
    found = [f"{count:,} {what}" for count, what in parts if count > 0]
    return ", ".join(found) or "none failed, none left"


def _notes(content: PageContent) -> list[str]:
    """Return the warnings at the top of the page."""
    notes = []
    if content.totals.counts is None:
        notes.append(
            "Samples are not counted: there are too many shards, and the job is not complete (no _SUCCESS)."
        )
    elif (counts := content.totals.counts).failed:
        notes.append(
            f"{counts.failed:,} of {counts.samples_in:,} samples failed and have no rows. Errors: "
            f"{shortened(error_kinds_text(counts))}."
        )
    if content.totals.damaged:
        url, reason = content.totals.damaged[0]
        notes.append(
            f"{content.totals.damaged_count:,} shard(s) are damaged, so samples may be missing: "
            f"{shortened(url)}: {shortened(reason)}."
        )
    if content.totals.shortfall:
        notes.append(f"The job is not complete: {shortened(content.totals.shortfall)}.")
    if content.totals.runs and (places := content.totals.runs[-1].left_alone):
        notes.append(
            f"{len(places):,} place(s) got no further shards in the last run: "
            f"{shortened('; '.join(places[:MAX_LISTED]))}."
        )
    if content.scores.damaged:
        names = ", ".join(list(content.scores.damaged)[:MAX_LISTED])
        notes.append(f"Annotation files that cannot be read and are skipped: {names}")
    cards = content.gallery.cards
    if cards and not any(card.pictures for card in cards):
        notes.append(
            "No image could be read, so there are no pictures. If the shards have moved, name their new "
            "location: legrad report OUT SHARDS..., or legrad report OUT OLD=NEW."
        )
    return notes


def _scores_note(content: PageContent) -> str:
    scores, counts = content.scores, content.totals.counts
    if not len(scores):
        return "There are no rows."
    total = counts.rows if counts is not None else None
    read_all = total == len(scores) and scores.files_read == scores.files_total
    if read_all:
        return f"All {len(scores):,} rows."
    of_rows = f" of {total:,}" if total is not None else ""
    return (
        f"{len(scores):,}{of_rows} rows: a random sample (seed {content.seed}) of whole row groups from "
        f"{scores.files_read:,} of {scores.files_total:,} annotation files."
    )


def _gallery_note(content: PageContent) -> str:
    cards = content.gallery.cards
    drawn = sum(card.at_random for card in cards)
    shards = f"{content.shards_shown} shard{'' if content.shards_shown == 1 else 's'}"
    return (
        f"{len(cards)} rows of {shards}: {drawn} chosen at random (seed {content.seed}), "
        f"{len(cards) - drawn} with the highest or lowest scores or rejected. "
        "The order “random” shows only the former."
    )


def _charts(scores: ScoredRows) -> list[Chart]:
    accepted = scores.accepted
    drawn = [
        histogram("Similarity", "cosine of image and prompt", scores.similarity, accepted),
        histogram("Peak", "maximum of the raw relevance grid", scores.peak, accepted),
        histogram("Mask area", "share of the image, accepted rows", scores.area_share, accepted, (0.0, 1.0)),
        histogram("Threshold", "threshold of the heat map", scores.threshold, accepted, (0.0, 1.0)),
        histogram("Ignored", "share of the image", scores.ignored_share, accepted, (0.0, 1.0)),
    ]
    return [chart for chart in drawn if chart is not None]


def _class_names(content: PageContent) -> dict[int, str]:
    """Return class names from the class file, else the prompt of a row of that class."""
    by_prompt = {
        card.row["class_id"]: card.row["prompt"]
        for card in content.gallery.cards
        if card.row["class_id"] is not None
    }
    return {key: shortened(name, 60) for key, name in {**by_prompt, **content.class_names}.items()}


def _class_chart(content: PageContent, names: Mapping[int, str]) -> dict[str, Any] | None:
    scores = content.scores
    if not len(scores) or not (scores.class_id >= 0).any():
        return None
    bars, omitted = class_bars(names, scores.class_id, scores.accepted, scores.similarity)
    return {"bars": bars, "omitted": omitted}


def _classes_shown(gallery: Gallery, names: Mapping[int, str]) -> list[tuple[int, str]]:
    shown = {card.class_id for card in gallery.cards if card.class_id is not None}
    return sorted(((key, class_name(key, names)) for key in shown), key=lambda pair: pair[1].lower())


def _errors(totals: Totals) -> dict[str, Any]:
    most = max((kind.rows for kind in totals.errors), default=0)
    return {
        "counted": totals.counts is not None,
        "kinds": [
            {
                "name": shortened(kind.name, 80),
                "rows": kind.rows,
                "percent": round(100 * kind.rows / most, 2) if most else 0,
                "examples": [
                    {name: shortened(text) for name, text in example.items()} for example in kind.examples
                ],
                "samples": [
                    f"{shortened(key, KEY_CHARACTERS)}\t{shortened(shard, SHARD_CHARACTERS)}"
                    for key, shard in kind.samples
                ],
                "samples_note": _samples_note(kind),
            }
            for kind in totals.errors
        ],
    }


def _samples_note(kind: ErrorKind) -> str:
    shown = len(kind.samples)
    some = f"The first {shown:,}" if kind.rows > shown else f"All {shown:,}"
    return f"{some} by sample key and shard:"


def _run(run: RunRecord) -> dict[str, Any]:
    return {
        "started": _moment(run.started),
        "ended": run.ended if run.ended != RUNNING else f"running, last update at {_moment(run.updated)}",
        "duration": as_duration(run.elapsed_s),
        "shards": f"{run.shards_done:,}",
        "samples": f"{run.samples:,}",
        "rate": f"{run.samples_per_s:,.1f}",
        "workers": _workers(run),
        "busy": as_share(run.measures.device_busy_share),
        "chart": throughput_chart(_moment(run.started), run.history),
    }


def _workers(run: RunRecord) -> str:
    return workers_text(run.workers, run.workers_wanted, run.workers_lost)


def _moment(text: str) -> str:
    """Format an ISO time for people; other texts stay as they are."""
    return re.sub(r"(\d)T(\d)", r"\1 \2", shortened(text, 60)).replace("+00:00", " UTC")


def _provenance(content: PageContent) -> list[tuple[str, str]]:
    job, config = content.job, content.config
    layers = config.model.layers
    facts = [
        ("output", content.out),
        ("job started", _moment(str(job.get("started", "unknown")))),
        ("model", ", ".join(filter(None, (config.model.name, config.model.pretrained)))),
        ("explained layers", "all" if layers == "all" else f"the last {layers}"),
        ("weights", str(job.get("weights_digest", "unknown"))),
        ("configuration", str(job.get("config_hash", "unknown"))),
    ]
    versions = job.get("versions")
    if isinstance(versions, Mapping):
        facts += [(str(package), str(version)) for package, version in versions.items()]
    return [(shortened(name, 80), shortened(value)) for name, value in facts]


def _config_yaml(job: Mapping[str, Any]) -> str:
    """Return the configuration as YAML, long lists cut."""
    text = yaml.safe_dump(_without_tails(job.get("config") or {}), sort_keys=False, allow_unicode=True)
    return text if len(text) <= MAX_CONFIG_CHARACTERS else f"{text[:MAX_CONFIG_CHARACTERS]}\n…"


def _without_tails(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_tails(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        listed = [_without_tails(entry) for entry in value[:MAX_LISTED]]
        more = len(value) - MAX_LISTED
        return [*listed, f"… and {more:,} more"] if more > 0 else listed
    return shortened(value) if isinstance(value, str) else value
