"""Load a model of open_clip or transformers with its weights, or say in one line why that is not possible."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.error import URLError

import open_clip
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from torch import nn

from legrad.checks import fitted_transform
from legrad.errors import ModelLoadError, UnsupportedModelError
from legrad.families.open_clip_models import SUPPORTED, describe_visual
from legrad.families.support import built_support, visual_without_weights
from legrad.heatmaps import Normalisation
from legrad.images import Fit, ImageTransform, transform_from
from legrad.support import model_support
from legrad.tokens import Tokenizer
from legrad.weights.checkpoint import check_checkpoint, check_safetensors
from legrad.weights.hf_files import names_transformers
from legrad.weights.hub_files import file_sha256
from legrad.weights.model_files import (
    CONFIG_FILE,
    LocalWeights,
    ModelFiles,
    brings_weights,
    find_model_files,
    plain_name,
)

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "bf16", "pure_fp16", "pure_bf16", "auto")
# compute capability of the first GPUs that compute bf16 themselves; PyTorch emulates it on older ones
FIRST_WITH_BF16 = (8, 0)
TEXT_MODEL_FOLDER = "text_model"
MAX_CAUSE_LENGTH = 300


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its own tokenizer, and for a model of transformers its image processor."""

    model: nn.Module
    tokenizer: Tokenizer
    processor: Any = None


def load_model(
    name: str,
    pretrained: str | None,
    *,
    precision: str = "fp32",
    device: str | torch.device | None = None,
    expected_digest: str | None = None,
) -> LoadedModel:
    """Load a model of open_clip or transformers with exactly the weights that are named.

    All files are located before the weights are read: configuration, then tokenizer, then weights. The
    library only gets these files, so that it cannot fall back to random weights or download anything itself.

    Args:
        name: name of an open_clip model, `hf-hub:ORGANISATION/NAME` or `local-dir:FOLDER`; or
            `hf:ORGANISATION/NAME` or `hf:FOLDER` for a CLIP or SigLIP model of transformers.
        pretrained: tag or path of a checkpoint. None: random weights; required for an `hf-hub:`,
            `local-dir:` or `hf:` name, which includes its weights.
        precision: one of `PRECISIONS`; auto: see `device_precision`.
        device: None: CUDA if available, otherwise CPU.
        expected_digest: digest that `model_digest` returned when the job started; files with another digest
            are refused.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelLoadError: there is no such model, or its weights are missing, damaged, of another model or not
            finite.
        UnsupportedModelError: the structure of the vision tower is not covered; only its configuration was
            downloaded.
    """
    check_request(name, precision)
    if pretrained is None and not brings_weights(name):
        logger.warning("%s gets random weights, as pretrained is None: its maps mean nothing", name)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    resolved = device_precision(where) if precision == "auto" else precision
    with _explained_failure(name, pretrained), _quiet():
        if names_transformers(name):
            return _loaded_by_transformers(name, pretrained, resolved, where, expected_digest)
        files = _supported_files(name, pretrained)
        checkpoint = None if files.weights is None else files.weights.fetch()
        before = None if checkpoint is None else _state_of(checkpoint)
        if checkpoint is not None:
            check_checkpoint(checkpoint, files)
            if expected_digest is not None:
                _check_digest(files.digest(file_sha256(checkpoint)), expected_digest)
        loaded = _made(files, checkpoint, resolved, where)
        if checkpoint is not None and _state_of(checkpoint) != before:
            raise ModelLoadError(f"{checkpoint} changed while it was loaded")
        return loaded


def _loaded_by_transformers(
    name: str, pretrained: str | None, precision: str, device: torch.device, expected_digest: str | None
) -> LoadedModel:
    # Imported here, as transformers is optional.
    from legrad import hf_loading

    _refuse_pretrained(pretrained)
    files, _ = hf_loading.supported_files(name)
    weights = files.fetch_weights()
    before = {path: _state_of(path) for path in weights.values()}
    if expected_digest is not None:
        _check_digest(
            files.digest({key: file_sha256(path) for key, path in weights.items()}), expected_digest
        )
    model, tokenizer, processor = hf_loading.made(files, weights, precision, device)
    check_finite(model, precision)
    for path, state in before.items():
        if _state_of(path) != state:
            raise ModelLoadError(f"{path} changed while it was loaded")
    return LoadedModel(model, tokenizer, processor)


def _refuse_pretrained(pretrained: str | None) -> None:
    if pretrained is not None:
        raise ModelLoadError("the name brings its own weights, so pretrained would be ignored; omit it")


def device_precision(device: torch.device | str) -> Literal["bf16", "fp32"]:
    """Return the precision that `auto` stands for: bf16 on a GPU that computes it, otherwise fp32."""
    return "bf16" if torch.device(device).type == "cuda" and computes_bf16(device) else "fp32"


def computes_bf16(device: torch.device | str) -> bool:
    """Return whether a CUDA device computes bf16 itself, without emulation."""
    return torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16


