"""Variants of mask settings over several models, compared on the same scenes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError

from legrad.quality.metrics import Estimate
from pipeline import storage
from pipeline.config.load import load_config
from pipeline.config.schema import JobConfig
from pipeline.config.section import Line, Section
from pipeline.config.yaml_text import parse_yaml
from pipeline.errors import UserError
from pipeline.evaluation.baseline_masks import DENSE_BASELINES
from pipeline.evaluation.mask_scores import WrittenMasks, summed_metrics

MAX_FILE_BYTES = 2**20
METRICS = ("mean_iou", "mean_iou_with_background", "precision", "recall")

# also the name of a folder
VariantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class SweepConfig(Section):
    """A sweep.

    Attributes:
        models: configurations of jobs, as paths beside this file; each names a model.
        common: overrides of every variant, as `legrad annotate` takes them.
        variants: overrides of each variant by its name; all are compared with the first.
        baselines: the same for masks of baselines, whose names begin with that of the baseline.
    """

    models: tuple[Line, ...] = Field(min_length=1)
    common: tuple[Line, ...] = ()
    variants: Mapping[VariantName, tuple[Line, ...]] = Field(min_length=1)
    baselines: Mapping[VariantName, tuple[Line, ...]] = {}


@dataclass(frozen=True)
class Variant:
    """One configuration of a sweep.

    Attributes:
        model: stem of the model's configuration.
        name: name of the variant; with the model, its folder.
        config: the job.
        baseline: the baseline that takes the place of LeGrad, or None.
    """

    model: str
    name: str
    config: JobConfig
    baseline: str | None = None


@dataclass(frozen=True)
class VariantScores:
    """Scores of the masks of a variant, with 95 % intervals over scenes.

    Attributes:
        model: see `Variant`.
        variant: name of the variant.
        scenes: scenes with ground truth.
        mean_iou: IoU of a class over the whole set, mean over classes, without background.
        mean_iou_with_background: the same, background as one of the classes.
        precision: share of the pixels in masks with the right label.
        recall: share of the objects' pixels with the right label.
        difference: difference of `mean_iou` to the model's first variant; scenes are resampled in pairs.
    """

    model: str
    variant: str
    scenes: int
    mean_iou: Estimate | None
    mean_iou_with_background: Estimate | None
    precision: Estimate | None
    recall: Estimate | None
    difference: Estimate | None


def read_sweep(path: str | Path, shards: Sequence[str], out_dir: str) -> list[Variant]:
    """Return the variants of a sweep, model by model; those of a model begin with the first variant.

    Args:
        path: the YAML file, see `SweepConfig`.
        shards: patterns of shards that take the place of `input.shards`.
        out_dir: folder of the sweep; a variant's job gets OUT/MODEL/VARIANT.

    Raises:
        UserError: the file or one of the configurations is wrong.
    """
    where = storage.shown_url(str(path))
    document = parse_yaml(storage.read_text(str(path), MAX_FILE_BYTES), where)
    try:
        sweep = SweepConfig.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{where}: {key}: {problem['msg'].removeprefix('Value error, ')}") from None
    return list(_variants(sweep, Path(path).parent, shards, out_dir))


def _variants(sweep: SweepConfig, folder: Path, shards: Sequence[str], out_dir: str) -> Iterator[Variant]:
    for model_file in sweep.models:
        model = Path(model_file).stem
        for name, overrides in {**sweep.variants, **sweep.baselines}.items():
            baseline = _baseline_of(name) if name in sweep.baselines else None
            place = storage.join_url(storage.join_url(out_dir, model), name)
            own = (f"input.shards={json.dumps(list(shards))}", f"output.dir={json.dumps(place)}")
            config = load_config(folder / model_file, [*sweep.common, *overrides, *own])
            yield Variant(model, name, config, baseline)


def _baseline_of(name: str) -> str:
    for baseline in DENSE_BASELINES:
        if name == baseline or name.startswith(f"{baseline}-"):
            return baseline
    raise UserError(f"baselines.{name}: expected a name that begins with {', '.join(DENSE_BASELINES)}")


def score_variant(variant: Variant, written: WrittenMasks, first: WrittenMasks | None) -> VariantScores:
    """Score the masks of a variant, beside those of the model's first variant if they are given."""
    metrics = summed_metrics(written)
    reference = None if first is None else summed_metrics(first)["mean_iou"]
    return VariantScores(
        variant.model,
        variant.name,
        len(written.scenes),
        **{name: metrics[name].estimate(seed=0) for name in METRICS},
        difference=None if reference is None else metrics["mean_iou"].difference(reference, seed=0),
    )


def as_markdown(scores: Sequence[VariantScores]) -> str:
    """Return a table: percent, and half the width of the 95 % interval."""
    columns = ("model", "variant", "mIoU", "difference", "with background", "precision", "recall")
    lines = [columns, ("---",) * len(columns)]
    for each in scores:
        shown = (each.mean_iou, each.mean_iou_with_background, each.precision, each.recall)
        miou, background, precision, recall = map(_percent, shown)
        difference = _percent(each.difference, sign="+")
        lines.append((each.model, each.variant, miou, difference, background, precision, recall))
    scenes = ", ".join(f"{count:,}" for count in sorted({each.scenes for each in scores}))
    notes = (
        f"Masks as written, {scenes} scenes, in per cent ± half the 95 % interval. Difference: to the "
        "model's first variant, scenes resampled in pairs.\n"
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{notes}"


def as_json(scores: Sequence[VariantScores]) -> str:
    """Return the scores as indented JSON."""
    return json.dumps([asdict(each) for each in scores], indent=1) + "\n"


def _percent(estimate: Estimate | None, *, sign: str = "") -> str:
    if estimate is None:
        return "-"
    half = 50 * (estimate.high - estimate.low)
    return f"{100 * estimate.value:{sign}.1f} ±{half:.1f}"
