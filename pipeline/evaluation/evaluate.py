"""Evaluate a job or a model against ground truth: written masks, heat maps beside baselines, recognition."""

from __future__ import annotations

import itertools
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import ValidationError

import legrad
from legrad.method.affinity import Affinity
from legrad.quality import metrics
from pipeline import storage
from pipeline.annotate.model import describe_model, is_built_in, load_explainer
from pipeline.config.classes import read_class_list
from pipeline.config.schema import InputConfig, ModelConfig
from pipeline.errors import SampleFailure, ShardError, UserError
from pipeline.evaluation.map_methods import MapEvaluator, MeasuredScenes, joined, legrad_name
from pipeline.evaluation.map_scores import DecodedScene, score_maps
from pipeline.evaluation.mask_scores import collect_written_masks, score_written_masks
from pipeline.evaluation.perturbation import score_perturbation
from pipeline.evaluation.rendering import plot_evaluation
from pipeline.evaluation.result import EvaluationResult, RecognitionScores
from pipeline.output.folder import JOB_FILE, OutputFolder
from pipeline.shards.ground_truth import Scene, list_truth_shards, read_scenes
from pipeline.shards.images import decode_image
from pipeline.shards.sample_error import SampleError
from pipeline.storage import ShardSource
from pipeline.text import printable

EVALUATION_FILE = "evaluation.json"
SCENES_PER_BATCH = 32


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation of heat maps.

    Attributes:
        layers: LeGrad is scored for each of these numbers of last blocks, and for all blocks.
        configured_layers: the number of blocks that a job used; it is scored as well, with and without
            affinity, and marked.
        configured_affinity: the job's `model.affinity`.
        class_template: prompt for a class; {} is replaced by its name.
        label: name of the model in tables and plots.
        seed: of the random maps and of the bootstrap.
        perturbed_scenes: number of scenes, the first ones, for which the perturbation tests run. Each scene
            takes 40 forward passes per method and prompt.
    """

    layers: tuple[int, ...] = (1, 2, 4)
    configured_layers: int | Literal["all"] | None = None
    configured_affinity: Affinity = "none"
    class_template: str = "a photo of a {}"
    label: str = "the model"
    seed: int = 0
    perturbed_scenes: int = 0


def evaluate_output(
    out_dir: str,
    shard_patterns: str | Path | Sequence[str | Path],
    classes_file: str | Path | None = None,
    *,
    result_name: str = EVALUATION_FILE,
    perturbed_scenes: int = 0,
    model_name: str | None = None,
    pretrained: str | None = None,
) -> EvaluationResult:
    """Evaluate a job: the masks that it wrote, and the maps of its model; write the result as JSON and plot.

    An output folder is untrusted. The model that it names is loaded only if it is one of open_clip's own with
    one of its tags, or the demo model, unless the caller names it as well; and only if its weights are those
    that annotated the shards.

    Args:
        out_dir: the job's output folder.
        shard_patterns: the tars that the job annotated; they contain ground truth.
        classes_file: class names, as `read_class_list` reads them; with it, recognition is measured too.
        result_name: name of the JSON file in the output folder; the plot has the same stem.
        perturbed_scenes: see `EvaluationOptions`.
        model_name: the job's `model.name`, repeated; or the place where that model is now.
        pretrained: the job's `model.pretrained`, repeated; or the place where those weights are now.

    Raises:
        UserError: no job in the folder, nothing to evaluate, unreadable shards or class list; a model that
            must be repeated, or whose weights differ from those of the job.
        OutputError: the result cannot be written.
    """
    folder = OutputFolder(out_dir)
    job = folder.job()
    config = folder.config(job)
    class_names = None if classes_file is None else _class_names(classes_file)
    shards = list_truth_shards(shard_patterns)
    model = _trusted_model(config.model, model_name, pretrained)
    explainer = load_explainer(
        model,
        "cuda" if torch.cuda.is_available() else "cpu",
        expected_digest=job.weights_digest,
    )
    options = EvaluationOptions(
        configured_layers=model.layers,
        configured_affinity=model.affinity,
        label=describe_model(model),
        perturbed_scenes=perturbed_scenes,
    )
    try:
        collected = collect_written_masks(
            folder, shards, config.input, config.prompts.source, job.config_hash
        )
        written = score_written_masks(collected, seed=options.seed)
        scenes = _read_all(shards, config.input)
        maps = evaluate_scenes(explainer, scenes, class_names, settings=config.input, options=options)
    except ShardError as error:
        raise UserError(str(error)) from error
    result = replace(maps, written=written)
    storage.publish(out_dir, result_name, result.to_json().encode())
    storage.publish(out_dir, f"{Path(result_name).stem}.png", plot_evaluation(result))
    return result


def _trusted_model(named_by_job: ModelConfig, name: str | None, pretrained: str | None) -> ModelConfig:
    """Return the model to load: the job's if it is safe to load, else the one that the caller names."""
    if name is None and pretrained is None:
        if is_built_in(named_by_job):
            return named_by_job
        repeated = " ".join(
            f"--{option} {shlex.quote(printable(value))}"
            for option, value in (("model", named_by_job.name), ("pretrained", named_by_job.pretrained))
            if value is not None
        )
        raise UserError(
            f"{JOB_FILE} names a model by a path or an address of a model hub. Such a model is loaded only "
            f"if you name it too. If you trust it: {repeated}"
        )
    section = named_by_job.model_dump() | {"name": name or named_by_job.name, "pretrained": pretrained}
    try:
        return ModelConfig.model_validate(section)
    except ValidationError as error:
        raise UserError(f"--pretrained: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def evaluate_shards(
    explainer: legrad.LeGrad,
    shard_paths: Sequence[str | Path],
    class_names: Sequence[str] | None = None,
    options: EvaluationOptions = EvaluationOptions(),
) -> EvaluationResult:
    """Evaluate the maps of a model on tars with ground truth, without a job; see `evaluate_scenes`."""
    settings = InputConfig(shards=[str(path) for path in shard_paths])
    scenes = _read_all(list_truth_shards(shard_paths), settings)
    return evaluate_scenes(explainer, scenes, class_names, settings=settings, options=options)


