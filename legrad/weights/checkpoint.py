"""Check the file of a checkpoint before a model is made, with one-line errors that name the way out."""

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
# How safetensors and torch begin the names of integer dtypes, quantised ones and bool too.
INTEGERS = ("I", "U", "BOOL", "torch.int", "torch.uint", "torch.q", "torch.bool")
LFS_POINTER, ZIP = b"version https://git-lfs", b"PK\x03\x04"


def check_checkpoint(path: Path, files: ModelFiles) -> None:
    """Refuse a file that is no checkpoint, has an unsupported format, or was trained with another activation.

    Only few weights are read; the others are checked after they are loaded into a model.

    Args:
        path: the checkpoint.
        files: the other files of the model.

    Raises:
        ModelLoadError: the file is refused.
        OSError: it cannot be read.
    """
    _check_first_bytes(path)
    if path.suffix in NUMPY_SUFFIXES:  # big_vision's: read by open_clip, piece by piece
        if "timm_model_name" not in files.model_config["vision_cfg"]:
            raise ModelLoadError(
                f"{path.name} is in the format of big_vision, which open_clip reads for SigLIP models only; "
                f"{files.name} takes weights saved with torch.save or safetensors"
            )
        return
    with _opened(path) as tensors:
        _check_keys(path, tensors, files)
        _check_dtypes(path, tensors)
        if files.weights_stand_alone:
            _check_known_tag(path, files)
            _check_rounding(path, tensors, files)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint of torch.save or safetensors, by name; code in it is never run.

    Raises:
        ModelLoadError: the file is damaged, holds more than weights or no floating-point weights.
        OSError: it cannot be read.
    """
    _check_first_bytes(path)
    with _opened(path) as tensors:
        _check_dtypes(path, tensors)
        return {key: tensors.read(key) for key in tensors.keys}


def check_safetensors(path: Path) -> None:
    """Refuse a file that is not a sound safetensors file of weights in a dtype that can be computed with.

    Raises:
        ModelLoadError: the file is refused.
        OSError: it cannot be read.
    """
    _check_first_bytes(path)
    with _opened(path) as tensors:
        _check_dtypes(path, tensors)


@dataclass(frozen=True)
class _Tensors:
    """The names of a checkpoint's tensors, and functions that read one of them, or the name of its dtype."""

    keys: list[str]
    read: Callable[[str], Tensor]
    dtype_of: Callable[[str], str]


@contextmanager
def _opened(path: Path) -> Iterator[_Tensors]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                yield _Tensors(
                    list(file.keys()), file.get_tensor, lambda key: str(file.get_slice(key).get_dtype())
                )
        except SafetensorError as error:
            raise ModelLoadError(
                f"{path.name} is no sound safetensors file ({error}); fetch it again"
            ) from error
        return
    if _is_torchscript(path):
        raise ModelLoadError(
            f"{path.name} is a TorchScript archive, which contains code and is never run. For OpenAI's "
            "weights use the tag openai; of a file that you trust, save torch.jit.load(FILE).state_dict()"
        )
    state = _state_dict(path, _unpickled(path))
    yield _Tensors(list(state), state.__getitem__, lambda key: str(getattr(state[key], "dtype", None)))


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, "cpu", weights_only=True, mmap=_is_zip(path))
    except UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise ModelLoadError(
                f"{path.name} is damaged, or no checkpoint; code in it is never run"
            ) from None
        raise ModelLoadError(
            f"{path.name} holds {named[1]} beside its weights, and code in it is never run: if you trust "
            "it, load it with weights_only=False and save only its state_dict"
        ) from None
    except (EOFError, RuntimeError, ValueError, KeyError, RecursionError) as error:
        raise ModelLoadError(f"{path.name} is damaged or truncated: download it again") from error


