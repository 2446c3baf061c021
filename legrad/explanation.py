"""Explain one image for several texts: heat maps, similarities, and pictures for a notebook."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from legrad.arguments import ImageInput, as_image, as_texts
from legrad.classes import class_labels
from legrad.errors import InputError
from legrad.explainer import LeGrad
from legrad.heatmaps import Normalisation, heatmaps_of, minmax_normalise, upsample_grid
from legrad.images import Resize
from legrad.inputs import neutral_patches
from legrad.method.trace import in_words
from legrad.pictures import draw_panels, fitted, heat_over, overlay

PANELS_PER_LINE = 4
AUTHORS_NEUTRAL_THRESHOLD = 0.8


@dataclass(frozen=True, eq=False)
class Explanation:
    """Heat maps of one image for several texts; a notebook displays `side_by_side`.

    Attributes:
        image: the original image, RGB; a file's, upright.
        texts: the texts, in the order of all other attributes.
        heatmaps: one for each text, from 0 to 1, at the pixel size of the model's input.
        similarities: cosine similarity of the image and each text; of a classifier, the logit of each class.
        layer_grids: raw relevance on the patch grid for each layer, not weighted.
        layer_indices: index in the tower of each layer of `layer_grids`, 0 first.
        normalisation: when grids of this model family are normalised; see `legrad.heatmaps_of`.
        layer_weights: of the layers in the sum that `heatmaps` are made from; None: all 1.
        score_name: what `similarities` are: "similarity", or "logit" of a classifier.

    Example:
        >>> explanation = legrad.explain_image(explainer, image, ["a banana", "a panda"])
        >>> explanation.heatmaps.shape
        torch.Size([2, 96, 96])
        >>> explanation.side_by_side().save(folder / "panda.png")
    """

    image: Image.Image
    texts: tuple[str, ...]
    heatmaps: Float[Tensor, "texts height width"]
    similarities: Float[Tensor, " texts"]
    layer_grids: Float[Tensor, "layers texts grid_height grid_width"]
    layer_indices: tuple[int, ...]
    normalisation: Normalisation
    layer_weights: tuple[float, ...] | None = None
    score_name: Literal["similarity", "logit"] = "similarity"

    def __repr__(self) -> str:
        """Return sizes and texts in a line."""
        size = f"{self.image.width} x {self.image.height} pixels"
        named = ", ".join([*(f"{text[:24]!r}" for text in self.texts[:3]), "..."][: len(self.texts)])
        plural = "text" if len(self.texts) == 1 else "texts"
        blocks = in_words(self.layer_indices)
        return f"Explanation(image of {size}, {len(self.texts)} {plural}: {named}; {blocks})"

    @property
    def overlays(self) -> tuple[Image.Image, ...]:
        """Heat map of each text over the greyed image, at the image's size."""
        return tuple(overlay(self.image, heatmap) for heatmap in self.heatmaps)

    @property
    def layer_strips(self) -> tuple[Image.Image, ...]:
        """Contribution of each layer, one picture for each text; see `layer_strip`."""
        return tuple(self._layer_strip(number, 224) for number in range(len(self.texts)))

    def side_by_side(self, *, panel_side: int = 320) -> Image.Image:
        """Draw the image and the heat maps of all texts in one picture.

        Args:
            panel_side: longer side of a panel, in pixels.
        """
        photo = np.asarray(fitted(self.image, panel_side))
        heats = [heat_over(photo, heatmap) for heatmap in self.heatmaps]
        labels = [
            (text, f"{self.score_name} {similarity:.3f}")
            for text, similarity in zip(self.texts, self.similarities.tolist(), strict=True)
        ]
        return draw_panels([("image",), *labels], [photo, *heats], per_line=PANELS_PER_LINE)

    def _layer_strip(self, number: int, panel_side: int) -> Image.Image:
        weights = torch.ones(len(self.layer_indices))
        if self.layer_weights is not None:
            weights = torch.tensor(self.layer_weights)
        grids = self.layer_grids[:, number] * weights[:, None, None]
        shares = grids.sum(dim=(-2, -1)) / grids.sum().clamp(min=torch.finfo(grids.dtype).tiny)
        photo = np.asarray(fitted(self.image, panel_side))
        height, width = photo.shape[:2]
        common_scale = minmax_normalise(grids.reshape(1, -1, grids.shape[-1])).reshape(grids.shape)
        merged = heatmaps_of(grids.sum(dim=0), height, width, self.normalisation)
        heatmaps = [*(upsample_grid(grid, height, width) for grid in common_scale), merged]
        labels = [
            (f"block {index}: {100 * share:.0f} %",)
            for index, share in zip(self.layer_indices, shares.tolist(), strict=True)
        ]
        panels = [heat_over(photo, heatmap) for heatmap in heatmaps]
        return draw_panels([*labels, ("sum",)], panels, per_line=len(panels))

    def _repr_png_(self) -> bytes:
        """Return the picture that a notebook displays."""
        sink = io.BytesIO()
        self.side_by_side().save(sink, "PNG")
        return sink.getvalue()


