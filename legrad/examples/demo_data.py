"""The bundled model and its pictures, so that the examples need no model hub and no data."""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import legrad
from pipeline.demo import assets


def output_folder(example: str) -> Path:
    """Return the folder that the command line names, otherwise `out/examples/NAME`, and make it."""
    given = sys.argv[1:]
    # a notebook's kernel has options there
    is_named = len(given) == 1 and not given[0].startswith("-")
    folder = Path(given[0]) if is_named else Path("out") / "examples" / example
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def name_and_weights(model: str | tuple[str, str]) -> tuple[str, str]:
    """Return the arguments of `LeGrad.from_open_clip` for "demo", or the given ones."""
    if isinstance(model, tuple):
        return model
    return assets.register_demo_model(), str(assets.demo_weights_path())


def load(model: str | tuple[str, str], **options: Any) -> legrad.LeGrad:
    """Return an explainer of the demo model ("demo"), or of a name and a pretrained tag of open_clip."""
    return legrad.LeGrad.from_open_clip(*name_and_weights(model), **options)


def scenes(folder: Path, number: int) -> list[tuple[Path, list[str]]]:
    """Write pictures of the demo to a folder; return their paths, each with texts of what it shows."""
    found = []
    with tarfile.open(assets.demo_shard_paths("heldout")[0]) as shard:
        for index in range(number):
            picture, facts = (_content(shard, f"heldout-{index:05d}.{kind}") for kind in ("jpg", "json"))
            path = folder / f"scene-{index}.jpg"
            path.write_bytes(picture)
            found.append((path, list(json.loads(facts)["captions"])))
    return found


def _content(shard: tarfile.TarFile, name: str) -> bytes:
    member = shard.extractfile(name)
    return (member or io.BytesIO()).read()
