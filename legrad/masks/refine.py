"""Pixel-adaptive refinement: heat maps that follow the edges of their image.

Every pixel of a map becomes a weighted mean of its neighbours, again and again; a neighbour weighs the more
the closer its colour is. So relevance spreads within a surface and stops at its edge.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Shaped
from torch import Tensor

from legrad.errors import InputError
from legrad.masks.contrast import PUBLISHED_CONTRAST

DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
DEFAULT_MAX_BYTES = 2**28
_FLOAT_BYTES = 4
_TINY = 1e-8


def dilations_for_patch(patch_pixels: int) -> tuple[int, ...]:
    """Give steps that reach as far as relevance is blurred: a quarter, a half, one and two patches.

    Args:
        patch_pixels: side of a patch in the frame of the heat maps.

    Returns:
        Different steps in pixels, ascending. The papers' own, up to 24 px, are made for maps of whole images
        from convolutional networks.
    """
    return tuple(
        sorted({max(1, patch_pixels // 4), max(1, patch_pixels // 2), patch_pixels, 2 * patch_pixels})
    )


@dataclass(frozen=True)
class Refinement:
    """How heat maps are refined.

    Attributes:
        kernel: how colour distance becomes affinity. pamr: exp(-|difference| / (contrast * deviation)), with
            the mean over the channels in the exponent; par: the square of that ratio instead, and a share of
            the weight goes by distance in the frame alone.
        iterations: how often every pixel becomes the mean of its neighbours.
        dilations: steps in pixels to eight neighbours each; see `dilations_for_patch`.
        contrast: share of the neighbours' standard deviation that counts as one unit of colour distance; the
            smaller, the sharper. None: the authors' own, 0.1 for pamr and 0.3 for par.
        position_weight: weight of nearness beside colour, the authors' own; par only.

    Source: pamr: Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels" (CVPR 2020),
        section 3.3. par: Ru et al., "Learning Affinity from Attention" (CVPR 2022), section on
        pixel-adaptive refinement. Iterations and dilations: chosen on scenes of the demo's held-out set.
    """

    kernel: str = "par"
    iterations: int = 8
    dilations: tuple[int, ...] = (4, 8, 16, 32)
    contrast: float | None = None
    position_weight: float = 0.01

    def __post_init__(self) -> None:
        if self.kernel not in PUBLISHED_CONTRAST:
            raise InputError(f"kernel: expected 'pamr' or 'par', received {self.kernel!r}")
        if self.iterations < 1:
            raise InputError(f"iterations: expected at least 1, received {self.iterations}")
        if not self.dilations or min(self.dilations) < 1 or len(set(self.dilations)) < len(self.dilations):
            raise InputError(
                f"dilations: expected different steps of at least 1 px, received {self.dilations}"
            )
        if not self.unit_contrast > 0:
            raise InputError(f"contrast: expected more than 0, received {self.contrast}")
        if not self.position_weight >= 0:
            raise InputError(f"position_weight: expected at least 0, received {self.position_weight}")

    @property
    def unit_contrast(self) -> float:
        """The contrast in force."""
        return PUBLISHED_CONTRAST[self.kernel] if self.contrast is None else self.contrast


def refine_heatmaps(
    images: Shaped[Tensor, "images channels height width"],
    heatmaps: Float[Tensor, "*leading map_height map_width"],
    image_index: Int[Tensor, " indices"] | None = None,
    refinement: Refinement = Refinement(),
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Float32[Tensor, "*leading map_height map_width"]:
    """Let heat maps follow the edges of their images.

    Args:
        images: pixels in any range, integer or float: only ratios of differences count, so normalised pixels
            do as well as raw ones.
        heatmaps: maps in the images' frame, on their device, of any range: [maps, height, width] with
            `image_index`; without it [images, prompts, height, width] or [images, height, width].
        image_index: of each map, the row of its image.
        refinement: which neighbours, how often, how sharp.
        max_bytes: working memory beside arguments and result, though never less than what one map of one
            image takes.

    Returns:
        Refined maps. Each pixel is a convex combination of pixels of its own map, so a map never leaves its
        range, a constant map stays as it is, and peaks become lower: min-max normalise before a fixed cut.

    Raises:
        InputError: the frames differ, or the index does not fit.
    """
    index = _checked_index(images, heatmaps, image_index)
    height, width = heatmaps.shape[-2:]
    maps = heatmaps.reshape(-1, height, width)
    refined = torch.empty(maps.shape, dtype=torch.float32, device=maps.device)
    map_bytes = height * width * _FLOAT_BYTES
    # weights before and after they are made to sum to 1, and a few frames of colours
    affinity_bytes = map_bytes * (16 * len(refinement.dilations) + 8 * images.shape[1])
    # maps are padded by the widest step, and two generations of them are held at a time
    padded_bytes = map_bytes + _FLOAT_BYTES * _padded_pixels(height, width, max(refinement.dilations))
    for map_rows in _groups(index, len(images), max_bytes, affinity_bytes, padded_bytes):
        affinities = _affinities(_as_rows(images[index[map_rows[:, 0]]]), refinement)
        per_image = max(1, (max_bytes // len(map_rows) - affinity_bytes) // padded_bytes)
        for rows in torch.split(map_rows, per_image, dim=1):
            refined[rows] = _diffuse(_as_rows(maps[rows]), affinities, refinement)
    return refined.reshape(heatmaps.shape)


def _as_rows(frames: Tensor) -> Float32[Tensor, "images channels height width"]:
    # pixels often come with their channels last and maps column by column, which is twice as slow here
    return frames.to(torch.float32).contiguous()


def _padded_pixels(height: int, width: int, margin: int) -> int:
    return (height + 2 * margin) * (width + 2 * margin)


def _checked_index(
    images: Tensor, heatmaps: Tensor, image_index: Int[Tensor, " indices"] | None
) -> Int[Tensor, " maps"]:
    if images.shape[-2:] != heatmaps.shape[-2:]:
        raise InputError(
            f"expected heat maps in the images' frame {tuple(images.shape[-2:])}, received "
            f"{tuple(heatmaps.shape[-2:])}"
        )
    leading = heatmaps.shape[:-2]
    if image_index is None:
        if not leading or leading[0] != len(images):
            raise InputError(
                f"expected heat maps of each of {len(images)} images, or image_index; received heat maps of "
                f"shape {tuple(heatmaps.shape)}"
            )
        return torch.arange(len(images)).repeat_interleave(leading[1:].numel())
    index = image_index.cpu()
    if leading != index.shape or bool(((index < 0) | (index >= len(images))).any()):
        raise InputError(
            f"image_index: expected a row of {len(images)} images for each of the heat maps "
            f"{tuple(leading)}, received {index.tolist()}"
        )
    return index


def _groups(
    index: Int[Tensor, " maps"], images: int, max_bytes: int, affinity_bytes: int, map_bytes: int
) -> Iterator[Int[Tensor, "images maps_per_image"]]:
    """Rows of maps of images that have equally many, so that a group is dense; few enough to fit."""
    counts = torch.bincount(index, minlength=images)
    by_image = torch.split(torch.argsort(index, stable=True), counts.tolist())
    for count in sorted(set(counts.tolist())):
        if count:
            rows = torch.stack([by_image[image] for image in (counts == count).nonzero().flatten().tolist()])
            yield from torch.split(rows, max(1, max_bytes // (affinity_bytes + count * map_bytes)))


def _neighbours(
    padded: Float[Tensor, "*leading padded_height padded_width"], dilations: tuple[int, ...]
) -> Iterator[Float[Tensor, "*leading height width"]]:
    """Views of a padded frame, each shifted to one neighbour of every pixel."""
    margin = max(dilations)
    height, width = padded.shape[-2] - 2 * margin, padded.shape[-1] - 2 * margin
    for step in dilations:
        for down, right in DIRECTIONS:
            top, left = margin + step * down, margin + step * right
            yield padded[..., top : top + height, left : left + width]


def _padded(
    frames: Float[Tensor, "images channels height width"], dilations: tuple[int, ...]
) -> Float[Tensor, "images channels padded_height padded_width"]:
    # beyond the border stands the border itself: no value comes in that the frame does not have
    return F.pad(frames, (max(dilations),) * 4, mode="replicate")


def _affinities(
    pixels: Float32[Tensor, "images channels height width"], refinement: Refinement
) -> Float32[Tensor, "neighbours images 1 height width"]:
    """Weights of every pixel's neighbours; they sum to 1."""
    dilations = refinement.dilations
    padded = _padded(pixels, dilations)
    inverse_unit = (
        _local_deviation(pixels, padded, dilations) * refinement.unit_contrast + _TINY
    ).reciprocal_()
    images, _, height, width = pixels.shape
    exponents = pixels.new_empty((8 * len(dilations), images, 1, height, width))
    for neighbour, exponent in zip(_neighbours(padded, dilations), exponents, strict=True):
        distance = (neighbour - pixels).mul_(inverse_unit)
        distance = distance.abs_() if refinement.kernel == "pamr" else distance.square_()
        torch.mean(distance, dim=1, keepdim=True, out=exponent)
    weights = torch.softmax(exponents.neg_(), dim=0)
    if refinement.kernel == "pamr":
        return weights
    near = _nearness(refinement).to(pixels.device).view(-1, 1, 1, 1, 1)
    return weights.add_(near, alpha=refinement.position_weight).div_(1 + refinement.position_weight)


