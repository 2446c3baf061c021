"""Find the files of a model for any kind of name: configuration, tokenizer and weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias

import open_clip
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from open_clip import factory
from open_clip.tokenizer import default_bpe

from legrad.errors import ModelLoadError
from legrad.weights.foreign_config import (
    read_config,
    refuse_code_in_model,
    refuse_code_in_text_model,
    refuse_code_in_tokenizer,
)
from legrad.weights.hub_files import file_sha256, hub_file, hub_file_sha256, hub_folder

HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"
# Of models of transformers, see `legrad.weights.hf_files`; all others are models of open_clip.
TRANSFORMERS_PREFIX = "hf:"
CONFIG_FILE = "open_clip_config.json"
SAFE_WEIGHTS_FILE, WEIGHTS_FILE = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
# In open_clip's order.
FOLDER_WEIGHTS_FILES = (
    SAFE_WEIGHTS_FILE,
    "open_clip_pytorch_model.safetensors",
    WEIGHTS_FILE,
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
VOCABULARY_PATTERNS = ("tokenizer.json", "*.model", "vocab*.json", "vocab.txt", "merges.txt", "*.tiktoken")
TOKENIZER_PATTERNS = (
    *VOCABULARY_PATTERNS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
PREPROCESS_KEYS = ("mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


@dataclass(frozen=True)
class LocalWeights:
    """A checkpoint on this machine."""

    path: Path

    def fetch(self) -> Path:
        """Return its path."""
        return self.path

    def sha256(self) -> str:
        """Return the SHA-256 of its bytes."""
        return file_sha256(self.path)


@dataclass(frozen=True)
class HubWeights:
    """A checkpoint in a repository on the Hugging Face hub: the first of several file names that exists."""

    repository: str
    filenames: tuple[str, ...]

    def fetch(self) -> Path:
        """Return its path on this machine; download it if necessary."""
        return hub_file(self.repository, self.filenames)

    def sha256(self) -> str:
        """Return the SHA-256 of its bytes, without a download if the hub or its cache knows it."""
        return hub_file_sha256(self.repository, self.filenames)


WeightsFile: TypeAlias = LocalWeights | HubWeights


@dataclass(frozen=True)
class ModelFiles:
    """All files and settings that determine what a model computes.

    Attributes:
        name: name in open_clip's tables, without slashes; or an `hf-hub:` or `local-dir:` name.
        model_config: open_clip's `model_cfg`.
        preprocess_config: mean, std and so on; open_clip's defaults are omitted.
        weights: the checkpoint; None: random weights.
        weights_stand_alone: the checkpoint is a file that the user combined with a model name, so that
            nothing guarantees that they belong together.
        tokenizer_files: files of a Hugging Face tokenizer; empty: open_clip's own tokenizer.
        text_model_config: `config.json` of a Hugging Face text tower, or None.
    """

    name: str
    model_config: Mapping[str, Any]
    preprocess_config: Mapping[str, Any]
    weights: WeightsFile | None
    weights_stand_alone: bool = False
    tokenizer_files: tuple[Path, ...] = field(default=())
    text_model_config: Path | None = None

    @property
    def quick_gelu(self) -> bool:
        """Whether open_clip's own towers use QuickGELU."""
        return bool(self.model_config.get("quick_gelu", False))

    def digest(self, weights_sha256: str) -> str:
        """Return one digest of weights, configuration and tokenizer.

        Args:
            weights_sha256: SHA-256 of the checkpoint.

        Returns:
            `sha256:` and hexadecimal digits.
        """
        tokenizer = {path.name: file_sha256(path) for path in self.tokenizer_files}
        text_model = self.text_model_config
        parts = {
            "weights": weights_sha256,
            "model_config": _without_addresses(self.model_config),
            "preprocess_config": self.preprocess_config,
            "tokenizer": tokenizer or {"open_clip": file_sha256(Path(default_bpe()))},
            "text_model": None if text_model is None else file_sha256(text_model),
        }
        return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"


