"""Checkpoints as files: told apart, and refused in one line with the way out, before a model is made."""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from legrad.errors import ModelLoadError
from legrad.weights.hub_files import file_sha256
from legrad.weights.model_files import ModelFiles

OPENAI_KEYS = frozenset({"input_resolution", "context_length", "vocab_size"})
TOWER_NAMES = frozenset({"visual", "text", "transformer", "image_encoder", "text_encoder"})
NUMPY_SUFFIXES = (".npz", ".npy")
LFS_POINTER, ZIP = b"version https://git-lfs", b"PK\x03\x04"


def check_checkpoint(path: Path, files: ModelFiles) -> None:
    """Refuse a file that is no checkpoint, holds it in a way that is not read, or needs another activation.

    Weights are not read, but for a few: what is in them shows once they are in a model.

    Args:
        path: the checkpoint.
        files: what the model is made of.

    Raises:
        ModelLoadError: it is such a file.
        OSError: it cannot be read.
    """
    _check_first_bytes(path)
    if path.suffix in NUMPY_SUFFIXES:  # big_vision's: read by open_clip, piece by piece
        return
    with _opened(path) as tensors:
        _check_keys(path, tensors, files)
        if files.weights_stand_alone:
            _check_known_tag(path, files)
            _check_rounding(path, tensors, files)


@dataclass(frozen=True)
class _Tensors:
    """The names of a checkpoint's tensors, and what reads one of them."""

    keys: list[str]
    read: Callable[[str], Tensor]


@contextmanager
def _opened(path: Path) -> Iterator[_Tensors]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                yield _Tensors(list(file.keys()), file.get_tensor)
        except SafetensorError as error:
            raise ModelLoadError(
                f"{path.name} is no sound safetensors file ({error}); fetch it again"
            ) from error
        return
    if _is_torchscript(path):
        raise ModelLoadError(
            f"{path.name} is a TorchScript archive, which is code and never run. OpenAI's own are the "
            "tag openai; of others, save torch.jit.load(FILE).state_dict() where you trust them"
        )
    state = _state_dict(path, _unpickled(path))
    yield _Tensors(list(state), state.__getitem__)


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, "cpu", weights_only=True, mmap=_is_zip(path))
    except UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise ModelLoadError(
                f"{path.name} is damaged, or no checkpoint; code in it is never run"
            ) from error
        raise ModelLoadError(
            f"{path.name} holds {named[1]} beside its weights, and code in it is never run: where you "
            "trust it, load it with weights_only=False and save its state_dict alone"
        ) from error
    except (EOFError, RuntimeError, ValueError, KeyError, RecursionError) as error:
        raise ModelLoadError(f"{path.name} is damaged or cut off: fetch it again") from error


def _check_first_bytes(path: Path) -> None:
    with path.open("rb") as file:
        first = file.read(64)
    if not first:
        raise ModelLoadError(f"{path.name} is empty: fetch it again")
    if first.startswith(LFS_POINTER):
        raise ModelLoadError(
            f"{path.name} is a pointer of Git LFS, not weights: run `git lfs pull` beside it"
        )
    if first.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise ModelLoadError(f"{path.name} is a web page, not weights: fetch the file itself")
    if first[8:9] == b"{" and path.suffix != ".safetensors":
        raise ModelLoadError(f"{path.name} is a safetensors file by its content: rename it to *.safetensors")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == ZIP


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _state_dict(path: Path, checkpoint: Any) -> dict[str, Tensor]:
    """Return the tensors by the names that open_clip's reader gives them."""
    if isinstance(checkpoint, Mapping) and "state_dict" in checkpoint:
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, Mapping):
        raise ModelLoadError(
            f"{path.name} holds {type(checkpoint).__name__}; expected weights by name, as "
            "model.state_dict() gives"
        )
    if not checkpoint:
        raise ModelLoadError(f"{path.name} holds no weights")
    for key, value in checkpoint.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values()):
            raise ModelLoadError(
                f"{path.name} has its weights under {key!r}; expected them at the top or under 'state_dict': "
                f"{_saved_anew(f'checkpoint[{key!r}]')}"
            )
    if str(next(iter(checkpoint))).startswith("module"):
        return {str(key)[len("module.") :]: value for key, value in checkpoint.items()}
    return {str(key): value for key, value in checkpoint.items()}


