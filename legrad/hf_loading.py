"""Load a model of Hugging Face transformers with exactly its weights; `legrad.loading` explains failures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)
from transformers.utils import logging

from legrad.errors import ModelLoadError
from legrad.families import describe_source, source_of
from legrad.families.source import Source
from legrad.weights.checkpoint import check_safetensors
from legrad.weights.hf_files import TransformersFiles, find_transformers_files

# Configuration, model and image processor by the type that config.json names; none of them is chosen by name.
_CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "clip": (CLIPConfig, CLIPModel, CLIPImageProcessor),
    "siglip": (SiglipConfig, SiglipModel, SiglipImageProcessor),
    "siglip2": (Siglip2Config, Siglip2Model, Siglip2ImageProcessor),
}
_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "pure_fp16": torch.float16,
    "bf16": torch.bfloat16,
    "pure_bf16": torch.bfloat16,
}


def supported_files(name: str) -> tuple[TransformersFiles, Source]:
    """Find the files of a model; its vision tower must be covered. No weights are read.

    Returns:
        The files, and the source of the model without memory for weights, with its image processor.

    Raises:
        ModelLoadError, HfHubHTTPError, LocalEntryNotFoundError: see `find_transformers_files`.
        UnsupportedModelError: the structure of the vision tower is not covered.
    """
    files = find_transformers_files(name)
    config_class, model_class, processor_class = _CLASSES[files.config["model_type"]]
    with _laid_out(files, {}) as folder, _quiet():
        with torch.device("meta"):
            model = model_class(config_class.from_pretrained(folder, local_files_only=True))
        source = source_of(model, processor_class.from_pretrained(folder, local_files_only=True))
    describe_source(source)
    return files, source


def made(
    files: TransformersFiles, weights: dict[str, Path], precision: str, device: torch.device
) -> tuple[nn.Module, Any, Any]:
    """Load a model from its files.

    Args:
        files: of the model.
        weights: path of each weights file.
        precision: one of `legrad.loading.PRECISIONS` other than auto; all weights get its dtype.
        device: of the model.

    Returns:
        The model in evaluation mode, its tokenizer and its image processor.

    Raises:
        ModelLoadError: weights are missing, or there are weights that the model does not have.
    """
    _, model_class, processor_class = _CLASSES[files.config["model_type"]]
    for path in weights.values():
        check_safetensors(path)
    with _laid_out(files, weights) as folder, _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        processor = processor_class.from_pretrained(folder, local_files_only=True)
        model, loaded = model_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            dtype=_DTYPES[precision],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, as what is missing is
        )
    _check_complete(loaded)
    return model.to(device).eval(), tokenizer, processor


def _check_complete(loaded: dict[str, Any]) -> None:
    """Raise an error for what transformers only warns of: weights that stay random, or are not used."""
    missing = sorted(loaded["missing_keys"])
    # Earlier versions of transformers saved the numbers of positions too.
    unexpected = sorted(key for key in loaded["unexpected_keys"] if not key.endswith(".position_ids"))
    misshapen = sorted(key for key, *_shapes in loaded["mismatched_keys"])
    for what, names in (
        ("have other shapes at", misshapen),
        ("lack", missing),
        ("hold, beyond the model's,", unexpected),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelLoadError(
                f"its weights {what} {', '.join(names[:3])}{more}: they are of another model than config.json"
            )


@contextmanager
def _laid_out(files: TransformersFiles, weights: dict[str, Path]) -> Iterator[str]:
    """Put links to files in a folder, so that transformers finds these and no others."""
    with TemporaryDirectory(prefix="legrad-") as folder:
        for path in files.small_files:
            (Path(folder) / path.name).symlink_to(path.resolve())
        for name, path in weights.items():
            (Path(folder) / name).symlink_to(path.resolve())
        yield folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' warnings and progress bars; what matters of them is an error here."""
    own: Any = logging  # without types
    level, bars = own.get_verbosity(), own.is_progress_bar_enabled()
    own.set_verbosity_error()
    own.disable_progress_bar()
    try:
        yield
    finally:
        own.set_verbosity(level)
        if bars:
            own.enable_progress_bar()
