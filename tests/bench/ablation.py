"""What each choice adds in mask quality and costs in time, on a shipped set of scenes.

    python tests/bench/ablation.py [--set heldout|newartist] [--only PATTERN] [--rounds 1] [--out FILE.jsonl]

Every variant annotates the set into a temporary folder as a worker does (tar, decoding, model, masks, files;
no ray), and its masks as written are held against the ground truth. Differences are to the row `fixed 0.5`,
scenes resampled in pairs. Seconds an image are those of the annotation, the model loaded beforehand, the
fastest of the rounds. Prints a Markdown table; with --out also one JSON row a variant.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from environment import environment
from shards_in_flight import work_through

from legrad.quality.metrics import Estimate
from pipeline import storage
from pipeline.config.load import load_config
from pipeline.config.schema import JobConfig
from pipeline.demo import assets
from pipeline.evaluation.mask_scores import (
    SummedMetric,
    WrittenMasks,
    collect_written_masks,
    score_written_masks,
    summed_metrics,
)
from pipeline.run.worker import build_annotator
from pipeline.shards.ground_truth import list_truth_shards

BASELINE = "fixed 0.5"
COMMON = (
    *("masks.rule=fixed", "masks.value=0.5", "masks.refine=none", "masks.combine=independent"),
    *("prompts.background=none", "views.scales=[1.0]", "model.layers=4", "output.heatmap=false"),
)
CLEANED = ("masks.smooth=0.5", "masks.min_component=0.01", "masks.max_hole=0.01")
BACKGROUND = ("prompts.background=default", "masks.combine=argmax")
OTSU = ("masks.rule=otsu",)
SCALES = ("views.scales=[1.0, 0.75, 1.5]",)
# Overrides of the demo's configuration and COMMON; one line a variant.
VARIANTS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "layers 1": ("model.layers=1",),
    "layers 2": ("model.layers=2",),
    "layers all": ("model.layers=all",),
    "fixed 0.4": ("masks.value=0.4",),
    "fixed 0.6": ("masks.value=0.6",),
    "otsu": OTSU,
    "quantile 0.8": ("masks.rule=quantile",),
    "band 0.25-0.75": ("masks.rule=band",),
    "band 0.4-0.6": ("masks.rule=band", "masks.low=0.4", "masks.high=0.6"),
    "band around otsu": ("masks.rule=band", "masks.band_center=otsu"),
    "argmax": ("masks.combine=argmax",),
    "otsu, argmax": (*OTSU, "masks.combine=argmax"),
    "background": BACKGROUND,
    "otsu, background": (*OTSU, *BACKGROUND),
    "neutral": ("prompts.neutral=a photo of a",),
    "templates": ("prompts.templates=simple-imagenet",),
    "refine pamr": ("masks.refine=pamr",),
    "refine par": ("masks.refine=par",),
    "otsu, pamr": (*OTSU, "masks.refine=pamr"),
    "otsu, par": (*OTSU, "masks.refine=par"),
    "flip": ("views.flip=true",),
    "scales 1, 1.5": ("views.scales=[1.0, 1.5]",),
    "scales 1, 2": ("views.scales=[1.0, 2.0]",),
    "scales 1, 0.75, 1.5": SCALES,
    "tile": ("model.fit=tile",),
    "keep": ("model.fit=keep",),
    "par, layers 2": ("masks.refine=par", "model.layers=2"),
    "par, layers all": ("masks.refine=par", "model.layers=all"),
    "par, fixed 0.4": ("masks.refine=par", "masks.value=0.4"),
    "par, argmax": ("masks.refine=par", "masks.combine=argmax"),
    "par, background": ("masks.refine=par", *BACKGROUND),
    "par, background, layers 2": ("masks.refine=par", "model.layers=2", *BACKGROUND),
    "par, background, scales 1, 0.75": ("masks.refine=par", "views.scales=[1.0, 0.75]", *BACKGROUND),
    "par, background, scales 1, 0.75, 1.5": ("masks.refine=par", *SCALES, *BACKGROUND),
    "par, background, smooth 0.5": ("masks.refine=par", "masks.smooth=0.5", *BACKGROUND),
    "par, background, neutral": ("masks.refine=par", "prompts.neutral=a photo of a", *BACKGROUND),
    "par, band around otsu": ("masks.refine=par", "masks.rule=band", "masks.band_center=otsu"),
    "par, cleaned": ("masks.refine=par", *CLEANED),
    "par, flip": ("masks.refine=par", "views.flip=true"),
    "par, scales 1, 0.75, 1.5": ("masks.refine=par", *SCALES),
    "size 3/4": ("model.image_size=SIZE*0.75",),
    "size 3/2": ("model.image_size=SIZE*1.5",),
    "size 2": ("model.image_size=SIZE*2",),
    "cleaned": CLEANED,
    "otsu, cleaned": (*OTSU, *CLEANED),
    "otsu, par, cleaned": (*OTSU, "masks.refine=par", *CLEANED),
    "otsu, par, flip": (*OTSU, "masks.refine=par", "views.flip=true"),
    "otsu, flip": (*OTSU, "views.flip=true"),
    "otsu, scales 1, 1.5": (*OTSU, "views.scales=[1.0, 1.5]"),
    "otsu, scales 1, 0.75, 1.5": (*OTSU, *SCALES),
    "otsu, par, scales 1, 0.75, 1.5": (*OTSU, "masks.refine=par", *SCALES),
    "argmax, par": ("masks.combine=argmax", "masks.refine=par"),
    "otsu, argmax, par": (*OTSU, "masks.combine=argmax", "masks.refine=par"),
    "otsu, argmax, par, flip": (*OTSU, "masks.combine=argmax", "masks.refine=par", "views.flip=true"),
    "background, par": (*BACKGROUND, "masks.refine=par"),
    "all classes": ("prompts.source=classes", "prompts.classes=CLASSES", "prompts.max_per_sample=64"),
    "otsu, size 3/2": (*OTSU, "model.image_size=SIZE*1.5"),
    "otsu, size 3/2, par": (*OTSU, "model.image_size=SIZE*1.5", "masks.refine=par"),
}
FIGURES = ("mean_iou", "iou", "boundary_f", "precision", "recall", "coverage")
SHOWN = (*FIGURES, "presence_auroc")


@dataclass(frozen=True)
class Trial:
    """What one configuration gave.

    Attributes:
        written: every scene's scores.
        seconds_per_image: of the annotation.
    """

    written: WrittenMasks
    seconds_per_image: float


def try_config(config: JobConfig, rounds: int = 1) -> Trial:
    """Annotate the configuration's shards into a temporary folder and score the masks as written there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards = storage.list_shards(config.input.shards)
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            here = config.model_copy(update={"output": config.output.model_copy(update={"dir": out})})
            annotator = build_annotator(here, {}, len(os.sched_getaffinity(0)), device)
            seconds.append(work_through(shards, annotator.annotate, annotator.wait_for_room))
            annotator.close()
            written = collect_written_masks(
                out, list_truth_shards([s.url for s in shards]), config.input, config.prompts.source
            )
    return Trial(written, min(seconds) / len(written.scenes))


