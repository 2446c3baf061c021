"""Explain many images, in batches of bounded memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from legrad import __version__
from legrad.arguments import ImageInput, as_image, as_texts, check_share, each_of_images, elements
from legrad.checks import check_resize
from legrad.classes import check_compares_texts, class_labels
from legrad.errors import InputError
from legrad.explainer import LeGrad
from legrad.explanations import ExplainedImage, Explanations
from legrad.images import Resize
from legrad.inputs import neutral_patches
from legrad.method.trace import Trace
from legrad.pictures import fitted
from legrad.views import preprocessed

# Images are read this many batches ahead, so that images of several input sizes still fill batches.
BATCHES_AHEAD = 4
# Pairs of image and text that are explained at once; their number bounds the memory of their relevance.
PAIRS_AT_ONCE = 256


def explain_images(
    explainer: LeGrad,
    images: Iterable[ImageInput],
    texts: Iterable[str | int] | Iterable[Iterable[str | int]],
    neutral: str | None = None,
    *,
    neutral_threshold: float = 0.8,
    as_authors: bool = False,
    resize: Resize = "exact",
    batch_size: int = 16,
    picture_side: int = 320,
) -> Explanations:
    """Explain many images, each for several texts, as `explain_image` does for one.

    Memory is bounded: images are taken from an iterator, a few batches at a time, and only their grids and
    reduced pictures are kept. With `fit="keep"`, images of one input size share a batch; the order of the
    results is that of the images. The size of batches changes results by rounding errors only. Each call
    reads all weights once, for their SHA-256.

    Args:
        explainer: explainer of the model.
        images: PIL images of any sizes and modes, paths of JPEG, PNG, WebP, BMP or GIF files, or arrays, see
            `LeGrad.preprocess`; a list or any iterable, such as a generator of the frames of a video.
        texts: a list of texts for every image, or a list with a list of texts for each image; for a
            classifier, names or indices of classes.
        neutral: a text that names no object, such as "a photo of a": where its map is high, all maps of the
            image are zero; see `neutral_embedding` of `LeGrad.heatmaps`. None: no correction.
        neutral_threshold: threshold in [0, 1] for the neutral text's map.
        as_authors: compute the maps of the authors' package; see `LeGrad.heatmaps`.
        resize: see `LeGrad.preprocess`.
        batch_size: number of images in a forward pass.
        picture_side: longer side, in pixels, to which the kept picture of an image is reduced.

    Returns:
        Grids, heat maps and similarities (of a classifier, logits) of all images, on the CPU.

    Raises:
        InputError: no image or no text; a single one instead of a list; a list of texts for each image that
            does not have one for each; a file that cannot be read; an unknown class; a neutral text for a
            classifier; or an option out of range.
        TokenizerError: the explainer was made without a tokenizer.
        UnsupportedModelError: the model was changed into one that cannot be explained.

    Example:
        >>> frames = (image.rotate(angle) for angle in (0, 5, 10))
        >>> explanations = legrad.explain_images(explainer, frames, ["a panda"], neutral="a photo of a")
        >>> torch.stack(list(explanations.maps)).shape
        torch.Size([3, 1, 96, 96])
        >>> explanations.to_dataframe()["text"].tolist()
        ['a panda', 'a panda', 'a panda']
    """
    if not isinstance(explainer, LeGrad):
        raise InputError(
            f"explainer: expected a LeGrad, received {type(explainer).__name__}; pass LeGrad(model)"
        )
    _check_counts(batch_size=batch_size, picture_side=picture_side)
    check_resize(resize)
    if neutral is not None and not isinstance(neutral, str):
        raise InputError(f"neutral: expected a text or None, received {neutral!r:.80}")
    neutral_threshold = check_share(neutral_threshold, "neutral_threshold")
    if neutral is not None:
        check_compares_texts(explainer.tower, "neutral")
    chosen = _TextsOfImages.of(texts, numbers_too=explainer.tower.is_classifier)
    if as_authors:
        explainer = explainer._by_authors()
        neutral = neutral or explainer.tower.authors_neutral_text
    explainer._follow_changes()
    prompts = _Prompts.of(explainer, chosen.unique, neutral, neutral_threshold)
    made_by = _facts(explainer, resize=resize) | {
        "score": "logit" if explainer.tower.is_classifier else "similarity",
        "neutral": neutral,
        "neutral_threshold": neutral_threshold,
        "as_authors": as_authors,
    }
    prepared = _prepared(explainer, _each_image(images), chosen, resize, picture_side)
    explained: list[ExplainedImage] = []
    while window := list(islice(prepared, BATCHES_AHEAD * batch_size)):
        explained += _explained(explainer, window, prompts, batch_size)
    chosen.check_number(len(explained))
    return Explanations(tuple(explained), explainer.tower.normalisation, made_by)


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of a model's state: of each entry the name, dtype, shape and bytes, by name.

    It covers both towers, wherever they are, and reads all weights once.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if isinstance(weight, Tensor):
            digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _TextsOfImages:
    """Texts of each image; one list for all images if `is_shared`."""

    lists: tuple[tuple[str, ...], ...]
    is_shared: bool

    @classmethod
    def of(cls, texts: Any, *, numbers_too: bool) -> _TextsOfImages:
        if isinstance(texts, str):
            as_texts(texts)
        listed = list(elements(texts, "texts", "texts"))
        if not listed:
            raise InputError("texts: expected a list of at least one text, received none")
        lists_of_images = [_is_list(each) for each in listed]
        if not any(lists_of_images):
            return cls((tuple(as_texts(listed, numbers_too=numbers_too)),), is_shared=True)
        lists = [
            as_texts(each, f"texts[{position}]", numbers_too=numbers_too)
            for position, each in enumerate(listed)
        ]
        if [] in lists:
            place = f"texts[{lists.index([])}]"
            raise InputError(f"{place}: expected a list of at least one text, received none")
        return cls(tuple(map(tuple, lists)), is_shared=False)

    @property
    def unique(self) -> list[str]:
        """All texts, each once, in order."""
        return list(dict.fromkeys(text for texts in self.lists for text in texts))

    def of_image(self, position: int) -> tuple[str, ...]:
        """Return the texts of an image."""
        if self.is_shared:
            return self.lists[0]
        if position >= len(self.lists):
            raise InputError(
                f"texts: expected a list for each image, received {len(self.lists)} lists and more images"
            )
        return self.lists[position]

    def check_number(self, images: int) -> None:
        """Raise an InputError if there were no images, or fewer than lists of texts."""
        if not images:
            raise InputError("images: expected at least one image, received none")
        if not self.is_shared and images < len(self.lists):
            raise InputError(
                f"texts: expected a list for each of {images} images, received {len(self.lists)} lists"
            )


def _is_list(texts: Any) -> bool:
    return (
        isinstance(texts, Iterable) and not isinstance(texts, str | bytes) and getattr(texts, "ndim", 1) > 0
    )


@dataclass(frozen=True)
class _Prompts:
    """What all texts are explained by, and the neutral text.

    Attributes:
        rows: embedding of each text; of a classifier, the index of each class.
        row_of: row of each text.
        labels: what each text is called in the results.
        neutral_row: embedding of the neutral text, or None.
        neutral_threshold: of its map.
    """

    rows: Tensor
    row_of: Mapping[str, int]
    labels: Mapping[str, str]
    neutral_row: Tensor | None
    neutral_threshold: float

    @classmethod
    def of(
        cls, explainer: LeGrad, texts: list[str], neutral: str | None, neutral_threshold: float
    ) -> _Prompts:
        row_of = {text: row for row, text in enumerate(texts)}
        if explainer.tower.is_classifier:
            classes = [explainer.find_class(text) for text in texts]
            labels = dict(zip(texts, class_labels(texts, classes, explainer.class_names), strict=True))
            return cls(torch.tensor(classes), row_of, labels, None, neutral_threshold)
        neutral_row = None if neutral is None else explainer.embed_text([neutral])
        labels = {text: text for text in texts}
        return cls(explainer.embed_text(texts), row_of, labels, neutral_row, neutral_threshold)

    def explained(
        self, explainer: LeGrad, trace: Trace, rows: Tensor, images: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the relevance and the score of each pair of a row and an image."""
        chosen = self.rows[rows]
        if explainer.tower.is_classifier:
            relevance = explainer.relevance(trace, image_index=images, class_index=chosen)
            return relevance, explainer.logits(trace, chosen, images)
        return explainer.relevance(trace, chosen, images), explainer.similarity(trace, chosen, images)


