"""Refine heat maps with two Triton kernels: one computes affinities, the other is launched once an iteration.

A program keeps the neighbours of a block of pixels in registers. It clamps coordinates at the border instead
of reading padded copies, and serves every map of its image, so affinities are read once an iteration.

Affinities are stored in float16. An iteration divides by the sum of what was stored, so every mean stays
convex; `tests/bench/README.md` has the agreement of refined maps with float32. For 64 images of 224 x 224
pixels with 32 neighbours, float16 affinities are 205 MB, written once and read once an iteration. Computing
them again in each iteration would move about 10 MB of pixels instead, but take 96 loads and 32 exponentials a
pixel: about as long on paper; neither was measured on a GPU. `legrad.masks.refine_groups` counts launches and
bytes.
"""

from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float16, Float32, Int, Int32, Shaped
from torch import Tensor

from legrad.masks.refine import Refinement, nearness_weights
from legrad.masks.refine_groups import map_groups
from legrad.memory import uploaded

TINY = tl.constexpr(1e-8)
WARPS = 4
# Values of one tile, neighbours times pixels: 32 in the registers of each of 128 threads.
TILE_VALUES = 4096
IMAGE_DTYPES = (
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


@triton.jit
@no_type_check
def _neighbour_pixels(  # noqa: PLR0917
    pixels, height, width, DILATIONS: tl.constexpr, RINGS: tl.constexpr, PADDED: tl.constexpr
):
    """Return rows and columns of the neighbours of a block of pixels, clamped at the border.

    Both are [PADDED, block], dilation by dilation in the order of `legrad.masks.refine.DIRECTIONS`; the last
    neighbour is repeated up to PADDED.
    """
    neighbours = tl.minimum(tl.arange(0, PADDED), 8 * RINGS - 1)
    direction = neighbours % 8
    direction += (direction >= 4).to(tl.int32)  # the middle of 3 x 3 is the pixel itself
    step = neighbours * 0
    for ring in tl.static_range(RINGS):
        step = tl.where(neighbours // 8 == ring, DILATIONS[ring], step)
    down, right = step * (direction // 3 - 1), step * (direction % 3 - 1)
    rows = (pixels // width)[None, :] + down[:, None]
    columns = (pixels % width)[None, :] + right[:, None]
    return tl.minimum(tl.maximum(rows, 0), height - 1), tl.minimum(tl.maximum(columns, 0), width - 1)


@triton.jit(
    do_not_specialize=[
        "stride_image", "stride_channel", "stride_row", "stride_column", "channels", "height", "width",
    ],
    do_not_specialize_on_alignment=["images", "runs"],
)  # fmt: skip
@no_type_check
def _affinity_kernel(  # noqa: PLR0917
    images,
    runs,
    affinities,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    channels,
    height,
    width,
    sharpness,
    DILATIONS: tl.constexpr,
    NEARNESS: tl.constexpr,
    POSITION_WEIGHT: tl.constexpr,
    IS_SQUARED: tl.constexpr,
    RINGS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the affinities of one block of pixels of one image."""
    pixels_of_frame = height * width
    run = tl.program_id(1)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pixels = tl.minimum(block, pixels_of_frame - 1)
    rows, columns = _neighbour_pixels(pixels, height, width, DILATIONS, RINGS, PADDED)
    neighbours = tl.arange(0, PADDED)
    is_neighbour = (neighbours < 8 * RINGS)[:, None]

    image = images + tl.load(runs + run).to(tl.int64) * stride_image
    own = image + (pixels // width) * stride_row + (pixels % width) * stride_column
    others = image + rows * stride_row + columns * stride_column
    exponents = tl.zeros([PADDED, BLOCK], dtype=tl.float32)
    for channel in range(channels):
        first = channel * stride_channel
        pixel = tl.load(own + first).to(tl.float32)
        differences = tl.load(others + first).to(tl.float32) - pixel[None, :]
        # In two passes over registers, rounding the quotient: the deviation of equal neighbours is exactly 0.
        mean = tl.div_rn(tl.sum(tl.where(is_neighbour, differences, 0.0), axis=0), 8.0 * RINGS)
        centred = tl.where(is_neighbour, differences - mean[None, :], 0.0)
        deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / (8 * RINGS))
        ratios = differences * (1.0 / (deviation * sharpness + TINY))[None, :]
        exponents += ratios * ratios if IS_SQUARED else tl.abs(ratios)
    exponents = tl.where(is_neighbour, exponents / channels, float("inf"))
    weights = tl.exp(tl.min(exponents, axis=0)[None, :] - exponents)
    weights /= tl.sum(weights, axis=0)[None, :]
    if POSITION_WEIGHT > 0:
        ring = neighbours // 8
        # The first, third, sixth and last of the directions are diagonal.
        direction = neighbours % 8
        is_diagonal = (direction == 0) | (direction == 2) | (direction == 5) | (direction == 7)
        near = tl.zeros([PADDED], dtype=tl.float32)
        for position in tl.static_range(RINGS):
            straight, diagonal = NEARNESS[8 * position + 1], NEARNESS[8 * position]
            near = tl.where(ring == position, tl.where(is_diagonal, diagonal, straight), near)
        weights = (weights + POSITION_WEIGHT * near[:, None]) / (1.0 + POSITION_WEIGHT)
    planes = (run.to(tl.int64) * 8 * RINGS + neighbours) * pixels_of_frame
    is_stored = is_neighbour & (block < pixels_of_frame)[None, :]
    tl.store(affinities + planes[:, None] + pixels[None, :], weights.to(tl.float16), mask=is_stored)


@triton.jit(
    do_not_specialize=["first_map", "height", "width"],
    do_not_specialize_on_alignment=["maps", "means", "runs", "run_firsts", "run_ends", "lowest", "highest"],
)
@no_type_check
def _mean_kernel(  # noqa: PLR0917
    maps,
    means,
    affinities,
    run_firsts,
    run_ends,
    lowest,
    highest,
    first_map,
    height,
    width,
    IS_LAST: tl.constexpr,
    DILATIONS: tl.constexpr,
    RINGS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace one block of pixels by the mean of their neighbours, in every map of one image."""
    pixels_of_frame = height * width
    run = tl.program_id(1)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_pixel = block < pixels_of_frame
    pixels = tl.minimum(block, pixels_of_frame - 1)
    rows, columns = _neighbour_pixels(pixels, height, width, DILATIONS, RINGS, PADDED)
    positions = rows * width + columns
    neighbours = tl.arange(0, PADDED)
    planes = (run.to(tl.int64) * 8 * RINGS + neighbours) * pixels_of_frame
    is_neighbour = (neighbours < 8 * RINGS)[:, None]
    stored = affinities + planes[:, None] + pixels[None, :]
    weights = tl.load(stored, mask=is_neighbour, other=0.0).to(tl.float32)
    weights /= tl.sum(weights, axis=0)[None, :]
    first = tl.load(run_firsts + run) - first_map
    others = maps + first.to(tl.int64) * pixels_of_frame + positions
    target = means + first.to(tl.int64) * pixels_of_frame + pixels
    for position in range(first, tl.load(run_ends + run) - first_map):
        mean = tl.sum(weights * tl.load(others), axis=0)
        if IS_LAST:  # Rounding may move a weighted mean beyond the values that it is made of.
            mean = tl.maximum(mean, tl.load(lowest + position), propagate_nan=tl.PropagateNan.ALL)
            mean = tl.minimum(mean, tl.load(highest + position), propagate_nan=tl.PropagateNan.ALL)
        tl.store(target, mean, mask=is_pixel)
        others += pixels_of_frame
        target += pixels_of_frame


@dataclass(frozen=True)
class _Kernels:
    """The two kernels for frames of one size and one refinement."""

    refinement: Refinement
    nearness: tuple[float, ...]
    height: int
    width: int
    tile_values: int

    def affinities(
        self, images: Shaped[Tensor, "images channels height width"], runs: Int32[Tensor, "3 runs"]
    ) -> Float16[Tensor, "runs neighbours height width"]:
        """Compute the affinities of the image of each run of maps."""
        size = (runs.shape[1], len(self.nearness), self.height, self.width)
        affinities = torch.empty(size, dtype=torch.float16, device=images.device)
        _affinity_kernel[self._grid(runs)](
            images,
            runs[0],
            affinities,
            *images.stride(),
            images.shape[1],
            self.height,
            self.width,
            self.refinement.unit_sharpness,
            NEARNESS=self.nearness,
            POSITION_WEIGHT=self.refinement.position_weight if self.refinement.kernel == "par" else 0.0,
            IS_SQUARED=self.refinement.kernel == "par",
            **self._constants(),
        )
        return affinities

    def diffuse(
        self,
        maps: Float32[Tensor, "maps height width"],
        first_map: int,
        runs: Int32[Tensor, "3 runs"],
        affinities: Float16[Tensor, "runs neighbours height width"],
        means: Float32[Tensor, "maps height width"],
    ) -> None:
        """Write to `means` the maps of runs, from position `first_map`, after all iterations."""
        lowest, highest = torch.aminmax(maps.flatten(1), dim=1)
        iterations = self.refinement.iterations
        between = torch.empty_like(means) if iterations > 1 else means
        for left in reversed(range(iterations)):
            target = between if left % 2 else means
            _mean_kernel[self._grid(runs)](
                maps,
                target,
                affinities,
                runs[1],
                runs[2],
                lowest,
                highest,
                first_map,
                self.height,
                self.width,
                IS_LAST=not left,
                **self._constants(),
            )
            maps = target

    def _grid(self, runs: Int32[Tensor, "3 runs"]) -> tuple[int, int]:
        return triton.cdiv(self.height * self.width, self._constants()["BLOCK"]), runs.shape[1]

    def _constants(self) -> dict[str, Any]:
        padded = triton.next_power_of_2(len(self.nearness))
        return {
            "DILATIONS": self.refinement.dilations,
            "RINGS": len(self.refinement.dilations),
            "PADDED": padded,
            "BLOCK": max(16, self.tile_values // padded),
            "num_warps": WARPS,
        }


def refined_maps(
    images: Shaped[Tensor, "images channels height width"],
    maps: Float[Tensor, "maps height width"],
    image_index: Int[Tensor, " maps"],
    refinement: Refinement,
    max_bytes: int,
    *,
    tile_values: int = TILE_VALUES,
) -> Float32[Tensor, "maps height width"]:
    """Refine heat maps as `legrad.refine_heatmaps` does.

    Args:
        images: pixels of any real dtype, of any strides.
        maps: on the device of the images, of any strides; at least one, with at least one pixel.
        image_index: for each map, the row of its image; on the CPU.
        refinement: parameters of the refinement.
        max_bytes: bound on working memory beside arguments and result, but at least what one map of one image
            needs.
        tile_values: neighbours times pixels of one program, a power of two.
    """
    height, width = maps.shape[-2:]
    order = torch.argsort(image_index, stable=True)
    is_in_order = bool((order[:-1] < order[1:]).all())
    nearness = nearness_weights(refinement)
    counts = torch.bincount(image_index, minlength=len(images)).tolist()
    groups = map_groups(counts, len(nearness), height * width, max_bytes)
    images = images if images.dtype in IMAGE_DTYPES else images.to(torch.float32)
    kernels = _Kernels(refinement, tuple(nearness.tolist()), height, width, tile_values)
    every_run = torch.tensor([run for group in groups for run in group], dtype=torch.int32)
    runs_by_group = torch.split(uploaded(every_run.T.contiguous(), maps.device), [*map(len, groups)], dim=1)
    refined = torch.empty(maps.shape, dtype=torch.float32, device=maps.device)
    for group, runs in zip(groups, runs_by_group, strict=True):
        first, end = group[0].first, group[-1].end
        affinities = kernels.affinities(images, runs)
        if is_in_order:
            kernels.diffuse(_as_rows(maps[first:end]), first, runs, affinities, refined[first:end])
        else:
            rows = uploaded(order[first:end], maps.device)
            means = torch.empty((end - first, height, width), dtype=torch.float32, device=maps.device)
            kernels.diffuse(_as_rows(maps[rows]), first, runs, affinities, means)
            refined[rows] = means
    return refined


def _as_rows(maps: Float[Tensor, "maps height width"]) -> Float32[Tensor, "maps height width"]:
    return maps.to(torch.float32).contiguous()
