"""How well scores tell classes that a scene shows from classes that it does not; left out: masks.

    python tests/bench/presence_filters.py [--weights new|old] [--sets heldout newartist] [--write]

The prompts of a scene are "a photo of a X" of the classes that it shows, and of others drawn at random. Each
score is one that a filter of a job looks at. One JSON row a set and score: the area under the ROC curve over
all prompts of the set, with its 95 % interval over scenes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from demo_inputs import PUBLISHED_SETS, SETS, WEIGHTS, demo_files, weights_path
from published import figure_parser, recording
from sklearn.metrics import roc_auc_score
from torch import Tensor

import legrad
from legrad.masks.thresholds import foreground_contrast
from legrad.quality.metrics import Estimate, bootstrap_statistic
from pipeline.config.schema import InputConfig
from pipeline.demo import assets
from pipeline.shards.ground_truth import Scene, list_truth_shards, read_scenes
from pipeline.shards.images import decode_image

# a score of each text of an image, from raw grids [texts, height, width] and similarities [texts]
SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "similarity": lambda grids, similarities: similarities,
    "peak": lambda grids, similarities: grids.amax((1, 2)),
    "foreground contrast": lambda grids, similarities: foreground_contrast(grids),
    "lead in similarity": lambda grids, similarities: lead(similarities),
    "lead in relevance": lambda grids, similarities: lead(grids).amax((1, 2)),
}


@dataclass(frozen=True)
class ScoredScene:
    """The scores of a scene's prompts, and which of them name a class that it shows."""

    scores: dict[str, np.ndarray]
    is_present: np.ndarray


def main() -> None:
    """Measure each set and score."""
    arguments = options()
    name = f"presence_filters-{arguments.weights}"
    data = demo_files(*arguments.sets, weights=arguments.weights)
    with recording(__file__, arguments, name=name, data=data) as record:
        for set_name in arguments.sets:
            scenes = list(scored_scenes(arguments, set_name))
            for score in SCORES:
                record("scores", {"set": set_name, "score": score, "auroc": auroc(scenes, score)})


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = figure_parser(__doc__)
    parser.add_argument("--weights", choices=WEIGHTS, default="new", help="weights of the demo's model")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=PUBLISHED_SETS, help="sets of scenes")
    parser.add_argument("--scenes", type=int, default=1000, help="scenes of each set at most")
    parser.add_argument("--absent", type=int, default=4, help="classes that a scene does not show")
    return parser.parse_args()


def scored_scenes(arguments: argparse.Namespace, set_name: str) -> Iterator[ScoredScene]:
    """Yield the scenes of a set that show a class."""
    explainer = legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(weights_path(arguments.weights)), layers=4
    )
    classes = assets.demo_classes()
    texts = explainer.embed_text([f"a photo of a {each}" for each in classes])
    rng = np.random.default_rng(0)
    settings = InputConfig(shards=[str(path) for path in assets.demo_shard_paths(set_name)])
    found = [item for shard in list_truth_shards(settings.shards) for item in read_scenes(shard, settings)]
    scenes = [item for item in found if isinstance(item, Scene)]
    for scene in scenes[: arguments.scenes]:
        shown = [scene.class_ids[ordinal] - 1 for ordinal in scene.visible_objects()]
        others = sorted(set(range(len(classes))) - {class_id - 1 for class_id in scene.class_ids})
        absent = rng.choice(others, arguments.absent, replace=False).tolist()
        if shown:
            yield scored(explainer, scene, texts[[*shown, *absent]], len(shown))


def scored(explainer: legrad.LeGrad, scene: Scene, texts: Tensor, shown: int) -> ScoredScene:
    """Return the scores of a scene's texts, of which the first ones are shown."""
    image = decode_image(scene.image, explainer.transform, max_image_pixels=10**8)
    pixels = explainer.transform.normalise(torch.from_numpy(image.pixels)[None], explainer.dtype)
    trace = explainer.encode(pixels)
    grids = explainer.relevance(trace, texts)[0].float()
    similarities = explainer.similarity(trace, texts)[0].float()
    scores = {name: score(grids, similarities).numpy() for name, score in SCORES.items()}
    return ScoredScene(scores, np.arange(len(texts)) < shown)


def lead(values: Tensor) -> Tensor:
    """Return how much each text, the first index, exceeds the strongest other text, in each place."""
    highest = values.topk(2, dim=0).values
    return values - torch.where(values == highest[0], highest[1], highest[0])


def auroc(scenes: Sequence[ScoredScene], score: str) -> Estimate:
    """Return the area under the ROC curve of a score."""

    def of_chosen(chosen: np.ndarray) -> float:
        scores = np.concatenate([scenes[index].scores[score] for index in chosen])
        is_present = np.concatenate([scenes[index].is_present for index in chosen])
        return float(roc_auc_score(is_present, scores))

    return bootstrap_statistic(of_chosen, len(scenes))


if __name__ == "__main__":
    main()
