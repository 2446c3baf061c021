"""Model families: from an open_clip vision tower to its description, or the reason why there is none.

The family is decided by the tower's structure, never by its name.
"""

from collections.abc import Callable

import timm
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from legrad.errors import UnsupportedModelError
from legrad.families import clip, eva, relpos, timm_vit
from legrad.families.parts import NotCovered
from legrad.towers import Tower

SUPPORTED = "open_clip's vision transformers, its own and timm's (`legrad models` lists them)"


# Exact classes: a subclass may compute something else.
_TIMM: dict[type[nn.Module], Callable[[TimmModel], Tower]] = {
    timm.models.vision_transformer.VisionTransformer: timm_vit.describe,
    timm.models.eva.Eva: eva.describe,
    timm.models.vision_transformer_relpos.VisionTransformerRelPos: relpos.describe,
}


_WHY_NOT = {
    "ModifiedResNet": "is convolutional: its only attention pools a feature map at the end",
    "ConvNeXt": "is convolutional and has no attention",
    "FastVit": "puts convolutions after its attention, which mix the patches again",
    "SwinTransformer": "attends within windows and merges patches from stage to stage",
}


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
    try:
        return describe_visual(visual)
    except NotCovered as reason:
        raise UnsupportedModelError(
            f"{type(model).__name__} with a vision tower {_class_name(visual)}: {reason}. "
            f"Supported: {SUPPORTED}"
        ) from None


def describe_visual(visual: nn.Module) -> Tower:
    """Describe a vision tower.

    Raises:
        NotCovered: its structure is not covered; the message is the reason.
    """
    if isinstance(visual, VisionTransformer):
        return clip.describe(visual)
    if isinstance(visual, TimmModel) and type(visual.trunk) in _TIMM:
        return _TIMM[type(visual.trunk)](visual)
    trunk = visual.trunk if isinstance(visual, TimmModel) else visual
    raise NotCovered(f"a {_class_name(visual)} {_WHY_NOT.get(type(trunk).__name__, 'is not covered')}")


def _class_name(visual: nn.Module) -> str:
    return (
        f"TimmModel({type(visual.trunk).__name__})"
        if isinstance(visual, TimmModel)
        else type(visual).__name__
    )
