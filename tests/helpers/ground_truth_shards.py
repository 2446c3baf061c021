"""Tiny shards with ground truth, and a tiny seeded CLIP that open_clip loads by name."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

from legrad.loading import model_digest
from pipeline.output.records import LAYOUT

IMAGE_SIZE, PATCH_SIZE, LAYERS = 32, 8, 3
MODEL_NAME = "evaluation-test-clip"
MODEL_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "width": 24,
        "head_width": 12,
        "layers": LAYERS,
    },
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def label_map(
    boxes: Mapping[int, tuple[int, int, int, int]], height: int = 24, width: int = 40
) -> np.ndarray:
    """Class id to (top, bottom, left, right); later boxes cover earlier ones."""
    labels = np.zeros((height, width), dtype=np.uint8)
    for class_id, (top, bottom, left, right) in boxes.items():
        labels[top:bottom, left:right] = class_id
    return labels


def scene_fields(
    labels: np.ndarray, captions: Sequence[str], class_ids: Sequence[int], seed: int = 0
) -> dict[str, bytes]:
    noise = np.random.default_rng(seed).integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
    document = {"caption": " and ".join(captions), "captions": list(captions), "class_ids": list(class_ids)}
    return {"png": png(noise), "json": json.dumps(document).encode(), "seg.png": png(labels)}


def write_shard(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, fields in samples.items():
            for extension, data in fields.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def two_object_shard(path: Path, scenes: int = 5) -> Path:
    """Scenes of one or two objects at seeded places, some pixels ignored."""
    generator = np.random.default_rng(7)
    samples: dict[str, Mapping[str, bytes]] = {}
    for index in range(scenes):
        top, left = generator.integers(0, 8, 2).tolist()
        boxes = {1: (top, top + 9, left, left + 10)}
        if index % 2 == 0:
            boxes[2] = (14, 23, 22, 33)
        boxes[255] = (10, 12, 0, 40)
        names = {1: "a dog", 2: "a car"}
        ids = [class_id for class_id in boxes if class_id != 255]
        samples[f"scene{index}"] = scene_fields(label_map(boxes), [names[i] for i in ids], ids, seed=index)
    return write_shard(path, samples)


def save_tiny_model(folder: Path) -> Path:
    """Register the tiny model with open_clip under MODEL_NAME and write its seeded weights."""
    config = folder / f"{MODEL_NAME}.json"
    config.write_text(json.dumps(MODEL_CONFIG))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL_NAME)
    for parameter in model.visual.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = folder / "weights.pt"
    torch.save(model.state_dict(), weights)
    return weights


def job_document(out: Path, weights: Path, **prompts: Any) -> dict[str, Any]:
    return {
        "layout": LAYOUT,
        "weights_digest": model_digest(MODEL_NAME, str(weights)) if weights.exists() else "unknown",
        "config_hash": "0" * 12,
        "config": {
            "input": {"shards": "unused.tar", "image": "png", "caption": "json:captions"},
            "model": {"name": MODEL_NAME, "pretrained": str(weights), "layers": 2},
            "prompts": {"source": "captions", **prompts},
            "output": {"dir": str(out), "heatmap": True},
        },
    }
