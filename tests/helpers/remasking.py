"""Jobs whose masks are made by a model, and from the maps that another job stored; in this process."""

import pyarrow.parquet as pq
import torch

from legrad.masks.rle import decode_rle
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.stored_maps import parts_from_maps
from pipeline.config.load import parse_config
from pipeline.demo.assets import DEMO_MODEL_NAME
from pipeline.output.folder import OutputFolder
from pipeline.output.status import read_status
from pipeline.run.job import prepare_job
from pipeline.run.remask import prepare_remask

# columns that do not say how a mask was made, and are the same to the bit
IDENTITY = (
    *("key", "sample_index", "shard", "prompt_index", "prompt", "prompt_truncated", "class_id", "status"),
    *("image_height", "image_width", "similarity", "peak", "heatmap", "heatmap_height", "heatmap_width"),
)


def scenes_job(shards, out, **sections):
    """A configuration for scenes of the demo: their captions, background texts, contrast, competition."""
    document = {
        "input": {"shards": [str(path) for path in shards], "image": "jpg", "caption": "json:captions"},
        "model": {"name": DEMO_MODEL_NAME, "pretrained": "demo", "precision": "fp32"},
        "prompts": {"source": "captions", "background": "default"},
        "masks": {"rule": "fixed", "value": 0.4, "combine": "argmax", "refine": "none"},
        "output": {"dir": str(out)},
        "run": {"cpus_per_worker": 1, "batch_size": 8},
    }
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return parse_config(document)


def annotated(explainer, config):
    """Annotate the shards of a job by a model; returns OUT."""
    return _made(prepare_job(config), explainer)


def remasked(out, new, *overrides, shards=(), device="cpu"):
    """Make the masks of a job from the maps in OUT; returns NEW."""
    job = prepare_remask(str(out), str(new), overrides, shards)
    return _made(job, parts_from_maps(job.config, job.stamp.maps_hash, torch.device(device), None))


def _made(job, source):
    annotator = ShardAnnotator(job.config, source, decode_threads=2, metadata=job.metadata)
    try:
        for shard in job.todo:
            annotator.annotate(shard)
    finally:
        annotator.close()
        job.folder.close()
    return job.folder.url


def rows_in(out):
    """All annotation rows of a folder, by shard, sample and prompt."""
    folder = OutputFolder(str(out))
    rows = [
        row
        for shard_id in sorted(folder.ids("annotations"))
        for row in pq.read_table(f"{out}/annotations/{shard_id}.parquet").to_pylist()
    ]
    return {(row["shard"], row["sample_index"], row["prompt_index"]): row for row in rows}


def assert_same_masks(found, expected, least_iou=0.995):
    """Compare rows by key: IoU of their masks, thresholds, and everything else, which is the same."""
    assert found.keys() == expected.keys()
    for place, row in expected.items():
        other = found[place]
        assert {name: other[name] for name in IDENTITY} == {name: row[name] for name in IDENTITY}
        for name in ("threshold", "threshold_low"):
            assert (other[name] is None) == (row[name] is None), (place, name)
            assert other[name] is None or abs(other[name] - row[name]) < 0.002, (place, name)
        for name in ("mask", "ignore"):
            assert iou(other[name], row[name]) >= least_iou, (place, name)
        assert len(other.get("instances") or ()) == len(row.get("instances") or ()), place
        for one, two in zip(other.get("instances") or (), row.get("instances") or (), strict=True):
            assert iou(one["mask"], two["mask"]) >= 0.98, place


def iou(one, other):
    """IoU of two masks; 1 where both are missing or empty."""
    if (one is None) != (other is None):
        return 0.0
    if one is None:
        return 1.0
    first, second = decode_rle(one), decode_rle(other)
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def counts_of(out):
    """Outcomes of the samples of a folder, and errors of each kind."""
    return read_status(str(out)).counts