def model_digest(name: str, pretrained: str | None) -> str:
    """Return a digest of all files that determine what a model computes, without loading the model.

    Weights on a hub are not downloaded if the hub or the local cache knows their SHA-256. Weights on this
    machine are read, and refused if they are recognisably not weights of this model.

    Args:
        name: see `load_model`.
        pretrained: see `load_model`.

    Returns:
        `sha256:` and hexadecimal digits.

    Raises:
        ModelLoadError, UnsupportedModelError: as `load_model` does.
    """
    check_request(name, "fp32")
    with _explained_failure(name, pretrained), _quiet():
        if names_transformers(name):
            from legrad import hf_loading

            _refuse_pretrained(pretrained)
            found, _ = hf_loading.supported_files(name)
            for weights in found.weights.values():
                if isinstance(weights, LocalWeights):
                    check_safetensors(weights.path)
            return found.digest(found.weights_sha256())
        files = _supported_files(name, pretrained)
        if files.weights is None:
            raise ModelLoadError("random weights have no digest; set pretrained to a tag or a checkpoint")
        if isinstance(files.weights, LocalWeights):
            check_checkpoint(files.weights.path, files)
        return files.digest(files.weights.sha256())


@dataclass(frozen=True)
class ModelFacts:
    """What is needed to make masks from a model's stored relevance, without the model.

    Attributes:
        transform: preprocessing of images.
        normalisation: when the family's maps are brought to [0, 1].
    """

    transform: ImageTransform
    normalisation: Normalisation


def model_facts(
    name: str,
    pretrained: str | None,
    *,
    image_size: int | tuple[int, int] | None = None,
    fit: Fit = "stretch",
) -> ModelFacts:
    """Return the facts of a model from its configuration; no weights are read.

    Args:
        name: see `load_model`.
        pretrained: see `load_model`.
        image_size: see `legrad.LeGrad`.
        fit: see `legrad.LeGrad`.

    Raises:
        ModelLoadError, UnsupportedModelError: as `load_model` does.
        InputError: an option does not fit the model.
    """
    with _explained_failure(name, pretrained), _quiet():
        if names_transformers(name):
            from legrad import hf_loading

            _, source = hf_loading.supported_files(name)
            tower, own_transform = source.describe(), source.transform()
        else:
            files = _supported_files(name, pretrained)
            visual: Any = visual_without_weights(files.model_config)
            tower = describe_visual(visual)
            own_transform = transform_from(visual.image_size, files.preprocess_config)
    return ModelFacts(fitted_transform(own_transform, tower, image_size, fit), tower.normalisation)


def check_files(name: str, pretrained: str | None) -> None:
    """Check that the files of a model can be found, and its structure is covered, without reading weights.

    Args:
        name: see `load_model`.
        pretrained: see `load_model`.

    Raises:
        ModelLoadError, UnsupportedModelError: as `load_model` does.
    """
    check_request(name, "fp32")
    with _explained_failure(name, pretrained), _quiet():
        if names_transformers(name):
            from legrad import hf_loading

            _refuse_pretrained(pretrained)
            hf_loading.supported_files(name)
        else:
            _supported_files(name, pretrained)


def check_request(name: str, precision: str) -> None:
    """Check name and precision as far as possible without reading files or asking a hub.

    Raises:
        ModelLoadError: unknown name or precision.
        UnsupportedModelError: the vision tower's structure is not covered.
    """
    if precision not in PRECISIONS:
        raise ModelLoadError(f"precision: expected one of {', '.join(PRECISIONS)}, received {precision!r}")
    if brings_weights(name):
        return
    if name.startswith(("timm:", "torchvision:")):
        raise ModelLoadError(f"{name} is a classifier; load it with LeGrad.from_classifier({name!r})")
    known = open_clip.list_models()
    if plain_name(name) not in known:
        nearest = ", ".join(get_close_matches(plain_name(name), known)) or "none is similar"
        raise ModelLoadError(f"open_clip has no model named {name!r}; nearest: {nearest}")
    reason = model_support(plain_name(name)).reason
    if reason is not None:
        raise UnsupportedModelError(f"{name}: {reason}. Supported: {SUPPORTED}")


def _supported_files(name: str, pretrained: str | None) -> ModelFiles:
    files = find_model_files(name, pretrained)
    reason = built_support(files.model_config).reason
    if reason is not None:
        raise UnsupportedModelError(f"{name}: {reason}. Supported: {SUPPORTED}")
    return files


def _check_digest(found: str, expected: str) -> None:
    if found != expected:
        raise ModelLoadError(
            f"this machine's files of the model have the digest {found}, and the job's have {expected}: its "
            "weights, configuration or tokenizer differ. Give all machines the same files, for example with "
            "HF_HOME on shared storage"
        )


def _made(files: ModelFiles, checkpoint: Path | None, precision: str, device: torch.device) -> LoadedModel:
    with TemporaryDirectory(prefix="legrad-") as folder:
        address = _laid_out(files, Path(folder))
        tokenizer = open_clip.get_tokenizer(address)
        model = open_clip.create_model(
            address, load_weights=False, pretrained_text=False, precision=precision, device=device
        ).eval()
    if checkpoint is not None:
        _fill_with_nan(model)
        open_clip.load_checkpoint(model, str(checkpoint), strict=True, weights_only=True, device="cpu")
        check_finite(model, precision)
    return LoadedModel(model, tokenizer)


