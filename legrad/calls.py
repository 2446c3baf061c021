"""Split a call over many images and prompts into parts, so that its temporaries stay within a memory budget.

    images, prompts -> parts of consecutive images -> parts of their prompts -> one piece of the result each

What counts is memory beside the arguments and the result: the trace of the images of a part, if they are not
encoded yet, gradients of prompts, and maps that are not normalised yet. Bytes are estimated from the shapes
of the tower. A part has at least one image and one prompt, whatever they take.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from legrad.arguments import as_output_sizes, check_budget
from legrad.heatmaps import Normalisation, heatmaps_of
from legrad.inputs import RaggedPrompts, as_ragged, check_image_index, check_text_embeddings
from legrad.method.affinity import KEY_BLOCKS
from legrad.method.relevance import CPU_MEMORY_BUDGET_BYTES, DEVICE_MEMORY_BUDGET_BYTES
from legrad.method.stages import Gate, Linear, Stage, accumulation_dtype
from legrad.method.towers import Block, Scoring, Tower
from legrad.method.trace import Trace

# On a CPU, larger parts are no faster; a device needs many images and prompts at once to be busy.
CPU_BUDGET_BYTES = 512 * 2**20
DEVICE_BUDGET_BYTES = 8 * 2**30
# Shares of a budget: the images of a part, the gradients and maps of its prompts, and one step of the method.
_SHARE_OF_IMAGES, _SHARE_OF_PROMPTS, _SHARE_OF_STEP = 3 / 4, 1 / 8, 1 / 16
# Copies of a map that exist at once: upsampled, stacked, normalised.
_COPIES_OF_MAP = 4
# Rows of a prompt that exist at once: unit text, feature, their product, gradients.
_COPIES_OF_ROW = 10
# Floats for each value of a preprocessed image that a convolutional stem holds at once.
_STEM_COPIES = 12

Rows = slice | Int[Tensor, " prompts"]


@dataclass(frozen=True)
class Steps:
    """How much of a call is computed at once.

    Attributes:
        images: number of images of a part.
        pairs: number of pairs of an image and a prompt of a part.
        step_bytes: bound on the temporaries of a step of the method.
    """

    images: int
    pairs: int
    step_bytes: int


def steps_within(
    memory_budget_bytes: int | None,
    tower: Tower,
    scoring: Scoring,
    *,
    patches: int,
    layers: int,
    map_pixels: int,
) -> Steps:
    """Return how much of a call fits a memory budget.

    Args:
        memory_budget_bytes: see `legrad.LeGrad.relevance`.
        tower: description of the tower.
        scoring: how layers are scored.
        patches: number of patches of an image.
        layers: number of explained layers.
        map_pixels: number of pixels of the largest heat map; 0: only relevance grids are computed.
    """
    is_cpu = tower.parameter().device.type == "cpu"
    budget = memory_budget_bytes or (CPU_BUDGET_BYTES if is_cpu else DEVICE_BUDGET_BYTES)
    most = CPU_MEMORY_BUDGET_BYTES if is_cpu else DEVICE_MEMORY_BUDGET_BYTES
    number_bytes = accumulation_dtype(tower.parameter().dtype).itemsize
    numbers_of_pair = (
        _COPIES_OF_ROW * max(tower.embed_dim, _width(tower.blocks[-1]))
        + (layers + 4) * patches
        + _COPIES_OF_MAP * map_pixels
    )
    image_bytes = bytes_of_image(tower, scoring, patches, layers)
    return Steps(
        max(1, int(budget * _SHARE_OF_IMAGES) // image_bytes),
        max(1, int(budget * _SHARE_OF_PROMPTS) // (number_bytes * numbers_of_pair)),
        max(1, min(most, int(budget * _SHARE_OF_STEP))),
    )


def bytes_of_image(tower: Tower, scoring: Scoring, patches: int, layers: int) -> int:
    """Estimate the memory that encoding one image takes, with what its trace keeps."""
    tokens, pixels = tower.prefix_tokens + patches, patches * tower.patch_size**2
    block = tower.blocks[-1]
    # A block runs while the values of the one before are still held; q, k and v are split and joined.
    running = 2 * _kept_width(block) + 8 * _width(block) + 2 * _widest(block)
    pooler = 0 if scoring.pooler is None else 4 * _width(block) + _kept_width(scoring.pooler)
    numbers = tokens * (layers * (_kept_width(block) + pooler) + running + pooler)
    keys = KEY_BLOCKS * _width(block) * patches
    return (numbers + 2 * keys + _STEM_COPIES * 3 * pixels) * tower.parameter().element_size()


@dataclass(frozen=True)
class Part:
    """Some prompts of some consecutive images.

    Attributes:
        images: the images.
        prompts: the prompts, in flat form, with rows of images counted from the first of the part.
        place: where the part is in the result's leading axes.
        is_all: whether it is the whole call.
    """

    images: slice
    prompts: RaggedPrompts
    place: tuple[Rows, ...]
    is_all: bool


@dataclass(frozen=True)
class Call:
    """Images and prompts of one call, checked.

    Attributes:
        images: preprocessed images, or their trace.
        text_embeddings: [batch, prompts, embed_dim]; [prompts, embed_dim]: every prompt for every image; or
            [prompts, embed_dim] with an index.
        image_index: for each prompt the row of its image, or None.
        map_sizes: (height, width) of all heat maps, or one for each image.
        steps: how much is computed at once.
    """

    images: Tensor | Trace
    text_embeddings: Tensor
    image_index: Tensor | None
    map_sizes: tuple[int, int] | list[tuple[int, int]]
    steps: Steps

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return self.images.batch_size if isinstance(self.images, Trace) else len(self.images)

    @property
    def leading(self) -> tuple[int, ...]:
        """Leading axes of the result: (batch, prompts), or (prompts,) with an index."""
        prompts = self.text_embeddings.shape[-2]
        return (self.batch_size, prompts) if self.image_index is None else (prompts,)

    def images_of_parts(self) -> Iterator[slice]:
        """Yield the images of each part; at least one slice, empty if there are no images or prompts."""
        prompts = self.text_embeddings.shape[-2]
        per_image = 1 if self.image_index is not None else max(1, prompts)
        step = min(self.steps.images, max(1, self.steps.pairs // per_image))
        batch = self.batch_size if prompts or self.image_index is None else 0
        for start in range(0, max(1, batch), step):
            yield slice(start, min(start + step, batch))

    def images_at(self, images: slice) -> Tensor | Trace:
        """Return the preprocessed images of a part, or their trace."""
        if images == slice(0, self.batch_size):
            return self.images
        return self.images.rows(images) if isinstance(self.images, Trace) else self.images[images]

    def parts(self, images: slice, trace: Trace) -> Iterator[Part]:
        """Yield the prompts of some images, part by part.

        Args:
            images: as `images_of_parts` yields them.
            trace: of these images.
        """
        if self.image_index is None:
            yield from self._table_parts(images, trace)
        else:
            yield from self._ragged_parts(self.image_index, images, trace)

    def _table_parts(self, images: slice, trace: Trace) -> Iterator[Part]:
        prompts = self.text_embeddings.shape[-2]
        step = max(1, self.steps.pairs // max(1, trace.batch_size))
        of_images = self.text_embeddings[images] if self.text_embeddings.ndim == 3 else self.text_embeddings
        for start in range(0, max(1, prompts), step):
            columns = slice(start, min(start + step, prompts))
            flat = as_ragged(trace.image_features, of_images[..., columns, :], None)
            is_all = trace.batch_size == self.batch_size and step >= prompts
            yield Part(images, flat, (images, columns), is_all)

    def _ragged_parts(self, image_index: Tensor, images: slice, trace: Trace) -> Iterator[Part]:
        is_every_image = trace.batch_size == self.batch_size or not len(image_index)
        if is_every_image and len(image_index) <= self.steps.pairs:
            flat = as_ragged(trace.image_features, self.text_embeddings, image_index)
            yield Part(images, flat, (slice(0, len(image_index)),), is_all=True)
            return
        is_here = (image_index >= images.start) & (image_index < images.stop)
        for rows in is_here.nonzero().flatten().split(self.steps.pairs):
            texts = self.text_embeddings[rows.to(self.text_embeddings.device)]
            flat = as_ragged(trace.image_features, texts, image_index[rows] - images.start)
            yield Part(images, flat, (rows,), is_all=False)


def checked_call(
    tower: Tower,
    scoring: Scoring,
    images: Tensor | Trace,
    text_embeddings: Any,
    image_index: Any,
    *,
    layers: int,
    memory_budget_bytes: Any = None,
    output_size: Any = None,
    is_of_maps: bool = False,
) -> Call:
    """Return a call, given images that were checked and the caller's other arguments.

    Args:
        tower: description of the tower.
        scoring: how layers are scored.
        images: preprocessed images, or their trace.
        text_embeddings: see `legrad.LeGrad.relevance`.
        image_index: see `legrad.LeGrad.relevance`.
        layers: number of explained layers.
        memory_budget_bytes: see `legrad.LeGrad.relevance`.
        output_size: see `legrad.LeGrad.heatmaps`.
        is_of_maps: whether heat maps are computed.

    Raises:
        InputError: an argument does not fit.
    """
    budget, patch = check_budget(memory_budget_bytes), tower.patch_size
    like = features_like(tower, images)
    if isinstance(images, Trace):
        grid = (images.grid_height, images.grid_width)
    else:
        grid = (images.shape[2] // patch, images.shape[3] // patch)
    check_text_embeddings(like, text_embeddings)
    if image_index is not None:
        image_index = check_image_index(image_index, text_embeddings, len(like))
    sizes = as_output_sizes(output_size, len(like)) or (patch * grid[0], patch * grid[1])
    largest = max(
        (height * width for height, width in ([sizes] if isinstance(sizes, tuple) else sizes)), default=0
    )
    steps = steps_within(
        budget,
        tower,
        scoring,
        patches=grid[0] * grid[1],
        layers=layers,
        map_pixels=largest if is_of_maps else 0,
    )
    return Call(images, text_embeddings, image_index, sizes, steps)


def features_like(tower: Tower, images: Tensor | Trace) -> Float[Tensor, "batch embed_dim"]:
    """Return a tensor of the shape, dtype and device of the images' features."""
    if isinstance(images, Trace):
        return images.image_features
    return images.new_empty(len(images), tower.embed_dim)


