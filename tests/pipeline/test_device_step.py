"""What a step of 64 images gives to a device, counted on the CPU for a narrow model of ViT-B/16's shape."""

import numpy as np
import pytest
import torch

from pipeline.annotate.grid_steps import GridTexts, batch_grids, grid_steps_of
from pipeline.annotate.texts import ImageMaps
from pipeline.config.masks import MasksConfig
from tests.helpers.device_work import DeviceWork, moved_bytes
from tests.helpers.steps import SIDE, counted_step
from tests.helpers.tiny_models import tiny_clip

PIXELS = 64 * SIDE * SIDE * 3


@pytest.fixture(scope="module", params=["none", "par"])
def step(request):
    return counted_step(images=64, prompts=1, refine=request.param)


def test_a_step_launches_at_most_700_kernels(step):
    assert 400 < step.total.launches <= 700


def test_a_step_waits_for_the_device_at_most_ten_times(step):
    assert 2 <= step.total.waits <= 10


def test_pixels_are_sent_once_and_nothing_of_their_size_beside_them(step):
    assert PIXELS <= step.total.uploaded_bytes < 1.02 * PIXELS
    assert step.by_part["pixels"].uploaded_bytes == 0


def test_beside_the_image_tower_a_step_moves_at_most_6_gb(step):
    """At this width tokens are small; the parts whose size depends on pixels are those of ViT-B/16."""
    assert 0 < step.total.moved_bytes - step.by_part["image tower"].moved_bytes < 6e9


def test_a_step_of_twice_as_many_images_waits_as_often():
    small, large = (counted_step(images=images, refine="none").total for images in (4, 8))
    assert small.waits == large.waits


def count(operate):
    model = tiny_clip()
    work = DeviceWork(model)
    with work.counted():
        operate(model.visual.conv1.weight.detach())
    return work


FILTERS = {"min_similarity": 0.1, "min_peak": 0.1, "min_foreground_contrast": 0.01, "min_lead": 0.01}


@pytest.mark.parametrize(("limits", "launches"), [({}, 54), (FILTERS, 162)], ids=["alone", "with filters"])
def test_smoothing_and_contrast_never_wait_and_launch_as_often_for_any_batch(limits, launches):
    steps = grid_steps_of(MasksConfig(smooth=0.6, combine="argmax", **limits), 0.5)
    found = []
    for counts in ([1, 3, 5], [5] * 30):
        chosen = [ImageMaps(np.arange(own), np.arange(own), np.arange(own + 2), 2) for own in counts]
        maps = sum(counts) + 2 * len(counts)
        grids, rows, similarities = torch.rand(maps, 14, 14), torch.rand(maps, 64), np.full(maps, 0.3)

        def take_steps(weight, chosen=chosen, grids=grids, rows=rows, similarities=similarities):
            texts = GridTexts(rows.to(weight.device), similarities)
            batch_grids(grids.to(weight.device), chosen, texts, steps)

        found.append(count(take_steps).total)
    assert 20 < found[0].launches == found[1].launches <= launches
    # these two tensors are made here, and sent
    assert found[0].waits == found[1].waits == 2


def test_the_counter_knows_launches_from_views_and_allocations():
    work = count(lambda weight: torch.empty_like(weight.flatten(1).T[:2]))
    assert work.total.launches == 0
    work = count(lambda weight: (weight + 1).mul_(weight).sum())
    assert dict(work.operations["other"]) == {"add": 1, "mul_": 1, "sum": 1}
    assert work.total.moved_bytes == 6 * 32 * 3 * 16 * 4 + 4


def test_the_counter_knows_what_waits():
    index = torch.tensor([0, 2])
    waiting = {
        "item": lambda weight: weight.sum().item(),
        "bool": lambda weight: bool(weight.sum() > 0),
        "cpu": lambda weight: weight.cpu().numpy(),
        "tolist": lambda weight: weight[0, 0, 0].tolist(),
        "nonzero": lambda weight: weight.nonzero(),
        "mask": lambda weight: weight[weight > 0],
        "index of the CPU": lambda weight: weight[index],
        "upload": lambda weight: index.to(weight.device),
        "constant": lambda weight: torch.tensor(1.0, device=weight.device),
        "pinned but waited for": lambda weight: torch.ones(2, pin_memory=True).to(weight.device),
    }
    assert {name: count(operate).total.waits for name, operate in waiting.items()} == dict.fromkeys(
        waiting, 1
    )
    free = {
        "pinned": lambda weight: torch.empty(2, pin_memory=True).to(weight.device, non_blocking=True) + 1,
        "made there": lambda weight: torch.arange(3, device=weight.device) + 1,
        "index of the device": lambda weight: weight[torch.zeros(2, dtype=torch.int64, device=weight.device)],
    }
    assert {name: count(operate).total.waits for name, operate in free.items()} == dict.fromkeys(free, 0)


def test_the_counter_knows_the_bytes_of_expanded_tensors_and_of_transfers():
    assert moved_bytes(torch.zeros(3, 1).expand(3, 5)) == 12
    work = count(lambda weight: torch.zeros(5, dtype=torch.uint8).to(weight.device).cpu())
    assert (work.total.uploaded_bytes, work.total.downloaded_bytes) == (5, 5)


def test_what_the_device_holds_cannot_be_read_as_an_array():
    with pytest.raises(TypeError, match="numpy"):
        count(lambda weight: weight.numpy())
