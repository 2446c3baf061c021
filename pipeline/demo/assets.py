"""Paths of the demo model and the demo shards; registration of the model with open_clip."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

DEMO_MODEL_NAME = "legrad_demo_clip"
# The sets that `legrad demo` annotates, and further ones to judge by.
SHARD_SETS = ("heldout", "newartist")
FURTHER_SHARD_SETS = ("stuff", "thirdartist", "duplicates")

_FOLDER = Path(__file__).parent


def demo_model_config_path() -> Path:
    """Return the path of the open_clip JSON configuration of the demo model."""
    return _FOLDER / f"{DEMO_MODEL_NAME}.json"


def demo_weights_path() -> Path:
    """Return the path of the weights of the demo model, safetensors in fp16."""
    return _FOLDER / f"{DEMO_MODEL_NAME}.safetensors"


def demo_shard_folder(set_name: str | None = None) -> Path:
    """Return the folder of the shards of a set; without a name, of those that `legrad demo` annotates."""
    return _FOLDER / ("further_shards" if set_name in FURTHER_SHARD_SETS else "shards")


def demo_shard_paths(set_name: str | None = None) -> list[Path]:
    """Return the paths of the sample shards of a set, in order.

    Args:
        set_name: "heldout" (artists of the training, new backgrounds) or "newartist" (an artist never
            trained on as well); "stuff" (backgrounds that captions name), "thirdartist" (yet another artist)
            or "duplicates" (several objects of a concept). Without a name, "heldout" and "newartist".

    Raises:
        ValueError: There is no such set.
    """
    if set_name is None:
        return [path for name in SHARD_SETS for path in demo_shard_paths(name)]
    known = (*SHARD_SETS, *FURTHER_SHARD_SETS)
    if set_name not in known:
        raise ValueError(f"unknown set of demo shards {set_name!r}; expected one of {', '.join(known)}")
    return sorted(demo_shard_folder(set_name).glob(f"{set_name}-*.tar"))


def demo_config_path() -> Path:
    """Return the path of the configuration of `legrad demo`."""
    return _FOLDER / "demo.yaml"


def demo_classes_path() -> Path:
    """Return the path of the class names, one a line; line 1 is class id 1."""
    return _FOLDER / "classes.txt"


def demo_classes() -> list[str]:
    """Return the class names; class id 1 is the first."""
    return demo_classes_path().read_text(encoding="utf-8").splitlines()


def demo_classes_with_stuff_path() -> Path:
    """Return the path of the class names of things and stuff, one a line; line 1 is class id 1."""
    return _FOLDER / "classes_with_stuff.txt"


def demo_checksums_path() -> Path:
    """Return the path of the recorded SHA-256 digests of weights and shards."""
    return _FOLDER / "checksums.json"


def actual_checksums() -> dict[str, str]:
    """Compute the SHA-256 digests of weights and shards on disk, by path relative to this folder."""
    names = (*SHARD_SETS, *FURTHER_SHARD_SETS)
    files = [demo_weights_path(), *(path for name in names for path in demo_shard_paths(name))]
    return {
        path.relative_to(_FOLDER).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.exists()
    }


def write_checksums() -> None:
    """Write the SHA-256 digests of the files on disk to the file of checksums."""
    demo_checksums_path().write_text(json.dumps(actual_checksums(), indent=2) + "\n", encoding="utf-8")


def register_demo_model() -> str:
    """Register the demo model with open_clip; later calls do nothing.

    Returns:
        The name to give to `open_clip.create_model`, along with `pretrained=str(demo_weights_path())`.
    """
    import open_clip

    if DEMO_MODEL_NAME not in open_clip.list_models():
        open_clip.add_model_config(demo_model_config_path())
    return DEMO_MODEL_NAME