def joined(call: Call, pieces: Iterable[tuple[Part, Tensor]]) -> Tensor:
    """Return the result of a call, given that of each part.

    Args:
        call: the call.
        pieces: parts with their results [*layers, *place, height, width].
    """
    result: Tensor | None = None
    for part, piece in pieces:
        if part.is_all:
            return piece
        if result is None:
            layers = piece.shape[: piece.ndim - 2 - len(part.place)]
            result = _empty_maps(piece, (*layers, *call.leading), piece.shape[-2], piece.shape[-1])
        result[(..., *_on(result.device, part.place), slice(None), slice(None))] = piece
    if result is None:
        raise ValueError("a call has at least one part")
    return result


def joined_by_image(
    call: Call,
    pieces: Iterable[tuple[Part, Tensor]],
    sizes: Sequence[tuple[int, int]],
    normalisation: Normalisation,
) -> list[Float[Tensor, "_prompts _height _width"]]:
    """Return heat maps of one size for each image, in the order of its prompts.

    Args:
        call: the call.
        pieces: parts with their relevance grids.
        sizes: (height, width) of the heat maps of each image.
        normalisation: see `legrad.heatmaps_of`.
    """
    counts, places = _places_of_prompts(call)
    results: list[Tensor] = []
    for part, piece in pieces:
        if not results:
            results = [_empty_maps(piece, (count,), *size) for count, size in zip(counts, sizes, strict=True)]
        grids = piece.reshape(-1, *piece.shape[-2:])
        owners = part.prompts.image_index.cpu() + part.images.start
        own_places = places[_on(places.device, part.place)].flatten()
        for image in owners.unique().tolist():
            here = (owners == image).nonzero().flatten()
            height, width = sizes[image]
            maps = heatmaps_of(grids[here.to(grids.device)], height, width, normalisation)
            results[image][own_places[here].to(maps.device)] = maps
    return results


