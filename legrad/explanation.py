"""Explain one image for several texts: heat maps, similarities, and pictures for a notebook."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from legrad.errors import InputError
from legrad.explainer import LeGrad
from legrad.heatmaps import Normalisation, heatmaps_of, minmax_normalise, upsample_grid
from legrad.images import Resize
from legrad.inputs import neutral_patches
from legrad.pictures import draw_panels, fitted, heat_over, overlay

PANELS_PER_LINE = 4
AUTHORS_NEUTRAL_THRESHOLD = 0.8


@dataclass(frozen=True, eq=False)
class Explanation:
    """Heat maps of one image for several texts; a notebook displays `side_by_side`.

    Attributes:
        image: the original image, RGB.
        texts: the texts, in the order of all other attributes.
        heatmaps: one for each text, from 0 to 1, at the pixel size of the model's input.
        similarities: cosine similarity of the image and each text.
        layer_grids: raw relevance on the patch grid for each layer; `heatmaps` are made from their sum.
        layer_indices: index in the tower of each layer of `layer_grids`, 0 first.
        normalisation: when grids of this model family are normalised; see `legrad.heatmaps_of`.

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
            (text, f"similarity {similarity:.3f}")
            for text, similarity in zip(self.texts, self.similarities.tolist(), strict=True)
        ]
        return draw_panels([("image",), *labels], [photo, *heats], per_line=PANELS_PER_LINE)

    def _layer_strip(self, number: int, panel_side: int) -> Image.Image:
        grids = self.layer_grids[:, number]
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
    image: Image.Image,
    texts: Sequence[str],
    *,
    as_authors: bool = False,
    resize: Resize = "exact",
) -> Explanation:
    """Explain one image for several texts, in one forward pass.

    Args:
        explainer: explainer of the model.
        image: of any size and mode.
        texts: at least one text.
        as_authors: compute the maps of the authors' package. They differ from the default for SigLIP and
            PE-Core only; see `LeGrad.heatmaps`.
        resize: see `LeGrad.preprocess`.

    Returns:
        Heat maps at the size of the model's input, similarities and the raw grids of every layer, on the CPU.

    Raises:
        InputError: no text, a single string instead of a list, or an unknown `resize`.
        TokenizerError: the explainer was made without a tokenizer.

    Example:
        >>> explanation = legrad.explain_image(explainer, image, ["a panda", "a rocket"])
        >>> bool(explanation.similarities[0] > explanation.similarities[1])
        True
        >>> explanation.overlays[0].size == image.size
        True
    """
    if isinstance(texts, str) or not texts:
        raise InputError(f"texts: expected a list of at least one text, received {texts!r}")
    if as_authors:
        explainer = explainer._by_authors()
    pixels = explainer.preprocess([image], resize=resize)
    trace = explainer.encode(pixels)
    embeddings = explainer.embed_text(texts)
    grids = explainer.relevance(trace, embeddings, per_layer=True)[:, 0]
    neutral_text = explainer.tower.authors_neutral_text
    if as_authors and neutral_text is not None:
        neutral_grids = explainer.relevance(trace, explainer.embed_text([neutral_text]))
        grids = grids.masked_fill(neutral_patches(neutral_grids, AUTHORS_NEUTRAL_THRESHOLD), 0)
    grids = grids.float().cpu()
    normalisation = explainer.tower.normalisation
    return Explanation(
        image=image.convert("RGB"),
        texts=tuple(texts),
        heatmaps=heatmaps_of(grids.sum(dim=0), pixels.shape[2], pixels.shape[3], normalisation),
        similarities=explainer.similarity(trace, embeddings)[0].float().cpu(),
        layer_grids=grids,
        layer_indices=tuple(layer.index for layer in trace.layers),
        normalisation=normalisation,
    )


def layer_strip(explainer: LeGrad, image: Image.Image, text: str, *, panel_side: int = 224) -> Image.Image:
    """Draw the contribution of each layer: one panel for each explained block, and one for their sum.

    All blocks share one colour scale, so the panel of a block that contributes little is pale; its label
    gives the block's share of the total relevance, in per cent.

    Args:
        explainer: made with the `layers` to show.
        image: of any size and mode.
        text: the text to explain.
        panel_side: longer side of a panel, in pixels.

    Returns:
        The panels in one line, first block to last, the sum at the end.

    Source: the per-layer maps of https://arxiv.org/abs/2404.03214, section 3.3.

    Example:
        >>> strip = legrad.layer_strip(explainer, image, "a panda", panel_side=100)
        >>> strip.save(folder / "layers.png")  # two blocks and their sum
    """
    return explain_image(explainer, image, [text])._layer_strip(0, panel_side)
