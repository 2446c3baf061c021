"""Explanations of many images: heat maps, masks, a table, files, and a figure for a notebook."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from legrad.arguments import shown
from legrad.errors import InputError
from legrad.heatmaps import Normalisation, heatmaps_of
from legrad.masks.cleaning import NO_CLEANING, Cleaning
from legrad.masks.grids import ImageMasks, grid_to_masks
from legrad.masks.thresholds import MaskRule
from legrad.pictures import PAPER, draw_panels, fitted, heat_over, overlay

if TYPE_CHECKING:
    import pandas as pd

NOTEBOOK_IMAGES, NOTEBOOK_TEXTS = 8, 8


@dataclass(frozen=True, eq=False)
class ExplainedImage:
    """What is kept of one explained image.

    Attributes:
        name: path of its file as it was passed; empty for an image that came without one.
        height: of the original image, in pixels.
        width: of the original image, in pixels.
        input_size: (height, width) in pixels to which it was resized for the model.
        texts: the texts that it was explained for.
        grids: raw relevance on the patch grid, summed over layers; zero where a neutral text's map was high.
        similarities: cosine similarity of the image and each text; of a classifier, each logit.
        picture: the image as RGB, reduced to the side that `explain_images` was given.
    """

    name: str
    height: int
    width: int
    input_size: tuple[int, int]
    texts: tuple[str, ...]
    grids: Float[Tensor, "texts grid_height grid_width"]
    similarities: Float[Tensor, " texts"]
    picture: Image.Image


class HeatMaps(Sequence[Tensor]):
    """Heat maps of each image, [texts, height, width]; each item is computed when it is accessed."""

    def __init__(self, images: Sequence[ExplainedImage], normalisation: Normalisation) -> None:
        self._images = images
        self._normalisation: Normalisation = normalisation

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> HeatMaps: ...

    def __getitem__(self, index: int | slice) -> Tensor | HeatMaps:
        if isinstance(index, slice):
            return HeatMaps(self._images[index], self._normalisation)
        image = self._images[index]
        return heatmaps_of(image.grids, *image.input_size, self._normalisation)

    def __repr__(self) -> str:
        return f"HeatMaps of {len(self)} images"


@dataclass(frozen=True, eq=False)
class Explanations:
    """Relevance of many images, each for several texts; a notebook displays `grid`.

    Grids are kept, heat maps are computed from them when they are accessed: an image with ten texts takes
    8 KB for a model of 14 x 14 patches, beside its reduced picture.

    Attributes:
        images: what is kept of each image, in the order in which the images were passed.
        normalisation: when grids of this model family are normalised; see `legrad.heatmaps_of`.
        made_by: what the maps were made with, as `save` writes it: versions, model, SHA-256 of its weights,
            preprocessing, layers, neutral text.

    Example:
        >>> images, texts = [image, image.rotate(90)], ["a banana", "a panda"]
        >>> explanations = legrad.explain_images(explainer, images, texts)
        >>> explanations
        Explanations(2 images, 4 heat maps)
        >>> explanations.masks("otsu")[1].rles[0]["size"] == [image.height, image.width]
        True
        >>> legrad.Explanations.load(explanations.save(folder / "pandas")).texts[0]
        ('a banana', 'a panda')
    """

    images: tuple[ExplainedImage, ...]
    normalisation: Normalisation
    made_by: Mapping[str, Any]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __repr__(self) -> str:
        """Return the number of images and maps in a line."""
        maps = sum(len(image.texts) for image in self.images)
        return f"Explanations({len(self)} images, {maps} heat maps)"

    @property
    def maps(self) -> HeatMaps:
        """Heat maps from 0 to 1, [texts, height, width] for each image, at the pixel size of its model input.

        Where sizes and numbers of texts agree, `torch.stack(list(explanations.maps))` is one tensor.
        """
        return HeatMaps(self.images, self.normalisation)

    @property
    def grids(self) -> tuple[Float[Tensor, "_texts _grid_height _grid_width"], ...]:
        """Raw relevance grids of each image, [texts, grid_height, grid_width]."""
        return tuple(image.grids for image in self.images)

    @property
    def similarities(self) -> tuple[Float[Tensor, " _texts"], ...]:
        """Cosine similarities of each image and its texts; of a classifier, logits."""
        return tuple(image.similarities for image in self.images)

    @property
    def score_name(self) -> str:
        """What `similarities` are: "similarity", or "logit" of a classifier."""
        return "logit" if self.made_by.get("score") == "logit" else "similarity"

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """Texts of each image."""
        return tuple(image.texts for image in self.images)

    def masks(self, rule: MaskRule | str = "otsu", *, cleaning: Cleaning = NO_CLEANING) -> list[ImageMasks]:
        """Threshold the heat maps at the size of each original image.

        Args:
            rule: rule for the threshold, or its name; see `legrad.MaskRule`.
            cleaning: smoothing of the grids and cleaning of the masks.

        Returns:
            Masks of each image, one for each of its texts.

        Raises:
            MaskError: there is no such rule.
        """
        chosen = MaskRule(rule) if isinstance(rule, str) else rule
        if not isinstance(chosen, MaskRule):
            raise InputError(
                f"rule: expected the name of a rule or a legrad.MaskRule, received {shown(rule)}; "
                "a threshold of your own is MaskRule('fixed', value=0.4)"
            )
        return [
            grid_to_masks(
                image.grids,
                image.height,
                image.width,
                chosen,
                normalisation=self.normalisation,
                cleaning=cleaning,
            )
            for image in self.images
        ]

    def to_dataframe(self, rules: Sequence[str] | Mapping[str, MaskRule] = ("otsu",)) -> pd.DataFrame:
        """Return a table with one row for each image and text; needs pandas.

        Args:
            rules: names of threshold rules, or rules by a name of your choice.

        Returns:
            Columns: `image` (position), `name` (path, or empty), `height` and `width` of the original image,
            `text`, `similarity` (of a classifier, `logit`), `peak` (largest raw relevance), and for each rule
            `area_NAME`, the pixels of the mask at the original image's size.

        Raises:
            InputError: `rules` is a single name, or pandas is not installed.
            MaskError: there is no such rule.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise InputError("to_dataframe needs pandas; install it with: pip install pandas") from error
        if isinstance(rules, str | MaskRule) or not isinstance(rules, Iterable):
            raise InputError(f"rules: expected a list of names, received {rules!r}; pass [{rules!r}]")
        named = rules if isinstance(rules, Mapping) else {name: MaskRule(name) for name in rules}
        areas = {name: [masks.areas for masks in self.masks(rule)] for name, rule in named.items()}
        rows = [
            {
                "image": position,
                "name": image.name,
                "height": image.height,
                "width": image.width,
                "text": text,
                self.score_name: float(image.similarities[number]),
                "peak": float(image.grids[number].max()),
                **{f"area_{name}": int(areas[name][position][number]) for name in named},
            }
            for position, image in enumerate(self.images)
            for number, text in enumerate(image.texts)
        ]
        return pd.DataFrame(rows)

    def grid(
        self, *, panel_side: int = 160, max_images: int = NOTEBOOK_IMAGES, max_texts: int = NOTEBOOK_TEXTS
    ) -> Image.Image:
        """Draw a figure: images as rows, their texts as columns.

        Args:
            panel_side: side of the square into which each panel fits, in pixels.
            max_images: largest number of rows; the first images are drawn.
            max_texts: largest number of texts of an image; its first texts are drawn.

        Returns:
            A picture; below each heat map are its text and its similarity.

        Raises:
            InputError: there are no images, or a number is below 1.
        """
        sizes = (panel_side, max_images, max_texts)
        if not all(isinstance(size, int | np.integer) and size >= 1 for size in sizes):
            raise InputError("grid: expected whole panel_side, max_images and max_texts of at least 1")
        if not self.images:
            raise InputError("grid: there are no images")
        shown = self.images[:max_images]
        columns = 1 + min(max_texts, max(len(image.texts) for image in shown))
        cells = [cell for position in range(len(shown)) for cell in self._row(position, columns, panel_side)]
        return draw_panels([label for label, _ in cells], [panel for _, panel in cells], per_line=columns)

    def _row(
        self, position: int, columns: int, side: int
    ) -> Iterator[tuple[tuple[str, ...], UInt8[np.ndarray, "side side 3"]]]:
        """Yield the label and the panel of an image and of each of its first texts, then empty ones."""
        image = self.images[position]
        photo = np.asarray(fitted(image.picture, side))
        yield (_last_part(image.name) or f"image {position}",), _centred(photo, side)
        drawn = self.maps[position][: columns - 1]
        for text, similarity, heatmap in zip(image.texts, image.similarities.tolist(), drawn, strict=False):
            yield (text, f"{self.score_name} {similarity:.3f}"), _centred(heat_over(photo, heatmap), side)
        for _ in range(columns - 1 - len(drawn)):
            yield ("",), _centred(photo[:0, :0], side)

    def overlays(self, position: int) -> tuple[Image.Image, ...]:
        """Return the heat maps of one image over its greyed, reduced picture.

        Args:
            position: of the image, from 0 on.

        Raises:
            InputError: there is no image at this position.
        """
        if position not in range(len(self)):
            raise InputError(f"position: expected 0 to {len(self) - 1}, received {position!r}")
        return tuple(overlay(self.images[position].picture, heatmap) for heatmap in self.maps[position])

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        pictures: bool = True,
        model_name: str = "",
    ) -> Path:
        """Write everything to a folder, from which `load` reads it.

        `manifest.json` names what the maps were made with, texts and files; it is written last, so that a
        folder without it is not complete. `grids.npz` holds the raw grids and similarities.
        `00012-image.png` is the reduced picture of the image at position 12, `00012-003-heatmap.png` the heat
        map of its text 3 in levels of grey at the size of the model's input, `00012-003-overlay.png` the same
        over the picture. Texts and names of images are never parts of file names.

        Args:
            folder: new or empty, unless `overwrite` is set.
            overwrite: replace the files of an earlier `save`; other files of the folder stay.
            pictures: also write a heat map and an overlay for each text.
            model_name: your name for the model, for the manifest: the explainer knows its class and weights
                only.

        Returns:
            The folder.

        Raises:
            InputError: the folder is not empty, or a file cannot be written.
        """
        from legrad.explanation_files import save_explanations

        return save_explanations(self, folder, overwrite=overwrite, pictures=pictures, model_name=model_name)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Explanations:
        """Read what `save` wrote; no code of the folder runs.

        Args:
            folder: of `save`.

        Raises:
            InputError: the folder is not complete, or one of its files is damaged.
        """
        from legrad.explanation_files import load_explanations

        return load_explanations(folder)

    def _repr_png_(self) -> bytes:
        """Return the picture that a notebook displays."""
        return png_bytes(self.grid())


def png_bytes(picture: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    return sink.getvalue()


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _centred(panel: UInt8[np.ndarray, "height width 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Put a panel in the middle of a white square."""
    square = np.full((side, side, 3), PAPER, np.uint8)
    height, width = panel.shape[:2]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = panel
    return square
