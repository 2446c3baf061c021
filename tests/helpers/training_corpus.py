"""Annotated shards for tests of training, written without a model; every image says whose it is."""

import io
import json
import tarfile
import uuid
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from pipeline import storage
from pipeline.output.folder import JOB_FILE, SHARDS_FILE
from pipeline.output.image_shards import content_digest
from pipeline.output.records import LAYOUT
from pipeline.output.schema import ANNOTATION_SCHEMA
from pipeline.output.tables import shard_list_bytes
from pipeline.output.writer import ShardWriter
from pipeline.shards.sample_error import SampleError
from tests.helpers.corpus import demo_job

HEIGHT, WIDTH = 6, 10
LAST_CLASS = 254

OUTCOMES = (
    "annotated",
    "empty",
    "failed",
    "rejected",
    "broken image",
    "foreign key",
    "foreign size",
    "twice",
)


@dataclass(frozen=True)
class Planned:
    """A sample: what happens to it, and a number that its image, its mask and its key encode."""

    number: int
    outcome: str = "annotated"
    prompts: int = 1

    @property
    def key(self):
        return f"s{self.number:06d}"


@dataclass
class Corpus:
    """What was written."""

    out: str
    shards: list
    planned: dict = field(default_factory=dict)


def png(pixels):
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def picture(number, height=HEIGHT, width=WIDTH):
    """All pixels encode the number."""
    return np.broadcast_to(np.uint8([number >> 8, number & 255, 7]), (height, width, 3)).copy()


def number_of(image):
    """The inverse of `picture`, of a channels-first tensor."""
    red, green, _ = image[:, 0, 0].tolist()
    assert (image == image[:, :1, :1]).all()
    return red * 256 + green


def class_of(number):
    return 1 + number % LAST_CLASS


def mask_of(number, prompt=0):
    """A rectangle that depends on the number."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[: 1 + number % (HEIGHT - 1), prompt : prompt + 1 + number % (WIDTH - 3)] = True
    return mask


def rle(mask):
    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def row(key, index, prompt_index=0, *, mask, **values):
    """An annotation row; without a mask it was rejected."""
    known = {
        "key": key,
        "sample_index": index,
        "prompt_index": prompt_index,
        "prompt": f"text {prompt_index}",
        "prompt_truncated": False,
        "class_id": None,
        "status": "rejected_peak" if mask is None else "ok",
        "image_height": HEIGHT,
        "image_width": WIDTH,
        "similarity": 0.5,
        "peak": 1.0,
        "threshold": 0.5,
        "area": 0 if mask is None else int(mask.sum()),
        "mask": None if mask is None else rle(mask),
    }
    return dict.fromkeys(ANNOTATION_SCHEMA.names) | known | values


def rows_of(planned, index):
    if planned.outcome in ("empty", "failed"):
        return []
    foreign = {"foreign key": {"key": "other"}, "foreign size": {"image_height": HEIGHT + 1}}
    return [
        row(
            planned.key,
            index,
            prompt,
            mask=None if planned.outcome == "rejected" else mask_of(planned.number, prompt),
            class_id=class_of(planned.number),
            similarity=0.9 - 0.1 * prompt,
        )
        | foreign.get(planned.outcome, {})
        for prompt in range(planned.prompts)
    ]


def members_of(planned):
    image = b"not an image" if planned.outcome == "broken image" else png(picture(planned.number))
    truth = png(np.full((HEIGHT, WIDTH), class_of(planned.number), dtype=np.uint8))
    image_name = f"{planned.key}.png"
    members = [(image_name, image), (f"{planned.key}.seg.png", truth), (f"{planned.key}.txt", b"a text")]
    return [*members, members[0]] if planned.outcome == "twice" else members


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def begin_job(shards, out):
    """What a job writes before it annotates: its settings and its list; returns the shards, in order."""
    config = demo_job(shards, out, input={"image": "png", "shards": [str(shard) for shard in shards]})
    sources = storage.list_shards(config.input.shards)
    listed = [
        {
            "shard_id": shard.shard_id,
            "shard": shard.canonical_url,
            "size_bytes": shard.size_bytes,
            "mtime_ns": shard.mtime_ns,
            "etag": shard.etag,
        }
        for shard in sources
    ]
    document = {"config": config.model_dump(mode="json"), "config_hash": "0" * 16, "layout": LAYOUT}
    storage.publish(config.output.dir, JOB_FILE, json.dumps(document).encode())
    storage.publish(config.output.dir, SHARDS_FILE, shard_list_bytes(listed))
    return sources


def annotate(out, shard, rows_by_sample):
    """Publish a shard's two files."""
    metadata = {"attempt": uuid.uuid4().hex, "config_hash": "0" * 16}
    with ShardWriter(shard, metadata) as writer:
        for index, rows in enumerate(rows_by_sample):
            failed = [] if rows else [SampleError("decode", "unreadable", "broken", None, index)]
            writer.add_sample(rows, failed if index % 2 else [])
        writer.publish(str(out), content_digest(shard))


def write_corpus(folder, plans, *, not_annotated=()):
    """Shards with the planned samples, and a job's output for them.

    Args:
        folder: takes both.
        plans: one list of planned samples a shard.
        not_annotated: ordinals of shards without annotations.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        write_tar(folder / f"{number:03d}.tar", [member for item in plan for member in members_of(item)])
        for number, plan in enumerate(plans)
    ]
    out = str(folder / "out")
    for number, (shard, plan) in enumerate(zip(begin_job(paths, out), plans, strict=True)):
        if number not in not_annotated:
            annotate(out, shard, [rows_of(item, index) for index, item in enumerate(plan)])
    return Corpus(out, paths, dict(enumerate(plans)))