def _check_keys(path: Path, tensors: _Tensors, files: ModelFiles) -> None:
    if not tensors.keys:
        raise ModelLoadError(f"{path.name} holds no weights")
    if OPENAI_KEYS & set(tensors.keys):
        raise ModelLoadError(
            f"{path.name} is in OpenAI's own form; use the tag openai, or take the keys "
            f"{', '.join(sorted(OPENAI_KEYS))} out of it{_quick_gelu_name(files)}"
        )
    firsts = {key.partition(".")[0] for key in tensors.keys}
    prefix = next(iter(firsts))
    # A checkpoint of one tower alone is told by what open_clip misses in it.
    if len(firsts) == 1 and prefix not in TOWER_NAMES and all("." in key for key in tensors.keys):
        renamed = f"{{key.removeprefix('{prefix}.'): value for key, value in checkpoint.items()}}"
        raise ModelLoadError(
            f"{path.name}: every name of a weight begins with '{prefix}.', as a wrapper leaves it: "
            f"{_saved_anew(renamed)}"
        )


def _saved_anew(expression: str) -> str:
    return f"save {expression} with torch.save, where checkpoint = torch.load(FILE, weights_only=True)"


def _quick_gelu_name(files: ModelFiles) -> str:
    if files.quick_gelu:
        return ""
    named = f"{files.name}-quickgelu"
    known = named if named in open_clip.list_models() else "a -quickgelu model"
    return f". They also need QuickGELU: model {known} instead of {files.name}"


def _check_known_tag(path: Path, files: ModelFiles) -> None:
    """Refuse a file that is known to be a tag's, where it would be run with another activation."""
    sha256 = cache(lambda: file_sha256(path))
    for name, tag in open_clip.list_pretrained():
        config = open_clip.get_pretrained_cfg(name, tag)
        quick_gelu = bool(config.get("quick_gelu"))
        same_tower = name.removesuffix("-quickgelu") == files.name.removesuffix("-quickgelu")
        if same_tower and quick_gelu != files.quick_gelu and _is_file_of(path, config, sha256):
            raise ModelLoadError(
                f"{path.name} has the weights of the tag {tag}, which "
                f"{'needs' if quick_gelu else 'does without'} QuickGELU; {files.name} "
                f"{'has' if files.quick_gelu else 'lacks'} it. Use model {name} with pretrained={tag!r}"
            )


def _is_file_of(path: Path, tag: Mapping[str, Any], sha256: Callable[[], str]) -> bool:
    """Say whether a file lies in the cache as a tag's, or has the digest that the tag's address names."""
    repository = str(tag.get("hf_hub") or "").rpartition("/")[0]
    if repository and f"models--{repository.replace('/', '--')}" in path.absolute().parts:
        return True
    url = str(tag.get("url") or "")
    if "openaipublic" in url:
        return sha256() == url.split("/")[-2]
    return "mlfoundations" in url and sha256().startswith(Path(url).stem.rpartition("-")[2])


def _check_rounding(path: Path, tensors: _Tensors, files: ModelFiles) -> None:
    """Refuse weights that bear the marks of OpenAI's training under a name that computes plain GELU.

    OpenAI kept the weights of linear layers in half precision, and embeddings and norms in single.
    """
    linear, embedding = "visual.transformer.resblocks.0.mlp.c_fc.weight", "token_embedding.weight"
    if files.quick_gelu or not {linear, embedding} <= set(tensors.keys):
        return
    rounded = _is_rounded(tensors.read(embedding), torch.float16, torch.bfloat16)
    if _is_rounded(tensors.read(linear), torch.float16) and not rounded:
        raise ModelLoadError(
            f"{path.name}: its linear layers are rounded to half precision and its embeddings are not, as in "
            f"OpenAI's weights{_quick_gelu_name(files)}. Weights trained with GELU go into a folder with an "
            "open_clip_config.json that says so: local-dir:FOLDER"
        )


def _is_rounded(weights: Tensor, *dtypes: torch.dtype) -> bool:
    return any(bool((weights.float() == weights.to(dtype).float()).all()) for dtype in dtypes)
