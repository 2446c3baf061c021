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
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from legrad.quality.metrics import Estimate
from pipeline.config.load import load_config
from pipeline.config.schema import JobConfig
from pipeline.console import PrintableConsole
from pipeline.demo import assets
from pipeline.demo.making.segmenter import Decoder, PixelScores, Segmenter, TowerFeatures, make_segmenter
from pipeline.demo.making.segmenter_profile import ErrorProfile, error_profile
from pipeline.demo.making.segmenter_scenes import SceneSplit, scene_split
from pipeline.demo.making.segmenter_scores import (
    WINDOWED_SIDE,
    Scores,
    predict,
    read_label_maps,
    score,
)
from pipeline.demo.making.segmenter_views import (
    Views,
    ViewTransform,
    make_views,
    whole_image_transform,
)
from pipeline.output.label_map import BACKGROUND_LABEL, IGNORED_LABEL
from pipeline.training import MaskDataset

CONFIG = Path(__file__).parent / "train_demo.yaml"
TARGET_SHARE = 0.8
NO_CLASS = -100
TRAINED_ON, COMPARED_WITH = "masks", "heldout-masks"
STUDENT, SUPERVISED = "student", "supervised twin"
KNOWN = "{}, classes known"
MASKS = KNOWN.format("pseudo-masks")


@dataclass(frozen=True)
class Plan:
    """All settings of the training, except the masks."""

    scenes: int = 3000
    views_per_scene: int = 3
    steps: int = 1200
    batch_size: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.1
    smallest_crop: float = 0.5
    class_weight: float = 0.3
    seed: int = 1

    def scaled(self, scale: float) -> Plan:
        """Return the plan with fewer scenes and steps, for a quick trial of all parts."""
        return replace(
            self,
            scenes=max(self.batch_size, round(self.scenes * scale)),
            steps=max(2, round(self.steps * scale)),
        )


