"""Pixel-adaptive refinement: let heat maps follow the edges of their image.

Every pixel of a map is repeatedly replaced by a weighted mean of its neighbours. Neighbours of similar colour
have higher weights, so relevance spreads within a surface and stops at its edge.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Shaped
from torch import Tensor

from legrad.errors import InputError
from legrad.masks.sharpness import PUBLISHED_SHARPNESS
from legrad.triton_kernel import TritonKernel

DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
DEFAULT_MAX_BYTES = 2**28
# `legrad.masks.refine_triton` on CUDA devices, until it fails.
REFINEMENT_KERNELS = TritonKernel("pixel-adaptive refinement")
# A group that fits into a processor's cache takes little more than half the time of a large one.
CPU_GROUP_BYTES_PER_THREAD = 2**24
_FLOAT_BYTES = 4
_TINY = 1e-8


def dilations_for_patch(patch_pixels: int) -> tuple[int, ...]:
    """Return dilations for `Refinement` that match the blur of a patch grid: 1/4, 1/2, 1 and 2 patches.

    Args:
        patch_pixels: side of a patch in the frame of the heat maps, in pixels.

    Returns:
        Distinct steps in pixels, ascending. The dilations of the papers, up to 24 pixels, are meant for maps
        of convolutional networks.

    Example:
        >>> legrad.dilations_for_patch(16)
        (4, 8, 16, 32)
    """
    steps = {max(1, patch_pixels // 4), max(1, patch_pixels // 2), patch_pixels, 2 * patch_pixels}
    return tuple(sorted(steps))


@dataclass(frozen=True)
class Refinement:
    """Parameters of the refinement of heat maps.

    Attributes:
        kernel: weight of a neighbour by its colour. "pamr": exp(-|difference| / (sharpness * deviation)),
            with the mean over the channels in the exponent; "par": the square of that ratio in the exponent,
            plus a term that depends on the distance in the frame only.
        iterations: number of times that every pixel is replaced by the mean of its neighbours, at least 1.
        dilations: distances in pixels, each to eight neighbours; see `dilations_for_patch`.
        sharpness: unit of colour distance, as a share of the neighbours' standard deviation, above 0; smaller
            is sharper. None: the authors' choice, 0.1 for "pamr" and 0.3 for "par".
        position_weight: weight of the term by distance relative to that by colour, at least 0; "par" only.

    Raises:
        InputError: a value is out of range.

    Source: pamr: Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels" (CVPR 2020),
        section 3.3. par: Ru et al., "Learning Affinity from Attention" (CVPR 2022), section on
        pixel-adaptive refinement. Iterations and dilations: chosen on scenes of the demo's held-out set.

    Example:
        >>> refinement = legrad.Refinement(dilations=legrad.dilations_for_patch(explainer.patch_size))
        >>> refinement.dilations, refinement.unit_sharpness
        ((2, 4, 8, 16), 0.3)
    """

    kernel: str = "par"
    iterations: int = 8
    dilations: tuple[int, ...] = (4, 8, 16, 32)
    sharpness: float | None = None
    position_weight: float = 0.01

    def __post_init__(self) -> None:
        if self.kernel not in PUBLISHED_SHARPNESS:
            raise InputError(f"kernel: expected 'pamr' or 'par', received {self.kernel!r}")
        if self.iterations < 1:
            raise InputError(f"iterations: expected at least 1, received {self.iterations}")
        if not self.dilations or min(self.dilations) < 1 or len(set(self.dilations)) < len(self.dilations):
            raise InputError(
                f"dilations: expected different steps of at least 1 px, received {self.dilations}"
            )
        if not self.unit_sharpness > 0:
            raise InputError(f"sharpness: expected more than 0, received {self.sharpness}")
        if not self.position_weight >= 0:
            raise InputError(f"position_weight: expected at least 0, received {self.position_weight}")

    @property
    def unit_sharpness(self) -> float:
        """The sharpness that is used: `sharpness`, or the authors' choice."""
        return PUBLISHED_SHARPNESS[self.kernel] if self.sharpness is None else self.sharpness


