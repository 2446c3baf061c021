"""The slider of the page: at which threshold it starts, and how far its masks are those of the job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from legrad.heatmaps import Normalisation
from pipeline.config.masks import MasksConfig
from pipeline.config.schema import JobConfig
from pipeline.output.records import JobRecord
from pipeline.report.gallery import CardRow

DECIMALS = 2


def normalisation_of(job: JobRecord) -> Normalisation:
    """Return when the job's model normalises its maps; as for CLIP where job.json has no facts of it."""
    return "upsampled" if job.model_facts is None else job.model_facts.normalisation


def preview_values(cards: Sequence[CardRow], config: JobConfig) -> dict[str, Any] | None:
    """Return what the template needs of the slider; None where no card has a map for it."""
    shown = [card for card in cards if card.pictures is not None and card.pictures.levels is not None]
    if not shown:
        return None
    return {
        "start": round(_start(shown, config.masks), DECIMALS),
        "rule": config.masks.rule,
        "note": " ".join([*_steps_note(shown, config), *_rule_note(shown, config.masks), *_iou_note(shown)]),
    }


def _start(cards: Sequence[CardRow], masks: MasksConfig) -> float:
    if masks.rule == "fixed":
        return masks.value
    cuts = [card.cut for card in cards if card.cut is not None]
    return float(np.median(cuts)) if cuts else masks.value


def _steps_note(cards: Sequence[CardRow], config: JobConfig) -> list[str]:
    """Say which map the slider thresholds, and which steps are not repeated."""
    masks = config.masks
    before_cutting = {
        "masks.smooth": masks.smooth > 0,
        "masks.contrast": config.contrast_share > 0,
        "masks.refine": masks.refine != "none",
        "masks.combine argmax": masks.combine == "argmax",
    }
    others = {
        "masks.segmenter": masks.segmenter is not None,
        "masks.min_component": masks.min_component > 0,
        "masks.max_hole": masks.max_hole > 0,
        "masks.min_area": bool(masks.min_area),
    }
    known = sum(card.has_mask_map for card in cards)
    first, note = others, "Shows what lies above the threshold in the heat maps that the masks were cut from"
    if not known:
        first, note = before_cutting | others, "Shows the stored heat map above the threshold"
    notes = [note + _without(first) + "."]
    if 0 < known < len(cards):
        rest = len(cards) - known
        rows = f"{rest} of {len(cards)} rows" if rest > 1 else f"1 of {len(cards)} rows"
        notes.append(f"For {rows}, shows the stored heat map instead{_without(before_cutting)}.")
    return notes


def _without(steps: dict[str, bool]) -> str:
    skipped = [key for key, acts in steps.items() if acts]
    return f", without {', '.join(skipped)}" if skipped else ""


def _rule_note(cards: Sequence[CardRow], masks: MasksConfig) -> list[str]:
    """Say what the slider's one threshold is where the rule chooses one for each row."""
    notes = []
    cuts = [card.cut for card in cards if card.cut is not None]
    if masks.rule != "fixed" and cuts:
        notes.append(
            f"masks.rule={masks.rule} has chosen thresholds from {min(cuts):.2f} to {max(cuts):.2f}, and "
            "each row shows its own; the slider sets one for all rows, and starts at their median."
        )
    if masks.rule == "band":
        notes.append("Ignored pixels are shown as the job has them.")
    return notes


def _iou_note(cards: Sequence[CardRow]) -> list[str]:
    found = [card.preview_iou for card in cards if card.preview_iou is not None]
    if not found:
        return ["legrad remask makes the masks of a threshold."]
    rows = f"{len(found)} row{'' if len(found) == 1 else 's'}"
    return [
        f"At the job’s own thresholds, these masks and the job’s have an IoU of {np.mean(found):.2f}, on "
        f"average of {rows}. legrad remask makes the masks of a threshold at full size."
    ]