def _laid_out(files: ModelFiles, folder: Path) -> str:
    """Put a model's small files in a folder, and return its `local-dir:` name for open_clip."""
    text = dict(files.model_config["text_cfg"])
    if files.text_model_config is not None:
        (folder / TEXT_MODEL_FOLDER).mkdir()
        (folder / TEXT_MODEL_FOLDER / "config.json").symlink_to(files.text_model_config.resolve())
        text["hf_model_name"] = str(folder / TEXT_MODEL_FOLDER)
    for path in files.tokenizer_files:
        (folder / path.name).symlink_to(path.resolve())
    config = {
        "model_cfg": {**files.model_config, "text_cfg": text},
        "preprocess_cfg": dict(files.preprocess_config),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return f"local-dir:{folder}"


@torch.no_grad()
def _fill_with_nan(model: nn.Module) -> None:
    """Fill all weights with NaN, to recognise those that a checkpoint does not contain."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def check_finite(model: nn.Module, precision: str) -> None:
    """Raise a ModelLoadError if weights of a model are NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelLoadError(
                f"its weights are not finite, or the checkpoint lacks some: {name} holds NaN or infinity at "
                f"precision {precision}"
            )


def _state_of(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _explained_failure(name: str, pretrained: str | None) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, UnsupportedModelError):
        raise
    except Exception as error:  # open_clip, torch and the readers of checkpoints share no base class
        raise ModelLoadError(load_failure(name, pretrained, error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress log messages of open_clip and the hub's client; failures are reported by the error."""
    root, hub = logging.getLogger(), logging.getLogger("huggingface_hub")
    earlier_level = hub.level
    hub.setLevel(logging.ERROR)
    root.addFilter(_not_by_open_clip)  # open_clip logs to the root logger
    try:
        yield
    finally:
        hub.setLevel(earlier_level)
        root.removeFilter(_not_by_open_clip)


def _not_by_open_clip(record: logging.LogRecord) -> bool:
    return Path(record.pathname).parent.name != "open_clip"


def load_failure(name: str, pretrained: str | None, error: Exception) -> str:
    """Return one line that says why a model could not be made, and what to do.

    Args:
        name: the requested model.
        pretrained: its tag or checkpoint.
        error: the exception of open_clip; its causes are considered too.
    """
    asked = f"open_clip could not make {name!r} with pretrained={pretrained!r}"
    if names_transformers(name):
        asked = f"transformers could not make {name!r}"
    cause = " ".join(str(error).split()) or type(error).__name__
    if find_spec("transformers") is None and (isinstance(error, ImportError) or "transformers" in cause):
        part = "" if names_transformers(name) else "the text tower or tokenizer of "
        return f"{name} needs {part}Hugging Face transformers: pip install 'legrad-pipeline[hf]'"
    tag = pretrained or ("null" if ":" in name else "TAG")
    fetch = f"legrad models --fetch {name} {tag}"
    advice = failure_advice(error, fetch)
    if isinstance(error, ModelLoadError):  # its message already says what to do
        return f"{asked}: {'; '.join(filter(None, (cause, advice)))}"
    return f"{asked}: {advice or shortened(cause)}"


def failure_advice(error: Exception, fetch: str) -> str | None:
    """Return what to do about an error of a hub or a reader of checkpoints, or None if it is not known.

    Args:
        error: the exception; its causes are considered too.
        fetch: command that downloads the files ahead of time.
    """
    return next((advice for link in _chain(error) if (advice := _advice(link, fetch))), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes; open_clip wraps exceptions of its hubs."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _advice(error: BaseException, fetch: str) -> str | None:
    if isinstance(error, UnpicklingError):  # its own message advises running the code
        return "the checkpoint is damaged, or holds more than weights; code in it is never run"
    if isinstance(error, GatedRepoError):
        return (
            "its files on the Hugging Face hub require accepting terms of use: accept them, then set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "the Hugging Face hub has no such repository, or it is private: set HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        return (
            "its files are not in this machine's cache, and the Hugging Face hub does not give them now: "
            f"{shortened(str(error.__cause__))}; try again later, or run `{fetch}` ahead of the job"
        )
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | URLError):
        return (
            "its files are not in this machine's cache and the Hugging Face hub cannot be reached; run "
            f"`{fetch}` where it can, with HF_HOME on storage that this machine sees"
        )
    if isinstance(error, EntryNotFoundError):
        return f"its repository on the Hugging Face hub lacks a file: {shortened(str(error))}"
    if isinstance(error, HfHubHTTPError):
        return f"the Hugging Face hub refused a file: {shortened(str(error))}"
    return None


def shortened(cause: str) -> str:
    """Return a message in one line, cut between words."""
    words = " ".join(cause.split())
    if len(words) <= MAX_CAUSE_LENGTH:
        return words
    return words[:MAX_CAUSE_LENGTH].rsplit(" ", 1)[0] + " ..."
