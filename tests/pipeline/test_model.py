"""What is wrong with a model's name, tag or layers is told before anything starts."""

import pytest
from corpus import demo_job, write_word_shards

from pipeline.demo.assets import DEMO_MODEL_NAME
from pipeline.errors import UserError
from pipeline.job import prepare_job
from pipeline.model import check_model
from pipeline.settings import ModelConfig


def model(name="ViT-B-32", pretrained="openai", **settings):
    return ModelConfig(name=name, pretrained=pretrained, **settings)


def test_models_with_known_tags_checkpoints_and_hub_addresses_pass(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    for good in (
        model(),
        model("ViT-B/32", "laion2b-s34b-b79k", layers=12),
        model(pretrained=str(tmp_path / "weights.pt"), layers="all"),
        model("hf-hub:someone/something", None),
        model(DEMO_MODEL_NAME, "demo"),
    ):
        check_model(good)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (model("ViT-B-33"), "model.name ViT-B-33: .*nearest: ViT-B-32"),
        (model("RN50"), "model.name RN50: .*convolutional.*legrad models"),
        (model(pretrained="opnai"), "model.pretrained: .* for ViT-B-32 one of openai, .*got 'opnai'"),
        (model(layers=13), "model.layers: ViT-B-32 has 12 blocks, got 13"),
    ],
)
def test_a_wrong_name_tag_or_number_of_layers_is_told_with_what_would_be_right(wrong, told):
    with pytest.raises(UserError, match=told):
        check_model(wrong)


def test_a_job_with_a_wrong_model_writes_nothing(tmp_path):
    shards = write_word_shards(tmp_path / "in", ["a"], 1)
    with pytest.raises(UserError, match=r"model\.layers"):
        prepare_job(demo_job(shards, tmp_path / "out", model={"layers": 99}))
    assert not (tmp_path / "out").exists()
