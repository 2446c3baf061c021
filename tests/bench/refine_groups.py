"""CPU time of refinement by torch with images in groups that fit into a cache, and in large ones.

    python tests/bench/refine_groups.py [--rounds 13] [--write]

One thread, `par`, random pictures and maps; both sizes take turns, and medians count. Results are the same to
the bit. One JSON row a case.
"""

from __future__ import annotations

import statistics
import time
from typing import Any
from unittest import mock

import torch
from published import figure_parser, recording

import legrad
from legrad.masks import refine

# images, maps of each, side of the frame
CASES = ((32, 2, 96), (32, 5, 96), (8, 1, 224), (8, 4, 224))
LARGE_BYTES = 2**28


def main() -> None:
    """Measure each case."""
    parser = figure_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=13)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with recording(__file__, arguments) as record:
        for images, maps, side in CASES:
            case = {"images": images, "maps_an_image": maps, "side": side}
            record("cases", case | cpu_ms_an_image(images, maps, side, arguments.rounds))


def cpu_ms_an_image(images: int, maps: int, side: int, rounds: int) -> dict[str, Any]:
    """Return the median CPU time an image with small and with large groups."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
    heatmaps = torch.rand(images * maps, side, side, generator=generator)
    owners = torch.arange(images).repeat_interleave(maps)
    times: dict[str, list[float]] = {"small_groups": [], "large_groups": []}
    limits = {"small_groups": refine.CPU_GROUP_BYTES_PER_THREAD, "large_groups": LARGE_BYTES}
    for _ in range(rounds + 1):
        for name, limit in limits.items():
            with mock.patch.object(refine, "CPU_GROUP_BYTES_PER_THREAD", limit):
                before_s = time.process_time()
                refine.refined_maps_by_torch(pixels, heatmaps, owners, legrad.Refinement("par"), LARGE_BYTES)
                times[name].append(time.process_time() - before_s)
    medians = {name: 1000 * statistics.median(found[1:]) / images for name, found in times.items()}
    return {f"{name}_ms_an_image": median for name, median in medians.items()}


if __name__ == "__main__":
    main()
