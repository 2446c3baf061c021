"""Filters of prompts: which one rejects a prompt, and which other text leads."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.annotate.filters import STATUSES, Filters, leads_of, rejections

INF = float("inf")


def statuses(filters, similarities, *, peaks=None, owners=None, backgrounds=()):
    count = len(similarities)
    grids = torch.rand(count, 3, 4, generator=torch.Generator().manual_seed(0))
    grids = grids / grids.amax((1, 2), keepdim=True) * torch.tensor(peaks or [1.0] * count)[:, None, None]
    is_background = torch.zeros(count, dtype=torch.bool)
    is_background[list(backgrounds)] = True
    found = rejections(
        filters,
        grids,
        torch.tensor(similarities, dtype=torch.float64),
        torch.tensor(owners or [0] * count),
        is_background,
    )
    return [STATUSES[each].removeprefix("rejected_") for each in found.tolist()]


@pytest.mark.parametrize(
    ("limits", "similarities", "options", "expected"),
    [
        ({"min_lead": 0.0}, [0.3, 0.2], {}, ["ok", "lead"]),
        ({"min_lead": 0.2}, [0.3, 0.2], {}, ["lead", "lead"]),
        ({"min_lead": -0.2}, [0.3, 0.2], {}, ["ok", "ok"]),
        ({"min_lead": 2.0}, [0.3], {}, ["ok"]),
        ({"min_lead": 0.0}, [0.3, 0.3], {}, ["ok", "ok"]),
        ({"min_lead": 0.01}, [0.3, 0.3], {}, ["lead", "lead"]),
        ({"min_lead": 0.1}, [0.3, 0.200009], {}, ["ok", "lead"]),
        ({"min_lead": 0.1}, [0.3, 0.20002], {}, ["lead", "lead"]),
        # a background text is another text, and is never rejected
        ({"min_lead": 0.0}, [0.3, 0.4], {"backgrounds": [1]}, ["lead", "ok"]),
        ({"min_lead": 0.0, "min_similarity": 0.35}, [0.36, 0.3], {"backgrounds": [1]}, ["ok", "ok"]),
        # one that another filter rejects does not count
        ({"min_lead": 0.05, "min_peak": 0.5}, [0.3, 0.4], {"peaks": [1.0, 0.4]}, ["ok", "peak"]),
        (
            {"min_lead": 0.05, "min_similarity": 0.25, "min_peak": 0.5},
            [0.3, 0.28, 0.2],
            {"peaks": [1.0, 0.1, 1.0]},
            ["ok", "peak", "similarity"],
        ),
        # a prompt of another image neither
        ({"min_lead": 0.0}, [0.3, 0.4], {"owners": [0, 1]}, ["ok", "ok"]),
        ({"min_lead": 0.0}, [0.3, 0.4, 0.2], {"owners": [0, 1, 0]}, ["ok", "ok", "lead"]),
        # the first filter that rejects a prompt names it
        ({"min_similarity": 0.5, "min_peak": 2.0, "min_lead": 2.0}, [0.3], {}, ["similarity"]),
        ({"min_peak": 2.0, "min_foreground_contrast": 9.0}, [0.3], {}, ["peak"]),
        ({"min_foreground_contrast": 9.0, "min_lead": 2.0}, [0.3, 0.3], {}, ["contrast", "contrast"]),
    ],
)
def test_the_first_filter_that_rejects_a_prompt_is_its_status(limits, similarities, options, expected):
    assert statuses(Filters(**limits), similarities, **options) == expected


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_prompt_whose_relevance_is_not_finite_counts_for_no_lead(broken):
    grids = torch.rand(2, 3, 4)
    grids[1, 0, 0] = broken
    similarities, owners = torch.tensor([0.3, 0.4]).double(), torch.zeros(2, dtype=torch.int64)
    is_background = torch.zeros(2, dtype=torch.bool)
    filters = Filters(min_lead=0.0, min_foreground_contrast=0.0)
    assert rejections(filters, grids, similarities, owners, is_background)[0] == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.3]), st.booleans()), min_size=1, max_size=12
    )
)
def test_a_lead_is_over_the_most_similar_other_text_of_the_image_that_is_left(texts):
    owners, similarities, is_left = map(list, zip(*texts, strict=True))
    owners = [sorted(set(owners)).index(owner) for owner in owners]
    expected = [
        similarities[own]
        - max(
            (
                similarities[other]
                for other in range(len(texts))
                if other != own and owners[other] == owners[own] and is_left[other]
            ),
            default=-INF,
        )
        for own in range(len(texts))
    ]
    found = leads_of(
        torch.tensor(similarities, dtype=torch.float64), torch.tensor(owners), torch.tensor(is_left)
    ).tolist()
    for own, (lead, wanted) in enumerate(zip(found, expected, strict=True)):
        # only the leads of texts that are left are asked for
        if is_left[own]:
            assert lead == pytest.approx(wanted)


def test_the_order_of_texts_changes_nothing():
    similarities, peaks = [0.3, 0.31, 0.2, 0.31], [1.0, 0.9, 1.0, 0.2]
    filters = Filters(min_peak=0.5, min_lead=-0.02)
    expected = statuses(filters, similarities, peaks=peaks)
    for order in itertools.permutations(range(4)):
        found = statuses(filters, np.take(similarities, order).tolist(), peaks=np.take(peaks, order).tolist())
        assert found == [expected[own] for own in order]
