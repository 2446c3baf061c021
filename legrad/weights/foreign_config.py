"""Read configurations of untrusted models within limits, and refuse those that name code to run."""

import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
from open_clip.hf_configs import arch_dict

from legrad.errors import ModelLoadError

MAX_CONFIG_BYTES = 16 << 20
# several times those of the largest models; each layer is built before any weight is compared
MAX_LAYERS = 1000
NAMES_OF_DEPTHS = frozenset({"layers", "num_hidden_layers", "num_layers", "n_layer", "depth"})
# Refused with any value: each makes transformers import, or download and import, code that is named there.
NAMES_OF_CODE = frozenset(
    {
        "trust_remote_code",
        "auto_map",
        "custom_generate",
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
        "_experts_implementation",
        "use_kernels",
        "kernel_config",
        "quantization_config",
    }
)
TOKENIZER_OPTIONS = frozenset({"clean", "strip_sep_token", "language"})
# Names without "Fast" of classes that only read vocabularies, and run nothing that a configuration names.
# fmt: off
TOKENIZER_CLASSES = frozenset({
    "Albert", "Bart", "Barthez", "Bert", "BigBird", "Bloom", "Camembert", "CLIP", "Cohere", "Deberta",
    "DebertaV2", "DistilBert", "Electra", "FNet", "Gemma", "GPT2", "GPTNeoX", "Llama", "Longformer",
    "M2M100", "MBart", "MBart50", "MPNet", "MT5", "Nllb", "PreTrained", "Qwen2", "RemBert", "Roberta",
    "Siglip", "Siglip2", "T5", "XGLM", "XLMRoberta", "XLNet",
})
# fmt: on
# Image processors, by the type of a model of transformers, without "Fast" and "Pil".
IMAGE_PROCESSORS = {
    "clip": frozenset({"CLIPImageProcessor", "CLIPFeatureExtractor"}),
    "siglip": frozenset({"SiglipImageProcessor"}),
    "siglip2": frozenset({"Siglip2ImageProcessor"}),
}
# If no class is named, transformers chooses one by the model type.
TOKENIZER_MODEL_TYPES = frozenset(arch_dict) | {"clip", "siglip", "siglip2", "t5", "gemma", "gpt2", "llama"}


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelLoadError: the file is missing, too large, or holds something else.
    """
    try:
        found = path.stat()
        # a pipe would block, and a device never end
        if not stat.S_ISREG(found.st_mode):
            raise ModelLoadError(f"{path} is no regular file")
        if found.st_size > MAX_CONFIG_BYTES:
            raise ModelLoadError(f"{path} has {found.st_size:,} bytes; the limit is {MAX_CONFIG_BYTES:,}")
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelLoadError(f"{path} holds {type(document).__name__}; expected a JSON object")
    return document


def refuse_code_in_model(config: Mapping[str, Any], where: str) -> None:
    """Refuse a model configuration of open_clip that runs code, downloads what it names, or is never built.

    Args:
        config: contents of `model_cfg`.
        where: file or name, for the error message.

    Raises:
        ModelLoadError: it names code, a tokenizer option that is not in the list of safe ones, a vision
            tower that is not part of timm, or more than MAX_LAYERS layers.
    """
    _refuse_names_of_code(config, where)
    _refuse_depth(config, where)
    for section in ("vision_cfg", "text_cfg"):
        if not isinstance(config.get(section), Mapping):
            raise ModelLoadError(f"{where} has no {section}; expected a configuration of open_clip")
    options = config["text_cfg"].get("tokenizer_kwargs") or {}
    unknown = set(options) - TOKENIZER_OPTIONS
    if unknown:
        raise ModelLoadError(
            f"{where}: text_cfg.tokenizer_kwargs has {_listed(unknown)}, which may run code or depend on "
            f"random numbers; only {_listed(TOKENIZER_OPTIONS)} are accepted"
        )
    timm_name = config["vision_cfg"].get("timm_model_name")
    if timm_name is not None and not timm.is_model(str(timm_name)):
        raise ModelLoadError(
            f"{where}: vision_cfg.timm_model_name is {timm_name!r}, which is not a model of timm"
        )


def refuse_code_in_text_model(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration of a Hugging Face text model that names code or an unknown architecture.

    Raises:
        ModelLoadError: it names code, or open_clip does not support its `model_type`.
    """
    _refuse_names_of_code(config, where)
    _refuse_depth(config, where)
    if config.get("model_type") not in arch_dict:
        raise ModelLoadError(
            f"{where}: model_type is {config.get('model_type')!r}; open_clip supports "
            f"{_listed(set(arch_dict))}"
        )


