"""Train 20 steps on an export of masks, as its reader would: by torchvision or by ultralytics.

    python tests/bench/train_on_export.py torchvision DEST    # DEST: legrad export OUT DEST --format voc
    python tests/bench/train_on_export.py ultralytics DEST    # DEST: legrad export OUT DEST --format yolo-seg

Models have random weights, so nothing is downloaded: torchvision's LR-ASPP on MobileNetV3, and YOLO11n-seg
built from its YAML file. Images are resized to 256 x 256 pixels. Prints the number of steps, and the loss of
the first and of the last step. It shows that the files are read and trained on, not how good masks are.
After its steps, ultralytics validates the model once.
"""

import argparse
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.nn.functional import cross_entropy

SIDE = 256
IGNORED = 255


def main() -> None:
    """Train by one of the libraries."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", choices=sorted(TRAININGS))
    parser.add_argument("export", metavar="DEST", type=Path, help="folder that legrad export wrote")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    losses = TRAININGS[arguments.library](arguments.export, arguments.steps)
    print(f"{len(losses)} steps; loss {losses[0]:.2f} at the first, {losses[-1]:.2f} at the last")


def train_by_torchvision(export: Path, steps: int) -> list[float]:
    """Train on label maps that `torchvision.datasets.VOCSegmentation` reads; return the loss of each step."""
    from torchvision.datasets import VOCSegmentation
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(0)
    classes = (export / "classes.txt").read_text(encoding="utf-8").splitlines()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(classes) + 1)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scenes = VOCSegmentation(str(export), year="2012", image_set="train", transforms=_resized)
    batches = torch.utils.data.DataLoader(
        scenes, batch_size=batch_size(len(scenes), steps), shuffle=True, drop_last=True
    )
    epochs = itertools.chain.from_iterable(itertools.repeat(batches))
    losses: list[float] = []
    for images, labels in itertools.islice(epochs, steps):
        loss = cross_entropy(model(images.to(device))["out"], labels.to(device), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _resized(image: Image.Image, labels: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image as [3, SIDE, SIDE] in 0 to 1, and its label map as [SIDE, SIDE]."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    size = (SIDE, SIDE)
    return (
        pil_to_tensor(image.convert("RGB").resize(size)) / 255,
        pil_to_tensor(labels.resize(size, Image.Resampling.NEAREST))[0].long(),
    )


def train_by_ultralytics(export: Path, steps: int) -> list[float]:
    """Train a YOLO model for one epoch of at most so many steps; return the loss of each."""
    # neither settings outside of the current folder, nor requests for news and versions
    os.environ.setdefault("YOLO_CONFIG_DIR", str(Path.cwd()))
    os.environ["YOLO_OFFLINE"] = "true"
    from ultralytics import YOLO

    images = (export / "train.txt").read_text(encoding="utf-8").splitlines()
    losses: list[float] = []
    model = YOLO("yolo11n-seg.yaml")
    model.add_callback("on_train_batch_end", lambda trainer: losses.append(float(trainer.loss)))
    model.train(
        data=str((export / "data.yaml").resolve()),
        epochs=1,
        batch=batch_size(len(images), steps),
        imgsz=SIDE,
        workers=0,
        amp=False,  # its check downloads a model
        val=False,
        plots=False,
        project=str(Path.cwd() / "runs"),
    )
    return losses


def batch_size(images: int, steps: int) -> int:
    """Return how many images a step takes, so that all steps are about one epoch; at least 2."""
    return max(2, math.ceil(images / steps))


TRAININGS: dict[str, Callable[[Path, int], Sequence[float]]] = {
    "torchvision": train_by_torchvision,
    "ultralytics": train_by_ultralytics,
}


if __name__ == "__main__":
    main()
