"""From the configuration's model section to a loaded explainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import open_clip
import torch

import legrad
from legrad.errors import InputError, LeGradError
from legrad.families import model_support
from legrad.loading import load_model, model_digest
from legrad.views import Views, check_views
from legrad.weights.model_files import plain_name
from pipeline import storage
from pipeline.config.schema import ADDRESS_PREFIXES, JobConfig, ModelConfig
from pipeline.demo import assets
from pipeline.errors import UserError

DEMO = "demo"
FOLDER_PREFIX = "local-dir:"


def load_explainer(
    model: ModelConfig, device: torch.device | str, *, expected_digest: str | None = None
) -> legrad.LeGrad:
    """Load the configured model, ready to explain images.

    What a hub has is downloaded once into this machine's cache, `HF_HOME`; processes that load at the same
    time wait for each other, by the locks of the hub's client. `legrad models --fetch NAME TAG` does that
    ahead of a job: on every machine, or once with `HF_HOME` on shared storage. Machines without a connection
    then need `HF_HUB_OFFLINE=1`, or every file is asked for in vain before the cache is used.

    Args:
        model: the configuration's model section.
        device: where the model goes.
        expected_digest: what `weights_digest` gave for the job; other files are refused.

    Raises:
        UserError: unknown name or tag, unsupported architecture, missing or unreadable checkpoint, other
            files than the job's.
    """
    with _as_user_error(model):
        loaded = load_model(
            _open_clip_name(model),
            _checkpoint(model),
            precision=model.precision,
            device=device,
            expected_digest=expected_digest,
        )
        return legrad.LeGrad(
            loaded.model,
            tokenizer=loaded.tokenizer,
            layers=model.layers,
            image_size=model.image_size,
            fit="stretch" if model.fit == "tile" else model.fit,
        )


def views_wanted(config: JobConfig, explainer: legrad.LeGrad) -> Views:
    """The views that a configuration asks for.

    Raises:
        UserError: the model cannot take one of them.
    """
    views = Views(tile=config.model.fit == "tile", **config.views.model_dump())
    try:
        return check_views(views, explainer.tower)
    except InputError as error:
        raise UserError(f"views.{error}") from error


def check_model(model: ModelConfig, scales: tuple[float, ...] = (1.0,)) -> None:
    """Refuse what can be told from the names alone, before any worker starts; nothing is loaded.

    What a name stands for that is an address is looked at by `weights_digest`.

    Args:
        model: the configuration's model section.
        scales: `views.scales`.

    Raises:
        UserError: unknown name or tag, unsupported architecture, more layers than there are, sizes that the
            model cannot take.
    """
    name = plain_name(_open_clip_name(model))
    if name.startswith(ADDRESS_PREFIXES):
        return
    support = model_support(name)
    if support.reason is not None:
        raise UserError(f"model.name {model.name}: {support.reason}{_nearest_names(name)}")
    if model.layers != "all" and model.layers > (support.blocks or 0):
        raise UserError(f"model.layers: {model.name} has {support.blocks} blocks, got {model.layers}")
    if not support.takes_any_grid and (model.fit == "keep" or scales != (1.0,)):
        raise UserError(
            f"model.name {model.name}: its positions are bound to one size, which model.fit keep and other "
            f"views.scales than 1 are not; got {model.fit} and {list(scales)}"
        )
    checkpoint = _checkpoint(model)
    if checkpoint is not None and not _is_tag(name, checkpoint) and not _is_path(checkpoint):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tag"
        raise UserError(
            f"model.pretrained: expected a checkpoint's path, or for {model.name} one of {tags}; "
            f"got {checkpoint!r}"
        )


def _nearest_names(name: str) -> str:
    known = open_clip.list_models()
    nearest = [] if name in known else get_close_matches(name, known)
    return f"; nearest: {', '.join(nearest)}" if nearest else "; `legrad models` lists what is supported"


def weights_digest(model: ModelConfig) -> str:
    """Identify all that decides what the model computes: weights, its and its tokenizer's configuration.

    The model is not loaded, and what a hub has is downloaded only where the hub does not tell its digest.

    Raises:
        UserError: a file is missing, damaged or no weights of this model; a configuration names code; the
            demo's weights are asked for under another model's name.
    """
    with _as_user_error(model):
        checkpoint = _checkpoint(model)
        return model_digest(_open_clip_name(model), checkpoint)


def describe_model(model: ModelConfig) -> str:
    """Name a model and its weights for people."""
    return model.name if model.pretrained is None else f"{model.name} ({model.pretrained})"


def resolved(model: ModelConfig) -> ModelConfig:
    """Return the section as any process reads it: names without slashes, absolute paths.

    Workers on a cluster have another working directory than the driver.
    """
    if model.name.startswith(FOLDER_PREFIX):
        folder = storage.absolute(model.name.removeprefix(FOLDER_PREFIX))
        return model.model_copy(update={"name": f"{FOLDER_PREFIX}{folder}"})
    model = model.model_copy(update={"name": plain_name(model.name)})
    if model.pretrained is None or is_built_in(model) or not _is_path(model.pretrained):
        return model
    return model.model_copy(update={"pretrained": storage.absolute(model.pretrained)})


def is_built_in(model: ModelConfig) -> bool:
    """Whether name and weights are open_clip's own, or the demo's: neither a path nor a hub's address."""
    if model.pretrained is None or model.name.startswith(ADDRESS_PREFIXES):
        return False
    demo = (assets.DEMO_MODEL_NAME, DEMO)
    return (model.name, model.pretrained) == demo or _is_tag(plain_name(model.name), model.pretrained)


@contextmanager
def _as_user_error(model: ModelConfig) -> Iterator[None]:
    try:
        yield
    except (LeGradError, OSError, ValueError) as error:
        named = f"model.name {model.name}, model.pretrained {model.pretrained}"
        raise UserError(f"{named}: {error}") from error


def _open_clip_name(model: ModelConfig) -> str:
    return assets.register_demo_model() if model.pretrained == DEMO else model.name


def _checkpoint(model: ModelConfig) -> str | None:
    if model.pretrained != DEMO:
        return model.pretrained
    if model.name != assets.DEMO_MODEL_NAME:
        raise UserError(
            f"model.pretrained demo belongs to model.name {assets.DEMO_MODEL_NAME}, got {model.name}"
        )
    return str(assets.demo_weights_path())


def _is_tag(name: str, pretrained: str) -> bool:
    """Whether open_clip has the tag; a file of the same name never hides it."""
    return bool(open_clip.is_pretrained_cfg(name, pretrained))


def _is_path(pretrained: str) -> bool:
    return os.sep in pretrained or Path(pretrained).exists()