@dataclass(frozen=True)
class _Prepared:
    """An image, resized for the model; the original is no longer needed."""

    name: str
    height: int
    width: int
    texts: tuple[str, ...]
    pixels: UInt8[np.ndarray, "height width 3"]
    picture: Image.Image


def _each_image(images: Any) -> Iterator[tuple[str, Image.Image]]:
    """Yield the path (or an empty name) and the decoded image of each element."""
    for position, image in enumerate(each_of_images(images)):
        is_path = isinstance(image, str | os.PathLike)
        name = os.fspath(image) if is_path else str(getattr(image, "filename", ""))
        yield name, as_image(image, f"images[{position}]")


def _prepared(
    explainer: LeGrad,
    images: Iterable[tuple[str, Image.Image]],
    texts: _TextsOfImages,
    resize: Resize,
    picture_side: int,
) -> Iterator[_Prepared]:
    for position, (name, image) in enumerate(images):
        of_image = texts.of_image(position)
        pixels = explainer.transform.resize(image, resize)
        picture = fitted(image, min(picture_side, max(image.size)))
        yield _Prepared(name, image.height, image.width, of_image, pixels, picture)


def _explained(
    explainer: LeGrad, images: Sequence[_Prepared], prompts: _Prompts, batch_size: int
) -> list[ExplainedImage]:
    """Explain images in batches of one input size; return them in the order in which they came."""
    explained: dict[int, ExplainedImage] = {}
    by_size = sorted(range(len(images)), key=lambda place: images[place].pixels.shape)
    for _, places in groupby(by_size, key=lambda place: images[place].pixels.shape):
        alike = list(places)
        for start in range(0, len(alike), batch_size):
            batch = alike[start : start + batch_size]
            found = _explained_batch(explainer, [images[place] for place in batch], prompts)
            explained.update(zip(batch, found, strict=True))
    return [explained[place] for place in range(len(images))]


