"""Find the files of a model of Hugging Face transformers, in a folder or a repository on the hub."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from legrad.errors import ModelLoadError
from legrad.weights.foreign_config import (
    read_config,
    refuse_code_in_processor,
    refuse_code_in_transformers_model,
)
from legrad.weights.hub_files import file_sha256, hub_folder
from legrad.weights.model_files import (
    TOKENIZER_PATTERNS,
    TRANSFORMERS_PREFIX,
    HubWeights,
    LocalWeights,
    WeightsFile,
    tokenizer_files,
)

CONFIG_FILE = "config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_SMALL_FILES = (*TOKENIZER_PATTERNS, CONFIG_FILE, *PROCESSOR_FILES, INDEX_FILE)
_Found = TypeVar("_Found")


def names_transformers(name: str) -> bool:
    """Return whether a name is that of a model of transformers: `hf:REPOSITORY` or `hf:FOLDER`."""
    return name.startswith(TRANSFORMERS_PREFIX)


def folder_named(name: str) -> Path | None:
    """Return the folder that a name of transformers gives, or None if it gives a repository on the hub."""
    address = name.removeprefix(TRANSFORMERS_PREFIX)
    path = Path(address).expanduser()
    is_folder = address.startswith(("/", ".", "~")) or path.is_dir()
    return path if is_folder else None


@dataclass(frozen=True)
class TransformersFiles:
    """All files that determine what a model of transformers computes.

    Attributes:
        config: contents of `config.json`.
        small_files: configuration, preprocessing, tokenizer, and the index of several weights files.
        weights: file name and place of each weights file.
    """

    config: Mapping[str, Any]
    small_files: tuple[Path, ...]
    weights: Mapping[str, WeightsFile]

    def fetch_weights(self) -> dict[str, Path]:
        """Return the path of each weights file on this machine; they are downloaded if necessary."""
        return {name: _or_way_out(weights.fetch) for name, weights in self.weights.items()}

    def weights_sha256(self) -> dict[str, str]:
        """Return the SHA-256 of each weights file, without a download if the hub or its cache knows it."""
        return {name: _or_way_out(weights.sha256) for name, weights in self.weights.items()}

    def digest(self, weights_sha256: Mapping[str, str]) -> str:
        """Return one digest of weights, configuration, preprocessing and tokenizer.

        Returns:
            `sha256:` and hexadecimal digits.
        """
        small = {path.name: file_sha256(path) for path in self.small_files}
        parts = {"transformers": small, "weights": dict(weights_sha256)}
        return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"


def find_transformers_files(name: str) -> TransformersFiles:
    """Find the files of a model, and refuse those that name code; weights are not downloaded yet.

    Args:
        name: `hf:` and a repository on the hub or a folder, such as `hf:./folder`.

    Raises:
        ModelLoadError: a file is missing, or names code, another kind of model or another processor.
        HfHubHTTPError, LocalEntryNotFoundError: a file cannot be downloaded.
    """
    local = folder_named(name)
    if local is not None and not local.is_dir():
        raise ModelLoadError(f"{local} is no folder on this machine")
    repository = name.removeprefix(TRANSFORMERS_PREFIX)
    folder = hub_folder(repository, _SMALL_FILES) if local is None else local
    config_file = _required(folder, CONFIG_FILE)
    config = read_config(config_file)
    refuse_code_in_transformers_model(config, str(config_file))
    index = [folder / INDEX_FILE] if (folder / INDEX_FILE).is_file() else []
    small_files = (
        config_file,
        *_processor_files(folder, config["model_type"]),
        *index,
        *tokenizer_files(folder),
    )
    weights: dict[str, WeightsFile] = {}
    for found in _indexed(index[0]) if index else (WEIGHTS_FILE,):
        weights[found] = HubWeights(repository, (found,))
        if local is not None:
            weights[found] = LocalWeights(_or_way_out(partial(_required, folder, found)))
    return TransformersFiles(config, tuple(dict.fromkeys(small_files)), weights)


def _processor_files(folder: Path, model_type: str) -> list[Path]:
    """Return the files that say how images are prepared; refuse those that name code or other processors."""
    paths = [folder / found for found in PROCESSOR_FILES if (folder / found).is_file()]
    if not paths:
        raise ModelLoadError(
            f"{folder} has neither {' nor '.join(PROCESSOR_FILES)}, which say how images are prepared; "
            "the processor's save_pretrained writes one"
        )
    for path in paths:
        refuse_code_in_processor(read_config(path), str(path), model_type)
    return paths


def _required(folder: Path, filename: str) -> Path:
    path = folder / filename
    if not path.is_file():
        if filename.endswith(".safetensors"):
            raise EntryNotFoundError(filename)
        raise ModelLoadError(
            f"{folder} has no {filename}, so it is not a model of transformers; save_pretrained writes one"
        )
    return path


def _indexed(index: Path) -> tuple[str, ...]:
    """Return the names of the weights files that an index names."""
    places = read_config(index).get("weight_map")
    names = sorted({str(value) for value in places.values()}) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise ModelLoadError(f"{index} does not name safetensors files of its folder as its weight_map")
    return tuple(names)


def _or_way_out(get: Callable[[], _Found]) -> _Found:
    """Return what a function gets of a weights file; where there is no such file, say what to do."""
    try:
        return get()
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise ModelLoadError(
            f"it has no weights as {WEIGHTS_FILE} (or as the files of {INDEX_FILE}), and weights in other "
            "formats, such as pytorch_model.bin, may hold code and are not loaded. Way out: load the model "
            "where you trust it, save it with save_pretrained(FOLDER), and name hf:FOLDER"
        ) from error
