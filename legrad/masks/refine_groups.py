"""Split refinement by Triton kernels into groups within a memory bound, and count its launches and bytes."""

from dataclasses import dataclass
from typing import NamedTuple

AFFINITY_BYTES = 2  # float16
MAP_BYTES = 4  # float32
# A float32 copy of the maps, and the targets of two iterations.
MAPS_HELD = 3
# Beside affinities and iterations: the float32 copy of maps in another layout or dtype, and their extremes.
OTHER_LAUNCHES = 2


class MapRun(NamedTuple):
    """Consecutive maps of one image, in the order of images.

    Attributes:
        image: row of the image.
        first: position of the first map.
        end: position after the last map.
    """

    image: int
    first: int
    end: int


@dataclass(frozen=True)
class KernelCost:
    """What a refinement by Triton kernels costs a device.

    Attributes:
        launches: kernels launched, at most.
        moved_bytes: memory read and written, each value once a kernel: rereads are served by a cache.
        held_bytes: working memory, beside arguments and result.
    """

    launches: int
    moved_bytes: int
    held_bytes: int


def map_groups(maps_per_image: list[int], neighbours: int, pixels: int, max_bytes: int) -> list[list[MapRun]]:
    """Split the maps of a batch into groups that are refined together.

    Args:
        maps_per_image: number of maps of each image.
        neighbours: neighbours of a pixel.
        pixels: pixels of a frame.
        max_bytes: bound on the working memory of a group, but at least what one map of one image needs.

    Returns:
        Groups of runs in the order of images. An image whose maps do not fit is split among groups.
    """
    affinity_bytes, map_bytes = AFFINITY_BYTES * neighbours * pixels, MAPS_HELD * MAP_BYTES * pixels
    longest = max(1, (max_bytes - affinity_bytes) // map_bytes)
    groups: list[list[MapRun]] = []
    held_bytes = max_bytes
    for run in _runs(maps_per_image, longest):
        run_bytes = affinity_bytes + map_bytes * (run.end - run.first)
        if not groups or held_bytes + run_bytes > max_bytes:
            groups.append([])
            held_bytes = 0
        groups[-1].append(run)
        held_bytes += run_bytes
    return groups


def _runs(maps_per_image: list[int], longest: int) -> list[MapRun]:
    runs, first = [], 0
    for image, count in enumerate(maps_per_image):
        end = first + count
        runs += [MapRun(image, start, min(start + longest, end)) for start in range(first, end, longest)]
        first = end
    return runs


def kernel_cost(
    groups: list[list[MapRun]], neighbours: int, pixels: int, iterations: int, image_bytes: int
) -> KernelCost:
    """Count what the Triton kernels launch, move and hold for groups of maps.

    A group takes 1 launch for the affinities, 1 an iteration, 1 for the extremes of its maps and, if its maps
    are not contiguous float32, 1 to copy them; maps out of the order of images are gathered and scattered as
    well, which is not counted. Affinities are written once and read once an iteration,
    however many maps an image has; a map is read and written once an iteration.

    Args:
        groups: from `map_groups`.
        neighbours: neighbours of a pixel.
        pixels: pixels of a frame.
        iterations: of the refinement.
        image_bytes: bytes of the pixels of one image.
    """
    sizes = [(len(group), group[-1].end - group[0].first) for group in groups]
    images, maps = sum(size[0] for size in sizes), sum(size[1] for size in sizes)
    affinity_bytes, map_bytes = AFFINITY_BYTES * neighbours * pixels, MAP_BYTES * pixels
    return KernelCost(
        launches=len(groups) * (1 + iterations + OTHER_LAUNCHES),
        moved_bytes=images * (image_bytes + (1 + iterations) * affinity_bytes)
        # Copied once and read for the extremes, beside the iterations.
        + maps * map_bytes * (2 * iterations + 3),
        held_bytes=max(
            (rows * affinity_bytes + count * MAPS_HELD * map_bytes for rows, count in sizes), default=0
        ),
    )