def explain_image(
    explainer: LeGrad,
    image: ImageInput,
    texts: Iterable[str | int],
    *,
    as_authors: bool = False,
    resize: Resize = "exact",
) -> Explanation:
    """Explain one image for several texts, in one forward pass.

    Args:
        explainer: explainer of the model.
        image: a PIL image of any size and mode, the path of a file, or an array; see `LeGrad.preprocess`.
        texts: at least one text, in a list, array, Series or generator; for a
            classifier, names or indices of classes.
        as_authors: compute the maps of the authors' package. They differ from the default for SigLIP and
            PE-Core only; see `LeGrad.heatmaps`.
        resize: see `LeGrad.preprocess`.

    Returns:
        Heat maps at the size of the model's input, similarities and the raw grids of every layer, on the CPU.

    Raises:
        ImageFileError: the file is no image of a format that is read, or damaged.
        InputError: no text, a single string instead of a list, an element that is no text, no image, an
            unknown class or an unknown `resize`.
        TokenizerError: the explainer was made without a tokenizer.

    Example:
        >>> explanation = legrad.explain_image(explainer, image, ["a panda", "a rocket"])
        >>> bool(explanation.similarities[0] > explanation.similarities[1])
        True
        >>> explanation.overlays[0].size == image.size
        True
    """
    if not isinstance(explainer, LeGrad):
        raise InputError(
            f"explainer: expected a LeGrad, received {type(explainer).__name__}; pass LeGrad(model)"
        )
    is_classifier = explainer.tower.is_classifier
    named, image = as_texts(texts, numbers_too=is_classifier), as_image(image)
    if not named:
        raise InputError("texts: expected a list of at least one text, received none")
    if as_authors:
        explainer = explainer._by_authors()
    class_index = [explainer.find_class(text) for text in named] if is_classifier else None
    pixels = explainer.preprocess([image], resize=resize)
    trace = explainer.encode(pixels)
    embeddings = None if is_classifier else explainer.embed_text(named)
    grids = explainer.relevance(trace, embeddings, class_index=class_index, per_layer=True)[:, 0]
    scores = (
        explainer.logits(trace, class_index)
        if embeddings is None
        else explainer.similarity(trace, embeddings)
    )
    neutral_text = explainer.tower.authors_neutral_text
    if as_authors and neutral_text is not None:
        neutral_grids = explainer.relevance(trace, explainer.embed_text([neutral_text]))
        grids = grids.masked_fill(neutral_patches(neutral_grids, AUTHORS_NEUTRAL_THRESHOLD), 0)
    grids = grids.float().cpu()
    layers = explainer._layers
    normalisation = explainer.tower.normalisation
    return Explanation(
        image=image.convert("RGB"),
        texts=tuple(named)
        if class_index is None
        else class_labels(named, class_index, explainer.class_names),
        heatmaps=heatmaps_of(layers.merged(grids), pixels.shape[2], pixels.shape[3], normalisation),
        similarities=scores[0].float().cpu(),
        layer_grids=grids,
        layer_indices=layers.indices,
        normalisation=normalisation,
        layer_weights=layers.weights,
        score_name="logit" if is_classifier else "similarity",
    )


def layer_strip(
    explainer: LeGrad, image: ImageInput, text: str | int, *, panel_side: int = 224
) -> Image.Image:
    """Draw the contribution of each layer: one panel for each explained block, and one for their sum.

    All blocks share one colour scale, so the panel of a block that contributes little is pale; its label
    gives the block's share of the total relevance, in per cent. Weights of layers count.

    Args:
        explainer: made with the `layers` to show.
        image: as in `explain_image`.
        text: the text to explain; for a classifier, the name or the index of a class.
        panel_side: longer side of a panel, in pixels.

    Returns:
        The panels in one line, first block to last, the sum at the end.

    Source: the per-layer maps of https://arxiv.org/abs/2404.03214, section 3.3.

    Example:
        >>> strip = legrad.layer_strip(explainer, image, "a panda", panel_side=100)
        >>> strip.save(folder / "layers.png")  # two blocks and their sum
    """
    return explain_image(explainer, image, [text])._layer_strip(0, panel_side)