def _explained_batch(
    explainer: LeGrad, batch: Sequence[_Prepared], prompts: _Prompts
) -> list[ExplainedImage]:
    pixels = torch.from_numpy(np.stack([image.pixels for image in batch]))
    trace = explainer.encode(preprocessed(explainer, pixels))
    neutral = None
    if prompts.neutral_row is not None:
        neutral_grids = explainer.relevance(trace, prompts.neutral_row)
        neutral = neutral_patches(neutral_grids, prompts.neutral_threshold)
    device = prompts.rows.device
    rows = torch.tensor([prompts.row_of[text] for image in batch for text in image.texts], device=device)
    images = torch.tensor([place for place, image in enumerate(batch) for _ in image.texts], device=device)
    grids, similarities = [], []
    for row, image in zip(torch.split(rows, PAIRS_AT_ONCE), torch.split(images, PAIRS_AT_ONCE), strict=True):
        relevance, scores = prompts.explained(explainer, trace, row, image)
        grids.append(
            (relevance if neutral is None else relevance.masked_fill(neutral[image], 0)).float().cpu()
        )
        similarities.append(scores.float().cpu())
    counts = [len(image.texts) for image in batch]
    return [
        ExplainedImage(
            image.name,
            image.height,
            image.width,
            (image.pixels.shape[0], image.pixels.shape[1]),
            tuple(prompts.labels[text] for text in image.texts),
            own_grids.clone(),
            own_similarities.clone(),
            image.picture,
        )
        for image, own_grids, own_similarities in zip(
            batch,
            torch.split(torch.cat(grids), counts),
            torch.split(torch.cat(similarities), counts),
            strict=True,
        )
    ]


def _facts(explainer: LeGrad, *, resize: Resize) -> dict[str, Any]:
    """Return what maps are made with, in values that JSON has."""
    kind = type(explainer.model)
    return {
        "versions": {
            "legrad": __version__,
            "open_clip": version("open_clip_torch"),
            "torch": torch.__version__,
        },
        "model": {
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "family": explainer.tower.family,
            "dtype": str(explainer.dtype),
            "weights_sha256": weights_sha256(explainer.model),
        },
        "preprocessing": asdict(explainer.transform) | {"resize": resize},
        "layers": list(explainer.layer_indices),
        "layer_weights": explainer._layers.weights,
        "pool": explainer._options.pool,
        "affinity": explainer._options.affinity,
    }


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(f"{name}: expected a whole number of at least 1, received {count!r}")
