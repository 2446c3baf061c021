"""Where the masks of a job are cut from their maps: on the device, or on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from legrad.masks.cleaning import Cleaning
from legrad.masks.instances import Splitting
from legrad.masks.runs import cuts_on_device
from legrad.masks.thresholds import MaskRule
from pipeline.config.masks import MasksConfig


@dataclass(frozen=True)
class DeviceCut:
    """How masks are cut on the device.

    Attributes:
        rule: where heat maps are cut.
        max_side: longest side of a mask in pixels; None: masks have the size of their image.
    """

    rule: MaskRule
    max_side: int | None = None


def device_cut_of(masks: MasksConfig, device: torch.device) -> DeviceCut | None:
    """Return how a job's masks are cut on the device; None where that is done on the CPU.

    | device | masks.combine | masks.rule | min_component, max_hole | cut on   | leaves the device |
    |--------|---------------|------------|-------------------------|----------|-------------------|
    | CPU    | any           | any        | any                     | CPU      | float32 maps      |
    | GPU    | argmax        | any        | any                     | CPU      | float16 maps      |
    | GPU    | independent, masks.instances not none | any | any    | CPU      | float16 maps      |
    | GPU    | independent   | quantile   | any                     | CPU      | float16 maps      |
    | GPU    | independent   | any        | one of them above 0     | CPU      | float16 maps      |
    | GPU    | independent   | other      | both 0                  | the GPU  | runs of masks     |

    Without refinement, the maps that leave a GPU are relevance grids, in float32. Of an image whose mask does
    not fit into a chunk (`legrad.masks.runs.MAX_CHUNK_PIXELS`) maps leave the GPU in any case.

    Args:
        masks: the configuration's section.
        device: of the model.
    """
    rule = mask_rule(masks)
    # instances need the maps beside the masks
    is_wanted = device.type == "cuda" and masks.combine == "independent" and not masks.has_instances
    return DeviceCut(rule, masks.max_side) if is_wanted and cuts_on_device(rule, cleaning_of(masks)) else None


def mask_rule(masks: MasksConfig) -> MaskRule:
    """Return where heat maps are cut."""
    return MaskRule(masks.rule, masks.value, masks.quantile, masks.low, masks.high, masks.band_center)


def splitting_of(masks: MasksConfig) -> Splitting | None:
    """Return how masks are split into instances; None where they are not."""
    return Splitting(min_peak_drop=masks.min_peak_drop) if masks.has_instances else None


def cleaning_of(masks: MasksConfig) -> Cleaning:
    """Return how specks and holes are removed from masks."""
    return Cleaning(min_component=masks.min_component, max_hole=masks.max_hole)
