"""The classes of a classifier: found by index or name, and as rows that take the place of text embeddings."""

from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from legrad.arguments import check_rows_of_images, shown
from legrad.errors import InputError
from legrad.method.stages import accumulation_dtype
from legrad.method.towers import Tower

# One class, classes for every image or for each image, or with an image index; nested sequences or a tensor.
ClassIndex = int | np.integer | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Tensor
MAX_NAMED = 5


def check_compares_texts(tower: Tower, caller: str) -> None:
    """Raise an InputError if a model is a classifier.

    Args:
        tower: description of its vision tower.
        caller: what needs texts; the message begins with it.
    """
    if tower.is_classifier:
        raise InputError(
            f"{caller}: this model ({tower.family}) is a classifier and has no text tower; explain one of "
            f"its {tower.embed_dim} classes with class_index=..., and `logits` returns their scores"
        )


def check_classifier(tower: Tower, caller: str) -> None:
    """Raise an InputError if a model is no classifier.

    Args:
        tower: description of its vision tower.
        caller: what needs classes; the message begins with it.
    """
    if not tower.is_classifier:
        raise InputError(
            f"{caller}: this model ({tower.family}) compares images with texts and has no classes; pass "
            "text_embeddings, which `embed_text` returns, and `similarity` returns their scores"
        )


def rows_of_prompts(
    tower: Tower,
    features_like: Float[Tensor, "batch embed_dim"],
    text_embeddings: Tensor | None,
    class_index: ClassIndex | None,
    image_index: Tensor | None,
) -> Tensor:
    """Return what is compared with the features: text embeddings, or for a classifier rows of classes.

    Args:
        tower: description of the vision tower.
        features_like: the features of the images, or a tensor of the same shape, dtype and device.
        text_embeddings: of a model that compares images with texts; otherwise None.
        class_index: of a classifier, see `class_rows`; otherwise None.
        image_index: for each prompt the row of its image, or None.

    Raises:
        InputError: texts for a classifier, classes for another model, neither, or classes that do not fit.
    """
    if text_embeddings is not None:
        check_compares_texts(tower, "text_embeddings")
    if class_index is not None:
        check_classifier(tower, "class_index")
        rows = class_rows(class_index, features_like)
        if image_index is not None:
            check_image_index(rows[..., 0], image_index, len(features_like))
        return rows
    if text_embeddings is None:
        found = "class_index=..., as this model is a classifier" if tower.is_classifier else "text_embeddings"
        raise InputError(f"expected {found}, received neither texts nor classes")
    return text_embeddings


def class_rows(
    class_index: object, logits_like: Float[Tensor, "batch classes"]
) -> Float[Tensor, "*leading classes"]:
    """Return a row for each class whose dot product with the logits is the logit of that class.

    Args:
        class_index: a `ClassIndex`: one class, [classes], or [batch, classes]; anything else is refused.
        logits_like: the logits of the images, or a tensor of the same shape, dtype and device.

    Returns:
        [classes, all classes] or [batch, classes, all classes].

    Raises:
        InputError: shape or dtype do not fit, or there is no such class.
    """
    index = as_class_index(class_index, logits_like)
    rows = logits_like.new_zeros(
        (*index.shape, logits_like.shape[1]), dtype=accumulation_dtype(logits_like.dtype)
    )
    return rows.scatter_(-1, index.unsqueeze(-1), 1)


def as_class_index(class_index: object, logits_like: Float[Tensor, "batch classes"]) -> Tensor:
    """Return a class index as a tensor [classes] or [batch, classes], on the device of the logits.

    Args:
        class_index: see `class_rows`.
        logits_like: see `class_rows`.

    Raises:
        InputError: as `class_rows`.
    """
    batch, classes = logits_like.shape
    index = _as_tensor(class_index)
    index = index.reshape(1) if index.ndim == 0 else index
    expected = f"class_index: expected whole numbers from 0 to {classes - 1}"
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise InputError(f"{expected}, received {_shown(class_index)}")
    if index.ndim > 2 or (index.ndim == 2 and len(index) != batch):
        raise InputError(
            f"class_index: expected one class, [classes], or [batch, classes] with a batch of {batch}, "
            f"received {list(index.shape)}"
        )
    if index.numel():
        lowest, highest = (int(extreme) for extreme in index.aminmax())
        if lowest < 0 or highest >= classes:
            wrong = lowest if lowest < 0 else highest
            raise InputError(f"{expected}, as the model has {classes} classes, received {wrong}")
    return index.to(logits_like.device, torch.int64)


def logits_of(
    logits: Float[Tensor, "batch classes"], class_index: object, image_index: Tensor | None
) -> Tensor:
    """Select logits by class, and by image.

    Args:
        logits: all logits of each image.
        class_index: see `class_rows`; None: all.
        image_index: for each class the row of its image, with a class index [classes]; or None.

    Returns:
        [batch, classes], or with `image_index` [classes].

    Raises:
        InputError: as `class_rows`, or the image index does not fit.
    """
    if class_index is None:
        if image_index is not None:
            raise InputError("image_index: expected a class_index with it, received none")
        return logits
    index = as_class_index(class_index, logits)
    if image_index is not None:
        check_image_index(index, image_index, len(logits))
        rows = logits[image_index.to(logits.device, torch.int64)]
        return rows.gather(1, index.unsqueeze(1))[:, 0]
    every_image = index.expand(len(logits), -1) if index.ndim == 1 else index
    return logits.gather(1, every_image)


