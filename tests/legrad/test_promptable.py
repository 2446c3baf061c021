"""Masks sharpened by a promptable segmenter: a fake one, and tiny SAM models loaded by the real path."""

import json
from pathlib import Path

import numpy as np
import pytest

from legrad.errors import MaskError, ModelLoadError
from legrad.masks.promptable import (
    MaskCandidates,
    SegmenterPrompt,
    Sharpening,
    best_candidate,
    sharpened_labels,
)
from legrad.masks.sam import SamSegmenter, segmenter_digest
from tests.legrad.test_instances import GRID, SIDE, disc

IMAGE = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
TWO_DISCS = np.maximum(disc(48, 26, 18), 0.9 * disc(48, 70, 18))


class SquareSegmenter:
    """Offers the box of each prompt, the whole image, and nothing; records its prompts."""

    def __init__(self) -> None:
        self.calls: list[list[SegmenterPrompt]] = []

    def segment(self, image, prompts):
        self.calls.append(list(prompts))
        return [self._candidates(image.shape[:2], prompt.box_xyxy.astype(int)) for prompt in prompts]

    @staticmethod
    def _candidates(size, box) -> MaskCandidates:
        left, top, right, bottom = box
        masks = np.zeros((3, *size), bool)
        masks[0] = True
        masks[1, top:bottom, left:right] = True
        return MaskCandidates(masks, np.array([0.9, 0.5, 0.1], np.float32))


def sharpened(heat: np.ndarray, segmenter=None, **options) -> np.ndarray:
    return sharpened_labels(
        segmenter or SquareSegmenter(),
        IMAGE,
        (heat > 0)[None],
        heat[None],
        Sharpening(GRID, **options),
    )[0]


def test_each_instance_is_a_prompt_with_its_peak_and_its_box():
    segmenter = SquareSegmenter()
    labels = sharpened(TWO_DISCS, segmenter, is_split=True)
    ((first, second),) = segmenter.calls
    assert np.abs(first.points_xy - [[26, 48]]).max() <= 1
    assert np.abs(second.points_xy - [[70, 48]]).max() <= 1
    assert np.abs(first.box_xyxy - [8, 30, 44, 66]).max() <= 2
    assert labels[31, 9] == 1
    assert labels[31, 86] == 2
    assert labels[5, 5] == 0


def test_a_mask_that_is_not_split_is_one_prompt_with_a_point_for_each_peak():
    segmenter = SquareSegmenter()
    labels = sharpened(TWO_DISCS, segmenter, min_iou=0.6)
    (only,) = segmenter.calls[0]
    assert np.abs(only.points_xy - [[26, 48], [70, 48]]).max() <= 1
    assert set(np.unique(labels)) == {0, 1}


def test_a_mask_stays_where_no_candidate_agrees_with_it():
    assert np.array_equal(sharpened(TWO_DISCS, min_iou=0.95) > 0, TWO_DISCS > 0)


def test_where_candidates_overlap_the_higher_peak_is_in_front():
    class Everything(SquareSegmenter):
        @staticmethod
        def _candidates(size, _box):
            return MaskCandidates(np.ones((1, *size), bool), np.ones(1, np.float32))

    assert (sharpened(TWO_DISCS, Everything(), is_split=True, min_iou=0.0) == 1).all()


def test_an_empty_mask_stays_empty_and_is_no_prompt():
    segmenter = SquareSegmenter()
    assert not sharpened(np.zeros((SIDE, SIDE), np.float32), segmenter).any()
    assert segmenter.calls == [[]]


def test_of_equally_good_candidates_the_one_with_the_higher_score_is_chosen():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, 0], masks[1, 1] = True, True
    own = masks.any(axis=0)
    best = best_candidate(MaskCandidates(masks, np.array([0.1, 0.2], np.float32)), own, 0.5)
    assert np.array_equal(best, masks[1])


def test_a_limit_out_of_range_is_refused():
    with pytest.raises(MaskError, match="min_iou from 0 to 1"):
        Sharpening(GRID, min_iou=1.5)


def test_a_place_that_is_neither_a_folder_nor_a_repository_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="no such folder"):
        segmenter_digest(str(tmp_path / "absent"))


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra sam")
    with pytest.raises(ModelLoadError, match=r"expected a folder with config\.json"):
        SamSegmenter.from_pretrained(str(tmp_path))