def refuse_code_in_transformers_model(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration of a model of transformers that names code or another kind of model.

    Raises:
        ModelLoadError: it does.
    """
    _refuse_names_of_code(config, where)
    _refuse_depth(config, where)
    if config.get("model_type") not in IMAGE_PROCESSORS:
        raise ModelLoadError(
            f"{where}: model_type is {config.get('model_type')!r:.80}; expected one of "
            f"{_listed(set(IMAGE_PROCESSORS))}, of CLIPModel, SiglipModel and Siglip2Model"
        )


def refuse_code_in_processor(config: Mapping[str, Any], where: str, model_type: str) -> None:
    """Refuse the configuration of a processor that names code, or an image processor of another model.

    Args:
        config: contents of `preprocessor_config.json` or `processor_config.json`.
        where: file, for the error message.
        model_type: of the model.

    Raises:
        ModelLoadError: it does.
    """
    _refuse_names_of_code(config, where)
    images = config.get("image_processor")
    settings = images if isinstance(images, Mapping) else config
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    expected = IMAGE_PROCESSORS[model_type]
    if named is not None and str(named).removesuffix("Fast").removesuffix("Pil") not in expected:
        raise ModelLoadError(
            f"{where}: the image processor is {named!r:.80}; for model_type {model_type} expected "
            f"{_listed(expected)}"
        )


def refuse_code_in_tokenizer(folder: Path) -> None:
    """Refuse the files of a Hugging Face tokenizer that name code or a class not known to be safe.

    Raises:
        ModelLoadError: they do.
    """
    paths = [folder / name for name in ("tokenizer_config.json", "config.json")]
    configs = {path: read_config(path) for path in paths if path.exists()}
    for path, config in configs.items():
        _refuse_names_of_code(config, str(path))
    classes = [config["tokenizer_class"] for config in configs.values() if config.get("tokenizer_class")]
    types = [config["model_type"] for config in configs.values() if config.get("model_type")]
    unlisted = [found for found in classes if _plain(str(found)) not in TOKENIZER_CLASSES]
    if not classes:
        unlisted = [found for found in types if found not in TOKENIZER_MODEL_TYPES]
    if unlisted:
        raise ModelLoadError(
            f"the tokenizer in {folder} has the class or type {unlisted[0]!r}, which is not on the list of "
            "those that run no code; save it as a PreTrainedTokenizerFast (tokenizer.json)"
        )


def _plain(tokenizer_class: str) -> str:
    if tokenizer_class == "TokenizersBackend":  # name of PreTrainedTokenizerFast in transformers 5
        return "PreTrained"
    return tokenizer_class.removesuffix("Fast").removesuffix("Tokenizer")


def _refuse_names_of_code(config: Mapping[str, Any], where: str) -> None:
    try:
        items = list(_items(config))
    except RecursionError:
        raise ModelLoadError(f"{where} is nested too deeply") from None
    found = next((key for key, _ in items if key in NAMES_OF_CODE), None)
    if found is not None:
        raise ModelLoadError(
            f"{where} has the key {found}: code that comes with a model is never run. If the model works "
            "without it, remove the key in a copy, and load that as local-dir:FOLDER (hf:FOLDER)"
        )


def _refuse_depth(config: Mapping[str, Any], where: str) -> None:
    for key, value in _items(config):
        depths = value if isinstance(value, list) else [value]
        if key in NAMES_OF_DEPTHS and any(
            isinstance(depth, int | float) and depth > MAX_LAYERS for depth in depths
        ):
            raise ModelLoadError(f"{where}: {key} is {value!r:.40}; the limit is {MAX_LAYERS:,}")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, nested in value.items():
            yield key, nested
            yield from _items(nested)
    elif isinstance(value, list):
        for nested in value:
            yield from _items(nested)


def _listed(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names))
