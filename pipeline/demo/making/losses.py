"""Contrastive losses over images that show several concepts at once; masks are not used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def concept_labels(class_sets: Sequence[Sequence[int]], class_count: int) -> Tensor:
    """Return which concepts each image shows, float [images, class_count + 1]; the last column is "none"."""
    labels = torch.zeros(len(class_sets), class_count + 1)
    for row, class_ids in enumerate(class_sets):
        columns = [class_id - 1 for class_id in class_ids] or [class_count]
        labels[row, columns] = 1.0
    return labels


def multi_positive_loss(logits: Tensor, positives: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Return the symmetric cross-entropy, with a uniform target over the positives of a row or column.

    Args:
        logits: Scaled similarities [rows, columns].
        positives: 1 where row and column belong together, else 0 [rows, columns].
        ignored: True where a pair is neither positive nor negative [rows, columns].
    """
    if ignored is not None:
        logits = logits.masked_fill(ignored, -1e4)
    return 0.5 * (_soft_cross_entropy(logits, positives) + _soft_cross_entropy(logits.T, positives.T))


def _soft_cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    counts = positives.sum(dim=1)
    has_positive = counts > 0
    targets = positives[has_positive] / counts[has_positive, None]
    return -(targets * F.log_softmax(logits[has_positive], dim=1)).sum(dim=1).mean()


def caption_relations(shown: Tensor, named: Tensor) -> tuple[Tensor, Tensor]:
    """Return which pairs of image and caption of a batch match, and which are ignored.

    An image matches its own caption and others that name the same, and those that name all that it shows. A
    caption that names some other part of what an image shows is true of it as well, and is ignored.

    Args:
        shown: What each image shows, from `concept_labels`.
        named: What its caption names, a subset, from `concept_labels`.

    Returns:
        Positives as float and ignored pairs as bool, both [images, captions].
    """
    shown, named = shown[:, :-1], named[:, :-1]
    sizes = named.sum(dim=1)
    is_subset = (shown @ named.T == sizes[None]) & ((sizes[None] > 0) | (shown.sum(dim=1)[:, None] == 0))
    is_same_caption = (named @ named.T == sizes[None]) & (sizes[:, None] == sizes[None])
    names_all = is_subset & (shown.sum(dim=1)[:, None] == sizes[None])
    is_positive = is_same_caption | names_all
    return is_positive.float(), is_subset & ~is_positive


def decorrelation_loss(unit_texts: Tensor) -> Tensor:
    """Return the squared distance of the texts' similarities from the identity, per text."""
    count = unit_texts.shape[0]
    return (unit_texts @ unit_texts.T - torch.eye(count, device=unit_texts.device)).square().sum() / count
