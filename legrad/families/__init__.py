"""Describe the vision towers of open_clip's models, by family, and list which models are supported.

The structure of a tower decides its family, never its name.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import open_clip
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from legrad.errors import UnsupportedModelError
from legrad.families import clip, eva, relpos, timm_vit
from legrad.families.modules import PLAIN_WAY_OUT, check_modules, way_out
from legrad.families.parts import NotCovered, qualified_name
from legrad.method.towers import Tower

SUPPORTED = "open_clip's vision transformers, its own and timm's (`legrad models` lists them)"
_SMALLEST_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


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
        model: a model with a `visual` tower, as `open_clip.create_model` returns it. It is not changed.

    Raises:
        UnsupportedModelError: the structure of the tower is not covered; the message names model, tower, the
            module that is not covered, and the way out.
    """
    visual = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        advice = way_out(model)
        if advice == PLAIN_WAY_OUT:
            advice = "explain the model that `open_clip.create_model` returns"
        raise UnsupportedModelError(
            f"{qualified_name(type(model))}: expected an open_clip model with a `visual` tower. "
            f"Way out: {advice}"
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
    try:
        describe = _description(visual)
        check_modules(visual)
        return describe(visual)
    except NotCovered as reason:
        raise NotCovered(_located(visual, reason)) from None
    except AttributeError as error:  # a module was replaced by one without the expected attributes
        raise NotCovered(f"one of its modules lacks an expected attribute: {error}") from error


def _description(visual: nn.Module) -> Callable[[Any], Tower]:
    """Choose the description by exact class, as a subclass may compute something else."""
    if type(visual) is VisionTransformer:
        return clip.describe
    trunk: Any = visual.trunk if type(visual) is TimmModel else visual
    if trunk is not visual and type(trunk) in _TIMM:
        return _TIMM[type(trunk)]
    why = next((_WHY_NOT[kind.__name__] for kind in type(trunk).__mro__ if kind.__name__ in _WHY_NOT), None)
    reason = f"a {_class_name(visual)} {why or 'is not covered'}"
    raise NotCovered(reason, None if why else trunk)


def _located(visual: nn.Module, reason: NotCovered) -> str:
    """Add to a reason the path of the module that is not covered, and the way out if it is missing."""
    if reason.module is None:
        return str(reason)
    paths = (path for path, module in visual.named_modules() if module is reason.module)
    place = ".".join(["visual", *filter(None, paths)])
    named = f"{reason} ({place}, a {qualified_name(type(reason.module))})"
    return named if "Way out" in named else f"{named}. Way out: {way_out(reason.module)}"


def _class_name(visual: nn.Module) -> str:
    return (
        f"TimmModel({type(visual.trunk).__name__})"
        if isinstance(visual, TimmModel)
        else type(visual).__name__
    )


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

    Nothing is downloaded. The vision towers are built without memory for weights; the first call takes
    seconds.

    Example:
        >>> models = legrad.supported_models()
        >>> models["ViT-B-16"].family, models["RN50"].family
        ('clip', None)
    """
    return {name: model_support(name) for name in open_clip.list_models()}


def model_support(name: str) -> ModelSupport:
    """Return whether the open_clip model of this name is supported, from its configuration only."""
    config = open_clip.get_model_config(name)
    if config is None:
        return ModelSupport(None, f"open_clip has no model named {name!r}")
    return support_of(config)


def support_of(model_config: Mapping[str, Any]) -> ModelSupport:
    """Return whether a model with this configuration, open_clip's `model_cfg`, is supported."""
    return _vision_support(model_config["embed_dim"], json.dumps(model_config["vision_cfg"], sort_keys=True))


def visual_without_weights(model_config: Mapping[str, Any]) -> nn.Module:
    """Return the vision tower of a model with this configuration, open_clip's `model_cfg`, without memory."""
    vision = model_config["vision_cfg"] | {"timm_model_pretrained": False}
    with torch.device("meta"):
        model: Any = open_clip.CLIP(model_config["embed_dim"], vision, _SMALLEST_TEXT)
    visual: nn.Module = model.visual
    return visual


@cache
def _vision_support(embed_dim: int, vision_json: str) -> ModelSupport:
    # Cached by vision tower, as many models differ only in their text towers.
    visual = visual_without_weights({"embed_dim": embed_dim, "vision_cfg": json.loads(vision_json)})
    try:
        tower = describe_visual(visual)
        return ModelSupport(tower.family, None, len(tower.blocks), tower.takes_any_grid)
    except NotCovered as reason:
        return ModelSupport(None, str(reason))
