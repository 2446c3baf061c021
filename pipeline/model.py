"""From the configuration's model section to a loaded explainer."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

import legrad
from legrad.errors import LeGradError
from pipeline.config import ModelConfig
from pipeline.demo import assets
from pipeline.errors import UserError

DEMO = "demo"


def load_explainer(model: ModelConfig, device: torch.device | str) -> legrad.LeGrad:
    """Load the configured model, ready to explain images.

    Args:
        model: the configuration's model section.
        device: where the model goes.

    Raises:
        UserError: unknown name or tag, unsupported architecture, missing or unreadable checkpoint.
    """
    try:
        return legrad.LeGrad.from_open_clip(
            _open_clip_name(model),
            _checkpoint(model),
            layers=model.layers,
            device=torch.device(device),
            precision=model.precision,
            image_size=model.image_size,
            fit=model.fit,
        )
    except (LeGradError, OSError, ValueError) as error:
        raise UserError(f"model.name {model.name}, model.pretrained {model.pretrained}: {error}") from error


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
