"""Train a segmenter on pseudo-masks only, and compare it with a supervised one: `make train-demo`.

Scenes are drawn and annotated by the pipeline. A student learns from the masks; its twin, alike in everything
else, learns from the scenes' ground truth. Both meet the shipped held-out scenes only when they are scored,
beside the pseudo-masks of those scenes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from legrad.quality.metrics import Estimate
from pipeline.config.load import load_config
from pipeline.config.schema import JobConfig
from pipeline.console import PrintableConsole
from pipeline.demo import assets
from pipeline.demo.making.segmenter import INPUT_SIDE, Segmenter, make_segmenter
from pipeline.demo.making.segmenter_scenes import SceneSplit, scene_split
from pipeline.demo.making.segmenter_scores import Scores, predict, read_label_maps, score
from pipeline.training import MaskDataset, collate, pixel_weights

CONFIG = Path(__file__).parent / "train_demo.yaml"
TARGET_SHARE = 0.8
TRAINED_ON, WITHOUT_BAND = "masks", "masks-without-band"
STUDENT, SUPERVISED = "student", "supervised twin"
MASKS, BAND_MASKS = "pseudo-masks, classes known", "pseudo-masks with a band, classes known"


@dataclass(frozen=True)
class Plan:
    """All settings of the training, except the masks."""

    scenes: int = 3000
    steps: int = 360
    batch_size: int = 32
    learning_rate: float = 2e-3
    tower_learning_rate: float = 2e-4
    weight_decay: float = 0.05
    warmup_share: float = 0.1
    smallest_crop: float = 0.6
    seed: int = 1

    def scaled(self, scale: float) -> Plan:
        """Return the plan with fewer scenes and steps, for a quick trial of all parts."""
        return replace(
            self,
            scenes=max(self.batch_size, round(self.scenes * scale)),
            steps=max(2, round(self.steps * scale)),
        )


def train(plan: Plan, dataset: MaskDataset, console: PrintableConsole, what: str) -> Segmenter:
    """Train a segmenter on the label maps of a dataset; start and schedule depend on the plan only.

    Args:
        plan: the schedule and its seed.
        dataset: images and label maps, transformed to one size.
        console: takes the loss now and then.
        what: is trained, for the console.
    """
    torch.manual_seed(plan.seed)
    segmenter = make_segmenter(plan.seed).train()
    tower = [value for value in segmenter.tower.parameters() if value.requires_grad]
    others = [value for name, value in segmenter.named_parameters() if not name.startswith("tower.")]
    rates = [plan.tower_learning_rate, plan.learning_rate]
    optimizer = torch.optim.AdamW(
        [{"params": tower, "lr": rates[0]}, {"params": others, "lr": rates[1]}],
        weight_decay=plan.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=plan.steps, pct_start=plan.warmup_share
    )
    losses = []
    for step, batch in enumerate(islice(_batches(plan, dataset), plan.steps), start=1):
        loss = _loss(segmenter, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == plan.steps:
            console.print(f"{what}: step {step} of {plan.steps}, loss {np.mean(losses[-50:]):.3f}")
    return segmenter.eval()


def _batches(plan: Plan, dataset: MaskDataset) -> Iterator[dict[str, Any]]:
    loader = DataLoader(
        dataset, batch_size=plan.batch_size, num_workers=1, collate_fn=collate, persistent_workers=True
    )

    def pass_of(epoch: int) -> Iterator[dict[str, Any]]:
        dataset.set_epoch(epoch)
        return iter(loader)

    return chain.from_iterable(pass_of(epoch) for epoch in count())


def _loss(segmenter: Segmenter, batch: Mapping[str, Tensor]) -> Tensor:
    scores = segmenter(batch["image"])
    # every fourth pixel, a row and a column apart: the scores have half the resolution
    row, column = torch.randint(2, (2,)).tolist()
    labels = batch["label_map"][:, row::2, column::2]
    losses = F.cross_entropy(scores, labels.long(), ignore_index=255, reduction="none")
    if "label_weights" in batch:
        losses = losses * pixel_weights(labels, batch["label_weights"])
    return losses.sum() / (labels != 255).sum().clamp(min=1)


def train_transform(plan: Plan) -> v2.Transform:
    """Augment an image and its label map by crops, mirroring and colours."""
    return v2.Compose(
        [
            v2.RandomResizedCrop((INPUT_SIDE, INPUT_SIDE), scale=(plan.smallest_crop, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            *_to_input(),
        ]
    )


def heldout_transform() -> v2.Transform:
    """Return the whole image, stretched to the input size."""
    return v2.Compose([v2.Resize((INPUT_SIDE, INPUT_SIDE), antialias=True), *_to_input()])


def _to_input() -> list[v2.Transform]:
    return [
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
    ]


def run(plan: Plan, out: Path, cache: Path, art: Path, console: PrintableConsole) -> dict[str, Any]:
    """Render scenes, annotate them, train twice, score; write result.json and the segmenters to a folder.

    Returns:
        What is written to result.json.

    Raises:
        SystemExit: a job was not complete.
    """
    times: dict[str, float] = {}
    out.mkdir(parents=True, exist_ok=True)
    with _timed("drawing scenes", times, console):
        split = scene_split(plan.scenes, art, cache, plan.seed)
        console.print(f"scenes to train on: {split.origin}")
    with _timed("annotating", times, console):
        annotate(masks_keys(split, out))
        annotate(masks_without_band_keys(split, out))
    segmenters = {}
    for what, target in ((STUDENT, "label_map"), (SUPERVISED, "ground_truth")):
        with _timed(f"training the {what}", times, console):
            dataset = _dataset(
                out / TRAINED_ON, split.train, target, transform=train_transform(plan), seed=plan.seed
            )
            segmenters[what] = train(plan, dataset, console, what)
        save_file(segmenters[what].state_dict(), out / f"{what.replace(' ', '-')}.safetensors")
    with _timed("scoring", times, console):
        scores = score_all(out, split, segmenters)
    result = _result(plan, split, load_config(CONFIG, masks_keys(split, out)), scores, times)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(_table(scores, split))
    _print_comparison(result, console)
    return result


def masks_keys(split: SceneSplit, out: Path) -> list[str]:
    """Return the keys of the job that makes the masks to train on and to compare with."""
    return [
        f"input.shards={json.dumps([str(path) for path in (*split.train, *split.heldout)])}",
        f"prompts.classes={assets.demo_classes_path()}",
        f"output.dir={out / TRAINED_ON}",
    ]


def masks_without_band_keys(split: SceneSplit, out: Path) -> list[str]:
    """Return the keys of a job with one threshold: ignored pixels of a band would count as errors."""
    return [
        f"input.shards={json.dumps([str(path) for path in split.heldout])}",
        f"prompts.classes={assets.demo_classes_path()}",
        "masks.rule=otsu",
        f"output.dir={out / WITHOUT_BAND}",
    ]


def annotate(keys: Sequence[str]) -> None:
    """Run `legrad annotate` with the configuration of this program and other values of some keys."""
    command = [sys.executable, "-m", "pipeline", "annotate", str(CONFIG), *keys]
    done = subprocess.run(command, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(done.returncode)


def score_all(out: Path, split: SceneSplit, segmenters: Mapping[str, Segmenter]) -> dict[str, Scores]:
    """Return the scores of the pseudo-masks and of the segmenters on the held-out scenes, by name.

    The pseudo-masks were made with the captions at hand. So the segmenters are scored twice: by themselves,
    and with the classes known that the captions mention, which only rules classes out.
    """
    banded = out / TRAINED_ON
    truth = read_label_maps(_dataset(banded, split.heldout, "ground_truth", shuffle=False))
    tags = {key: np.setdiff1d(np.unique(labels), (0, 255)).tolist() for key, labels in truth.items()}
    found = {
        name: score(read_label_maps(_dataset(folder, split.heldout, "label_map", shuffle=False)), truth)
        for name, folder in ((MASKS, out / WITHOUT_BAND), (BAND_MASKS, banded))
    }
    for what, segmenter in segmenters.items():
        images = _dataset(banded, split.heldout, "ground_truth", transform=heldout_transform(), shuffle=False)
        found[what] = score(predict(segmenter, images, truth), truth)
        found[f"{what}, classes known"] = score(predict(segmenter, images, truth, tags), truth)
    return found


def _dataset(out: Path, shards: tuple[Path, ...], target: Any, **options: Any) -> MaskDataset:
    return MaskDataset(out, [str(path) for path in shards], target=target, **options)


@contextmanager
def _timed(what: str, times: dict[str, float], console: PrintableConsole) -> Iterator[None]:
    started_s = time.monotonic()
    yield
    times[what] = round(time.monotonic() - started_s, 1)
    console.print(f"{what}: {times[what]:.0f} s", highlight=False)


def _result(
    plan: Plan, split: SceneSplit, config: JobConfig, scores: Mapping[str, Scores], times: Mapping[str, float]
) -> dict[str, Any]:
    masks = max(scores[MASKS], scores[BAND_MASKS], key=lambda found: found.classes_only.value)
    student, twin = scores[STUDENT], scores[SUPERVISED]
    return {
        "plan": asdict(plan),
        "scenes": {"train": split.origin, "heldout": [path.name for path in split.heldout]},
        "masks": config.masks.model_dump(mode="json"),
        "prompts": config.prompts.model_dump(mode="json"),
        "miou": {
            name: {
                "with_background": asdict(found.with_background),
                "classes_only": asdict(found.classes_only),
            }
            for name, found in scores.items()
        },
        "student_minus_masks": asdict(student.better_than(masks)),
        "student_share_of_supervised": student.classes_only.value / twin.classes_only.value,
        "seconds": dict(times),
    }


def _table(scores: Mapping[str, Scores], split: SceneSplit) -> Table:
    table = Table(
        "label maps of the held-out scenes",
        "mIoU, 64 classes",
        "mIoU with background",
        title=f"{len(split.heldout)} shards, never trained on; 95 % intervals over scenes",
        title_justify="left",
    )
    for name, found in scores.items():
        table.add_row(name, _shown(found.classes_only), _shown(found.with_background))
    return table


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _print_comparison(result: Mapping[str, Any], console: PrintableConsole) -> None:
    gain, share = Estimate(**result["student_minus_masks"]), result["student_share_of_supervised"]
    reached = "80 % or more" if share >= TARGET_SHARE else "less than 80 %"
    console.print(
        f"The student (classes unknown) against the pseudo-masks (classes known): {_shown(gain)} mIoU "
        f"({'better' if gain.value > 0 else 'not better'}).\n"
        f"It reaches {share:.1%} of its supervised twin ({reached}).",
        highlight=False,
    )


def main() -> None:
    """Run the training and comparison from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/train-demo"), help="folder for the results")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the scenes and steps (default 1)")
    parser.add_argument("--seed", type=int, default=1, help="seed of scenes, weights and order")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/train-demo"), help="folder for the rendered scenes"
    )
    parser.add_argument(
        "--art", type=Path, default=Path(".cache/demo-art"), help="folder for the packages of sprites"
    )
    options = parser.parse_args()
    plan = replace(Plan(), seed=options.seed).scaled(options.scale)
    run(plan, options.out, options.cache, options.art, PrintableConsole())


if __name__ == "__main__":
    main()
