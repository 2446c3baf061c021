"""Values of one card of the gallery, as the page's template shows them and its script reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.output.schema import EMPTY_MASK, OK
from pipeline.report.gallery import CardRow, shortened
from pipeline.report.level_maps import STEPS

STATUS_WORDS = {
    OK: "accepted",
    EMPTY_MASK: "accepted: empty mask",
    "rejected_similarity": "rejected: similarity",
    "rejected_peak": "rejected: peak",
    "rejected_contrast": "rejected: foreground contrast",
    "rejected_lead": "rejected: lead",
    "rejected_area": "rejected: area",
}
MAX_MARKABLE_CHARACTERS = 500


def card_values(card: CardRow, class_names: Mapping[int, str], shards: Mapping[str, int]) -> dict[str, Any]:
    """Return what the template needs of a card.

    Args:
        card: a row of the gallery.
        class_names: class id to name.
        shards: canonical URL to its place in the page's list of shards.
    """
    row = card.row
    return {
        "prompt": row["prompt"],
        "key": row["key"],
        "shard": row["shard"],
        "sample_index": row["sample_index"],
        "prompt_index": row["prompt_index"],
        "status": row["status"],
        "status_word": status_word(row["status"]),
        "class_id": card.class_id,
        "class_name": None if card.class_id is None else class_name(card.class_id, class_names),
        "size": f"{row['image_width']} × {row['image_height']}",
        "scores": {
            "similarity": _exact(row["similarity"]),
            "peak": _exact(row["peak"]),
            "area": _exact(card.area_share),
            "iou": _exact(card.iou),
        },
        "similarity": _shown(row["similarity"], ".3f"),
        "peak": _shown(row["peak"], ".3g"),
        "threshold": _shown(row["threshold"] if card.cut is None else card.cut, ".3f"),
        "area": _shown(card.area_share, ".1%"),
        "iou": _shown(card.iou, ".2f"),
        "ignored": None if card.ignored_share is None else _shown(card.ignored_share, ".1%"),
        "at_random": card.at_random,
        "pictures": card.pictures,
        "no_picture": card.no_picture,
        "identity": _identity(card, shards),
        "levels": _levels(card),
    }


def class_name(class_id: int, names: Mapping[int, str]) -> str:
    """Return the name of a class; its id where no name is known."""
    return names.get(class_id, f"class {class_id}")


def status_word(status: str) -> str:
    """Return the words for a status."""
    return STATUS_WORDS.get(status, shortened(status, 40))


def ascii_json(value: object) -> str:
    """Return JSON of ASCII characters alone, so that no text of others can change what is around it."""
    return json.dumps(value, ensure_ascii=True)


def _identity(card: CardRow, shards: Mapping[str, int]) -> dict[str, Any]:
    """Return the data attributes by which a mark names the row; the key only where it is shown otherwise."""
    key = card.row["whole_key"]
    if len(key) > MAX_MARKABLE_CHARACTERS:
        return {"unmarkable": ""}
    own = {"shard": shards[card.row["whole_shard"]], "prompt-index": card.row["prompt_index"]}
    return own if key == card.row["key"] else {**own, "key": ascii_json(key)}


def _levels(card: CardRow) -> dict[str, Any]:
    """Return the data attributes from which the script draws masks of other thresholds."""
    levels = None if card.pictures is None else card.pictures.levels
    if levels is None:
        return {}
    return {
        "levels": levels.text,
        "level-steps": STEPS,
        "level-height": levels.height,
        "level-width": levels.width,
    }


def _exact(value: float | None) -> str:
    """Format a score for sorting; empty for None."""
    return "" if value is None or not np.isfinite(value) else f"{value:.9g}"


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None or not np.isfinite(value) else format(value, form).replace("%", " %")