def brings_weights(name: str) -> bool:
    """Return whether a name includes weights: `local-dir:`, `hf-hub:` and `hf:` names do."""
    return name.startswith((HUB_PREFIX, FOLDER_PREFIX, TRANSFORMERS_PREFIX))


def plain_name(name: str) -> str:
    """Return a model's name in open_clip's tables, such as ViT-B-32 for ViT-B/32."""
    return name if brings_weights(name) else name.replace("/", "-")


def find_model_files(name: str, pretrained: str | None) -> ModelFiles:
    """Find the files of a model, and refuse configurations that name code; weights are not downloaded yet.

    Args:
        name: name of an open_clip model, `hf-hub:ORGANISATION/NAME` or `local-dir:FOLDER`.
        pretrained: tag or path of a checkpoint; None for names that include weights, and for random weights.

    Raises:
        ModelLoadError: there is no file for the name, tag or path; `pretrained` is set although the name
            includes weights; or a configuration names code.
        HfHubHTTPError, LocalEntryNotFoundError: a file cannot be downloaded.
    """
    if not brings_weights(name):
        return _by_name(plain_name(name), pretrained)
    if pretrained is not None:
        raise ModelLoadError("the name brings its own weights, so pretrained would be ignored; omit it")
    prefix, _, address = name.partition(":")
    return _in_folder(name, Path(address)) if f"{prefix}:" == FOLDER_PREFIX else _in_repository(name, address)


def _in_folder(name: str, folder: Path) -> ModelFiles:
    if not folder.is_dir():
        raise ModelLoadError(f"{name.removeprefix(FOLDER_PREFIX)} is no folder on this machine")
    if not (folder / CONFIG_FILE).is_file():
        raise ModelLoadError(f"the folder has no {CONFIG_FILE}; {_how_open_clip_writes_it()}")
    model_config, preprocess_config = _read_open_clip_config(folder / CONFIG_FILE)
    tokenizer = folder if model_config["text_cfg"].get("hf_tokenizer_name") else None
    return ModelFiles(
        name,
        model_config,
        preprocess_config,
        LocalWeights(_weights_in(folder)),
        tokenizer_files=() if tokenizer is None else tokenizer_files(tokenizer),
        text_model_config=_text_model_config(model_config),
    )


def _in_repository(name: str, repository: str) -> ModelFiles:
    try:
        path = hub_file(repository, [CONFIG_FILE])
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        raise ModelLoadError(
            f"the repository has no {CONFIG_FILE}, so it is not a model of open_clip; "
            f"{_how_open_clip_writes_it()}"
        ) from None
    model_config, preprocess_config = _read_open_clip_config(path)
    return ModelFiles(
        name,
        model_config,
        preprocess_config,
        HubWeights(repository, (SAFE_WEIGHTS_FILE, WEIGHTS_FILE)),
        tokenizer_files=_hub_tokenizer_files(model_config),
        text_model_config=_text_model_config(model_config),
    )


def _by_name(name: str, pretrained: str | None) -> ModelFiles:
    model_config = open_clip.get_model_config(name)
    if model_config is None:
        raise ModelLoadError(f"open_clip has no model named {name!r}")
    refuse_code_in_model(model_config, name)
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained is not None else {}
    if pretrained is None:
        weights, preprocess = None, {}
    elif tag:
        weights, preprocess = _weights_of_tag(tag), _preprocess_of(tag)
        model_config["quick_gelu"] = bool(tag.get("quick_gelu") or model_config.get("quick_gelu"))
    else:
        weights, preprocess = _local_checkpoint(name, pretrained), _preprocess_of_name(name)
    return ModelFiles(
        name,
        model_config,
        preprocess,
        weights,
        weights_stand_alone=pretrained is not None and not tag,
        tokenizer_files=_hub_tokenizer_files(model_config),
        text_model_config=_text_model_config(model_config),
    )


def _weights_of_tag(tag: Mapping[str, Any]) -> WeightsFile:
    """Return where the weights of a tag are, by the rules of open_clip's `download_pretrained`."""
    if not tag.get("hf_hub"):
        return LocalWeights(Path(factory.download_pretrained(dict(tag))))
    repository, _, filename = str(tag["hf_hub"]).rpartition("/")
    filename = filename or WEIGHTS_FILE
    safe = SAFE_WEIGHTS_FILE if filename == WEIGHTS_FILE else Path(filename).with_suffix(".safetensors").name
    candidates = (safe, filename) if filename.endswith((".bin", ".pth")) else (filename,)
    return HubWeights(repository, candidates)