def _check_first_bytes(path: Path) -> None:
    with path.open("rb") as file:
        first = file.read(64)
    if not first:
        raise ModelLoadError(f"{path.name} is empty: download it again")
    if first.startswith(LFS_POINTER):
        raise ModelLoadError(
            f"{path.name} is a pointer of Git LFS, not weights: run `git lfs pull` in its folder"
        )
    if first.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise ModelLoadError(f"{path.name} is a web page, not weights: download the file itself")
    if first[8:9] == b"{" and path.suffix != ".safetensors":
        raise ModelLoadError(f"{path.name} has the content of a safetensors file: rename it to *.safetensors")


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
    """Return the tensors by the names that open_clip's reader would give them."""
    if isinstance(checkpoint, Mapping) and "state_dict" in checkpoint:
        checkpoint = checkpoint["state_dict"]
    if not isinstance(checkpoint, Mapping):
        raise ModelLoadError(
            f"{path.name} holds {type(checkpoint).__name__}; expected weights by name, as "
            "model.state_dict() returns"
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
            f"{path.name} is in OpenAI's own format; use the tag openai, or remove the keys "
            f"{', '.join(sorted(OPENAI_KEYS))} from it{_quick_gelu_name(files)}"
        )
    firsts = {key.partition(".")[0] for key in tensors.keys}
    prefix = next(iter(firsts))
    # A checkpoint of a single tower is reported later, by the keys that open_clip does not find in it.
    if len(firsts) == 1 and prefix not in TOWER_NAMES and all("." in key for key in tensors.keys):
        renamed = f"{{key.removeprefix('{prefix}.'): value for key, value in checkpoint.items()}}"
        raise ModelLoadError(
            f"{path.name}: every name of a weight begins with '{prefix}.', which a wrapper has added: "
            f"{_saved_anew(renamed)}"
        )


def _check_dtypes(path: Path, tensors: _Tensors) -> None:
    """Refuse quantised weights: open_clip would take their integers as the weights themselves."""
    for key in tensors.keys:
        if key.endswith(("weight", "bias")) and (kind := tensors.dtype_of(key)).startswith(INTEGERS):
            raise ModelLoadError(
                f"{path.name}: {key} holds integers ({kind}), not floating-point weights: the checkpoint is "
                "quantised; save the weights of the model before it was quantised"
            )


def _saved_anew(expression: str) -> str:
    return f"save {expression} with torch.save, for checkpoint = torch.load(FILE, weights_only=True)"


def _quick_gelu_name(files: ModelFiles) -> str:
    if files.quick_gelu:
        return ""
    named = f"{files.name}-quickgelu"
    known = f"the model {named}" if named in open_clip.list_models() else "a -quickgelu model"
    return f". They also need QuickGELU: use {known} instead of {files.name}"


def _check_known_tag(path: Path, files: ModelFiles) -> None:
    """Refuse a file that is known to belong to a tag with another activation than the model's."""
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
    """Return whether a file is in the cache of a tag's repository, or has the digest in the tag's address."""
    repository = str(tag.get("hf_hub") or "").rpartition("/")[0]
    if repository and f"models--{repository.replace('/', '--')}" in path.absolute().parts:
        return True
    url = str(tag.get("url") or "")
    if "openaipublic" in url:
        return sha256() == url.split("/")[-2]
    return "mlfoundations" in url and sha256().startswith(Path(url).stem.rpartition("-")[2])


def _check_rounding(path: Path, tensors: _Tensors, files: ModelFiles) -> None:
    """Refuse weights that seem to be OpenAI's, trained with QuickGELU, for a model with plain GELU.

    OpenAI stored weights of linear layers in half precision, and embeddings and norms in single precision.
    """
    linear, embedding = "visual.transformer.resblocks.0.mlp.c_fc.weight", "token_embedding.weight"
    if files.quick_gelu or not {linear, embedding} <= set(tensors.keys):
        return
    rounded = _is_rounded(tensors.read(embedding), torch.float16, torch.bfloat16)
    if _is_rounded(tensors.read(linear), torch.float16) and not rounded:
        raise ModelLoadError(
            f"{path.name}: its linear layers are rounded to half precision and its embeddings are not, as in "
            f"OpenAI's weights{_quick_gelu_name(files)}. If the weights were trained with GELU, put "
            "them in a folder with an open_clip_config.json that says so, and load it as local-dir:FOLDER"
        )


def _is_rounded(weights: Tensor, *dtypes: torch.dtype) -> bool:
    # NaN, which no rounding changes, is reported later by the name of its weight.
    exact = weights.float()
    return any(bool(((exact == exact.to(dtype).float()) | exact.isnan()).all()) for dtype in dtypes)
