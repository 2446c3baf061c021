"""Small corpora for tests: shards of generated images with captions."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from pipeline.config.load import parse_config
from pipeline.demo.assets import DEMO_MODEL_NAME


def image_bytes(seed, height=48, width=64, file_format="JPEG"):
    """A smooth random picture, so that JPEG keeps it and models see structure."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    picture.save(sink, file_format)
    return sink.getvalue()


def sample(key, seed=0, caption="a dog", **members):
    """A sample's members by name; None leaves one out."""
    fields = {"jpg": image_bytes(seed), "txt": caption.encode()} | members
    return [(f"{key}.{field.replace('_', '.')}", data) for field, data in fields.items() if data is not None]


def captions_json(captions):
    """A JSON member with a list of captions."""
    return json.dumps({"captions": captions}).encode()


def write_shard(path, samples):
    """A tar of samples as `sample` makes them."""
    with tarfile.open(path, "w") as tar:
        for name, data in (member for members in samples for member in members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_corpus(folder, shards, samples_per_shard, caption="a dog"):
    """Shards 0000.tar, 0001.tar, ... of good samples; no image occurs twice."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_shard(
            folder / f"{shard:04d}.tar",
            [
                sample(f"{shard:04d}{index:04d}", seed=shard * samples_per_shard + index, caption=caption)
                for index in range(samples_per_shard)
            ],
        )
        for shard in range(shards)
    ]


WORDS_IN_TURN = ("a dog", "a red cactus", "-", "", "sky")


def write_word_shards(folder, names, samples):
    """Shards of captions alone, by name; among five samples one is to be empty and one is an error.

    Shards that are there stay as they are: one that is written again is another version of itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.tar" for name in names]
    for path in paths:
        if not path.exists():
            members = [
                (f"{path.stem}{index:05d}.txt", WORDS_IN_TURN[index % 5].encode()) for index in range(samples)
            ]
            write_shard(path, [[member] for member in members])
    return paths


def demo_job(shards, out, **sections):
    """A configuration on the demo model; further sections are merged in."""
    document = {
        # a job without shards is refused, also where a test reads none
        "input": {"shards": [str(path) for path in shards] or ["unused.tar"]},
        "model": {"name": DEMO_MODEL_NAME, "pretrained": "demo"},
        "masks": {"rule": "otsu", "refine": "none"},
        "output": {"dir": str(out)},
        "run": {"batch_size": 8, "cpus_per_worker": 1},
    }
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return parse_config(document)