def evaluate_scenes(
    explainer: legrad.LeGrad,
    scenes: Iterable[Scene | SampleError],
    class_names: Sequence[str] | None = None,
    *,
    settings: InputConfig,
    options: EvaluationOptions,
) -> EvaluationResult:
    """Score LeGrad's maps and every baseline's, one map for each visible object's caption.

    Args:
        explainer: the model; its own number of layers is not used.
        scenes: ground truth, as `read_scenes` yields it; what cannot be used is counted.
        class_names: names of class ids 1, 2, ...; with them, recognition is measured too.
        settings: size limits of images, and how they are resized.
        options: which maps are scored, and how.

    Raises:
        UserError: no scene could be scored, or a class id is not in the class list.
    """
    omitted: Counter[str] = Counter()
    depth = len(explainer.tower.blocks)
    configured = (
        min(options.configured_layers, depth) if isinstance(options.configured_layers, int) else depth
    )
    has_job, affinity = options.configured_layers is not None, options.configured_affinity
    configured_name = legrad_name(configured, depth, affinity) if has_job else None
    layer_counts = {count for count in (*options.layers, configured, depth) if count <= depth}
    spread_layers = configured if has_job else max(layer_counts - {depth}, default=depth)
    class_texts = [options.class_template.format(name) for name in class_names or ()]
    evaluator = MapEvaluator(
        explainer, class_texts, sorted(layer_counts), options.seed, spread_layers=spread_layers
    )
    decoded = _decoded(scenes, explainer, settings, omitted)
    batches: list[MeasuredScenes] = []
    perturbed_left = options.perturbed_scenes
    for batch in _batched(decoded, SCENES_PER_BATCH):
        batches.append(evaluator.measure(batch, min(perturbed_left, len(batch))))
        perturbed_left -= min(perturbed_left, len(batch))
    if not batches:
        raise UserError(f"no scene with ground truth could be scored; skipped: {dict(omitted) or 'nothing'}")
    found = joined(batches)
    return EvaluationResult(
        model=options.label,
        scenes=len(found.present),
        pairs=len(found.scene_of_pair),
        omitted=dict(omitted),
        maps=score_maps(
            found.methods,
            found.metrics,
            found.class_of_pair,
            found.scene_of_pair,
            configured_name=configured_name,
            seed=options.seed,
        ),
        recognition=_recognition(found.class_scores, found.present, class_names, options),
        perturbation=()
        if found.perturbed is None
        else score_perturbation(
            found.methods, found.perturbed, configured_name=configured_name, seed=options.seed
        ),
        perturbed_scenes=options.perturbed_scenes - perturbed_left,
    )


