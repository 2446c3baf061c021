"""Quality and CPU time of masks by what makes them, on the demo's scenes; left out: Ray, and time to load.

    python tests/bench/ablation.py [--weights new|old] [--sets heldout ...] [--only PATTERN] [--write]

Every variant annotates a set into a temporary folder as a worker does (tar, decoding, model, masks, Parquet),
and its masks as written are compared with the ground truth. A variant is the configuration `ablation.yaml`
(refined maps, cut at 0.5; captions as prompts) with a few keys changed. One JSON row a set and variant:

    mean_iou            over the classes of the set, without background
    difference          of mean_iou to the variant `refined`, scenes resampled in pairs
    precision, recall   of the pixels in masks, of the pixels of objects; ignored pixels count as missed
    coverage            share of the pixels that are not ignored
    boundary_f          F-measure of the boundary of a row's mask, within .75 % of the diagonal
    map_pointing        share of the maps that masks are cut from whose maximum lies on the object
    map_average_precision    of these maps as a ranking of the pixels
    cpu_ms_an_image     CPU time of the annotation, sample processes included, least of the rounds
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cut_map_scores import caught_maps, cut_map_scores
from demo_inputs import SETS, WEIGHTS, demo_files, demo_job
from proc import children_of, cpu_s_of
from published import figure_parser, recording
from shards_in_flight import work_through

from legrad.quality.metrics import Estimate
from pipeline import storage
from pipeline.config.masks import MasksConfig
from pipeline.config.schema import JobConfig
from pipeline.evaluation.mask_scores import (
    SummedMetric,
    WrittenMasks,
    collect_written_masks,
    score_written_masks,
    summed_metrics,
)
from pipeline.output.folder import OutputFolder
from pipeline.run.worker import build_annotator
from pipeline.shards.ground_truth import Scene, list_truth_shards, read_scenes

CONFIG = Path(__file__).with_name("ablation.yaml")
BASELINE, DEMO = "refined", "the demo's configuration"
DEFAULTS = (f"masks.smooth={MasksConfig().smooth}", "masks.contrast=null")
TEXTS = ("prompts.background=default",)
ARGMAX = ("masks.combine=argmax",)
PLAIN = ("masks.refine=none",)
TWO_SIZES = ("views.scales=[1.0, 0.75]",)
# the settings for several captions and background texts, in one forward pass
ONE_PASS = (*DEFAULTS, *TEXTS, "masks.value=0.4", "model.layers=3")
# Changes of `ablation.yaml`, one line a variant; SIZE*x is x times the model's input, in whole patches.
VARIANTS: dict[str, Sequence[str]] = {
    BASELINE: (),
    "default": DEFAULTS,
    DEMO: (),
    "layers 2": ("model.layers=2",),
    "layers all": ("model.layers=all",),
    "cut at 0.4": ("masks.value=0.4",),
    "otsu": ("masks.rule=otsu",),
    "band around otsu": ("masks.rule=band", "masks.band_center=otsu"),
    "refined by pamr": ("masks.refine=pamr",),
    "smooth 0.6": ("masks.smooth=0.6",),
    "contrast 0.6": ("masks.contrast=0.6",),
    "key affinity": ("model.affinity=keys",),
    "neutral": ("prompts.neutral=a photo of a",),
    "mirrored too": ("views.flip=true",),
    "background, argmax": (*TEXTS, *ARGMAX),
    "background, argmax, two sizes": (*TEXTS, *ARGMAX, *TWO_SIZES),
    "default, background": (*DEFAULTS, *TEXTS),
    "default, background, contrast with it alone": (*DEFAULTS, *TEXTS, "masks.contrast_with=background"),
    "one pass": ONE_PASS,
    "one pass, argmax": (*ONE_PASS, *ARGMAX),
    "one pass, layers 2": (*ONE_PASS, "model.layers=2"),
    "one pass, layers 4": (*ONE_PASS, "model.layers=4"),
    "one pass, cut at 0.5": (*ONE_PASS, "masks.value=0.5"),
    "one pass, contrast 0": (*ONE_PASS, "masks.contrast=0"),
    "one pass, contrast 0.3": (*ONE_PASS, "masks.contrast=0.3"),
    "one pass, contrast 0.8": (*ONE_PASS, "masks.contrast=0.8"),
    "one pass, smooth 0.4": (*ONE_PASS, "masks.smooth=0.4"),
    "one pass, smooth 1": (*ONE_PASS, "masks.smooth=1"),
    "one pass, key affinity": (*ONE_PASS, "model.affinity=keys"),
    "one pass, neutral": (*ONE_PASS, "prompts.neutral=a photo of a"),
    "one pass, not refined": (*ONE_PASS, *PLAIN),
    "two sizes, argmax": (*ONE_PASS, *ARGMAX, *TWO_SIZES),
    "two sizes, argmax, smooth 0.5": (*ONE_PASS, *ARGMAX, *TWO_SIZES, "masks.smooth=0.5"),
    "plain": PLAIN,
    "plain, otsu": (*PLAIN, "masks.rule=otsu"),
}
INPUT_SIDE, PATCH_SIDE = 96, 8
# a worker writes these to the footers of its files, and readers refuse files without
METADATA = {"config_hash": "ablation"}
METRICS = ("mean_iou", "iou", "boundary_f", "precision", "recall", "coverage")


@dataclass(frozen=True)
class Trial:
    """What one configuration gave.

    Attributes:
        written: the scores of every scene.
        map_scores: of the maps that masks are cut from.
        cpu_s: CPU time of the annotation of all scenes, least of the rounds.
    """

    written: WrittenMasks
    map_scores: dict[str, Estimate]
    cpu_s: float


def main() -> None:
    """Measure the chosen variants on the chosen sets."""
    arguments = options()
    data = [*demo_files(*arguments.sets, weights=arguments.weights), "tests/bench/ablation.yaml"]
    name = f"ablation-{arguments.weights}"
    with recording(__file__, arguments, name=name, data=data) as record:
        for set_name in arguments.sets:
            for row in rows_of_set(set_name, arguments):
                record("variants", row)


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = figure_parser(__doc__)
    parser.add_argument("--weights", choices=WEIGHTS, default="new", help="weights of the demo's model")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="sets of scenes")
    parser.add_argument("--only", default="", help="regular expression; `refined` always runs")
    parser.add_argument("--rounds", type=int, default=1, help="annotations of a set by each variant")
    return parser.parse_args()


def rows_of_set(set_name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the row of each chosen variant, the baseline first."""
    baseline: Mapping[str, SummedMetric] = {}
    for variant, changes in VARIANTS.items():
        if variant != BASELINE and not re.search(arguments.only, variant):
            continue
        config = variant_config(set_name, variant, arguments.weights)
        trial = try_config(config, arguments.rounds)
        metrics = summed_metrics(trial.written)
        baseline = baseline or metrics
        scores, images = score_written_masks(trial.written), len(trial.written.scenes)
        yield {
            "set": set_name,
            "variant": variant,
            "changes": list(changes),
            "difference": metrics["mean_iou"].difference(baseline["mean_iou"], seed=0),
            **{name: getattr(scores, name) for name in METRICS},
            **trial.map_scores,
            "cpu_ms_an_image": 1000 * trial.cpu_s / images,
        }


