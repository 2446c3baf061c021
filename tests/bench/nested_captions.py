"""Masks of captions that contain each other, with and without contrast; left out: files, Ray, and time.

    python tests/bench/nested_captions.py [--weights new|old] [--sets heldout newartist] [--write]

The prompts of a scene with several objects are the caption of each object ("a dog", "a cat") and the caption
that joins them ("a dog and a cat"), whose target is all these objects together. A background text takes from
all of them. Masks: last 3 layers, smoothed by 0.6 patch, refined, cut at 0.4, at the model's input size.
One JSON row a set and way, with the mean IoU of the single captions and of the joined one:

    no contrast; contrast of 0.6 weighted by how far two texts are apart (as `legrad annotate` does), with
    weights of 1, and among the single captions alone
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from demo_inputs import PUBLISHED_SETS, SETS, WEIGHTS, demo_files, weights_path
from published import figure_parser, recording
from torch import Tensor

import legrad
from legrad.heatmaps import heatmaps_of, minmax_normalise
from legrad.masks.refine import Refinement, dilations_for_patch, refine_heatmaps
from legrad.quality.metrics import bootstrap_mean
from pipeline.config.schema import InputConfig
from pipeline.demo import assets
from pipeline.prompts.sample_prompts import default_background
from pipeline.shards.ground_truth import Scene, list_truth_shards, read_scenes
from pipeline.shards.images import decode_image

LAYERS, SMOOTH_PATCHES, SHARE, CUT, PATCH_PIXELS = 3, 0.6, 0.6, 0.4, 8
WAYS = ("no contrast", "weights by distance", "weights of 1", "among single captions alone")


@dataclass(frozen=True)
class Target:
    """What a prompt should find in a scene.

    Attributes:
        is_joined: whether the prompt is the caption that joins all objects.
        pixels: its objects, bool [height, width].
        valid: pixels that count.
    """

    is_joined: bool
    pixels: np.ndarray
    valid: np.ndarray


def main() -> None:
    """Measure each set and way."""
    parser = figure_parser(__doc__)
    parser.add_argument("--weights", choices=WEIGHTS, default="new", help="weights of the demo's model")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=PUBLISHED_SETS, help="sets of scenes")
    parser.add_argument("--scenes", type=int, default=1000, help="scenes of a set, at most")
    arguments = parser.parse_args()
    data = demo_files(*arguments.sets, weights=arguments.weights)
    name = f"nested_captions-{arguments.weights}"
    with recording(__file__, arguments, name=name, data=data) as record:
        for set_name in arguments.sets:
            for row in rows_of_set(set_name, arguments):
                record("ways", row)


def rows_of_set(set_name: str, arguments: argparse.Namespace) -> Iterator[Mapping[str, object]]:
    """Yield the row of each way."""
    explainer = legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(weights_path(arguments.weights)), layers=LAYERS
    )
    background = explainer.embed_text(default_background())
    scenes = list(scenes_with_several_objects(set_name))[: arguments.scenes]
    ious: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for number, scene in enumerate(scenes):
        for way, found in masks_of(explainer, scene, background).items():
            for target, mask in zip(targets_of(scene), found, strict=True):
                if target.pixels.any():
                    ious.setdefault((way, target.is_joined), []).append((number, iou(mask, target)))
    for way in WAYS:
        single, joined = (bootstrap_mean(*_columns(ious[way, is_joined])) for is_joined in (False, True))
        yield {"set": set_name, "way": way, "single": single, "joined": joined}


def scenes_with_several_objects(set_name: str) -> Iterator[Scene]:
    """Yield the scenes that have more than one caption."""
    shards = [str(path) for path in assets.demo_shard_paths(set_name)]
    settings = InputConfig(shards=shards, image="jpg", caption="json:captions")
    for shard in list_truth_shards(settings.shards):
        for item in read_scenes(shard, settings):
            if isinstance(item, Scene) and len(item.captions) > 1:
                yield item


def targets_of(scene: Scene) -> list[Target]:
    """Return the targets of the single captions, and last that of the joined one."""
    single = [scene.class_mask(class_id) for class_id in scene.class_ids]
    joined = np.logical_or.reduce(single)
    return [Target(pixels is joined, pixels, scene.valid) for pixels in (*single, joined)]


def masks_of(
    explainer: legrad.LeGrad, scene: Scene, background: Tensor
) -> Mapping[str, Sequence[np.ndarray]]:
    """Return, for each way, the masks of the single captions and of the joined one, at the image's size."""
    image = decode_image(scene.image, explainer.transform, max_image_pixels=10**8)
    pixels = torch.from_numpy(image.pixels)[None]
    captions = [*scene.captions, " and ".join(scene.captions)]
    texts = torch.cat([explainer.embed_text(captions), background[:1]])
    images = explainer.transform.normalise(pixels, explainer.dtype)
    grids = legrad.smoothed_grids(explainer.relevance(images, texts)[0].float(), SMOOTH_PATCHES)
    weights = legrad.text_distances(texts, background.double().mean(dim=0))
    among_singles = torch.ones_like(weights)
    among_singles[len(captions) - 1], among_singles[:, len(captions) - 1] = 0, 0
    of_ways = (torch.zeros_like(weights), weights, torch.ones_like(weights), among_singles)
    found = {}
    for way, own_weights in zip(WAYS, of_ways, strict=True):
        kept = legrad.contrasted_grids(grids, own_weights, share=SHARE)[: len(captions)]
        found[way] = refined_masks(explainer, pixels, kept, scene.labels.shape)
    return found


def refined_masks(
    explainer: legrad.LeGrad, pixels: Tensor, grids: Tensor, size: tuple[int, ...]
) -> Sequence[np.ndarray]:
    """Return the masks of grids of one image at a size."""
    height, width = pixels.shape[1:3]
    heatmaps = heatmaps_of(grids, height, width, explainer.tower.normalisation).contiguous()
    refinement = Refinement(dilations=dilations_for_patch(PATCH_PIXELS))
    owners = torch.zeros(len(grids), dtype=torch.int64)
    refined = minmax_normalise(refine_heatmaps(pixels.permute(0, 3, 1, 2), heatmaps, owners, refinement))
    masks: np.ndarray = (legrad.upsample_grid(refined, size[0], size[1]) > CUT).numpy()
    return list(masks)


def iou(mask: np.ndarray, target: Target) -> float:
    """Return the IoU over the pixels that count."""
    both = mask & target.pixels & target.valid
    either = (mask | target.pixels) & target.valid
    return float(both.sum() / either.sum())


def _columns(values: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    scenes, ious = zip(*values, strict=True)
    return np.array(ious), np.array(scenes)


if __name__ == "__main__":
    main()