def _read_all(shards: Iterable[ShardSource], settings: InputConfig) -> Iterator[Scene | SampleError]:
    return itertools.chain.from_iterable(read_scenes(shard, settings) for shard in shards)


def _class_names(classes_file: str | Path) -> list[str]:
    """Return the names of class ids 1, 2, ..."""
    entries = sorted(read_class_list(str(classes_file)), key=lambda entry: entry.class_id)
    class_ids = [entry.class_id for entry in entries]
    if class_ids != list(range(1, len(entries) + 1)):
        raise UserError(
            f"{classes_file}: expected class ids 1, 2, 3, ... without gaps, found {class_ids!r:.200}"
        )
    return [entry.name for entry in entries]


def _decoded(
    scenes: Iterable[Scene | SampleError],
    explainer: legrad.LeGrad,
    settings: InputConfig,
    omitted: Counter[str],
) -> Iterator[DecodedScene]:
    """Yield the scenes that can be scored; count the others by reason."""
    for scene in scenes:
        if isinstance(scene, SampleError):
            omitted[f"samples: {scene.stage}/{scene.kind}"] += 1
            continue
        objects = scene.pointed_objects() if scene.label_map is None else scene.visible_objects()
        hidden = len(scene.class_ids) - len(objects)
        if hidden:
            omitted["objects without a visible pixel or point"] += hidden
        if not objects:
            omitted["scenes without a visible object"] += 1
            continue
        try:
            image = decode_image(
                scene.image,
                explainer.transform,
                max_image_pixels=settings.max_image_pixels,
                resize=settings.resize,
            )
        except SampleFailure as failure:
            omitted[f"samples: {failure.stage}/{failure.kind}"] += 1
            continue
        yield DecodedScene(scene, objects, image.pixels, image.image_height, image.image_width)


def _batched(scenes: Iterable[DecodedScene], size: int) -> Iterator[list[DecodedScene]]:
    """Yield batches of scenes of one input size."""
    waiting: defaultdict[tuple[int, ...], list[DecodedScene]] = defaultdict(list)
    for scene in scenes:
        batch = waiting[scene.pixels.shape]
        batch.append(scene)
        if len(batch) == size:
            yield waiting.pop(scene.pixels.shape)
    yield from waiting.values()


def _recognition(
    scores: Float[np.ndarray, "scenes classes"],
    present: Bool[np.ndarray, "scenes classes"],
    class_names: Sequence[str] | None,
    options: EvaluationOptions,
) -> RecognitionScores | None:
    if not class_names:
        return None
    scene, seed = np.arange(len(scores)), options.seed
    top1 = metrics.top1_hits(scores, present).astype(np.float64)
    return RecognitionScores(
        classes=len(class_names),
        template=options.class_template,
        top1=metrics.bootstrap_mean(top1, scene, seed=seed),
        recall_at_n=metrics.bootstrap_mean(
            metrics.recall_at_present_count(scores, present), scene, seed=seed
        ),
        mean_average_precision=metrics.bootstrap_statistic(
            lambda rows: metrics.mean_average_precision(scores[rows], present[rows]), len(scores), seed=seed
        ),
        auroc=None
        if present.all()
        else metrics.bootstrap_statistic(
            lambda rows: metrics.presence_auroc(scores[rows], present[rows]), len(scores), seed=seed
        ),
    )
