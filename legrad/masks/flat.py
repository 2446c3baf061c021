"""Upsample maps to frames of any sizes at once: all pixels in one flat array, column after column.

This is the order of COCO's run-length encoding. The same operations serve any number of maps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from legrad.memory import uploaded

HeightWidth = tuple[int, int]


@dataclass(frozen=True)
class FlatLayout:
    """Where the pixels of frames are in one flat array: frame after frame, column after column.

    Columns and rows are counted through all frames; so are the columns of the maps, one map after the other.

    Attributes:
        starts: first pixel of each frame.
        widths: columns of each frame.
        map_of_column: number of each column's frame.
        heights: pixels of each column.
        left: column of a map to the left of each column's centre.
        right: column of a map to the right of it.
        top: row of a map above each row's centre, in each map counted from 0.
        right_weight: weight of the column to the right; that to the left has the rest.
        bottom_weight: weight of the row below; that above has the rest.
        column: of each pixel.
        row: of each pixel.
    """

    starts: Int[Tensor, " maps"]
    widths: Int[Tensor, " maps"]
    map_of_column: Int[Tensor, " columns"]
    heights: Int[Tensor, " columns"]
    left: Int[Tensor, " columns"]
    right: Int[Tensor, " columns"]
    top: Int[Tensor, " rows"]
    right_weight: Float32[Tensor, " columns"]
    bottom_weight: Float32[Tensor, " rows"]
    column: Int[Tensor, " pixels"]
    row: Int[Tensor, " pixels"]

    @classmethod
    def of(cls, frames: Sequence[HeightWidth], map_size: HeightWidth, device: torch.device) -> "FlatLayout":
        """Lay out frames of any sizes.

        Args:
            frames: height and width of each.
            map_size: height and width of the maps.
            device: where the layout is used. Only what grows with rows and columns is made on the CPU.
        """
        map_height, map_width = map_size
        heights, widths = np.array(frames, dtype=np.int64).T
        left, right_weight = _neighbours(widths, map_width)
        top, bottom_weight = _neighbours(heights, map_height)
        map_of_column = np.repeat(np.arange(len(frames)), widths)
        column_heights = heights[map_of_column]
        first_pixels = column_heights.cumsum() - column_heights
        first_rows = (heights.cumsum() - heights)[map_of_column]
        areas = heights * widths
        first_left = map_of_column * map_width
        tables = {
            "starts": areas.cumsum() - areas,
            "widths": widths,
            "map_of_column": map_of_column,
            "heights": column_heights,
            "left": first_left + left,
            "right": first_left + np.minimum(left + 1, map_width - 1),
            "top": top,
            "row_shift": first_rows - first_pixels,
        }
        pixels = int(areas.sum())
        # four bytes an index, unless a single map has more pixels
        dtype = np.int32 if max(pixels, len(left) * (map_height + 1)) < 2**31 else np.int64
        on_device = dict(zip(tables, _uploaded(list(tables.values()), dtype, device), strict=True))
        right_weights, bottom_weights = _uploaded([right_weight, bottom_weight], np.float32, device)
        column = torch.repeat_interleave(on_device["heights"], output_size=pixels)
        row = on_device.pop("row_shift").index_select(0, column)
        row += torch.arange(pixels, dtype=row.dtype, device=device)
        return cls(
            **on_device,
            right_weight=right_weights,
            bottom_weight=bottom_weights,
            column=column,
            row=row,
        )


def _neighbours(lengths: Int64[np.ndarray, " maps"], cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, along one axis, the cell before each pixel's centre, and the weight of the cell after it.

    Args:
        lengths: pixels of each map along the axis.
        cells: cells of every map along the axis.
    """
    owner = np.repeat(np.arange(len(lengths)), lengths)
    centre = np.arange(len(owner)) - (lengths.cumsum() - lengths)[owner] + 0.5
    # in double precision and then rounded, as OpenCV does
    position = (centre * (cells / lengths)[owner] - 0.5).astype(np.float32).clip(0, cells - 1)
    before = np.floor(position)
    return before.astype(np.int64), position - before


def _uploaded(arrays: Sequence[np.ndarray], dtype: type, device: torch.device) -> list[Tensor]:
    """Bring arrays to a device by one copy."""
    packed = uploaded(torch.from_numpy(np.concatenate(arrays).astype(dtype)), device)
    return list(torch.split(packed, [len(array) for array in arrays]))


def interpolated(
    maps: Float32[Tensor, "maps rows columns"], layout: FlatLayout
) -> Float32[Tensor, " pixels"]:
    """Interpolate maps bilinearly to the frames of a layout, as `upsample_grid` does but for rounding.

    Args:
        maps: of any range.
        layout: of their frames.
    """
    rows = maps.shape[1]
    by_column = maps.mT.reshape(-1, rows)
    before, after = (by_column.index_select(0, side) for side in (layout.left, layout.right))
    # a linear interpolation of equal values is exact, so a constant map stays constant
    columns = torch.lerp(before, after, layout.right_weight[:, None])
    # the last row twice, so that every pixel has a neighbour below
    padded = torch.cat([columns, columns[:, -1:]], dim=1).flatten()
    above = layout.top.index_select(0, layout.row).add_(layout.column, alpha=rows + 1)
    upper = padded.index_select(0, above)
    lower = padded.index_select(0, above.add_(1))
    return torch.lerp(upper, lower, layout.bottom_weight.index_select(0, layout.row))