def train(
    plan: Plan, views: Views, labels: Tensor, console: PrintableConsole, *, what: str, clip_weights: Path
) -> Segmenter:
    """Train a segmenter on label maps; start and schedule depend on the plan only.

    Args:
        plan: the schedule and its seed.
        views: of the training scenes.
        labels: label map of each view, to learn from.
        console: takes the loss now and then.
        what: is trained, for the console.
        clip_weights: of the demo CLIP.
    """
    torch.manual_seed(plan.seed)
    segmenter = make_segmenter(plan.seed, clip_weights)
    decoder = segmenter.decoder.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.learning_rate, total_steps=plan.steps, pct_start=plan.warmup_share
    )
    losses = []
    for step, chosen in enumerate(islice(_batches(plan, len(views.images)), plan.steps), start=1):
        batch = Views(*(part[chosen] for part in views))
        loss = _loss(decoder, batch, labels[chosen], plan.class_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == plan.steps:
            console.print(f"{what}: step {step} of {plan.steps}, loss {np.mean(losses[-100:]):.3f}")
    return segmenter.to(memory_format=torch.contiguous_format).eval()


def _loss(decoder: Decoder, batch: Views, labels: Tensor, class_weight: float) -> Tensor:
    images = batch.images.float().contiguous(memory_format=torch.channels_last)
    # half the time where the processor multiplies bf16
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        scores = decoder(images, TowerFeatures(batch.grids, batch.similarities))
    return pixel_loss(PixelScores(*(maps.float() for maps in scores)), labels, class_weight)


def _batches(plan: Plan, views: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(plan.seed)
    size = min(plan.batch_size, views)
    return chain.from_iterable(
        torch.split(torch.randperm(views, generator=generator)[: views // size * size], size) for _ in count()
    )


def pixel_loss(
    scores: PixelScores, labels: UInt8[Tensor, "batch side side"], class_weight: float
) -> Float[Tensor, ""]:
    """Return the loss of foreground against background, and of the class where there is one.

    Args:
        scores: of a segmenter.
        labels: 0 background, class ids, 255 ignored, at the size of the segmenter's input.
        class_weight: of the classes' part.
    """
    fine, coarse = _some_pixels(labels, 2), _some_pixels(labels, 4)
    counts, is_class = fine != IGNORED_LABEL, (coarse != BACKGROUND_LABEL) & (coarse != IGNORED_LABEL)
    shown = F.binary_cross_entropy_with_logits(
        scores.foreground[:, 0], (fine != BACKGROUND_LABEL).float(), reduction="none"
    )
    classes = F.interpolate(scores.classes, size=coarse.shape[1:], mode="bilinear", align_corners=False)
    targets = torch.where(is_class, coarse.long() - 1, NO_CLASS)
    which = F.cross_entropy(classes, targets, ignore_index=NO_CLASS, reduction="sum")
    return (shown * counts).sum() / counts.sum().clamp(min=1) + class_weight * which / is_class.sum().clamp(
        min=1
    )


def _some_pixels(labels: UInt8[Tensor, "batch _ _"], stride: int) -> UInt8[Tensor, "batch _ _"]:
    """Return every stride-th row and column, from random first ones."""
    row, column = torch.randint(stride, (2,)).tolist()
    return labels[:, row::stride, column::stride]


def run(
    plan: Plan, out: Path, cache: Path, art: Path, console: PrintableConsole, *, clip_weights: Path
) -> dict[str, Any]:
    """Render scenes, annotate them, train twice, score; write result.json and the segmenters to a folder.

    Args:
        plan: all settings of the training.
        out: the folder.
        cache: folder for the rendered scenes.
        art: folder for the packages of sprites.
        console: reports progress and results.
        clip_weights: of the demo CLIP, which annotates the scenes and is the segmenters' tower.

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
        model = f"model.pretrained={json.dumps(str(clip_weights))}"
        annotate([*training_keys(split, out), model])
        annotate([*heldout_keys(split, out), model])
    with _timed("drawing views", times, console):
        views = draw_views(plan, clip_weights, out / TRAINED_ON, split)
    segmenters = {}
    for what, labels in ((STUDENT, views.pseudo_masks), (SUPERVISED, views.ground_truth)):
        with _timed(f"training the {what}", times, console):
            segmenters[what] = train(plan, views, labels, console, what=what, clip_weights=clip_weights)
        save_file(segmenters[what].state_dict(), out / f"{what.replace(' ', '-')}.safetensors")
    with _timed("scoring", times, console):
        outcome = evaluate(out, split, segmenters)
    result = _result(plan, split, load_config(CONFIG, training_keys(split, out)), outcome, times)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(_table(outcome.scores, split))
    console.print(_profile_table(outcome.profiles))
    _print_comparison(result, console)
    return result


@dataclass(frozen=True)
class Outcome:
    """Scores of label maps, and profiles of the errors of those that know the classes, by name."""

    scores: Mapping[str, Scores]
    profiles: Mapping[str, ErrorProfile]


def evaluate(out: Path, split: SceneSplit, segmenters: Mapping[str, Segmenter]) -> Outcome:
    """Compare the pseudo-masks and the segmenters with the ground truth of the held-out scenes."""
    heldout = partial(_dataset, out / COMPARED_WITH, split.heldout, shuffle=False)
    truth = read_label_maps(heldout("ground_truth"))
    found: dict[str, Mapping[str, np.ndarray]] = {MASKS: read_label_maps(heldout("label_map"))}
    images = heldout("ground_truth", transform=whole_image_transform(WINDOWED_SIDE))
    # The pseudo-masks were made with the captions at hand. So the segmenters predict twice: by themselves,
    # and with the classes known that the captions mention.
    tags = {key: np.setdiff1d(np.unique(labels), (0, 255)).tolist() for key, labels in truth.items()}
    for what, segmenter in segmenters.items():
        found[what], found[KNOWN.format(what)] = predict(segmenter, images, truth, tags)
    return Outcome(
        scores={name: score(labels, truth) for name, labels in found.items()},
        profiles={
            name: error_profile(found[name], truth)
            for name in (MASKS, *(KNOWN.format(what) for what in segmenters))
        },
    )


def draw_views(plan: Plan, clip_weights: Path, masks: Path, split: SceneSplit) -> Views:
    """Return views of the training scenes, with the annotated label maps and the ground truth."""
    torch.manual_seed(plan.seed)
    transform = ViewTransform(
        read_label_maps(_dataset(masks, split.train, "label_map", shuffle=False)), plan.smallest_crop
    )
    scenes = _dataset(masks, split.train, "ground_truth", transform=transform, shuffle=False)
    return make_views(scenes, make_segmenter(plan.seed, clip_weights), plan.views_per_scene)


def training_keys(split: SceneSplit, out: Path) -> list[str]:
    """Return the keys of the job that makes the masks to train on."""
    return _keys(split.train, out / TRAINED_ON)


def heldout_keys(split: SceneSplit, out: Path) -> list[str]:
    """Return the keys of a job with one threshold: ignored pixels of a band would count as errors."""
    return [*_keys(split.heldout, out / COMPARED_WITH), "masks.rule=fixed"]


def _keys(shards: Sequence[Path], out: Path) -> list[str]:
    return [
        f"input.shards={json.dumps([str(path) for path in shards])}",
        f"prompts.classes={assets.demo_classes_path()}",
        f"output.dir={out}",
    ]


def annotate(keys: Sequence[str]) -> None:
    """Run `legrad annotate` with the configuration of this program and other values of some keys."""
    command = [sys.executable, "-m", "pipeline", "annotate", str(CONFIG), *keys]
    done = subprocess.run(command, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(done.returncode)


def _dataset(out: Path, shards: tuple[Path, ...], target: Any, **options: Any) -> MaskDataset:
    return MaskDataset(out, [str(path) for path in shards], target=target, **options)


@contextmanager
def _timed(what: str, times: dict[str, float], console: PrintableConsole) -> Iterator[None]:
    started_s = time.monotonic()
    yield
    times[what] = round(time.monotonic() - started_s, 1)
    console.print(f"{what}: {times[what]:.0f} s", highlight=False)


def _result(
    plan: Plan, split: SceneSplit, config: JobConfig, outcome: Outcome, times: Mapping[str, float]
) -> dict[str, Any]:
    scores = outcome.scores
    student, told, twin = (scores[name] for name in (STUDENT, KNOWN.format(STUDENT), SUPERVISED))
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
        "errors": {name: asdict(profile) for name, profile in outcome.profiles.items()},
        "student_minus_masks": asdict(student.better_than(scores[MASKS])),
        "student_minus_masks_classes_known": asdict(told.better_than(scores[MASKS])),
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


def _profile_table(profiles: Mapping[str, ErrorProfile]) -> Table:
    columns = [field.name.replace("_", " ") for field in fields(ErrorProfile)]
    table = Table(
        "where they are wrong", *columns, title="shares of pixels, and mean IoU", title_justify="left"
    )
    for name, profile in profiles.items():
        table.add_row(name, *(f"{value:.3f}" for value in asdict(profile).values()))
    return table


def _print_comparison(result: Mapping[str, Any], console: PrintableConsole) -> None:
    share = result["student_share_of_supervised"]
    reached = "80 % or more" if share >= TARGET_SHARE else "less than 80 %"
    for which, key in (
        ("by itself", "student_minus_masks"),
        ("with the classes known", "student_minus_masks_classes_known"),
    ):
        gain = Estimate(**result[key])
        console.print(
            f"The student, {which}, against the pseudo-masks, whose classes are known: {_shown(gain)} mIoU "
            f"({'better' if gain.value > 0 else 'not better'}).",
            highlight=False,
        )
    console.print(f"It reaches {share:.1%} of its supervised twin ({reached}).", highlight=False)


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
    parser.add_argument(
        "--clip-weights",
        type=Path,
        default=assets.demo_weights_path(),
        help="weights of the demo CLIP (default: those that are shipped)",
    )
    options = parser.parse_args()
    plan = replace(Plan(), seed=options.seed).scaled(options.scale)
    run(
        plan,
        options.out,
        options.cache,
        options.art,
        PrintableConsole(),
        clip_weights=options.clip_weights,
    )


if __name__ == "__main__":
    main()
