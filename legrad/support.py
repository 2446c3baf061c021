"""Which of open_clip's models can be explained, from their configurations alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import open_clip
import torch

from legrad.families import describe_visual
from legrad.families.parts import NotCovered

_SMALLEST_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


@dataclass(frozen=True)
class ModelSupport:
    """Whether one open_clip model can be explained.

    Attributes:
        family: the family whose rules apply, or None.
        reason: why the model is refused, or None.
        blocks: how many layers there are to choose from, or None.
        takes_any_grid: images of other sizes than the model's own are possible.
    """

    family: str | None
    reason: str | None
    blocks: int | None = None
    takes_any_grid: bool = False


def supported_models() -> dict[str, ModelSupport]:
    """List every model that open_clip knows by name, with its family or the reason for its refusal.

    Vision towers are built without memory for their weights; the first call takes seconds. Nothing is
    downloaded.
    """
    return {name: model_support(name) for name in open_clip.list_models()}


def model_support(name: str) -> ModelSupport:
    """Say whether the open_clip model of this name can be explained, from its configuration alone."""
    config = open_clip.get_model_config(name)
    if config is None:
        return ModelSupport(None, f"open_clip has no model of the name {name!r}")
    return support_of(config)


def support_of(model_config: Mapping[str, Any]) -> ModelSupport:
    """Say whether a model of this configuration, open_clip's `model_cfg`, can be explained."""
    vision = model_config["vision_cfg"] | {"timm_model_pretrained": False}
    return _vision_support(model_config["embed_dim"], json.dumps(vision, sort_keys=True))


@cache
def _vision_support(embed_dim: int, vision_json: str) -> ModelSupport:
    # Many names share a vision tower and differ in their texts.
    with torch.device("meta"):
        model = open_clip.CLIP(embed_dim, json.loads(vision_json), _SMALLEST_TEXT)
    try:
        tower = describe_visual(model.visual)
        return ModelSupport(tower.family, None, len(tower.blocks), tower.takes_any_grid)
    except NotCovered as reason:
        return ModelSupport(None, str(reason))