def test_missing_transformers_are_reported_with_the_extra_that_brings_them(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModelLoadError, match=r"legrad-pipeline\[sam\]"):
        SamSegmenter.from_pretrained(str(tmp_path))


@pytest.fixture(scope="module", params=["save_tiny_sam", "save_tiny_sam2"])
def folder(request, tmp_path_factory) -> Path:
    pytest.importorskip("transformers", reason="needs the extra sam")
    from tests.helpers import tiny_segmenters

    return getattr(tiny_segmenters, request.param)(tmp_path_factory.mktemp("segmenter"))


PROMPTS = (
    SegmenterPrompt(np.array([[26, 48]], np.float32), np.ones(1, bool), np.array([8, 30, 44, 66], "f4")),
    SegmenterPrompt(
        np.array([[70, 48], [2, 3]], "f4"), np.array([True, False]), np.array([52, 30, 88, 66], "f4")
    ),
    SegmenterPrompt(np.array([[70, 40]], np.float32), np.ones(1, bool), np.array([52, 30, 88, 66], "f4")),
)


def test_each_prompt_gets_candidates_in_the_frame_of_the_image(folder):
    image = IMAGE[:60, :90]
    candidates = SamSegmenter.from_pretrained(str(folder)).segment(image, PROMPTS)
    assert [each.masks.shape for each in candidates] == [(3, 60, 90)] * 3
    assert all(each.masks.dtype == bool and each.scores.shape == (3,) for each in candidates)


def test_the_candidates_of_a_prompt_do_not_depend_on_other_prompts(folder):
    segmenter = SamSegmenter.from_pretrained(str(folder))
    together = segmenter.segment(IMAGE, PROMPTS)
    for prompt, expected in zip(PROMPTS, together, strict=True):
        (alone,) = segmenter.segment(IMAGE, [prompt])
        assert (alone.masks != expected.masks).mean() < 0.001
        np.testing.assert_allclose(alone.scores, expected.scores, atol=1e-5)
    assert segmenter.segment(IMAGE, []) == []


def test_the_image_encoder_computes_in_half_precision_where_asked_to(folder):
    full, half = (
        SamSegmenter.from_pretrained(str(folder), precision=precision).segment(IMAGE, PROMPTS[:1])[0]
        for precision in ("fp32", "bf16")
    )
    assert (full.masks != half.masks).mean() < 0.1


def test_files_with_another_digest_are_refused(folder):
    digest = segmenter_digest(str(folder))
    SamSegmenter.from_pretrained(str(folder), expected_digest=digest)
    with pytest.raises(ModelLoadError, match="digest"):
        SamSegmenter.from_pretrained(str(folder), expected_digest="sha256:0")


def test_a_mask_is_sharpened_end_to_end(folder):
    labels = sharpened(TWO_DISCS, SamSegmenter.from_pretrained(str(folder)), is_split=True, min_iou=0.0)
    assert labels.max() <= 2


@pytest.fixture
def tiny_folder(tmp_path) -> Path:
    pytest.importorskip("transformers", reason="needs the extra sam")
    from tests.helpers.tiny_segmenters import save_tiny_sam

    return save_tiny_sam(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra sam")
    from tests.helpers.tiny_segmenters import save_tiny_sam

    save_tiny_sam(tmp_path, safe=False)
    with pytest.raises(ModelLoadError, match=r"expected \*\.safetensors, found only pytorch_model\.bin"):
        SamSegmenter.from_pretrained(str(tmp_path))


def test_weights_that_lack_a_tensor_are_refused(tiny_folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_folder / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lack 1 of its weights, such as mask_decoder\.iou_token"):
        SamSegmenter.from_pretrained(str(tiny_folder))


def test_damaged_weights_are_refused(tiny_folder):
    (tiny_folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelLoadError, match=f"segmenter {tiny_folder}"):
        SamSegmenter.from_pretrained(str(tiny_folder))


def test_a_model_of_another_family_is_refused(tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ModelLoadError, match="expected one of sam, sam2, found 'bert'"):
        segmenter_digest(str(tiny_folder))


def test_the_digest_covers_weights_and_processor(tiny_folder):
    before = segmenter_digest(str(tiny_folder))
    settings = tiny_folder / "processor_config.json"
    settings.write_text(settings.read_text() + "\n")
    assert segmenter_digest(str(tiny_folder)) != before
