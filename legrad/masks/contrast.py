"""Contrast between the texts of an image: what other texts explain better is taken from a text's grid."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from legrad.errors import InputError
from legrad.memory import uploaded

# bound on the values of a temporary tensor, about 64 MB in float32
MAX_VALUES = 2**24


def contrasted_grids(
    relevance_grids: Float[Tensor, "*leading texts grid_height grid_width"],
    weights: Float[Tensor, "... texts texts"] | None = None,
    *,
    share: float = 0.6,
) -> Float[Tensor, "*leading texts grid_height grid_width"]:
    """Subtract from each text's grid a share of the strongest other text's grid, clipped at 0.

        contrasted[p] = max(0, grid[p] - share * max over q of (weights[p, q] * grid[q]))

    Relevance of one text contains what all texts have in common: a text's map is high wherever the image
    shows anything. What remains is where the text explains the image better than the others do. Apply it to
    raw grids, which texts have in one unit, before any normalisation.

    Args:
        relevance_grids: raw relevance of all texts of an image, as `LeGrad.relevance` returns them for a
            batch. A grid with NaN or infinity takes nothing from others.
        weights: weight from 0 to 1 with which text q, the last index, takes from text p; see
            `text_distances`. A text that takes nothing has a column of zeros. What a text would take from
            itself does not count. None: all weights are 1.
        share: share from 0 to 1 of the strongest other grid; at 0 the grids are returned as they are.

    Returns:
        Grids in float32, or in float64 if the given ones are, in the unit of the given ones. A text from
        which nothing is taken keeps its grid to the bit; one that others explain better everywhere has zeros.

    Raises:
        InputError: the share is out of range.

    Source: this project; measured in tests/bench/README.md. The idea that classes compete on unnormalised
        maps is that of CLIP-ES (arXiv:2212.09506), section 3.2, where a softmax over classes acts on scores.

    Example:
        >>> contrasted = legrad.contrasted_grids(grids, share=0.6)
        >>> bool((contrasted <= grids).all() and (contrasted >= 0).all())
        True
    """
    if not 0 <= share <= 1:
        raise InputError(f"share: expected a value from 0 to 1, received {share!r}")
    texts = relevance_grids.shape[-3]
    if not share or texts < 2:
        return relevance_grids
    grids = relevance_grids if relevance_grids.dtype == torch.float64 else relevance_grids.float()
    others = torch.ones(texts, texts, dtype=grids.dtype, device=grids.device).fill_diagonal_(0)
    if weights is not None:
        others = others * weights
    return _less_strongest(grids, _strongest_other(grids, others), share)


def _less_strongest(grids: Tensor, strongest: Tensor, share: float) -> Tensor:
    """Return max(0, grids - share * strongest), but a grid from which nothing is taken to the bit."""
    return grids - torch.minimum(grids.clamp(min=0), strongest * share)


def _strongest_other(
    grids: Float[Tensor, "*leading texts grid_height grid_width"],
    weights: Float[Tensor, "... texts texts"],
) -> Float[Tensor, "*leading texts grid_height grid_width"]:
    """Return, for each text and cell, the highest weighted relevance of another text, at least 0."""
    # NaN * 0 is NaN
    is_finite = (grids - grids).sum((-2, -1), keepdim=True) == 0
    takers = torch.where(is_finite, grids, 0)[..., None, :, :, :]
    strongest = torch.zeros_like(grids)
    at_once = max(1, MAX_VALUES // max(1, grids.numel()))
    for start in range(0, grids.shape[-3], at_once):
        block = slice(start, start + at_once)
        taken = takers[..., block, :, :] * weights[..., block, None, None]
        strongest = torch.maximum(strongest, taken.amax(dim=-3))
    return strongest


def text_distances(
    unit_rows: Float[Tensor, "*leading texts embed_dim"], centre: Float[Tensor, " embed_dim"] | None = None
) -> Float[Tensor, "*leading texts texts"]:
    """Compute how far texts are apart, from 0 (equal) to 1 (as far as from texts of all kinds, or farther).

    These are weights for `contrasted_grids`. For unit rows p and q, and the mean c of many other unit rows:

        distance[p, q] = min(1, |p - q|^2 / mean of r(p) and r(q)),   r(p) = 2 - 2 <p, c>

    r(p) is the mean of |p - t|^2 over the rows t whose mean is c. A text tower puts all texts into one narrow
    cone, so distances count in comparison with these. One text that contains the other ("a dog", "a dog and
    a cat") is near it, and takes little of its grid.

    Args:
        unit_rows: unit text embeddings of an image's texts.
        centre: mean embedding of texts of all kinds; None: the origin, as if these had nothing in common with
            the image's texts.

    Returns:
        Symmetric distances in float32, zero on the diagonal.

    Example:
        >>> legrad.text_distances(explainer.embed_text(["a dog", "a dog", "a rocket"]))[0].tolist()
        [0.0, 0.0, 1.0]
    """
    # in float64, so that a batch's size, which changes the order of sums, does not change the rounded result
    rows = unit_rows.double()
    products = rows @ rows.mT
    squared = products.diagonal(dim1=-2, dim2=-1)
    apart = ((squared[..., :, None] + squared[..., None, :]) / 2 - products).clamp(min=0)
    to_others = torch.ones_like(rows[..., 0]) if centre is None else 1 - rows @ centre.double()
    usual = (to_others[..., :, None] + to_others[..., None, :]) / 2
    distances = (apart / usual.clamp(min=1e-12)).clamp(max=1).float()
    return distances.masked_fill(torch.eye(rows.shape[-2], dtype=torch.bool, device=rows.device), 0)


def distances_by_image(
    unit_rows: Float[Tensor, "maps embed_dim"],
    image_index: Int[Tensor, " maps"],
    centre: Float[Tensor, " embed_dim"] | None = None,
) -> Float[Tensor, " pairs"]:
    """Compute `text_distances` for images with different numbers of texts, without waiting for the device.

    Args:
        unit_rows: unit embedding of each text, on any device.
        image_index: for each text the row of its image, on the CPU.
        centre: see `text_distances`.

    Returns:
        float32, image by image in ascending order of `image_index`: n x n distances for an image of n
        texts, row by row, the texts in their given order.
    """
    index = image_index.numpy()
    counts = np.bincount(index)
    pairs = int((counts**2).sum())
    if counts.max(initial=0) < 2:
        return torch.zeros(pairs, device=unit_rows.device)
    # the last place is that of padding
    distances = torch.zeros(pairs + 1, device=unit_rows.device)
    for group in _groups(index, unit_rows.shape[1], unit_rows.device):
        is_pair = group.is_text[:, :, None] & group.is_text[:, None, :]
        distances[torch.where(is_pair, group.pairs, pairs)] = text_distances(unit_rows[group.rows], centre)
    return distances[:-1]


def contrasted_by_image(
    relevance_grids: Float[Tensor, "maps grid_height grid_width"],
    image_index: Int[Tensor, " maps"],
    distances: Float[Tensor, " pairs"],
    *,
    share: float = 0.6,
    takes: Bool[Tensor, " maps"] | None = None,
) -> Float[Tensor, "maps grid_height grid_width"]:
    """Apply `contrasted_grids` to images with different numbers of texts, weighted by their distances.

    The device is not waited for, and the result of an image does not depend on the other images.

    Args:
        relevance_grids: raw relevance of one text of one image each, on any device.
        image_index: for each grid the row of its image, on the CPU.
        distances: between the texts of each image, as `distances_by_image` returns them.
        share: see `contrasted_grids`.
        takes: for each grid whether its text takes from others; None: all do.

    Returns:
        Contrasted grids in float32, or in float64 if the given ones are.

    Raises:
        InputError: the share is out of range.
    """
    _, height, width = relevance_grids.shape
    index = image_index.numpy()
    if not share or np.bincount(index, minlength=1).max() < 2:
        return relevance_grids
    contrasted: list[Tensor] = []
    for group in _groups(index, height * width, relevance_grids.device):
        is_weighed = group.is_text[:, None, :]
        if takes is not None:
            is_weighed = is_weighed & takes[group.rows][:, None, :]
        of_images = contrasted_grids(
            relevance_grids[group.rows], distances[group.pairs] * is_weighed, share=share
        )
        contrasted.append(of_images.flatten(0, 1).index_select(0, group.places))
    in_order, order = torch.cat(contrasted), index.argsort(kind="stable")
    if (order[1:] > order[:-1]).all():
        return in_order
    return in_order[uploaded(torch.from_numpy(order.argsort()), in_order.device)]


@dataclass(frozen=True)
class _Group:
    """Images whose texts are padded to one number, on the device of their grids.

    Attributes:
        rows: for each text the row of its grid; in the places of padding, that of the image's last text.
        is_text: whether a place is that of a text.
        places: places of the texts, counted through all images.
        pairs: places of the distances between each two texts, as `distances_by_image` returns them; padding
            has those of the image's last text.
    """

    rows: Int64[Tensor, "images most_texts"]
    is_text: Bool[Tensor, "images most_texts"]
    places: Int64[Tensor, " maps"]
    pairs: Int64[Tensor, "images most_texts most_texts"]


def _groups(index: Int64[np.ndarray, " maps"], values_a_text: int, device: torch.device) -> Iterator[_Group]:
    """Divide images into groups of consecutive ones, mostly a single group, so that memory is bounded.

    Args:
        index: image of each grid.
        values_a_text: values that a text takes beside its weights.
        device: of the grids.
    """
    order = index.argsort(kind="stable")
    _, starts, counts = np.unique(index[order], return_index=True, return_counts=True)
    first_pairs = np.cumsum(counts**2) - counts**2
    for group in _groups_within(counts.tolist(), values_a_text):
        of_group = counts[group][:, None]
        column = np.arange(of_group.max())
        position = np.minimum(column, of_group - 1)
        rows = order[starts[group][:, None] + position]
        is_text = column < of_group
        pair_rows = first_pairs[group][:, None] + position * of_group
        parts = [rows.ravel(), is_text.ravel(), position.ravel(), pair_rows.ravel(), np.flatnonzero(is_text)]
        packed = uploaded(torch.from_numpy(np.concatenate(parts).astype(np.int64)), device)
        padded = packed[: 4 * rows.size].view(4, *rows.shape)
        pairs = padded[3][:, :, None] + padded[2][:, None, :]
        yield _Group(padded[0], padded[1].bool(), packed[4 * rows.size :], pairs)


def _groups_within(counts: Sequence[int], values_a_text: int) -> Iterator[slice]:
    """Divide images into consecutive groups that take at most `MAX_VALUES`, but at least one image each."""
    start, most = 0, 0
    for image, count in enumerate(counts):
        most = max(most, count)
        if image > start and (image + 1 - start) * most * (values_a_text + most) > MAX_VALUES:
            yield slice(start, image)
            start, most = image, count
    if start < len(counts):
        yield slice(start, len(counts))
