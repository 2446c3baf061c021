"""From the configuration's model section to a loaded explainer."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import open_clip
import torch

import legrad
from legrad.errors import InputError, LeGradError
from legrad.support import model_support
from legrad.views import Views, check_views
from pipeline.demo import assets
from pipeline.errors import UserError
from pipeline.settings import JobConfig, ModelConfig

DEMO = "demo"
HUB_PREFIXES = ("hf-hub:", "local-dir:")


def load_explainer(model: ModelConfig, device: torch.device | str) -> legrad.LeGrad:
    """Load the configured model, ready to explain images.

    What a hub has is downloaded once into this machine's cache, `HF_HOME`; processes that load at the same
    time wait for each other, by the locks of the hub's client. `legrad models --fetch NAME TAG` does that
    ahead of a job: on every machine, or once with `HF_HOME` on shared storage. Machines without a connection
    then need `HF_HUB_OFFLINE=1`, or every file is asked for in vain before the cache is used.

    Args:
        model: the configuration's model section.
        device: where the model goes.

    Raises:
        UserError: unknown name or tag, unsupported architecture, missing or unreadable checkpoint.
    """
    try:
        with _quiet_hub():
            return legrad.LeGrad.from_open_clip(
                _open_clip_name(model),
                _checkpoint(model),
                layers=model.layers,
                device=torch.device(device),
                precision=model.precision,
                image_size=model.image_size,
                fit="stretch" if model.fit == "tile" else model.fit,
            )
    except (LeGradError, OSError, ValueError) as error:
        raise UserError(f"model.name {model.name}, model.pretrained {model.pretrained}: {error}") from error


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


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Leave out what open_clip and the hub's client log; what fails is told once, by the error."""
    root, hub = logging.getLogger(), logging.getLogger("huggingface_hub")
    earlier_level = hub.level
    hub.setLevel(logging.ERROR)
    root.addFilter(_not_by_open_clip)  # which logs by the root logger
    try:
        yield
    finally:
        hub.setLevel(earlier_level)
        root.removeFilter(_not_by_open_clip)


def _not_by_open_clip(record: logging.LogRecord) -> bool:
    return Path(record.pathname).parent.name != "open_clip"


def check_model(model: ModelConfig, scales: tuple[float, ...] = (1.0,)) -> None:
    """Refuse what can be told from the names alone, before any worker starts; nothing is loaded.

    Models from a hub by address are left to the workers, which download their configuration.

    Args:
        model: the configuration's model section.
        scales: `views.scales`.

    Raises:
        UserError: unknown name or tag, unsupported architecture, more layers than there are, sizes that the
            model cannot take.
    """
    name = _open_clip_name(model).replace("/", "-")
    if name.startswith(HUB_PREFIXES):
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
    if not _names_a_file(checkpoint) and not open_clip.is_pretrained_cfg(name, checkpoint):
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
    """Identify the weights: SHA-256 of a local checkpoint, the tag itself for weights from a hub.

    Raises:
        UserError: the demo weights are asked for under another model's name, or the file cannot be read.
    """
    checkpoint = _checkpoint(model)
    if not _names_a_file(checkpoint):
        return f"open_clip:{model.name}:{checkpoint}"
    digest = hashlib.sha256()
    try:
        with Path(checkpoint).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"model.pretrained {checkpoint}: cannot be read: {error.strerror}") from error
    return f"sha256:{digest.hexdigest()}"


def _open_clip_name(model: ModelConfig) -> str:
    return assets.register_demo_model() if model.pretrained == DEMO else model.name


def _checkpoint(model: ModelConfig) -> str:
    if model.pretrained != DEMO:
        return model.pretrained
    if model.name != assets.DEMO_MODEL_NAME:
        raise UserError(
            f"model.pretrained demo belongs to model.name {assets.DEMO_MODEL_NAME}, got {model.name}"
        )
    return str(assets.demo_weights_path())


def is_local_checkpoint(model: ModelConfig) -> bool:
    """Whether `model.pretrained` is a path, neither a hub tag nor the demo's weights."""
    return model.pretrained != DEMO and _names_a_file(model.pretrained)


def _names_a_file(checkpoint: str) -> bool:
    return os.sep in checkpoint or Path(checkpoint).exists()
