"""Output folders for tests of the report: written by the pipeline's own writer, without a model."""

import numpy as np
import torch

from legrad.masks.rle import encode_rle
from pipeline.output.counts import ShardCounts
from pipeline.output.folder import OutputFolder, new_run_id
from pipeline.output.runs import RunState, recorded_run
from pipeline.output.writer import ShardWriter
from pipeline.run.job import prepare_job
from pipeline.shards.sample_error import SampleError
from tests.helpers.corpus import demo_job, image_bytes, sample, write_shard

HEIGHT, WIDTH = 48, 64
HOSTILE = (
    """<img src=x onerror="document.title='hit'"></script><script>document.title='hit'</script>'"&{{7*7}}"""
)


def box_rle(top, left, bottom, right, height=HEIGHT, width=WIDTH):
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[0, top:bottom, left:right] = True
    return encode_rle(mask)[0]


def row(index, prompt_index=0, *, key=None, status="ok", similarity=0.3, peak=0.01, heat=True, **columns):
    """One annotation row as the annotator writes it, without its shard."""
    side = 8 + index % 24
    grid = (np.arange(12) * 20 % 256).astype(np.uint8)
    accepted = status == "ok"
    return {
        "key": f"key{index:03d}" if key is None else key,
        "sample_index": index,
        "prompt_index": prompt_index,
        "prompt": f"thing number {index}",
        "prompt_truncated": False,
        "class_id": None,
        "status": status,
        "image_height": HEIGHT,
        "image_width": WIDTH,
        "similarity": similarity,
        "peak": peak,
        "threshold": 0.5 if accepted else None,
        "threshold_low": None,
        "area": side * side if accepted else 0,
        "bbox_xywh": [4.0, 4.0, side, side] if accepted else None,
        "mask": box_rle(4, 4, 4 + side, 4 + side) if accepted else None,
        "ignore": None,
        "heatmap": grid.tobytes() if heat else None,
        "heatmap_height": 3 if heat else None,
        "heatmap_width": 4 if heat else None,
        **columns,
    }


def write_job(folder, shards, *, errors=(), done=None, runs=True, images=None, **sections):
    """A job of shards 0.tar, 1.tar, ..., each with its rows; `done` of them annotated; returns OUT.

    `images`: bytes of the image of every sample, or None for pictures of their own; `errors`: of the first
    shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, rows in enumerate(shards):
        keys = dict(sorted((entry["sample_index"], entry["key"]) for entry in rows))
        samples = [
            sample(keys.get(index, f"other{index}"), jpg=images or image_bytes(index))
            for index in range(max(keys, default=-1) + 1)
        ]
        paths.append(write_shard(folder / f"{number}.tar", samples))
    out = folder / "out"
    job = prepare_job(demo_job(paths, out, **sections))
    metadata = {**job.metadata, "attempt": "a"}
    for number, shard in enumerate(job.shards[:done]):
        with ShardWriter(shard, metadata, with_instances=job.config.masks.has_instances) as writer:
            by_sample = {}
            for entry in shards[number]:
                by_sample.setdefault(entry["sample_index"], []).append(entry)
            for rows in by_sample.values():
                writer.add_sample(rows, ())
            for error in errors if number == 0 else ():
                writer.add_sample((), [error])
            writer.publish(str(out))
    if runs:
        record_run(out)
    return out


def record_run(out, ended="complete", **state):
    """Leave the record of a run of ten seconds; `state`: fields of its state."""
    with recorded_run(OutputFolder(str(out), new_run_id())) as recorder:
        for second in range(1, 11):
            recorder.update(
                RunState(
                    shards_total=1,
                    shards_skipped=0,
                    counts=ShardCounts(annotated=20 * second),
                    workers_ready=1,
                    elapsed_s=float(second),
                    **state,
                )
            )
        recorder.close(ended)


def error(index=0, kind="truncated", message="the image ends early", key="broken"):
    return SampleError("decode", kind, message, key, index)


def varied_rows(count, *, classes=0):
    """Rows whose scores differ; every fifth is rejected."""
    return [
        row(
            index,
            similarity=round(0.1 + 0.01 * (index * 7 % count), 4),
            peak=round(0.001 + 0.0001 * (index * 3 % count), 5),
            status="rejected_similarity" if index % 5 == 4 else "ok",
            class_id=1 + index % classes if classes else None,
        )
        for index in range(count)
    ]
