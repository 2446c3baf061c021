"""What the tables have in common: the model, the maps of all methods, and reading the images of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt16
from torch import Tensor

import legrad
from legrad.method.trace import trace_images
from legrad.text_cache import TextEmbedder
from pipeline.datasets.truth_dataset import MAX_IMAGE_PIXELS, TruthDataset, TruthSample
from pipeline.errors import SampleFailure
from pipeline.evaluation.map_methods import legrad_grids, legrad_name
from pipeline.reproduce import paper
from pipeline.shards.images import DecodedImage, decode_image
from pipeline.text import printable

BATCH_SIZE = 16
MAX_MESSAGE_CHARACTERS = 300
USED, SKIPPED, ERROR = "used", "skipped", "error"

Record = dict[str, Any]


@dataclass(frozen=True)
class ReadSample:
    """An image of a dataset with its ground truth, ready for the model."""

    name: str
    truth: TruthSample
    image: DecodedImage

    @property
    def class_ids(self) -> list[int]:
        """The classes in the image."""
        return list(self.truth.document["class_ids"])

    @property
    def label_map(self) -> UInt16[np.ndarray, "height width"]:
        """Class of each pixel; raises ValueError where the truth has none."""
        if self.truth.label_map is None:
            raise ValueError(f"{self.name}: expected a label map, found none")
        return self.truth.label_map

    @property
    def captions(self) -> list[str]:
        """A name for each class."""
        return list(self.truth.document["captions"])


class Methods:
    """One model, and the maps of every compared method.

    Attributes:
        explainer: the model.
        names: the methods, LeGrad's first.
    """

    def __init__(self, explainer: legrad.LeGrad) -> None:
        self.explainer = explainer
        self._depth = len(explainer.tower.blocks)
        self._layers = sorted({min(paper.LAYERS, self._depth), self._depth})
        own = [legrad_name(layers, self._depth) for layers in self._layers]
        self.names: tuple[str, ...] = (*own, *paper.BASELINES)
        # Text by text, so that an embedding does not depend on the texts beside it.
        self._texts = TextEmbedder(explainer, batch_size=1)

    def embed(self, captions: Sequence[str]) -> Float[Tensor, "texts embed_dim"]:
        """Embed names of classes in the paper's template."""
        return self._texts.embed([paper.TEMPLATE.format(caption) for caption in captions]).unit_rows

    def images(self, batch: Sequence[ReadSample]) -> Float[Tensor, "batch 3 height width"]:
        """Return the images as the model takes them."""
        pixels = torch.from_numpy(np.stack([sample.image.pixels for sample in batch]))
        return self.explainer.transform.normalise(pixels.to(self.explainer.device), self.explainer.dtype)

    def maps_of_classes(
        self, batch: Sequence[ReadSample]
    ) -> dict[str, Float[Tensor, "pairs grid_height grid_width"]]:
        """Return the raw maps of each class in each image, in that order."""
        captions = [caption for sample in batch for caption in sample.captions]
        rows = [row for row, sample in enumerate(batch) for _ in sample.captions]
        index = torch.tensor(rows, device=self.explainer.device)
        return self.maps(self.images(batch), self.embed(captions), index)

    def maps(
        self,
        images: Float[Tensor, "batch 3 height width"],
        texts: Float[Tensor, "pairs embed_dim"],
        image_index: Int[Tensor, " pairs"],
    ) -> dict[str, Float[Tensor, "pairs grid_height grid_width"]]:
        """Return the raw maps of every method, by name."""
        explainer = self.explainer
        trace = trace_images(explainer.tower, images, self._depth, explainer.scoring)
        own = legrad_grids(explainer, trace, texts, image_index, self._layers, spread_layers=self._depth)
        others = legrad.baseline_grids(explainer, images, texts, image_index, methods=paper.BASELINES)
        return {name: grids.float().cpu() for name, grids in (own | others).items()}

    def heatmaps(
        self, maps: Mapping[str, Tensor], pair: int, height: int, width: int
    ) -> Iterator[tuple[str, Float[Tensor, "height width"]]]:
        """Yield the heat map of one pair by each method, in a frame of pixels, one at a time."""
        for name, grids in maps.items():
            heat = legrad.heatmaps_of(grids[pair], height, width, self.explainer.tower.normalisation)
            yield name, heat


Measure = Callable[[Methods, Sequence[ReadSample]], list[Record]]


def measure_batch(
    methods: Methods, dataset: TruthDataset, names: Sequence[str], measure: Measure
) -> list[Record]:
    """Return one record for each image of a batch, in its order; images that cannot be used are counted.

    Args:
        methods: the model and the compared methods.
        dataset: opened.
        names: images of the dataset.
        measure: returns what a table keeps of the images that have a class.
    """
    records: dict[str, Record] = {}
    usable = []
    for name in names:
        try:
            sample = _read(methods, dataset, name)
        except SampleFailure as failure:
            records[name] = _unused(name, ERROR, f"{failure.stage}/{failure.kind}", failure.message)
            continue
        if sample.class_ids:
            usable.append(sample)
        else:
            records[name] = _unused(name, SKIPPED, "no_class", "the image has none of the classes")
    measured = measure(methods, usable) if usable else []
    for sample, values in zip(usable, measured, strict=True):
        records[sample.name] = {"name": sample.name, "state": USED} | values
    return [records[name] for name in names]


def _read(methods: Methods, dataset: TruthDataset, name: str) -> ReadSample:
    truth = dataset.read(name)
    image = decode_image(truth.image, methods.explainer.transform, max_image_pixels=MAX_IMAGE_PIXELS)
    return ReadSample(name, truth, image)


def _unused(name: str, state: str, kind: str, message: str) -> Record:
    return {
        "name": name,
        "state": state,
        "kind": kind,
        "message": printable(message[:MAX_MESSAGE_CHARACTERS]),
    }