def _nearness(refinement: Refinement) -> Float32[Tensor, " neighbours"]:
    steps = torch.tensor([(down, right) for down, right in DIRECTIONS], dtype=torch.float32).norm(dim=1)
    distances = torch.cat([steps * dilation for dilation in refinement.dilations])
    unit = refinement.unit_contrast * distances.std(correction=0) + _TINY
    return torch.softmax(-((distances / unit) ** 2), dim=0)


def _local_deviation(
    pixels: Float32[Tensor, "images channels height width"],
    padded: Float32[Tensor, "images channels padded_height padded_width"],
    dilations: tuple[int, ...],
) -> Float32[Tensor, "images channels height width"]:
    """Standard deviation of every pixel's neighbours, in each channel."""
    # of differences to the pixel itself, which lose no digits to a large mean
    total, squares = torch.zeros_like(pixels), torch.zeros_like(pixels)
    for neighbour in _neighbours(padded, dilations):
        difference = neighbour - pixels
        total += difference
        squares.addcmul_(difference, difference)
    neighbours = 8 * len(dilations)
    mean = total.div_(neighbours)
    return squares.div_(neighbours).addcmul_(mean, mean, value=-1).clamp_(min=0).sqrt_()


def _diffuse(
    maps: Float32[Tensor, "images maps height width"],
    affinities: Float32[Tensor, "neighbours images 1 height width"],
    refinement: Refinement,
) -> Float32[Tensor, "images maps height width"]:
    # rounding may carry a weighted mean past the values it is made of
    lowest, highest = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    for _ in range(refinement.iterations):
        padded = _padded(maps, refinement.dilations)
        maps = torch.zeros_like(maps)
        for neighbour, weight in zip(_neighbours(padded, refinement.dilations), affinities, strict=True):
            maps.addcmul_(neighbour, weight)
    return maps.clamp_(lowest, highest)
