"""Segmenters of the SAM family, by the `transformers` library (extra `sam`).

Source: Kirillov et al., "Segment Anything" (arXiv:2304.02643); Ravi et al., "SAM 2" (arXiv:2408.00714).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from legrad.errors import ModelLoadError
from legrad.masks.promptable import MaskCandidates, SegmenterPrompt
from legrad.weights.hub_files import file_sha256, hub_folder

CONFIG_FILE, WEIGHTS_PATTERN = "config.json", "*.safetensors"
SMALL_FILES = (
    CONFIG_FILE,
    "preprocessor_config.json",
    "processor_config.json",
    f"{WEIGHTS_PATTERN}.index.json",
)
PROMPTS_AT_ONCE = 32
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SamSegmenter:
    """A model of the SAM family as a `PromptableSegmenter`.

    Args:
        model: a SamModel or Sam2Model of transformers, on its device, in fp32.
        processor: its processor.
        precision: fp32, bf16 or fp16: of the image encoder. Coordinates in half precision would be off by
            pixels, so the decoder always computes in fp32.
    """

    def __init__(self, model: Any, processor: Any, *, precision: str = "fp32") -> None:
        self._model = model
        self._processor = processor
        self._precision = precision

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        expected_digest: str | None = None,
    ) -> SamSegmenter:
        """Load a segmenter; only safetensors are read, and no code of a repository is run.

        Args:
            name: a local folder, or a repository on the Hugging Face hub such as facebook/sam-vit-base.
            revision: commit, tag or branch of the repository; None: its main branch.
            device: where it computes.
            precision: see the class.
            expected_digest: digest that `segmenter_digest` returned; files with another one are refused.

        Raises:
            ModelLoadError: transformers is not installed, or the files are missing, damaged, of another
                family, not safetensors, or not those that are expected.
        """
        with _explained(name):
            folder = segmenter_folder(name, revision)
            model_class, processor_class = _classes(folder)
            if expected_digest is not None and (found := _digest(folder)) != expected_digest:
                raise ModelLoadError(
                    f"this machine's files have the digest {found}, and the job's have {expected_digest}: "
                    "give all machines the same files"
                )
            with _without_bars():
                model, loading = model_class.from_pretrained(
                    folder,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
            # transformers would fill them at random
            if absent := sorted({*loading["missing_keys"], *map(str, loading["mismatched_keys"])}):
                raise ModelLoadError(f"its files lack {len(absent)} of its weights, such as {absent[0]}")
            processor = processor_class.from_pretrained(folder, local_files_only=True)
        return cls(model.eval().to(device), processor, precision=precision)

    def segment(
        self, image: UInt8[np.ndarray, "height width 3"], prompts: Sequence[SegmenterPrompt]
    ) -> list[MaskCandidates]:
        """Return the candidates of each prompt; the image is encoded once, see `PromptableSegmenter`."""
        if not prompts:
            return []
        with torch.inference_mode():
            pixels = self._processor(images=image, return_tensors="pt")["pixel_values"]
            with self._autocast():
                encoded = self._model.get_image_embeddings(pixels.to(self._model.device))
            embeddings = _in_fp32(encoded)
            found: dict[int, MaskCandidates] = {}
            for numbers in _batches([len(prompt.points_xy) for prompt in prompts]):
                candidates = self._decode(image, embeddings, [prompts[number] for number in numbers])
                found |= dict(zip(numbers, candidates, strict=True))
        return [found[number] for number in range(len(prompts))]

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self._precision)
        return nullcontext() if dtype is None else torch.autocast(self._model.device.type, dtype)

    def _decode(
        self,
        image: UInt8[np.ndarray, "height width 3"],
        embeddings: Any,
        prompts: Sequence[SegmenterPrompt],
    ) -> list[MaskCandidates]:
        inputs = self._processor(
            images=image,
            input_points=[[prompt.points_xy.tolist() for prompt in prompts]],
            input_labels=[[prompt.is_object.astype(int).tolist() for prompt in prompts]],
            input_boxes=[[prompt.box_xyxy.tolist() for prompt in prompts]],
            return_tensors="pt",
        )
        device = self._model.device
        output = self._model(
            image_embeddings=embeddings,
            input_points=inputs["input_points"].to(device, torch.float32),
            input_labels=inputs["input_labels"].to(device),
            input_boxes=inputs["input_boxes"].to(device, torch.float32),
            multimask_output=True,
        )
        # SAM pads the image to a square, and SAM 2 does not
        sizes = [inputs[key] for key in ("original_sizes", "reshaped_input_sizes") if key in inputs]
        (masks,) = self._processor.post_process_masks(output.pred_masks, *sizes)
        scores = output.iou_scores[0].float().cpu().numpy()
        return [
            MaskCandidates(mask.cpu().numpy().astype(bool), score)
            for mask, score in zip(masks, scores, strict=True)
        ]


def segmenter_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder with the files of a segmenter: a local one, or the cache of a repository.

    Raises:
        OSError: the repository or its files cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelLoadError("there is no such folder, and it is no name of a repository (ORGANISATION/NAME)")
    return hub_folder(name, [*SMALL_FILES, WEIGHTS_PATTERN], revision)


def segmenter_digest(name: str, revision: str | None = None) -> str:
    """Return a digest of all files that determine what a segmenter computes.

    Args:
        name: see `SamSegmenter.from_pretrained`.
        revision: see there.

    Returns:
        `sha256:` and hexadecimal digits.

    Raises:
        ModelLoadError: as `SamSegmenter.from_pretrained` does, without reading the weights.
    """
    with _explained(name):
        folder = segmenter_folder(name, revision)
        _classes(folder)
        return _digest(folder)


def _digest(folder: Path) -> str:
    paths = sorted({path for pattern in (*SMALL_FILES, WEIGHTS_PATTERN) for path in folder.glob(pattern)})
    lines = [f"{path.name} {file_sha256(path)}\n" for path in paths]
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def _classes(folder: Path) -> tuple[Any, Any]:
    """Return the classes of model and processor that a folder's configuration names; check its files."""
    try:
        import transformers
    except ImportError as error:
        raise ModelLoadError(
            "it needs transformers, which is not installed: pip install 'legrad-pipeline[sam]'"
        ) from error
    if not (folder / CONFIG_FILE).is_file():
        raise ModelLoadError(f"expected a folder with {CONFIG_FILE}, found none in {folder}")
    if not any(folder.glob(WEIGHTS_PATTERN)):
        others = sorted(path.name for path in folder.glob("*.bin"))
        kind = f"only {others[0]}, whose format can hold code, which is never run" if others else "no weights"
        raise ModelLoadError(f"expected {WEIGHTS_PATTERN}, found {kind}")
    families = {
        "sam": (transformers.SamModel, transformers.SamProcessor),
        "sam2": (transformers.Sam2Model, transformers.Sam2Processor),
    }
    config, _ = transformers.PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    family = config.get("model_type")
    if family not in families:
        raise ModelLoadError(f"model_type: expected one of {', '.join(families)}, found {family!r:.80}")
    return families[family]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except ModelLoadError as error:
        raise ModelLoadError(f"segmenter {name}: {error}") from error.__cause__
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers, safetensors and the hub share no base class
        cause = " ".join(str(error).split())[:400] or type(error).__name__
        raise ModelLoadError(f"segmenter {name}: {cause}") from error


def _in_fp32(embeddings: Any) -> Any:
    """Return the embeddings of an image, one tensor or several, in fp32."""
    return embeddings.float() if isinstance(embeddings, Tensor) else [each.float() for each in embeddings]


def _batches(point_counts: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of prompts with equally many points, a few at a time.

    Padding would do for all of them, but it is part of the attention, so that a prompt's masks would depend
    on the others.
    """
    for count in sorted(set(point_counts)):
        numbers = [number for number, points in enumerate(point_counts) if points == count]
        for first in range(0, len(numbers), PROMPTS_AT_ONCE):
            yield numbers[first : first + PROMPTS_AT_ONCE]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide the progress bars of transformers: many workers load at once."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
