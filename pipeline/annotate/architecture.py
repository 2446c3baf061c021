"""Refuse a model of open_clip that cannot be explained, by its name and without importing a model library."""

from __future__ import annotations

from difflib import get_close_matches

from legrad.support import ModelSupport, model_configs, model_support
from pipeline.config.schema import CLASSIFIER_PREFIXES
from pipeline.errors import UserError


def check_architecture(name: str, where: str) -> ModelSupport:
    """Return what is known of the open_clip model of this name.

    Args:
        name: name of an open_clip model; addresses such as `hf-hub:...` are not looked up.
        where: key or option that holds the name, for the message.

    Raises:
        UserError: there is no such model, or its architecture is not supported.
    """
    if name.startswith(CLASSIFIER_PREFIXES):
        raise UserError(
            f"{where} {name}: a classifier has no texts to compare images with, which a job needs; "
            f"`legrad explain IMAGE CLASS --model {name}` explains its classes"
        )
    support = model_support(name)
    if support.reason is None:
        return support
    known = list(model_configs())
    nearest = [] if name in known else get_close_matches(name, known)
    if "/" in name and not nearest:
        nearest = [f"hf:{name} of transformers", f"hf-hub:{name} of open_clip"]
    advice = f"nearest: {', '.join(nearest)}" if nearest else "`legrad models` lists the supported models"
    raise UserError(f"{where} {name}: {support.reason}; {advice}")