def _places_of_prompts(call: Call) -> tuple[list[int], Int[Tensor, "*leading"]]:
    """Return the number of prompts of each image, and for each prompt its place among those of its image."""
    if call.image_index is None:
        batch, prompts = call.leading
        return [prompts] * batch, torch.arange(prompts).expand(batch, prompts)
    owners = call.image_index.cpu()
    counts = owners.bincount(minlength=call.batch_size)
    order = owners.argsort(stable=True)
    places = torch.empty_like(owners)
    places[order] = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners[order]]
    return counts.tolist(), places


def _on(device: torch.device, place: tuple[Rows, ...]) -> tuple[Rows, ...]:
    return tuple(rows if isinstance(rows, slice) else rows.to(device) for rows in place)


def _empty_maps(like: Tensor, leading: tuple[int, ...], height: int, width: int) -> Tensor:
    """Return room for maps that are stored as others are: row by row, or column by column."""
    is_by_column = like.stride(-2) == 1 and like.stride(-1) != 1
    return (
        like.new_empty(*leading, width, height).mT
        if is_by_column
        else like.new_empty(*leading, height, width)
    )


def _width(block: Block) -> int:
    """Return the width of a block's tokens."""
    return max((stage.weight().shape[0] for stage in block.out if isinstance(stage, Linear)), default=1)


def _widest(block: Block) -> int:
    return max(
        (max(stage.weight().shape) for stage in (*block.out, *block.mlp) if isinstance(stage, Linear)),
        default=_width(block),
    )


def _kept_width(block: Block) -> int:
    """Return how many numbers a layer's trace keeps for each token: values, outputs, and inputs of stages."""
    width = _width(block)
    kept, current = 2 * width, width
    stages: tuple[Stage, ...] = (*block.out, *block.mlp)
    for stage in stages:
        if isinstance(stage, Linear):
            current = stage.weight().shape[0]
        else:
            kept += 0 if stage.is_linear else current
        if isinstance(stage, Gate):
            current //= 2
    return kept
