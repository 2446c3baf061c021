"""The slider of the page: at which threshold it starts, and how far its masks are those of the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from legrad.heatmaps import Normalisation
from pipeline.config.masks import MasksConfig
from pipeline.config.schema import JobConfig
from pipeline.report.gallery import CardRow

DECIMALS = 2


def normalisation_of(job: Mapping[str, Any]) -> Normalisation:
    """Return when the job's model normalises its maps; as for CLIP where job.json has no facts of it."""
    facts = job.get("model_facts")
    named = facts.get("normalisation") if isinstance(facts, Mapping) else None
    return cast("Normalisation", named) if named in ("grid", "upsampled") else "upsampled"


def preview_values(
    cards: Sequence[CardRow], config: JobConfig, job: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return what the template needs of the slider; None where no card has a stored heat map."""
    if not any(card.pictures is not None and card.pictures.grid for card in cards):
        return None
    return {
        "start": round(_start(cards, config.masks), DECIMALS),
        "rule": config.masks.rule,
        "normalisation": normalisation_of(job),
        "note": _note(cards, config),
    }


def _start(cards: Sequence[CardRow], masks: MasksConfig) -> float:
    if masks.rule == "fixed":
        return masks.value
    thresholds = [card.row["threshold"] for card in cards if card.row["threshold"] is not None]
    return float(np.median(thresholds)) if thresholds else masks.value


def _note(cards: Sequence[CardRow], config: JobConfig) -> str:
    """Say what the slider's masks lack, and by how much they differ from the job's at its own thresholds."""
    masks = config.masks
    steps = {
        "masks.smooth": masks.smooth > 0,
        "masks.contrast": config.contrast_share > 0,
        "masks.refine": masks.refine != "none",
        "masks.segmenter": masks.segmenter is not None,
        "masks.combine argmax": masks.combine == "argmax",
        "masks.min_component": masks.min_component > 0,
        "masks.max_hole": masks.max_hole > 0,
    }
    skipped = [key for key, acts in steps.items() if acts]
    note = "Shows the stored heat map above the threshold"
    note += f", without {', '.join(skipped)}." if skipped else "."
    found = [card.preview_iou for card in cards if card.preview_iou is not None]
    if found:
        note += (
            f" At the job’s own thresholds, these masks and the job’s have an IoU of {np.mean(found):.2f}, "
            f"on average of {len(found)} row{'' if len(found) == 1 else 's'}."
        )
    return f"{note} legrad remask makes the masks of a threshold exactly."
