"""Describe the vision towers of models, by library and family, and list which models are supported.

The structure of a tower decides its family, never its name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from legrad.errors import UnsupportedModelError
from legrad.families import open_clip_models, openai_clip
from legrad.families.open_clip_models import describe_visual
from legrad.families.parts import NotCovered
from legrad.families.source import Source
from legrad.method.towers import Tower
from legrad.tokens import Tokenizer

_SMALLEST_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


# Where the models of other libraries are described, by the name of the library's Python package.
_ELSEWHERE = {
    "clip": "legrad.families.openai_clip",
    "timm": "legrad.families.classifiers",
    "torchvision": "legrad.families.classifiers",
    "transformers": "legrad.families.hugging_face",
}


def source_of(model: nn.Module, processor: Any = None) -> Source:
    """Return what of a model depends on its library, which the Python package of its class decides.

    A library is only imported if the model is of one of its classes, or of a subclass.

    Args:
        model: see `legrad.LeGrad`. It is not changed.
        processor: see `legrad.LeGrad`.

    Raises:
        UnsupportedModelError: the model is of no known kind.
    """
    kinds = (kind for kind in type(model).__mro__ if issubclass(kind, nn.Module))
    packages = (kind.__module__.partition(".")[0] for kind in kinds)
    module = next((_ELSEWHERE[package] for package in packages if package in _ELSEWHERE), None)
    if module is None:
        return open_clip_models.source(model)
    found: Source = import_module(module).source(model, processor)
    return found


def without_archive(
    model: nn.Module | Mapping[str, Tensor], tokenizer: Tokenizer | None
) -> tuple[nn.Module, Tokenizer | None]:
    """Return a model and its tokenizer; for a state of OpenAI's clip, a model of open_clip with its weights.

    Args:
        model: a model, which is returned itself; a TorchScript archive of OpenAI's clip, as `torch.jit.load`
            returns it, none of whose code is run; or the state of such an archive.
        tokenizer: the one that the caller passed; None: for a state, OpenAI's.

    Raises:
        UnsupportedModelError: it is a state, but not one of OpenAI's clip.
    """
    state = model.state_dict() if isinstance(model, torch.jit.ScriptModule) else model
    if not isinstance(state, Mapping):
        return state, tokenizer
    made = openai_clip.model_of_state(state)
    return made, tokenizer or openai_clip.own_tokenizer(made)


def describe_tower(model: nn.Module) -> Tower:
    """Describe the vision tower of a model.

    Args:
        model: see `legrad.LeGrad`. It is not changed.

    Raises:
        UnsupportedModelError: the structure of the tower is not covered; the message names model, tower, the
            module that is not covered, and the way out.
    """
    return describe_source(source_of(model))


def describe_source(source: Source) -> Tower:
    """Describe the vision tower of a model whose source is known; see `describe_tower`."""
    try:
        return source.describe()
    except NotCovered as reason:
        raise UnsupportedModelError(f"{source.name}: {reason}. Supported: {source.supported}") from None


@dataclass(frozen=True)
class ModelSupport:
    """Whether one open_clip model can be explained.

    Attributes:
        family: name of the model family; None if the model is not supported.
        reason: why the model is not supported, or None.
        blocks: number of transformer blocks, each of which can be explained; None if not supported.
        takes_any_grid: whether images of other sizes than the model's own are possible.
    """

    family: str | None
    reason: str | None
    blocks: int | None = None
    takes_any_grid: bool = False


def supported_models() -> dict[str, ModelSupport]:
    """List all models of open_clip by name, with their family or the reason why they are not supported.

    Nothing is downloaded. The vision towers are built without memory for weights; the first call takes
    seconds.
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
