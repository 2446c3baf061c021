"""Views of an image: positions of windows, and merging of known maps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import legrad
from legrad.canvases import (
    View,
    Views,
    canvas_bytes,
    canvas_grids,
    canvas_pixels,
    views_of,
    window_starts,
)
from legrad.errors import InputError
from legrad.images import ImageTransform
from legrad.views import check_views, merge_grids, reference_grid, resample_grids, view_relevance
from tests.helpers.tiny_models import IMAGE_SIZE, PATCH, relative_error, tiny_clip, unit_texts

MEAN = STD = (0.5, 0.5, 0.5)
WINDOW = (6, 6)
sides = st.integers(1, 3000)
tilings = st.fixed_dictionaries(
    {
        "flip": st.booleans(),
        "scales": st.sampled_from([(1.0,), (1.0, 1.5), (2.0, 0.5)]),
        "tile": st.just(True),
        "tile_zoom": st.floats(1, 8),
        "tile_overlap": st.floats(0, 0.9),
        "max_tiles": st.integers(1, 40),
    }
)


def transform(patch=4, window=WINDOW, fit="stretch"):
    return ImageTransform(window[0] * patch, window[1] * patch, MEAN, STD, fit=fit, patch_size=patch)


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


# --- geometry ---


@given(cells=st.integers(1, 400), window=st.integers(1, 40), overlap=st.floats(0, 0.95))
def test_windows_cover_an_axis_flush_with_both_ends_and_overlap_as_asked(cells, window, overlap):
    assume(cells >= window)
    starts = window_starts(cells, window, overlap)
    assert (starts[0], starts[-1] + window) == (0, cells)
    moves = np.diff(starts)
    assert (moves >= 1).all()
    # a window moves on by a cell at least, whatever is asked
    assert (moves <= max(1, window * (1 - overlap) + 1e-6)).all()


@given(cells=st.integers(1, 400), window=st.integers(1, 40), overlap=st.floats(0, 0.95))
def test_no_axis_has_more_windows_than_it_needs_and_they_are_evenly_spread(cells, window, overlap):
    assume(cells >= window)
    moves = np.diff(window_starts(cells, window, overlap))
    longest = max(1, int(window * (1 - overlap) + 1e-9))
    assert (len(moves) - 1) * longest < max(1, cells - window)
    assert not len(moves) or moves.max() - moves.min() <= 1


@settings(max_examples=40)
@given(asked=tilings, height=sides, width=sides)
def test_views_lie_on_their_canvas_cover_it_and_are_no_more_than_allowed(asked, height, width):
    views = Views(**asked)
    canvases = canvas_grids(views, transform(), height, width)
    listed = views_of(views, canvases, WINDOW)
    assert listed[0] == View(0, 0, 0, *canvases[0], False)
    for index, grid in enumerate(canvases):
        seen = torch.zeros(grid, dtype=torch.int64)
        for view in (view for view in listed if view.canvas == index):
            assert 0 <= view.top <= view.top + view.rows <= grid[0]
            assert 0 <= view.left <= view.left + view.columns <= grid[1]
            seen[view.top : view.top + view.rows, view.left : view.left + view.columns] += 1
        assert (seen > 0).all()
    per_window = 2 if views.flip else 1
    windows = [view for view in listed if view.canvas == len(views.scales)]
    assert len(windows) <= per_window * views.max_tiles
    assert len(listed) == len(set(listed)) == per_window * len(views.scales) + len(windows)
    assert all((view.rows, view.columns) == WINDOW for view in windows)


@settings(max_examples=40)
@given(asked=tilings, height=sides, width=sides)
def test_windows_see_no_more_pixels_than_there_are_and_keep_the_aspect_ratio_where_they_may(
    asked, height, width
):
    views = Views(**asked)
    canvases = canvas_grids(views, transform(), height, width)
    if len(canvases) == len(views.scales):
        return  # one window would see it all
    rows, columns = canvases[-1]
    short, long = sorted((rows, columns))
    assert short <= max(6, round(6 * views.tile_zoom), 6)
    assert short == 6 or short <= round(min(height, width) / 4)
    if short > 6:
        assert abs(long - short * max(height, width) / min(height, width)) <= 0.5


@settings(max_examples=40)
@given(asked=tilings, height=sides, width=sides)
def test_what_the_canvases_of_an_image_take_is_bounded_ahead_of_it(asked, height, width):
    views = Views(**asked)
    taken = sum(
        rows * columns * 4 * 4 * 3 for rows, columns in canvas_grids(views, transform(), height, width)
    )
    assert taken <= canvas_bytes(views, transform())


def test_a_photograph_gets_the_windows_that_one_would_draw():
    views = Views(tile=True, tile_zoom=2.0, tile_overlap=0.25, max_tiles=16)
    canvases = canvas_grids(views, transform(16, (14, 14)), 3000, 4000)
    assert canvases == ((14, 14), (28, 37))
    windows = [(view.top, view.left) for view in views_of(views, canvases, (14, 14))[1:]]
    assert windows == [(top, left) for top in (0, 7, 14) for left in (0, 7, 15, 23)]


def test_with_fewer_windows_the_same_photograph_is_seen_from_farther():
    views = Views(tile=True, tile_zoom=2.0, tile_overlap=0.25, max_tiles=6)
    canvases = canvas_grids(views, transform(16, (14, 14)), 3000, 4000)
    assert canvases[1] == (24, 32)
    assert len(views_of(views, canvases, (14, 14))) == 1 + 6


def test_an_endless_image_is_squeezed_under_the_windows_that_are_allowed():
    views = Views(tile=True, tile_overlap=0.0, max_tiles=5)
    assert canvas_grids(views, transform(), 24, 60_000) == ((6, 6), (6, 30))
    assert canvas_grids(views, transform(), 60_000, 24) == ((6, 6), (30, 6))


def test_a_small_square_image_is_seen_whole_alone():
    assert canvas_grids(Views(tile=True), transform(), 24, 24) == ((6, 6),)
    assert canvas_grids(Views(tile=True), transform(), 3, 3) == ((6, 6),)


def test_canvases_are_resized_from_the_image_itself_as_a_model_of_that_size_would():
    views = Views(scales=(1.0, 1.4), tile=True)
    image = picture(200, 120)
    plain, larger, tiled = canvas_pixels(views, transform(), image)
    assert np.array_equal(plain, transform().resize(image))
    assert np.array_equal(larger, transform(window=(8, 8)).resize(image))
    assert np.array_equal(tiled, np.asarray(image.resize((80, 48), Image.Resampling.BICUBIC)))


def test_scales_of_images_that_keep_their_aspect_ratio_keep_it():
    canvases = canvas_grids(Views(scales=(1.0, 2.0)), transform(fit="keep"), 100, 400)
    assert canvases == ((3, 12), (6, 24))


# --- merging ---


@settings(max_examples=40)
@given(asked=tilings, height=sides, width=sides, value=st.floats(0.0, 1024.0, width=32))
def test_constant_maps_merge_to_the_constant(asked, height, width, value):
    views = Views(**asked)
    canvases = canvas_grids(views, transform(), height, width)
    maps = [
        (view, torch.full((2, view.rows, view.columns), value)) for view in views_of(views, canvases, WINDOW)
    ]
    merged = merge_grids(canvases, maps)
    assert merged.shape == (2, *reference_grid(canvases))
    torch.testing.assert_close(merged, torch.full_like(merged, value), rtol=1e-5, atol=0)


def ramp(grid):
    """Brighter from left to right, and twice as much so from top to bottom; of the image, not of cells."""
    down, across = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells for cells in grid)
    return (2 * down[:, None] + across)[None]


@settings(max_examples=40)
@given(asked=tilings, height=sides, width=sides)
def test_views_of_one_ramp_merge_to_that_ramp(asked, height, width):
    views = Views(**asked)
    canvases = canvas_grids(views, transform(), height, width)
    maps = []
    for view in views_of(views, canvases, WINDOW):
        rows, columns = slice(view.top, view.top + view.rows), slice(view.left, view.left + view.columns)
        seen = ramp(canvases[view.canvas])[:, rows, columns]
        maps.append((view, seen.flip(-1) if view.is_mirrored else seen))
    merged = merge_grids(canvases, maps)
    # within half a cell of the border of a coarser canvas nothing is extrapolated
    largest_cell = sum(weight / min(grid[axis] for grid in canvases) for axis, weight in ((0, 2), (1, 1)))
    assert (merged - ramp(reference_grid(canvases))).abs().max() <= largest_cell / 2 + 1e-9


@given(rows=st.integers(3, 20), columns=st.integers(3, 20), finer=st.tuples(st.floats(1, 4), st.floats(1, 4)))
def test_ramps_survive_on_a_finer_grid_to_the_last_cell_but_the_border(rows, columns, finer):
    grid = (round(rows * finer[0]), round(columns * finer[1]))
    error = (resample_grids(ramp((rows, columns)), grid) - ramp(grid)).abs()[0]
    down, across = ((torch.arange(cells) + 0.5) / cells for cells in grid)
    inside = ((down - 0.5).abs() <= 0.5 - 0.5 / rows)[:, None] & ((across - 0.5).abs() <= 0.5 - 0.5 / columns)
    assert (error[inside] < 1e-6).all()


@given(
    rows=st.integers(2, 12),
    columns=st.integers(2, 12),
    factor=st.sampled_from([(1, 1), (2, 2), (3, 2), (1.5, 2.5)]),
    data=st.data(),
)
def test_a_point_lands_where_it_was(rows, columns, factor, data):
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    point = torch.zeros(1, rows, columns)
    point[0, row, column] = 1
    grid = (round(rows * factor[0]), round(columns * factor[1]))
    resampled = resample_grids(point, grid)[0]
    top, left = np.unravel_index(int(resampled.argmax()), grid)
    assert abs((top + 0.5) / grid[0] - (row + 0.5) / rows) <= 0.5 / rows + 1e-9
    assert abs((left + 0.5) / grid[1] - (column + 0.5) / columns) <= 0.5 / columns + 1e-9


def test_coarser_cells_take_the_mean_of_the_area_that_they_cover():
    fine = torch.zeros(1, 8, 8)
    fine[0, 2, 5] = 1
    coarse = resample_grids(fine, (4, 4))[0]
    assert np.unravel_index(int(coarse.argmax()), (4, 4)) == (1, 2)
    assert float(coarse.sum()) == pytest.approx(1 / 4, rel=0.2)  # four fine cells make a coarse one


def test_a_window_that_alone_saw_something_puts_it_at_its_place():
    views = Views(tile=True)
    canvases = ((6, 6), (12, 16))
    maps = []
    for view in views_of(views, canvases, WINDOW):
        seen = torch.zeros(1, view.rows, view.columns)
        row, column = 9 - view.top, 13 - view.left
        if view.canvas == 1 and 0 <= row < 6 and 0 <= column < 6:
            seen[0, row, column] = 1
        maps.append((view, seen))
    merged = merge_grids(canvases, maps)
    assert merged[0].nonzero().tolist() == [[9, 13]]
    assert float(merged[0, 9, 13]) == 0.5  # the windows saw it, the whole image did not


# --- on a model ---


@pytest.fixture(scope="module")
def explainer():
    return legrad.LeGrad(tiny_clip())


def test_the_whole_image_alone_is_plain_relevance_bit_for_bit(explainer):
    images, texts = [picture(37, 21), picture(90, 80, 1)], unit_texts(3)
    expected = explainer.relevance(explainer.preprocess(images), texts)
    for image, plain in zip(images, expected, strict=True):
        alone = explainer.relevance(explainer.preprocess([image]), texts)[0]
        assert torch.equal(view_relevance(explainer, [image], texts, views=Views())[0], alone)
        assert relative_error(alone, plain) < 1e-5


def test_a_mirrored_view_of_a_symmetric_image_changes_nothing_but_symmetry(explainer):
    half = np.asarray(picture(10, 12))
    symmetric = Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1))
    texts = unit_texts(2)
    plain = view_relevance(explainer, [symmetric], texts, views=Views())[0]
    flipped = view_relevance(explainer, [symmetric], texts, views=Views(flip=True))[0]
    assert relative_error(flipped, (plain + plain.flip(-1)) / 2) < 1e-5


def test_an_image_and_its_mirror_image_get_mirrored_maps(explainer):
    image, texts = picture(*IMAGE_SIZE[::-1]), unit_texts(2)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    views = Views(flip=True, scales=(1.0, 2.0))
    there, back = (view_relevance(explainer, [which], texts, views=views)[0] for which in (image, mirrored))
    assert there.shape == (2, 6, 10)
    # PIL resamples a mirror image to within a level
    assert relative_error(back.flip(-1), there) < 0.02


@pytest.mark.parametrize("affinity", ["none", "keys"])
def test_each_view_is_explained_as_the_library_explains_it_alone(affinity):
    explainer = legrad.LeGrad(tiny_clip(), affinity=affinity)
    image, texts = picture(100, 60), unit_texts(2)
    views = Views(flip=True, scales=(1.0, 1.5), tile=True, max_tiles=4)
    canvases = canvas_grids(views, explainer.transform, image.height, image.width)
    pixels = canvas_pixels(views, explainer.transform, image)
    tokens = 1 + 3 * 5
    maps = []
    for view in views_of(views, canvases, (3, 5)):
        top, left = view.top * PATCH, view.left * PATCH
        seen = pixels[view.canvas][top : top + view.rows * PATCH, left : left + view.columns * PATCH]
        seen = np.ascontiguousarray(seen[:, ::-1]) if view.is_mirrored else seen
        batch = explainer.transform.normalise(torch.from_numpy(seen.copy())[None], torch.float32)
        scale = (1 + view.rows * view.columns) / tokens
        maps.append((view, scale * explainer.relevance(batch, texts)[0]))
    merged = view_relevance(explainer, [image], texts, views=views)[0]
    assert len(maps) > 6
    assert relative_error(merged, merge_grids(canvases, maps)) < 1e-5


def test_no_text_gives_no_map(explainer):
    (maps,) = view_relevance(
        explainer, [picture(100, 60)], unit_texts(0), views=Views(flip=True, scales=(1.0, 1.5))
    )
    assert maps.shape == (0, 4, 8)


def test_maps_of_finer_views_have_the_scale_of_the_first_for_every_pooling():
    # at the same tokens, twice: a finer view of them has relevance of the same size
    for pool in ("reference", "model"):
        explainer = legrad.LeGrad(tiny_clip(), pool=pool)
        texts = unit_texts(8)
        plain = view_relevance(explainer, [picture(20, 12)], texts, views=Views())[0]
        finer = view_relevance(explainer, [picture(20, 12)], texts, views=Views(scales=(1.0, 4.0)))[0]
        assert 0.5 < float((2 * finer.mean() - plain.mean()) / plain.mean()) < 2


def test_a_model_of_one_size_takes_windows_and_mirrors_but_no_scales(explainer):
    tower = explainer.tower
    bound = replace(tower, takes_any_grid=False, family="relpos")
    assert check_views(Views(scales=(1.0, 2.0)), tower).scales == (1.0, 2.0)
    assert check_views(Views(flip=True, tile=True), bound).tile
    with pytest.raises(InputError, match=r"scales: .*relpos.*one size"):
        check_views(Views(scales=(1.0, 1.5)), bound)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 1.0)}, "scales"),
        ({"scales": (0.0,)}, "scales"),
        ({"scales": (float("nan"),)}, "scales"),
        ({"scales": (9.0,)}, "scales"),
        ({"tile_zoom": 0.5}, "tile_zoom"),
        ({"tile_overlap": 1.0}, "tile_overlap"),
        ({"max_tiles": 0}, "max_tiles"),
        ({"max_tiles": 257}, "max_tiles"),
    ],
)
def test_views_out_of_range_are_refused_with_what_was_expected(wrong, message):
    with pytest.raises(InputError, match=rf"^{message}: expected .*received"):
        Views(**wrong)