def _local_checkpoint(name: str, pretrained: str) -> WeightsFile:
    path = Path(pretrained)
    if not path.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tag"
        raise ModelLoadError(
            f"pretrained={pretrained!r} is neither a file on this machine nor a tag of {name}, "
            f"which has {tags}"
        )
    return LocalWeights(path)


def _preprocess_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in PREPROCESS_KEYS if config.get(key) is not None}


def _preprocess_of_name(name: str) -> dict[str, Any]:
    """Return the preprocessing on which all tags of a name agree, otherwise nothing (open_clip's default)."""
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    # Images are always stretched here, so tags that only differ in resize_mode agree.
    agreed = [{**_preprocess_of(tag), "resize_mode": "squash"} for tag in tags]
    return agreed[0] if agreed and all(other == agreed[0] for other in agreed) else {}


def _read_open_clip_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    document = read_config(path)
    model_config = document.get("model_cfg")
    if not isinstance(model_config, dict):
        raise ModelLoadError(f"{path} has no model_cfg; {_how_open_clip_writes_it()}")
    refuse_code_in_model(model_config, str(path))
    preprocess = document.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise ModelLoadError(f"{path}: preprocess_cfg is {preprocess!r:.80}; expected a JSON object")
    return model_config, _preprocess_of(preprocess)


def _how_open_clip_writes_it() -> str:
    return "open_clip's push_to_hf_hub writes it, as {model_cfg: ..., preprocess_cfg: ...}"


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in FOLDER_WEIGHTS_FILES if (folder / name).is_file()]
    if found:
        return found[0]
    others = sorted(
        path
        for suffix in ("safetensors", "bin", "pth", "pt")
        for path in folder.glob(f"*.{suffix}")
        if path.is_file()
    )
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(path.name for path in others)
        raise ModelLoadError(f"{folder} has several checkpoints ({names}); name one {SAFE_WEIGHTS_FILE}")
    raise ModelLoadError(f"{folder} has no weights; expected {SAFE_WEIGHTS_FILE} or {WEIGHTS_FILE} in it")


def _hub_tokenizer_files(model_config: Mapping[str, Any]) -> tuple[Path, ...]:
    named = model_config["text_cfg"].get("hf_tokenizer_name")
    if not named:
        return ()
    folder = Path(str(named))
    try:
        return tokenizer_files(folder if folder.is_dir() else hub_folder(str(named), TOKENIZER_PATTERNS))
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(f"its tokenizer, {named}, is missing") from error


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of the Hugging Face tokenizer in a folder.

    Raises:
        ModelLoadError: there is no vocabulary, or a file names code.
    """
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and _matches(path.name, TOKENIZER_PATTERNS)
    )
    if not any(_matches(path.name, VOCABULARY_PATTERNS) for path in files):
        raise ModelLoadError(
            f"{folder} has no vocabulary of a tokenizer ({', '.join(VOCABULARY_PATTERNS)}), "
            "which the model's configuration requires"
        )
    refuse_code_in_tokenizer(folder)
    return tuple(files)


def _matches(filename: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(filename, pattern) for pattern in patterns)


def _text_model_config(model_config: Mapping[str, Any]) -> Path | None:
    named = model_config["text_cfg"].get("hf_model_name")
    if not named:
        return None
    folder = Path(str(named))
    path = folder / "config.json" if folder.is_dir() else hub_file(str(named), ["config.json"])
    refuse_code_in_text_model(read_config(path), str(path))
    return path


def _without_addresses(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the addresses of a text tower's files, as their contents have digests of their own."""
    text = model_config["text_cfg"]
    named = {key: bool(text.get(key)) for key in ("hf_model_name", "hf_tokenizer_name")}
    return {**model_config, "text_cfg": {**text, **named}}
