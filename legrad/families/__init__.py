"""Model families: from an open_clip vision tower to its description, or the reason why there is none.

The family is decided by the tower's structure, never by its name.
"""

from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from legrad.errors import UnsupportedModelError
from legrad.families import clip
from legrad.towers import Tower

SUPPORTED = "open_clip's vision transformers, its own and timm's (`legrad models` lists them)"


def describe_tower(model: nn.Module) -> Tower:
    """Describe the vision tower of an open_clip model.

    Args:
        model: a model with a `visual` tower, as `open_clip.create_model` gives it. It is not changed.

    Raises:
        UnsupportedModelError: the tower's structure is not covered; names model, tower and reason.
    """
    visual = getattr(model, "visual", None)
    if visual is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected an open_clip model with a `visual` tower"
        )
    tower = describe_visual(visual)
    if isinstance(tower, str):
        raise UnsupportedModelError(
            f"{type(model).__name__} with a vision tower {class_name(visual)}: {tower}. "
            f"Supported: {SUPPORTED}"
        )
    return tower


def describe_visual(visual: Any) -> Tower | str:
    """Describe a vision tower, or say why it is not covered."""
    if isinstance(visual, VisionTransformer):
        return clip.refusal(visual) or clip.describe(visual)
    return f"a {class_name(visual)} is no plain vision transformer"


def class_name(visual: nn.Module) -> str:
    """Name a tower's class, and that of the trunk inside a timm tower."""
    if isinstance(visual, TimmModel):
        return f"TimmModel({type(visual.trunk).__name__})"
    return type(visual).__name__
