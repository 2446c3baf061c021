"""What masks are worth by threshold rule, combination and filter, on the demo's scenes with ground truth.

    python tests/bench/mask_quality.py [--scenes 1000] [--absent 4]

One JSON row for each set of scenes and recipe. The prompts of a scene are "a photo of a X" of the classes
that it shows; under argmax "a photo" competes with them. `precision` is the share of a mask's pixels that lie
on its object, `recall` the share of the object that its mask covers, `background_precision` the share of what
is neither mask nor ignored that is not the object, each a mean over (scene, class) with its 95 % interval;
`miou` is over classes, background included, of label maps, without ignored pixels. `auroc` separates classes
that a scene shows from others, `--absent` a scene, drawn at random.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from environment import environment
from sklearn.metrics import roc_auc_score

import legrad
from legrad.masks.rle import decode_rle
from legrad.masks.thresholds import foreground_contrast
from legrad.quality.metrics import bootstrap_mean, bootstrap_statistic
from pipeline.annotate.rows import annotation_rows
from pipeline.annotate.sample_states import ExplainedPrompt, ExplainedSample, SampleMaps
from pipeline.config.load import parse_config
from pipeline.config.schema import InputConfig
from pipeline.demo import assets
from pipeline.output.label_map import label_map
from pipeline.shards.ground_truth import Scene, list_truth_shards, read_scenes
from pipeline.shards.images import decode_image

BACKGROUND_TEXT = "a photo"
RECIPES: dict[str, dict[str, Any]] = {
    "fixed 0.5": {"rule": "fixed"},
    "otsu": {"rule": "otsu"},
    "quantile 0.9": {"rule": "quantile", "quantile": 0.9},
    "band": {"rule": "band"},
    "band, otsu at the center": {"rule": "band", "band_center": "otsu"},
    "band 0.25 0.8, otsu at the center": {"rule": "band", "band_center": "otsu", "high": 0.8},
    "argmax, fixed 0.4": {"rule": "fixed", "value": 0.4, "combine": "argmax"},
    "argmax, otsu": {"rule": "otsu", "combine": "argmax"},
    "argmax, otsu, no background text": {"rule": "otsu", "combine": "argmax"},
    "argmax, otsu, smooth 0.5": {"rule": "otsu", "combine": "argmax", "smooth": 0.5},
    "argmax, otsu, cleaned": {
        "rule": "otsu",
        "combine": "argmax",
        "min_component": 0.005,
        "max_hole": 0.005,
    },
    "argmax, band": {"rule": "band", "combine": "argmax"},
}


@dataclass(frozen=True)
class Explained:
    """A scene with the maps of its classes, and what distinguishes them from absent ones."""

    scene: Scene
    sample: ExplainedSample
    filters: dict[str, np.ndarray]
    is_present: np.ndarray


def explained_scenes(arguments: argparse.Namespace, artists: str) -> Iterator[Explained]:
    """Every scene of a set."""
    name = assets.register_demo_model()
    explainer = legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=4)
    classes = assets.demo_classes()
    texts = explainer.embed_text([*(f"a photo of a {each}" for each in classes), BACKGROUND_TEXT])
    rng = np.random.default_rng(0)
    settings = InputConfig(shards=[str(path) for path in assets.demo_shard_paths(artists)])
    scenes = [scene for shard in list_truth_shards(settings.shards) for scene in read_scenes(shard, settings)]
    for index, scene in enumerate(scenes[: arguments.scenes]):
        assert isinstance(scene, Scene)
        shown = [scene.class_ids[ordinal] - 1 for ordinal in scene.visible_objects()]
        others = sorted(set(range(len(classes))) - {class_id - 1 for class_id in scene.class_ids})
        absent = rng.choice(others, arguments.absent, replace=False).tolist()
        if shown:
            yield explain(explainer, scene, index, texts, (shown, absent), classes)


def explain(
    explainer: legrad.LeGrad,
    scene: Scene,
    index: int,
    texts: torch.Tensor,
    chosen: tuple[list[int], list[int]],
    classes: Sequence[str],
) -> Explained:
    """One scene with the maps of the classes shown, of absent ones, and of the background text."""
    shown, absent = chosen
    image = decode_image(scene.image, explainer.transform, max_image_pixels=10**8)
    trace = explainer.encode(
        explainer.transform.normalise(torch.from_numpy(image.pixels)[None], explainer.dtype)
    )
    rows = texts[[*shown, *absent, len(classes)]]
    grids = explainer.relevance(trace, rows)[0].float()
    similarities = explainer.similarity(trace, rows)[0].float()
    prompts = tuple(
        ExplainedPrompt(ordinal, classes[class_], class_ + 1, False, float(similarities[ordinal]))
        for ordinal, class_ in enumerate(shown)
    )
    own = torch.cat([grids[: len(shown)], grids[-1:]])
    peaks = own.amax((1, 2)).numpy()
    maps = SampleMaps(own.numpy(), peaks, None, None, np.arange(len(shown)), len(shown), "upsampled")
    return Explained(
        scene,
        ExplainedSample(index, scene.key, image.image_height, image.image_width, prompts, maps),
        {
            "similarity": similarities[:-1].numpy(),
            "peak": grids[:-1].amax((1, 2)).numpy(),
            "contrast": foreground_contrast(grids[:-1]).numpy(),
        },
        np.arange(len(rows) - 1) < len(shown),
    )


def without_backgrounds(maps: SampleMaps) -> SampleMaps:
    """Return the maps of the prompts alone."""
    prompts = maps.prompt_maps
    return replace(maps, relevance_grids=maps.relevance_grids[:prompts], peaks=maps.peaks[:prompts])


def mask_figures(
    scenes: Sequence[Explained], masks: dict[str, Any], *, with_background: bool
) -> dict[str, Any]:
    """Precision, recall and the like of one recipe."""
    document = {"input": {"shards": "-"}, "model": {"name": "-", "pretrained": "-"}, "output": {"dir": "-"}}
    config = parse_config({**document, "masks": masks})
    figures: list[tuple[int, float, float, float, float]] = []
    confusion = np.zeros((256, 256), dtype=np.int64)
    for index, each in enumerate(scenes):
        maps = each.sample.maps
        if not with_background:
            maps = without_backgrounds(maps)
        rows = annotation_rows(replace(each.sample, maps=maps), config)
        truth, valid = each.scene.label_map, each.scene.valid
        labels = label_map(rows, *truth.shape)
        counted = valid & (labels != 255)
        np.add.at(confusion, (truth[counted], labels[counted]), 1)
        for row in rows:
            own_ignore = row["ignore"] or rows[0]["ignore"]
            mask = decode_rle(row["mask"]) & valid
            rest = valid & ~mask & ~(decode_rle(own_ignore) if own_ignore else False)
            target = (truth == row["class_id"]) & valid
            figures.append(
                (
                    index,
                    (mask & target).sum() / mask.sum() if mask.any() else np.nan,
                    (mask & target).sum() / target.sum(),
                    1 - (rest & target).sum() / rest.sum() if rest.any() else np.nan,
                    1 - (mask | rest).sum() / valid.sum(),
                )
            )
    return {**_means(np.array(figures)), "miou": round(_mean_iou(confusion), 4)}


def _means(figures: np.ndarray) -> dict[str, Any]:
    names = ("precision", "recall", "background_precision", "ignored_share")
    means: dict[str, Any] = {"empty_masks": int(np.isnan(figures[:, 1]).sum())}
    for column, name in enumerate(names, start=1):
        defined = ~np.isnan(figures[:, column])
        means[name] = _rounded(bootstrap_mean(figures[defined, column], figures[defined, 0].astype(int)))
    return means


def _mean_iou(confusion: np.ndarray) -> float:
    hits, in_truth = np.diag(confusion), confusion.sum(axis=1)
    return float((hits / (in_truth + confusion.sum(axis=0) - hits))[in_truth > 0].mean())


def _rounded(estimate: Any) -> list[float]:
    return [round(figure, 4) for figure in (estimate.value, estimate.low, estimate.high)]


def auroc_figures(scenes: Sequence[Explained]) -> dict[str, Any]:
    """How well each filter separates classes that a scene shows from others."""

    def auroc(name: str, chosen: np.ndarray) -> float:
        scores = np.concatenate([scenes[index].filters[name] for index in chosen])
        return float(roc_auc_score(np.concatenate([scenes[index].is_present for index in chosen]), scores))

    return {
        name: _rounded(bootstrap_statistic(lambda chosen, name=name: auroc(name, chosen), len(scenes)))  # type: ignore[misc]
        for name in ("similarity", "peak", "contrast")
    }


def main() -> None:
    """Print one JSON row for each set and recipe."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenes", type=int, default=1000, help="of each set at most")
    parser.add_argument("--absent", type=int, default=4, help="classes that a scene does not show")
    arguments = parser.parse_args()
    print(json.dumps({"benchmark": "mask_quality", **environment(), **vars(arguments)}), flush=True)
    for artists in ("heldout", "newartist"):
        scenes = list(explained_scenes(arguments, artists))
        print(json.dumps({"set": artists, "scenes": len(scenes), "auroc": auroc_figures(scenes)}), flush=True)
        for name, masks in RECIPES.items():
            figures = mask_figures(scenes, masks, with_background="no background" not in name)
            print(json.dumps({"set": artists, "recipe": name, **masks, **figures}), flush=True)


if __name__ == "__main__":
    main()
