"""Load the model that a configuration names, and check its names without loading it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import open_clip
import torch

import legrad
from legrad.canvases import Views
from legrad.errors import InputError, LeGradError
from legrad.families import model_support
from legrad.images import ImageTransform
from legrad.loading import check_files, computes_bf16, load_model, model_digest
from legrad.loading import model_facts as legrad_facts
from legrad.views import check_views
from legrad.weights.hf_files import folder_named, names_transformers
from legrad.weights.model_files import TRANSFORMERS_PREFIX, plain_name
from pipeline import storage
from pipeline.config.schema import ADDRESS_PREFIXES, DEMO, JobConfig, ModelConfig
from pipeline.demo import assets
from pipeline.errors import UserError
from pipeline.output.records import ModelFacts

FOLDER_PREFIX = "local-dir:"


def load_explainer(
    model: ModelConfig, device: torch.device | str, *, expected_digest: str | None = None
) -> legrad.LeGrad:
    """Load the configured model, ready to explain images.

    Files on a hub are downloaded once into the cache of this machine, `HF_HOME`; processes that load at the
    same time wait for each other by the locks of the hub's client. `legrad models --fetch NAME TAG` downloads
    them ahead of a job: on every machine, or once with `HF_HOME` on shared storage. Machines without a
    connection then need `HF_HUB_OFFLINE=1`, or the hub is tried for every file before the cache is used.

    Args:
        model: `model` section of the configuration.
        device: device of the model.
        expected_digest: `weights_digest` of the job; files with another digest are refused.

    Raises:
        UserError: unknown name or tag, unsupported architecture, missing or unreadable checkpoint, files
            that differ from the job's.
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
            processor=loaded.processor,
            layers=model.layers,
            affinity=model.affinity,
            image_size=model.image_size,
            fit="stretch" if model.fit == "tile" else model.fit,
        )


def check_device(model: ModelConfig, device: torch.device | str) -> None:
    """Refuse a GPU that cannot compute in the job's precision.

    Raises:
        UserError: `model.precision` is bf16, which the GPU would only emulate, slowly.
    """
    on_gpu = torch.device(device).type == "cuda"
    if model.precision == "bf16" and on_gpu and not computes_bf16(device):
        raise UserError(
            f"model.precision is bf16, which this worker's GPU ({torch.cuda.get_device_name(device)}) only "
            "emulates: keep such machines out of the job; or start again in a new output.dir with "
            "model.precision=fp32 or fp16"
        )


def views_wanted(config: JobConfig, explainer: legrad.LeGrad) -> Views:
    """Return the views that a configuration asks for.

    Raises:
        UserError: the model cannot take one of them.
    """
    views = Views(tile=config.model.fit == "tile", **config.views.model_dump())
    try:
        return check_views(views, explainer.tower)
    except InputError as error:
        raise UserError(f"views.{error}") from error


