"""Label maps against masks painted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from legrad.errors import RleError
from legrad.masks.rle import encode_rle
from pipeline.errors import UserError
from pipeline.output.label_map import check_masks_of_image, label_map, mask_frame, mask_of_image


def row(mask, class_id=1, similarity=0.3, ignore=None):
    def rle(pixels):
        return None if pixels is None else encode_rle(np.asarray(pixels, dtype=bool)[None])[0]

    return {"class_id": class_id, "similarity": similarity, "mask": rle(mask), "ignore": rle(ignore)}


def test_no_rows_are_all_background():
    labels = label_map([], 3, 5)
    assert (labels.dtype, labels.shape, labels.any()) == (np.uint8, (3, 5), False)


def test_where_masks_overlap_the_higher_similarity_wins_whatever_the_order():
    left, right = [[1, 1, 0, 0]], [[0, 1, 1, 0]]
    rows = [row(left, 7, 0.2), row(right, 3, 0.4)]
    assert label_map(rows, 1, 4).tolist() == label_map(rows[::-1], 1, 4).tolist() == [[7, 3, 3, 0]]


def test_of_equal_similarities_the_lower_class_id_wins():
    rows = [row([[1, 1]], 9), row([[0, 1]], 4), row([[0, 1]], 5)]
    assert label_map(rows, 1, 2).tolist() == label_map(rows[::-1], 1, 2).tolist() == [[9, 4]]


def test_a_rejected_row_has_no_say_and_an_empty_mask_only_what_it_ignores():
    rows = [row(None, 7, 0.9), row([[1, 0, 0]], 3), row([[0, 0, 0]], 4, 0.9, ignore=[[0, 0, 1]])]
    assert label_map(rows, 1, 3).tolist() == [[3, 0, 255]]


def test_what_one_row_ignores_and_another_covers_is_the_others():
    rows = [row([[1, 0, 0, 0]], 7, 0.9, ignore=[[0, 1, 1, 0]]), row([[0, 1, 0, 0]], 3, 0.1)]
    assert label_map(rows, 1, 4).tolist() == [[7, 3, 255, 0]]


def test_masks_of_a_smaller_frame_are_enlarged_by_the_nearest_pixel():
    rows = [row([[1, 0, 0], [0, 0, 0]], 7, ignore=[[0, 0, 0], [0, 0, 1]])]
    small = np.array([[7, 0, 0], [0, 0, 255]])
    np.testing.assert_array_equal(label_map(rows, 4, 6), small.repeat(2, axis=0).repeat(2, axis=1))


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 70))
def test_a_mask_in_any_frame_that_the_pipeline_writes_is_one_of_its_image(height, width, max_side):
    mask = np.ones(mask_frame(height, width, max_side), dtype=bool)
    rle = encode_rle(mask[None])[0]
    check_masks_of_image([rle], height, width)
    np.testing.assert_array_equal(mask_of_image(rle, height, width), mask)


@pytest.mark.parametrize("size", [(8, 6), (4, 3), (3, 3), (7, 6), (12, 16), (5, 8), (1, 48), (0, 0)])
def test_a_mask_in_another_frame_is_none_of_the_image(size):
    rle = encode_rle(np.ones((1, *size), dtype=bool))[0]
    for read in (mask_of_image, lambda rle, *frame: check_masks_of_image([rle], *frame)):
        with pytest.raises(RleError) as refusal:
            read(rle, 6, 8)
        assert refusal.value.fault in ("frame", "size")


def test_a_mask_of_more_pixels_than_its_image_is_refused_before_they_are_allocated():
    rle = {"size": [40_000, 40_000], "counts": "0PPPZbe1"}
    with pytest.raises(RleError, match="40000 x 40000 pixels; the limit is 48 pixels"):
        label_map([{**row([[1]]), "mask": rle}], 6, 8)


@pytest.mark.parametrize("class_id", [None, 0, -1, 255, 256, 1000])
def test_a_class_id_that_a_byte_cannot_distinguish_from_background_and_ignore_is_refused(class_id):
    with pytest.raises(UserError, match=f"from 1 to 254, received {class_id}"):
        label_map([row([[1]], class_id)], 1, 1)


def test_the_error_names_sample_and_prompt_where_the_rows_do():
    with pytest.raises(UserError, match="sample 'a/1', prompt 'a dog'"):
        label_map([{**row([[1]], None), "key": "a/1", "prompt": "a dog"}], 1, 1)


@given(
    masks=hnp.arrays(bool, st.tuples(st.integers(0, 4), st.just(5), st.just(6))),
    similarities=st.lists(st.sampled_from([-0.1, 0.2, 0.3]), min_size=4, max_size=4),
    ignored=hnp.arrays(bool, (5, 6)),
)
def test_each_pixel_has_the_label_of_the_most_similar_mask_on_it(masks, similarities, ignored):
    rows = [
        row(mask, index + 1, similarity, ignored if index == 0 else None)
        for index, (mask, similarity) in enumerate(zip(masks, similarities, strict=False))
    ]
    labels = label_map(rows, 5, 6)
    for y, x in np.ndindex(5, 6):
        here = [index for index in range(len(masks)) if masks[index, y, x]]
        if here:
            assert labels[y, x] == 1 + max(here, key=lambda index: (similarities[index], -index))
        else:
            assert labels[y, x] == (255 if rows and ignored[y, x] else 0)