def check_image_index(index: Tensor, image_index: Tensor, batch: int) -> None:
    """Raise an InputError unless an image index names one image for each class.

    Args:
        index: classes, as `as_class_index` returns them.
        image_index: for each class the row of its image.
        batch: number of images.
    """
    if index.ndim != 1 or image_index.shape != index.shape:
        raise InputError(
            "image_index: expected class_index [classes] and image_index [classes], received "
            f"{list(index.shape)} and {list(image_index.shape)}"
        )
    check_rows_of_images(image_index, batch)


def check_class_names(class_names: Any, tower: Tower) -> tuple[str, ...] | None:
    """Return the names of a model's classes as a tuple; raise an InputError unless there is one for each.

    Args:
        class_names: None, or a list of strings; anything else is refused.
        tower: description of the vision tower.
    """
    if class_names is None:
        return None
    check_classifier(tower, "class_names")
    classes = tower.embed_dim
    is_list = isinstance(class_names, Iterable) and not isinstance(class_names, str | Set | Mapping)
    names = tuple(class_names) if is_list else ()
    found = None
    if not is_list:
        found = "a single string" if isinstance(class_names, str) else shown(class_names)
    elif not all(isinstance(name, str) for name in names):
        found = "others than strings among them"
    elif len(names) != classes:
        found = f"{len(names)} names"
    if found is not None:
        raise InputError(
            f"class_names: expected a list of {classes} names, one for each class, received {found}"
        )
    return names


def find_class(wanted: str | int, classes: int, class_names: Sequence[str] | None) -> int:
    """Return the index of a class, given its index or its name.

    Args:
        wanted: an index, also in digits; or a name, or one of the synonyms that a name lists between commas,
            in upper or lower case.
        classes: number of classes.
        class_names: name of each class, or None if they are not known.

    Raises:
        InputError: no class or several classes have this name; the message lists the nearest ones.
    """
    digits = str(wanted).strip()
    if digits.isdecimal() and digits not in (class_names or ()):
        if int(digits) < classes:
            return int(digits)
        raise InputError(f"class {digits}: the model has {classes} classes, from 0 to {classes - 1}")
    if not isinstance(wanted, str):
        raise InputError(
            f"class {wanted!r}: expected a name, or an index from 0 to {classes - 1}, received "
            f"{shown(wanted)}"
        )
    if class_names is None:
        raise InputError(
            f"class {wanted!r}: the names of this model's classes are not known: give an index from 0 to "
            f"{classes - 1}, or class_names"
        )
    by_name = _indices_by_name(class_names)
    key = _folded(str(wanted))
    whole = [index for index, name in enumerate(class_names) if _folded(name) == key]
    found = whole or by_name.get(key, [])
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"class {wanted!r} is the name of several classes: {_listed(found, class_names)}")
    raise InputError(f"no class is named {wanted!r}; {_nearest(key, by_name, class_names)}")


def class_labels(
    wanted: Sequence[str], class_index: Sequence[int], class_names: Sequence[str] | None
) -> tuple[str, ...]:
    """Return labels of classes: what was asked for, and the name of each class that was given by index.

    Args:
        wanted: names, or indices in digits.
        class_index: what `find_class` found for each.
        class_names: name of each class, or None if they are not known.
    """
    return tuple(
        f"{text}: {class_names[index]}" if class_names is not None and text.strip() == str(index) else text
        for text, index in zip(wanted, class_index, strict=True)
    )


def _indices_by_name(class_names: Sequence[str]) -> dict[str, list[int]]:
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(class_names):
        for synonym in dict.fromkeys(map(_folded, (name, *name.split(",")))):
            by_name.setdefault(synonym, []).append(index)
    return by_name


def _nearest(key: str, by_name: dict[str, list[int]], class_names: Sequence[str]) -> str:
    holding = [name for name in by_name if key and key in name.split()]
    similar = [*holding, *get_close_matches(key, by_name, n=MAX_NAMED)]
    indices = list(dict.fromkeys(index for name in similar for index in by_name[name]))[:MAX_NAMED]
    last = len(class_names) - 1
    return f"nearest: {_listed(indices, class_names)}" if indices else f"give an index from 0 to {last}"


def _listed(indices: Sequence[int], class_names: Sequence[str]) -> str:
    return "; ".join(f"{index} ({class_names[index]})" for index in indices)


def _folded(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _as_tensor(class_index: object) -> Tensor:
    try:
        index = torch.as_tensor(class_index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            "class_index: expected whole numbers, one class, [classes], or [batch, classes]; received "
            f"{_shown(class_index)}"
        ) from error
    # Of an empty list, torch makes floating-point numbers.
    return index if index.numel() else index.to(torch.int64)


def _shown(class_index: object) -> str:
    if isinstance(class_index, Tensor):
        return f"{class_index.dtype} {list(class_index.shape)}"
    shown = repr(class_index)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