def variant_config(set_name: str, overrides: tuple[str, ...]) -> JobConfig:
    """The demo's configuration on one set of scenes, with overrides.

    SIZE*x stands for x times the model's input in whole patches, CLASSES for the shipped list of classes.
    """
    shards = [str(path) for path in assets.demo_shard_paths(set_name)]
    found = [_filled_in(override) for override in (*COMMON, *overrides)]
    return load_config(assets.demo_config_path(), [f"input.shards={json.dumps(shards)}", *found])


def _filled_in(override: str) -> str:
    key, times, factor = override.replace("CLASSES", str(assets.demo_classes_path())).partition("SIZE*")
    if not times:
        return key
    vision = json.loads(Path(assets.demo_config_path()).with_name("legrad_demo_clip.json").read_text())[
        "vision_cfg"
    ]
    patch = vision["patch_size"]
    return f"{key}{round(vision['image_size'] * float(factor) / patch) * patch}"


def measured(set_name: str, pattern: str, rounds: int) -> Iterator[tuple[str, JobConfig, Trial, Mapping]]:
    """Every chosen variant, the baseline first, with its figures' differences to the baseline."""
    baseline: dict[str, SummedMetric] = {}
    for name, overrides in VARIANTS.items():
        if name != BASELINE and not re.search(pattern, name):
            continue
        config = variant_config(set_name, overrides)
        trial = try_config(config, rounds)
        figures = summed_metrics(trial.written)
        baseline = baseline or figures
        differences = {key: figures[key].difference(baseline[key], seed=0) for key in FIGURES}
        yield name, config, trial, differences


def shown(estimate: Estimate | None, *, signed: bool = False) -> str:
    """Percent with half the interval."""
    if estimate is None:
        return "-"
    half = 50 * (estimate.high - estimate.low)
    return f"{100 * estimate.value:{'+' if signed else ''}.1f} ±{half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", default="heldout", choices=("heldout", "newartist"))
    parser.add_argument("--only", default="", help="regular expression; the baseline always runs")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    head = {"benchmark": "ablation", **environment(), "set": arguments.set, "rounds": arguments.rounds}
    columns = ["variant", "mIoU", "difference", *SHOWN[1:], "ms/image"]
    print("| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), sep="\n")
    for name, config, trial, differences in measured(arguments.set, arguments.only, arguments.rounds):
        scores = asdict(score_written_masks(trial.written))
        estimates = {name: value and Estimate(**value) for name, value in scores.items() if name in SHOWN}
        cells = [name, shown(estimates["mean_iou"]), shown(differences["mean_iou"], signed=True)]
        cells += [shown(estimates[key]) for key in SHOWN[1:]]
        print("| " + " | ".join([*cells, f"{1000 * trial.seconds_per_image:.0f}"]) + " |", flush=True)
        if arguments.out:
            row = {
                **head,
                "variant": name,
                "config": config.model_dump(mode="json", include={"model", "views", "prompts", "masks"}),
                "seconds_per_image": trial.seconds_per_image,
                "scores": scores,
                "difference_to_baseline": {
                    key: value and asdict(value) for key, value in differences.items()
                },
            }
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
