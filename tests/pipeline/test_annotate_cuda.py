"""The shard annotator on a CUDA device: the same rows as on the CPU."""

import pyarrow.dataset as ds
import pytest
import torch

from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.model import load_explainer
from pipeline.demo import assets
from tests.helpers.corpus import demo_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def annotate_demo_shard(out, device, **model):
    shards = assets.demo_shard_paths("heldout")[:1]
    config = demo_job(
        shards,
        out,
        input={"caption": "json:captions"},
        prompts={"source": "captions"},
        model={"layers": 4, **model},
        run={"batch_size": 24},
    )
    explainer = load_explainer(config.model, device)
    annotator = ShardAnnotator(config, explainer, decode_threads=4, metadata={})
    report = annotator.annotate(storage.list_shards(config.input.shards)[0])
    annotator.close()
    assert report.counts.failed == 0
    return ds.dataset(out / "annotations", format="parquet").to_table().to_pylist()


@pytest.mark.parametrize(
    ("precision", "similarity_error", "area_share"), [("fp32", 1e-3, 0.01), ("bf16", 0.02, 0.1)]
)
def test_masks_made_on_cuda_are_those_made_on_the_cpu(tmp_path, precision, similarity_error, area_share):
    on_cpu = annotate_demo_shard(tmp_path / "cpu", "cpu")
    on_cuda = annotate_demo_shard(tmp_path / "cuda", "cuda", precision=precision)
    assert [(row["key"], row["prompt"]) for row in on_cuda] == [(row["key"], row["prompt"]) for row in on_cpu]
    differing_areas = []
    for left, right in zip(on_cpu, on_cuda, strict=True):
        assert left["similarity"] == pytest.approx(right["similarity"], abs=similarity_error)
        pixels = left["image_height"] * left["image_width"]
        differing_areas.append(abs(left["area"] - right["area"]) / pixels)
    assert sum(differing_areas) / len(differing_areas) < area_share
