"""How faithful maps are to the model: its accuracy as patches are hidden or shown; left out: masks, time.

    python tests/bench/perturbation.py [--weights new|old] [--sets heldout newartist] [--scenes 50] [--write]

As in the paper's perturbation test (arXiv:2404.03214, after Chefer et al., CVPR 2021): 0 to 90 % of an
image's patches are hidden in steps of 10 %, the most relevant first (positive) or the least relevant first
(negative), and the model is asked again; insertion shows them in a blurred image instead. Two tables, each
with a row for every set and map:

    target       maps of the classes that a scene shows, one for each object's caption
    predicted    maps of the class that the model names for the whole image, right or wrong

Scores are areas under the accuracy over 0 to 90 %, divided by the range, with 95 % intervals over scenes. An
image counts as right where the map's class scores above every class that the scene does not show.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from demo_inputs import PUBLISHED_SETS, SETS, WEIGHTS, demo_files, weights_path
from published import Record, figure_parser, recording
from torch import Tensor

import legrad
from legrad.inputs import as_ragged
from legrad.masks.contrast import contrasted_by_image, distances_by_image
from legrad.masks.smoothing import smoothed_grids
from legrad.method.relevance import relevance_grids
from legrad.method.trace import Trace, trace_images
from pipeline.config.masks import MasksConfig
from pipeline.config.schema import InputConfig
from pipeline.demo import assets
from pipeline.evaluation.map_methods import legrad_grids, named_baselines
from pipeline.evaluation.perturbation import PerturbedOutputs, joined_outputs, perturb, score_perturbation
from pipeline.prompts.sample_prompts import default_background
from pipeline.shards.ground_truth import Scene, list_truth_shards, read_scenes
from pipeline.shards.images import decode_image

LAYERS = 4  # last blocks of the maps that keys and contrast change
CONTRAST_SHARE = 0.6  # the default where several captions are prompts
BACKGROUNDS = 4  # the default of prompts.max_background
SCENES_AT_ONCE = 16
TEMPLATE = "a photo of a {}"


@dataclass(frozen=True)
class Model:
    """The demo model, with the texts that every image has in common.

    Attributes:
        explainer: the model.
        class_rows: unit embeddings of class id 1, 2, ...
        background_rows: unit embeddings of the background texts.
    """

    explainer: legrad.LeGrad
    class_rows: Tensor
    background_rows: Tensor


@dataclass(frozen=True)
class Pairs:
    """Texts of a batch, each with its image.

    Attributes:
        texts: unit rows.
        image_index: for each text the row of its image.
        class_ids: the class of each text.
    """

    texts: Tensor
    image_index: Tensor
    class_ids: np.ndarray


def main() -> None:
    """Measure each set."""
    arguments = options()
    data = demo_files(*arguments.sets, weights=arguments.weights)
    name = f"perturbation-{arguments.weights}"
    with recording(__file__, arguments, name=name, data=data) as record:
        model = demo_model(arguments.weights)
        for set_name in arguments.sets:
            measure_set(model, set_name, arguments.scenes, record)


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = figure_parser(__doc__)
    parser.add_argument("--weights", choices=WEIGHTS, default="new", help="weights of the demo's model")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=PUBLISHED_SETS, help="sets of scenes")
    parser.add_argument("--scenes", type=int, default=50, help="scenes of each set, the first ones")
    return parser.parse_args()


def demo_model(weights: str) -> Model:
    """Load the demo model."""
    name = assets.register_demo_model()
    explainer = legrad.LeGrad.from_open_clip(name, str(weights_path(weights)), layers="all")
    classes = explainer.embed_text([TEMPLATE.format(each) for each in assets.demo_classes()])
    return Model(explainer, classes, explainer.embed_text(default_background()))


def measure_set(model: Model, set_name: str, scenes: int, record: Record) -> None:
    """Record the rows of a set."""
    found: dict[str, list[PerturbedOutputs]] = {"target": [], "predicted": []}
    methods: tuple[str, ...] = ()
    first = 0
    for batch in batches_of(set_name, scenes):
        images, trace = encoded(model.explainer, batch)
        present = np.stack([present_classes(scene, len(model.class_rows)) for scene in batch])
        for table, pairs in (
            ("target", targets(model, batch)),
            ("predicted", predictions(model, trace)),
        ):
            grids = maps_of(model, trace, images, pairs)
            methods = tuple(grids)
            outputs = perturb(
                model.explainer,
                images[pairs.image_index],
                torch.stack(list(grids.values())).float(),
                pairs.texts,
                class_embeddings=model.class_rows,
                class_of_pair=pairs.class_ids,
                scene_of_pair=pairs.image_index.numpy(),
                present=present[pairs.image_index.numpy()],
            )
            found[table].append(replace(outputs, scene_of_pair=outputs.scene_of_pair + first))
        first += len(batch)
    for table, outputs_of_batches in found.items():
        outputs = joined_outputs(outputs_of_batches)
        for scores in score_perturbation(methods, outputs, configured_name=None, seed=0):
            areas = {f"{curve.test}_{curve.order}": curve.accuracy_area for curve in scores.curves}
            size = {"scenes": first, "pairs": len(outputs.scene_of_pair)}
            record(table, {"set": set_name, "map": scores.method, **size, **areas})


def batches_of(set_name: str, scenes: int) -> Iterator[list[Scene]]:
    """Yield the first scenes of a set that show an object, a few at a time."""
    settings = InputConfig(shards=[str(path) for path in assets.demo_shard_paths(set_name)])
    batch: list[Scene] = []
    for shard in list_truth_shards(settings.shards):
        for scene in read_scenes(shard, settings):
            if scenes and isinstance(scene, Scene) and scene.visible_objects():
                batch.append(scene)
                scenes -= 1
            if len(batch) == SCENES_AT_ONCE:
                yield batch
                batch = []
    if batch:
        yield batch


def encoded(explainer: legrad.LeGrad, scenes: Sequence[Scene]) -> tuple[Tensor, Trace]:
    """Return the model's input for scenes, and the trace of every block with keys."""
    pixels = np.stack(
        [decode_image(scene.image, explainer.transform, max_image_pixels=10**8).pixels for scene in scenes]
    )
    images = explainer.transform.normalise(torch.from_numpy(pixels), explainer.dtype)
    depth = len(explainer.tower.blocks)
    return images, trace_images(explainer.tower, images, depth, explainer.scoring, keep_keys=True)


