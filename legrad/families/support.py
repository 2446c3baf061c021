"""Build vision towers without memory for weights, to see whether a configuration is supported.

`python -m legrad.families.support` does so for all models of open_clip, and writes the table that
`legrad.support` reads. Takes half a minute.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import open_clip
import torch
from torch import nn

from legrad.families.open_clip_models import describe_visual
from legrad.families.parts import NotCovered
from legrad.support import TABLE, ModelSupport, model_configs, tower_key

_SMALLEST_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


def built_support(model_config: Mapping[str, Any]) -> ModelSupport:
    """Return whether a model with this configuration, open_clip's `model_cfg`, is supported, by its tower."""
    return _vision_support(model_config["embed_dim"], json.dumps(model_config["vision_cfg"], sort_keys=True))


def visual_without_weights(model_config: Mapping[str, Any]) -> nn.Module:
    """Return the vision tower of a model with this configuration, open_clip's `model_cfg`, without memory."""
    vision = model_config["vision_cfg"] | {"timm_model_pretrained": False}
    with torch.device("meta"):
        model: Any = open_clip.CLIP(model_config["embed_dim"], vision, _SMALLEST_TEXT)
    visual: nn.Module = model.visual
    return visual


def built_table() -> dict[str, dict[str, Any]]:
    """Return the table of the installed open_clip and timm; an entry names its first model."""
    table: dict[str, dict[str, Any]] = {}
    for name, config in model_configs().items():
        key = tower_key(config)
        if key not in table:
            table[key] = {"model": name, **asdict(built_support(config))}
    return table


@cache
def _vision_support(embed_dim: int, vision_json: str) -> ModelSupport:
    # Cached by vision tower, as many models differ only in their text towers.
    visual = visual_without_weights({"embed_dim": embed_dim, "vision_cfg": json.loads(vision_json)})
    try:
        tower = describe_visual(visual)
        return ModelSupport(tower.family, None, len(tower.blocks), tower.takes_any_grid)
    except NotCovered as reason:
        return ModelSupport(None, str(reason))


if __name__ == "__main__":
    lines = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in built_table().items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