def refine_heatmaps(
    images: Shaped[Tensor, "images channels height width"],
    heatmaps: Float[Tensor, "*leading map_height map_width"],
    image_index: Int[Tensor, " indices"] | None = None,
    refinement: Refinement = Refinement(),
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Float32[Tensor, "*leading map_height map_width"]:
    """Refine heat maps so that they follow the edges of their images.

    On a CUDA device where Triton works, two kernels compute it with affinities in float16 (see
    `legrad.masks.refine_triton`); elsewhere torch does, in float32.

    Args:
        images: pixels of any range, integer or float; only ratios of differences matter, so normalised pixels
            work as well as raw ones.
        heatmaps: maps of any range, in the frame and on the device of the images: [maps, height, width] with
            `image_index`; without it [images, prompts, height, width] or [images, height, width].
        image_index: for each map, the row of its image.
        refinement: parameters of the refinement.
        max_bytes: bound on working memory beside arguments and result, but at least what one map of one image
            needs.

    Returns:
        Refined maps. Each pixel is a convex combination of pixels of its own map: a map stays within its
        range, a constant map stays as it is, and peaks become lower, so apply `minmax_normalise` before a
        fixed threshold.

    Raises:
        InputError: heat maps and images differ in size, or the index does not fit.

    Source: see `Refinement`.

    Example:
        >>> pixels = explainer.preprocess([image])
        >>> heatmaps = explainer.heatmaps(pixels, explainer.embed_text(["a panda"]))
        >>> legrad.refine_heatmaps(pixels, heatmaps, refinement=legrad.Refinement(iterations=2)).shape
        torch.Size([1, 1, 96, 96])
    """
    index = _checked_index(images, heatmaps, image_index)
    maps = heatmaps.reshape(-1, *heatmaps.shape[-2:])

    def by_kernels() -> Float32[Tensor, "maps height width"]:
        from legrad.masks import refine_triton

        return refine_triton.refined_maps(images, maps, index, refinement, max_bytes)

    def by_torch() -> Float32[Tensor, "maps height width"]:
        return refined_maps_by_torch(images, maps, index, refinement, max_bytes)

    # What the torch version refuses or differentiates must not look like a failure of the kernels.
    is_plain = maps.numel() and maps.device == images.device and not _needs_gradient(images, maps)
    if is_plain and REFINEMENT_KERNELS.runs_on(maps.device):
        return REFINEMENT_KERNELS.run(maps.device, by_kernels, by_torch).reshape(heatmaps.shape)
    return by_torch().reshape(heatmaps.shape)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def refined_maps_by_torch(
    images: Shaped[Tensor, "images channels height width"],
    maps: Float[Tensor, "maps height width"],
    index: Int[Tensor, " maps"],
    refinement: Refinement,
    max_bytes: int,
) -> Float32[Tensor, "maps height width"]:
    """Compute `refine_heatmaps` with torch, on any device; the reference for the kernels."""
    height, width = maps.shape[-2:]
    refined = torch.empty(maps.shape, dtype=torch.float32, device=maps.device)
    map_bytes = height * width * _FLOAT_BYTES
    # Weights before and after softmax, and a few frames of colours.
    affinity_bytes = map_bytes * (16 * len(refinement.dilations) + 8 * images.shape[1])
    # Maps are padded by the largest dilation, and those of two iterations are held at a time.
    margin = 2 * max(refinement.dilations)
    padded_bytes = map_bytes + _FLOAT_BYTES * (height + margin) * (width + margin)
    group_bytes = min(max_bytes, _cache_bytes(maps.device) or max_bytes)
    for map_rows in _groups(index, len(images), group_bytes, affinity_bytes, padded_bytes):
        affinities = _affinities(_as_rows(images[index[map_rows[:, 0]]]), refinement)
        per_image = max(1, (max_bytes // len(map_rows) - affinity_bytes) // padded_bytes)
        for rows in torch.split(map_rows, per_image, dim=1):
            refined[rows] = _diffuse(_as_rows(maps[rows]), affinities, refinement)
    return refined


def _cache_bytes(device: torch.device) -> int | None:
    return CPU_GROUP_BYTES_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else None


def _as_rows(frames: Tensor) -> Float32[Tensor, "images channels height width"]:
    # Pixels often have their channels last, and maps are stored column by column: twice as slow here.
    return frames.to(torch.float32).contiguous()


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
    """Group images with equally many maps, so that a group is a dense tensor, within the memory bound."""
    counts = torch.bincount(index, minlength=images)
    by_image = torch.split(torch.argsort(index, stable=True), counts.tolist())
    for count in sorted(set(counts.tolist())):
        if count:
            rows = torch.stack([by_image[image] for image in (counts == count).nonzero().flatten().tolist()])
            yield from torch.split(rows, max(1, max_bytes // (affinity_bytes + count * map_bytes)))


def _neighbours(
    padded: Float[Tensor, "*leading padded_height padded_width"], dilations: tuple[int, ...]
) -> Iterator[Float[Tensor, "*leading height width"]]:
    """Yield views of a padded frame, each shifted to one neighbour of every pixel."""
    margin = max(dilations)
    height, width = padded.shape[-2] - 2 * margin, padded.shape[-1] - 2 * margin
    for step in dilations:
        for down, right in DIRECTIONS:
            top, left = margin + step * down, margin + step * right
            yield padded[..., top : top + height, left : left + width]


def _padded(
    frames: Float[Tensor, "images channels height width"], dilations: tuple[int, ...]
) -> Float[Tensor, "images channels padded_height padded_width"]:
    # Replicating the border adds no values that the frame does not have.
    return F.pad(frames, (max(dilations),) * 4, mode="replicate")


def _affinities(
    pixels: Float32[Tensor, "images channels height width"], refinement: Refinement
) -> Float32[Tensor, "neighbours images 1 height width"]:
    """Compute the weights of every pixel's neighbours; they sum to 1."""
    dilations = refinement.dilations
    padded = _padded(pixels, dilations)
    inverse_unit = (
        _local_deviation(pixels, padded, dilations) * refinement.unit_sharpness + _TINY
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
    near = nearness_weights(refinement).to(pixels.device).view(-1, 1, 1, 1, 1)
    return weights.add_(near, alpha=refinement.position_weight).div_(1 + refinement.position_weight)


def nearness_weights(refinement: Refinement) -> Float32[Tensor, " neighbours"]:
    """Return the weights of neighbours by distance alone, on the CPU; they sum to 1."""
    steps = torch.tensor([(down, right) for down, right in DIRECTIONS], dtype=torch.float32).norm(dim=1)
    distances = torch.cat([steps * dilation for dilation in refinement.dilations])
    unit = refinement.unit_sharpness * distances.std(correction=0) + _TINY
    return torch.softmax(-((distances / unit) ** 2), dim=0)


def _local_deviation(
    pixels: Float32[Tensor, "images channels height width"],
    padded: Float32[Tensor, "images channels padded_height padded_width"],
    dilations: tuple[int, ...],
) -> Float32[Tensor, "images channels height width"]:
    """Compute the standard deviation of every pixel's neighbours in each channel."""
    # From differences to the pixel itself, which lose no digits to a large mean.
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
    # Rounding may move a weighted mean beyond the values that it is made of.
    lowest, highest = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    for _ in range(refinement.iterations):
        padded = _padded(maps, refinement.dilations)
        maps = torch.zeros_like(maps)
        for neighbour, weight in zip(_neighbours(padded, refinement.dilations), affinities, strict=True):
            maps.addcmul_(neighbour, weight)
    return maps.clamp_(lowest, highest)
