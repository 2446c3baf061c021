"""Models of open_clip: which description their vision tower has, and what else depends on open_clip."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from legrad.errors import UnsupportedModelError
from legrad.families import clip, eva, relpos, timm_vit
from legrad.families.modules import IN_OPEN_CLIP, PLAIN_WAY_OUT, check_modules, located, way_out
from legrad.families.open_clip_texts import text_encoder_of
from legrad.families.parts import NotCovered, qualified_name, why_not_covered
from legrad.families.source import Source
from legrad.images import transform_of
from legrad.method.towers import Tower

SUPPORTED = "open_clip's vision transformers, its own and timm's (`legrad models` lists them)"
EXPECTED = "explain the model that open_clip.create_model returns"

_TIMM: dict[type[nn.Module], Callable[[Any, nn.Module], Tower]] = {
    timm.models.vision_transformer.VisionTransformer: timm_vit.describe,
    timm.models.eva.Eva: eva.describe,
    timm.models.vision_transformer_relpos.VisionTransformerRelPos: relpos.describe,
}
# The original methods of open_clip's models, which apply `visual` and at most a normalisation.
_ENCODE_IMAGE = (CLIP.encode_image, CustomTextCLIP.encode_image, CoCa.encode_image)


def source(model: nn.Module) -> Source:
    """Return the source of a model with a `visual` tower, as `open_clip.create_model` returns it.

    Raises:
        UnsupportedModelError: it has no `visual` tower.
    """
    visual: Any = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        advice = way_out(model) if isinstance(model, nn.Module) else PLAIN_WAY_OUT
        raise UnsupportedModelError(
            f"{qualified_name(type(model))}: expected an open_clip model with a `visual` tower, a CLIP or "
            "SigLIP model of Hugging Face transformers, OpenAI's clip, or a vision transformer of timm or "
            "torchvision with a classifier. "
            f"Way out: {EXPECTED if advice == PLAIN_WAY_OUT else advice}"
        )
    return Source(
        library="open_clip",
        model=model,
        visual=visual,
        visual_path="visual",
        name=f"{type(model).__name__} with a vision tower {_class_name(visual)}",
        describe=partial(describe_visual, visual),
        known=IN_OPEN_CLIP,
        entry=(("encode_image", "_encode_image"), _ENCODE_IMAGE),
        own_features=partial(_own_features, model),
        block_paths=partial(_block_paths, visual),
        transform=partial(transform_of, visual),
        expected=EXPECTED,
        supported=SUPPORTED,
        texts=partial(text_encoder_of, model),
    )


def describe_visual(visual: nn.Module) -> Tower:
    """Describe a vision tower of open_clip.

    Raises:
        NotCovered: its structure is not covered; the message is the reason.
    """
    with located({"visual": visual}, IN_OPEN_CLIP):
        describe = _description(visual)
        check_modules(visual)
        return describe(visual)


def _description(visual: nn.Module) -> Callable[[Any], Tower]:
    """Choose the description by exact class, as a subclass may compute something else."""
    if type(visual) is VisionTransformer:
        return clip.describe
    trunk: Any = visual.trunk if type(visual) is TimmModel else visual
    if trunk is not visual and type(trunk) in _TIMM:
        return lambda visual: _TIMM[type(trunk)](visual.trunk, visual.head)
    why = why_not_covered(trunk)
    reason = f"a {_class_name(visual)} {why or 'is not covered'}"
    raise NotCovered(reason, None if why else trunk)


def _class_name(visual: nn.Module) -> str:
    return (
        f"TimmModel({type(visual.trunk).__name__})"
        if isinstance(visual, TimmModel)
        else type(visual).__name__
    )


def _own_features(model: Any, images: Tensor) -> Tensor:
    features = model.encode_image(images)
    own: Tensor = features[0] if isinstance(features, tuple) else features
    return own


def _block_paths(visual: Any) -> tuple[str, ...]:
    if hasattr(visual, "trunk"):
        blocks, path = visual.trunk.blocks, "visual.trunk.blocks"
    else:
        blocks, path = visual.transformer.resblocks, "visual.transformer.resblocks"
    return tuple(f"{path}.{index}" for index in range(len(blocks)))
