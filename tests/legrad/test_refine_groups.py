"""How the maps of a batch are split for the kernels of refinement, and what these launch, move and hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from legrad.masks.refine_groups import kernel_cost, map_groups

NEIGHBOURS, PIXELS = 32, 224 * 224
IMAGE_BYTES = 3 * PIXELS
AFFINITY_BYTES, MAP_BYTES = 2 * NEIGHBOURS * PIXELS, 12 * PIXELS


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 2**26))
def test_every_map_is_in_one_group_and_groups_stay_within_the_bound(maps_per_image, max_bytes):
    groups = map_groups(maps_per_image, NEIGHBOURS, PIXELS, max_bytes)
    runs = [run for group in groups for run in group]
    owners = [image for image, count in enumerate(maps_per_image) for _ in range(count)]
    assert [run.image for run in runs for _ in range(run.first, run.end)] == owners
    assert [place for run in runs for place in range(run.first, run.end)] == list(range(len(owners)))
    cost = kernel_cost(groups, NEIGHBOURS, PIXELS, 8, IMAGE_BYTES)
    assert cost.held_bytes <= max(max_bytes, AFFINITY_BYTES + MAP_BYTES)


def test_maps_that_fit_are_one_group():
    (group,) = map_groups([1, 0, 3], NEIGHBOURS, PIXELS, 2**28)
    assert group == [(0, 0, 1), (2, 1, 4)]


def test_an_image_with_too_many_maps_is_split():
    groups = map_groups([5, 1], NEIGHBOURS, PIXELS, AFFINITY_BYTES + 2 * MAP_BYTES)
    assert groups == [[(0, 0, 2)], [(0, 2, 4)], [(0, 4, 5)], [(1, 5, 6)]]


@pytest.mark.parametrize(("maps_per_image", "gigabytes"), [(1, 2.10), (4, 2.84)])
def test_a_step_of_64_images_launches_11_kernels_a_group_and_moves_less_than_3_gigabytes(
    maps_per_image, gigabytes
):
    groups = map_groups([maps_per_image] * 64, NEIGHBOURS, PIXELS, 2**28)
    cost = kernel_cost(groups, NEIGHBOURS, PIXELS, 8, IMAGE_BYTES)
    assert cost.launches == 11 * len(groups)
    assert len(groups) <= 2
    assert cost.moved_bytes == pytest.approx(gigabytes * 1e9, rel=0.01)
