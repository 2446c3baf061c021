"""Files of models: fetched ahead of a job, and reported in one line where they are out of reach."""

import logging

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner

from pipeline.annotate.model import load_explainer
from pipeline.cli.main import app
from pipeline.config.schema import ModelConfig
from pipeline.demo.assets import DEMO_MODEL_NAME
from pipeline.errors import UserError


@pytest.fixture
def _offline(monkeypatch, tmp_path):
    """No connection, and nothing downloaded earlier."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


def test_a_model_is_fetched_ahead_of_a_job():
    result = CliRunner().invoke(app, ["models", "--fetch", DEMO_MODEL_NAME, "demo"], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"{DEMO_MODEL_NAME} demo" in result.output


@pytest.mark.usefixtures("_offline")
def test_a_model_that_brings_its_weights_is_fetched_by_its_address_alone():
    result = CliRunner().invoke(app, ["models", "--fetch", "hf-hub:org/model", "null"])
    assert "models --fetch hf-hub:org/model null" in str(result.exception)


@pytest.mark.usefixtures("_offline")
def test_files_out_of_reach_are_reported_once_by_the_error_alone(caplog):
    filters, level = list(logging.getLogger().filters), logging.getLogger("huggingface_hub").level
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match=r"legrad models --fetch ViT-B-32 openai") as caught,
    ):
        load_explainer(ModelConfig(name="ViT-B-32", pretrained="openai"), "cpu")
    assert "\n" not in str(caught.value)
    assert caplog.messages == []
    assert list(logging.getLogger().filters) == filters
    assert logging.getLogger("huggingface_hub").level == level
