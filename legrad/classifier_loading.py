"""Load a classifier of timm or torchvision with its weights and the names of its classes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.error import URLError

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from legrad.arguments import as_path
from legrad.errors import LeGradError, ModelLoadError, UnsupportedModelError
from legrad.families import describe_tower
from legrad.images import ImageTransform
from legrad.loading import check_finite, device_precision, failure_advice, shortened
from legrad.weights.checkpoint import read_state_dict

TIMM, TORCHVISION = "timm:", "torchvision:"
CLASSIFIER_PREFIXES = (TIMM, TORCHVISION)
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The last layer of a classifier, whose rows are its classes.
_LAST_LAYERS = ("head.weight", "heads.head.weight")


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier in evaluation mode.

    Attributes:
        model: of timm or torchvision.
        class_names: name of each class, or None if the weights do not say which data set they are of.
        preprocessing: mean, standard deviation and resampling filter that the weights were trained for, by
            their names in `ImageTransform`; empty where the model holds them itself.
    """

    model: nn.Module
    class_names: tuple[str, ...] | None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def transform_like(self, own: ImageTransform) -> ImageTransform:
        """Return the preprocessing that the weights were trained for, given the model's own."""
        return replace(own, **self.preprocessing)


def load_classifier(
    name: str,
    checkpoint: str | None = None,
    *,
    precision: str = "fp32",
    device: str | torch.device | None = None,
) -> LoadedClassifier:
    """Load a classifier with exactly the weights that are named.

    Args:
        name: `timm:NAME` or `timm:NAME.TAG`, `torchvision:NAME` or `torchvision:NAME.WEIGHTS`, such as
            `timm:vit_base_patch16_224.augreg_in1k` or `torchvision:vit_b_16.IMAGENET1K_V1`; without a tag,
            the library's default weights.
        checkpoint: path of a file with weights of this model and any number of classes, saved by torch.save
            or safetensors; no code in it is run. None: the named weights, downloaded if they are not cached.
        precision: of the model: fp32, fp16, bf16, or auto, which is bf16 on a GPU that computes it, otherwise
            fp32.
        device: None: CUDA if available, otherwise CPU.

    Raises:
        ModelLoadError: there is no such model, or its weights are missing, damaged, of another model or not
            finite.
        UnsupportedModelError: the structure of the model is not covered; this is found before weights are
            downloaded.
    """
    if not name.startswith(CLASSIFIER_PREFIXES):
        raise ModelLoadError(f"name: expected {TIMM}NAME or {TORCHVISION}NAME, received {name!r}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    resolved = device_precision(where) if precision == "auto" else precision
    if resolved not in _DTYPES:
        raise ModelLoadError(f"precision: expected {', '.join(_DTYPES)} or auto, received {precision!r}")
    if checkpoint is not None and not as_path(checkpoint, "checkpoint").is_file():
        raise ModelLoadError(
            f"checkpoint: there is no file {checkpoint}; weights of a tag are named "
            f"{name.partition('.')[0]}.TAG"
        )
    load = _load_timm if name.startswith(TIMM) else _load_torchvision
    with _explained_failure(name):
        loaded = load(name.partition(":")[2], None if checkpoint is None else Path(checkpoint))
        loaded.model.to(where, _DTYPES[resolved]).eval()
        check_finite(loaded.model, resolved)
    return loaded


def _load_timm(name: str, checkpoint: Path | None) -> LoadedClassifier:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        nearest = ", ".join(get_close_matches(architecture, timm.list_models())) or "none is similar"
        raise ModelLoadError(f"timm has no model named {architecture!r}; nearest: {nearest}")
    tags = timm.list_models(f"{architecture}.*", pretrained=True)
    if "." in name and name not in tags:
        raise ModelLoadError(f"timm has no weights named {name!r}; it has {', '.join(tags) or 'none'}")
    if checkpoint is not None:
        state = read_state_dict(checkpoint)
        classes = _classes_in(checkpoint, state)
        _check_covered(lambda: timm.create_model(architecture, num_classes=classes))
        model = timm.create_model(architecture, num_classes=classes)
        _fill(model, state, checkpoint)
        return LoadedClassifier(model, None)
    config = timm.models.get_pretrained_cfg(name)
    if not tags or config is None:
        raise ModelLoadError(f"timm has no weights of {architecture}; give a checkpoint")
    if not config.num_classes:
        raise ModelLoadError(
            f"the weights {architecture}.{config.tag} are of a model without a classifier. Give a checkpoint "
            f"with one, or other weights: {', '.join(tags)}"
        )
    _check_covered(lambda: timm.create_model(name))
    return LoadedClassifier(timm.create_model(name, pretrained=True), _timm_class_names(config))


def _timm_class_names(config: Any) -> tuple[str, ...] | None:
    """Return the names of the classes that a configuration of weights names or, by their number, implies."""
    if config.label_names is not None:
        described = config.label_descriptions or {}
        return tuple(described.get(label, label) for label in config.label_names)
    subset = infer_imagenet_subset({"num_classes": config.num_classes})
    if subset is None:
        return None
    return tuple(ImageNetInfo(subset).label_descriptions())


def _load_torchvision(name: str, checkpoint: Path | None) -> LoadedClassifier:
    from torchvision import models

    architecture, _, tag = name.partition(".")
    known = models.list_models(models)
    if architecture not in known:
        nearest = ", ".join(get_close_matches(architecture, known)) or "none is similar"
        raise ModelLoadError(f"torchvision has no model named {architecture!r}; nearest: {nearest}")
    kinds = models.get_model_weights(architecture)
    if tag and tag not in kinds.__members__:
        raise ModelLoadError(
            f"torchvision has no weights {tag!r} of {architecture}; it has {', '.join(kinds.__members__)}"
        )
    _check_covered(lambda: models.get_model(architecture))
    if checkpoint is not None:
        state = read_state_dict(checkpoint)
        model = models.get_model(architecture, num_classes=_classes_in(checkpoint, state))
        _fill(model, state, checkpoint)
        return LoadedClassifier(model, None)
    weights = kinds[tag] if tag else kinds.DEFAULT
    preset = weights.transforms()
    preprocessing = {
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
    }
    model = models.get_model(architecture, weights=weights)
    return LoadedClassifier(model, tuple(weights.meta["categories"]), preprocessing)


def _check_covered(make: Any) -> None:
    """Raise an UnsupportedModelError if a model is not covered; it is made without memory for weights."""
    with torch.device("meta"):
        model = make()
    describe_tower(model)


def _classes_in(checkpoint: Path, state: Mapping[str, Tensor]) -> int:
    last = next((state[key] for key in _LAST_LAYERS if key in state), None)
    if last is None:
        raise ModelLoadError(
            f"{checkpoint.name} holds no classifier: expected a weight named {' or '.join(_LAST_LAYERS)}"
        )
    return len(last)


def _fill(model: nn.Module, state: Mapping[str, Tensor], checkpoint: Path) -> None:
    expected = {key: list(value.shape) for key, value in model.state_dict().items()}
    found = {key: list(value.shape) for key, value in state.items()}
    for what, keys in (
        ("lacks", expected.keys() - found.keys()),
        ("holds beyond the model", found.keys() - expected.keys()),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3])
            raise ModelLoadError(f"{checkpoint.name} {what} {len(keys)} weights, such as {shown}")
    for key, shape in expected.items():
        if found[key] != shape:
            raise ModelLoadError(
                f"{checkpoint.name}: {key} has the shape {found[key]}; the model's has {shape}: the weights "
                "are of another model, or of another input size"
            )
    model.load_state_dict(dict(state), strict=True)


@contextmanager
def _explained_failure(name: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, UnsupportedModelError):
        raise
    except Exception as error:  # timm, torchvision and the readers of checkpoints share no base class
        library, _, weights = name.partition(":")
        asked = f"{library} could not make {weights!r}"
        if isinstance(error, LeGradError):
            raise ModelLoadError(f"{asked}: {error}") from error
        if library == "torchvision" and isinstance(error, URLError):
            advice: str | None = (
                "its weights are not in this machine's cache and cannot be downloaded; run this where they "
                "can, with TORCH_HOME on storage that this machine sees"
            )
        else:
            advice = failure_advice(error, f"hf download timm/{weights}")
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ModelLoadError(f"{asked}: {advice or shortened(cause)}") from error
