"""List which models of open_clip can be explained, without importing torch or open_clip.

The answers are in a table, `supported_models.json`, by the configuration of the vision tower. It is made by
`python -m legrad.families.support`, and a test compares it with what the installed open_clip and timm build.
Other releases of timm may build other modules from the same configuration; `load_model` builds the tower
before it reads weights, and `LeGrad` checks the model itself. Configurations that the table lacks, such as
those of a newer open_clip, are built.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("supported_models.json")
_REQUIRED_KEYS = {"embed_dim", "vision_cfg", "text_cfg"}


@dataclass(frozen=True)
class ModelSupport:
    """Whether one open_clip model can be explained.

    Attributes:
        family: name of the model family; None if the model is not supported.
        reason: why the model is not supported, or None.
        blocks: number of transformer blocks, each of which can be explained; None if not supported.
        takes_any_grid: whether images of other sizes than the model's own are possible.

    Example:
        >>> support = legrad.supported_models()["ViT-B-16"]
        >>> support.family, support.blocks, support.reason
        ('clip', 12, None)
    """

    family: str | None
    reason: str | None
    blocks: int | None = None
    takes_any_grid: bool = False


def supported_models() -> dict[str, ModelSupport]:
    """List all models of open_clip by name, with their family or the reason why they are not supported.

    Nothing is downloaded, and no model library is imported. Only models that the table of this release
    lacks, as those of a newer open_clip, take a fraction of a second each.

    Example:
        >>> models = legrad.supported_models()
        >>> models["ViT-B-16"].family, models["RN50"].family
        ('clip', None)
    """
    return {name: _support_of(config) for name, config in model_configs().items()}


def model_support(name: str) -> ModelSupport:
    """Return whether the open_clip model of this name, such as ViT-B-32 or ViT-B/32, is supported."""
    config = model_configs().get(name.replace("/", "-"))
    if config is None:
        return ModelSupport(None, f"open_clip has no model named {name!r}")
    return _support_of(config)


def tower_key(model_config: Mapping[str, Any]) -> str:
    """Return the key in the table of a model with this configuration, open_clip's `model_cfg`."""
    tower = {key: model_config[key] for key in ("embed_dim", "vision_cfg")}
    return hashlib.sha256(json.dumps(tower, sort_keys=True).encode()).hexdigest()


def model_configs() -> dict[str, Mapping[str, Any]]:
    """Return the configurations of open_clip's models by name, in the order of `open_clip.list_models()`."""
    folder = None if "open_clip" in sys.modules else _config_folder()
    if folder is None:
        # already imported, it may have been given further configurations
        import open_clip

        return {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    complete = {name: config for name, config in found.items() if config.keys() >= _REQUIRED_KEYS}
    return {name: complete[name] for name in sorted(complete, key=_in_natural_order)}


def _config_folder() -> Path | None:
    """Return open_clip's folder of model configurations, or None if it is not where release 3.3 has it."""
    spec = find_spec("open_clip")
    folder = Path(spec.origin).parent / "model_configs" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None


def _in_natural_order(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def _support_of(model_config: Mapping[str, Any]) -> ModelSupport:
    entry = _table().get(tower_key(model_config))
    if entry is not None:
        return entry
    from legrad.families.support import built_support

    return built_support(model_config)


@cache
def _table() -> dict[str, ModelSupport]:
    entries = json.loads(TABLE.read_text("utf-8"))
    return {
        key: ModelSupport(entry["family"], entry["reason"], entry["blocks"], entry["takes_any_grid"])
        for key, entry in entries.items()
    }