def variant_config(set_name: str, variant: str, weights: str = "new") -> JobConfig:
    """Return the configuration of a variant for one set of scenes."""
    changes = [with_size(change) for change in VARIANTS[variant]]
    return demo_job([set_name], changes, weights=weights, config=None if variant == DEMO else CONFIG)


def with_size(change: str) -> str:
    """Return a change with a side in pixels in place of `SIZE*x`."""
    key, found, factor = change.partition("SIZE*")
    return f"{key}{round(INPUT_SIDE * float(factor) / PATCH_SIDE) * PATCH_SIDE}" if found else change


def try_config(config: JobConfig, rounds: int = 1) -> Trial:
    """Annotate the configuration's shards into a temporary folder and score the masks as written there."""
    shards = storage.list_shards(config.input.shards)
    truth = list_truth_shards([shard.url for shard in shards])
    cpu_s = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as out, caught_maps() as caught:
            cpu_s.append(annotate(config, out, shards))
            written = collect_written_masks(OutputFolder(out), truth, config.input, config.prompts.source)
            if written.damaged_files or written.shards_without_annotations:
                raise RuntimeError(f"shards without scores, so the figures mean nothing: {written}"[:1000])
    found = itertools.chain.from_iterable(read_scenes(shard, config.input) for shard in truth)
    scenes = [scene for scene in found if isinstance(scene, Scene)]
    return Trial(written, cut_map_scores(caught, scenes), min(cpu_s))


def annotate(config: JobConfig, out: str, shards: Sequence[storage.ShardSource]) -> float:
    """Annotate shards into a folder; return the CPU time of this process and its sample processes."""
    here = config.model_copy(update={"output": config.output.model_copy(update={"dir": out})})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    annotator = build_annotator(here, METADATA, len(os.sched_getaffinity(0)), device)
    before_s = time.process_time()
    work_through(shards, annotator.annotate, annotator.wait_for_room)
    own_s = time.process_time() - before_s
    # their parent imports libraries in the meantime, which is no part of the work
    processes = [each for parent in children_of(os.getpid()) for each in children_of(parent)]
    cpu_s = own_s + sum(map(cpu_s_of, processes))
    annotator.close()
    return cpu_s


if __name__ == "__main__":
    main()