def check_model(model: ModelConfig, scales: tuple[float, ...] = (1.0,)) -> None:
    """Refuse what the names alone show to be wrong, before any worker starts and without loading anything.

    A name that is an address is checked by `weights_digest`.

    Args:
        model: `model` section of the configuration.
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
            f"model.name {model.name}: its positions are bound to one size, so model.fit must not be keep "
            f"and views.scales must be [1]; got {model.fit} and {list(scales)}"
        )
    checkpoint = _checkpoint(model)
    if checkpoint is not None and not _is_tag(name, checkpoint) and not _is_path(checkpoint):
        own = [DEMO] if name == assets.DEMO_MODEL_NAME else open_clip.list_pretrained_tags_by_model(name)
        or_tag = f", or for {model.name} one of {', '.join(own)}" if own else ""
        raise UserError(
            f"model.pretrained: expected the path of a checkpoint{or_tag}; got {checkpoint!r}, and there is "
            "no such file"
        )


def check_model_files(model: ModelConfig) -> None:
    """Refuse a checkpoint or folder that is not there, or is not of a model, without reading its weights.

    Weights that a tag of open_clip names are not looked for. Of a name on a hub, the small files are
    downloaded, as a job does.

    Args:
        model: `model` section of the configuration.

    Raises:
        UserError: a file is missing, or a configuration is of a model that is not supported.
    """
    if model.name.startswith(ADDRESS_PREFIXES):
        with _as_user_error(model):
            check_files(model.name, model.pretrained)
        return
    is_checkpoint = model.pretrained is not None and not is_built_in(model) and _is_path(model.pretrained)
    if is_checkpoint and not Path(storage.absolute(str(model.pretrained))).is_file():
        raise UserError(f"model.pretrained: there is no file {model.pretrained}")


def _nearest_names(name: str) -> str:
    known = open_clip.list_models()
    nearest = [] if name in known else get_close_matches(name, known)
    return f"; nearest: {', '.join(nearest)}" if nearest else "; `legrad models` lists the supported models"


def weights_digest(model: ModelConfig) -> str:
    """Return a digest of all that decides what a model computes: weights, configuration and tokenizer.

    The model is not loaded, and files on a hub are downloaded only where the hub does not publish a digest.

    Raises:
        UserError: a file is missing, damaged or not of this model; a configuration names code; the weights
            of the demo are requested under the name of another model.
    """
    with _as_user_error(model):
        checkpoint = _checkpoint(model)
        return model_digest(_open_clip_name(model), checkpoint)


def model_facts(model: ModelConfig) -> ModelFacts:
    """Return what is needed to make masks from the model's stored maps; no weights are read.

    Raises:
        UserError: as `weights_digest`.
    """
    with _as_user_error(model):
        facts = legrad_facts(
            _open_clip_name(model),
            _checkpoint(model),
            image_size=model.image_size,
            fit="stretch" if model.fit == "tile" else model.fit,
        )
    transform = facts.transform
    return ModelFacts(
        normalisation=facts.normalisation,
        patch_size=transform.patch_size,
        input_height=transform.height,
        input_width=transform.width,
        interpolation=transform.interpolation,
        mean=transform.mean,
        std=transform.std,
        fit=transform.fit,
    )


def transform_of_facts(facts: ModelFacts) -> ImageTransform:
    """Return the preprocessing of a model that is not loaded."""
    return ImageTransform(
        facts.input_height,
        facts.input_width,
        facts.mean,
        facts.std,
        facts.interpolation,
        facts.fit,
        facts.patch_size,
    )


def describe_model(model: ModelConfig) -> str:
    """Return the name of a model and its weights for display."""
    return model.name if model.pretrained is None else f"{model.name} ({model.pretrained})"


def resolved(model: ModelConfig) -> ModelConfig:
    """Return the section with absolute paths and plain names, which mean the same in every process.

    Workers on a cluster have a different working directory from the driver.
    """
    if model.name.startswith(FOLDER_PREFIX):
        folder = storage.absolute(model.name.removeprefix(FOLDER_PREFIX))
        return model.model_copy(update={"name": f"{FOLDER_PREFIX}{folder}"})
    if names_transformers(model.name):
        local = folder_named(model.name)
        named = model.name if local is None else f"{TRANSFORMERS_PREFIX}{storage.absolute(str(local))}"
        return model.model_copy(update={"name": named})
    model = model.model_copy(update={"name": plain_name(model.name)})
    if model.pretrained is None or is_built_in(model) or not _is_path(model.pretrained):
        return model
    return model.model_copy(update={"pretrained": storage.absolute(model.pretrained)})


def is_built_in(model: ModelConfig) -> bool:
    """Return whether open_clip, or the demo, brings name and weights: neither is a path or an address."""
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
    return assets.register_demo_model() if model.name == assets.DEMO_MODEL_NAME else model.name


def _checkpoint(model: ModelConfig) -> str | None:
    if model.pretrained != DEMO:
        return model.pretrained
    if model.name != assets.DEMO_MODEL_NAME:
        raise UserError(
            f"model.pretrained demo belongs to model.name {assets.DEMO_MODEL_NAME}, got {model.name}"
        )
    return str(assets.demo_weights_path())


def _is_tag(name: str, pretrained: str) -> bool:
    """Return whether open_clip has the tag; a file of the same name does not hide it."""
    return bool(open_clip.is_pretrained_cfg(name, pretrained))


def _is_path(pretrained: str) -> bool:
    return os.sep in pretrained or Path(pretrained).exists()