def present_classes(scene: Scene, classes: int) -> np.ndarray:
    """Return which classes the captions of a scene name."""
    present = np.zeros(classes, dtype=bool)
    present[np.array(scene.class_ids) - 1] = True
    return present


def targets(model: Model, scenes: Sequence[Scene]) -> Pairs:
    """Return the captions of the objects that scenes show."""
    pairs = [(image, ordinal) for image, scene in enumerate(scenes) for ordinal in scene.visible_objects()]
    captions = [scenes[image].captions[ordinal] for image, ordinal in pairs]
    return Pairs(
        model.explainer.embed_text(captions),
        torch.tensor([image for image, _ in pairs]),
        np.array([scenes[image].class_ids[ordinal] for image, ordinal in pairs]),
    )


def predictions(model: Model, trace: Trace) -> Pairs:
    """Return the class that the model names for each image."""
    best = model.explainer.similarity(trace, model.class_rows).argmax(dim=1)
    return Pairs(model.class_rows[best], torch.arange(len(best)), best.numpy() + 1)


def maps_of(model: Model, trace: Trace, images: Tensor, pairs: Pairs) -> dict[str, Tensor]:
    """Return the grids of every kind of map, by its name: LeGrad's first, then those of baselines."""
    explainer, depth = model.explainer, len(trace.layers)
    own = legrad_grids(
        explainer, trace, pairs.texts, pairs.image_index, (1, 2, LAYERS, depth), spread_layers=LAYERS
    )
    contrasted = {f"LeGrad, last {LAYERS}, contrast": contrasted_relevance(model, trace, pairs)}
    others = named_baselines(
        explainer, images, pairs.texts, pairs.image_index, generator=torch.Generator().manual_seed(0)
    )
    return own | contrasted | others


def contrasted_relevance(model: Model, trace: Trace, pairs: Pairs) -> Tensor:
    """Return relevance smoothed and contrasted as a job does by default, against backgrounds as well."""
    closest = model.explainer.similarity(trace, model.background_rows).topk(BACKGROUNDS).indices
    owners = torch.arange(len(closest)).repeat_interleave(BACKGROUNDS)
    texts = torch.cat([pairs.texts, model.background_rows[closest.flatten()]])
    index = torch.cat([pairs.image_index, owners])
    prompts = as_ragged(trace.image_features, texts, index)
    explainer = model.explainer
    last = replace(trace, layers=trace.layers[-LAYERS:])
    layers = relevance_grids(explainer.tower, last, prompts.unit_rows, index, scoring=explainer.scoring)
    grids = contrasted_by_image(
        smoothed_grids(layers.sum(dim=0), MasksConfig().smooth),
        index,
        distances_by_image(prompts.unit_rows, index, model.background_rows.double().mean(dim=0)),
        share=CONTRAST_SHARE,
    )
    return grids[: len(pairs.texts)]


if __name__ == "__main__":
    main()
