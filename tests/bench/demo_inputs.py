"""The demo's files that programs here measure with: sets of scenes, and weights of today and before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from measured_files import ROOT

from pipeline.config.load import load_config
from pipeline.config.schema import JobConfig
from pipeline.demo import assets

# new: the shipped weights. old: those before stuff was part of the training
WEIGHTS = {
    "new": "pipeline/demo/legrad_demo_clip.safetensors",
    "old": "tests/bench/weights/legrad_demo_clip-1.safetensors",
}
OLD_WEIGHTS_SHA256 = "ada1843379f478af64886ca1732c39ca05d1c475e9a3240acdb30adad1acd3d1"
SETS = (*assets.SHARD_SETS, *assets.FURTHER_SHARD_SETS)
# sets whose figures are published side by side
PUBLISHED_SETS = ("heldout", "newartist")


def demo_files(*sets: str, weights: str = "new") -> list[str]:
    """Return patterns of the files that a job on the demo's scenes reads."""
    return [
        "pipeline/demo/legrad_demo_clip.json",
        "pipeline/demo/demo.yaml",
        "pipeline/demo/classes.txt",
        "pipeline/prompts/background.txt",
        WEIGHTS[weights],
        *(f"{assets.demo_shard_folder(name).relative_to(ROOT)}/{name}-*.tar" for name in sets),
    ]


def weights_path(weights: str) -> Path:
    """Return the path of weights.

    Raises:
        SystemExit: the old weights are not there, or are others.
    """
    path = ROOT / WEIGHTS[weights]
    if not path.exists():
        raise SystemExit(f"{WEIGHTS[weights]} is not there; measure with --weights new")
    if weights == "old" and hashlib.sha256(path.read_bytes()).hexdigest() != OLD_WEIGHTS_SHA256:
        raise SystemExit(f"{WEIGHTS[weights]} has other bytes than the weights of that name")
    return path


def demo_job(
    sets: Iterable[str],
    changes: Sequence[str] = (),
    *,
    weights: str = "new",
    config: Path | None = None,
) -> JobConfig:
    """Return the demo's configuration, or another one for its model, for sets of scenes.

    Args:
        sets: names of sets of the demo's shards.
        changes: `key=value`, which come last.
        weights: key of `WEIGHTS`.
        config: the configuration; default: that of the demo.
    """
    shards = [str(path) for name in sets for path in assets.demo_shard_paths(name)]
    own = [f"input.shards={json.dumps(shards)}"]
    if weights != "new":
        own.append(f"model.pretrained={weights_path(weights)}")
    return load_config(config or assets.demo_config_path(), [*own, *changes])
