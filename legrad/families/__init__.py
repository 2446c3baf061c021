"""Describe the vision towers of models, by library and family.

The structure of a tower decides its family, never its name.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from legrad.errors import InputError, UnsupportedModelError
from legrad.families import open_clip_models, openai_clip
from legrad.families.parts import NotCovered
from legrad.families.source import Source
from legrad.method.towers import Tower
from legrad.tokens import Tokenizer

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
        InputError: there is a processor for a model of another library than transformers.
    """
    kinds = (kind for kind in type(model).__mro__ if issubclass(kind, nn.Module))
    packages = (kind.__module__.partition(".")[0] for kind in kinds)
    module = next((_ELSEWHERE[package] for package in packages if package in _ELSEWHERE), None)
    if processor is not None and module != _ELSEWHERE["transformers"]:
        raise InputError(
            f"processor: expected None, as only models of transformers have one and this is a "
            f"{type(model).__name__}; set explainer.transform for another preprocessing"
        )
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
