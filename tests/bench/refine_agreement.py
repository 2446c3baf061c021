"""How near the Triton kernels of refinement, with affinities in float16, stay to torch in float32.

    python tests/bench/refine_agreement.py [--scenes 64] [--device cuda] [--write]

Scenes of the demo's two sets with the maps of their captions; `difference` is between refined maps that are
scaled to 0 to 1, `mask_iou` between masks cut at 0.5. On the CPU, the kernels run in Triton's interpreter.
"""

import io
import itertools
import os
import sys
from typing import Any

if "cuda" not in sys.argv:
    # read when the kernels are defined
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from demo_inputs import demo_files
from PIL import Image
from published import figure_parser, recording
from torch import Tensor

import legrad
from legrad.heatmaps import heatmaps_of, minmax_normalise
from legrad.masks.refine import refined_maps_by_torch
from legrad.masks.refine_triton import refined_maps
from pipeline.config.schema import InputConfig
from pipeline.demo import assets
from pipeline.shards.ground_truth import Scene, list_truth_shards, read_scenes

MAX_BYTES = 2**28
# Few large blocks, since the interpreter runs them one by one.
TILE_VALUES = {"cpu": 2**17, "cuda": 4096}


def main() -> None:
    """Measure each set and kernel."""
    parser = figure_parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scenes", type=int, default=64, help="number of scenes of each set")
    arguments = parser.parse_args()
    sets = ("heldout", "newartist")
    explainer = legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers=2
    )
    with recording(__file__, arguments, data=demo_files(*sets)) as record:
        for set_name in sets:
            frames = [_frames(scene, explainer) for scene in _scenes(set_name, arguments.scenes)]
            for kernel in ("par", "pamr"):
                pairs = [_refined(*frame, kernel, arguments.device) for frame in frames]
                single, half = (torch.cat(maps) for maps in zip(*pairs, strict=True))
                record("maps", {"set": set_name, "kernel": kernel, **_agreement(single, half)})


def _scenes(set_name: str, count: int) -> list[Scene]:
    shards = [str(path) for path in assets.demo_shard_paths(set_name)]
    settings = InputConfig(shards=shards)
    items = itertools.chain.from_iterable(read_scenes(shard, settings) for shard in list_truth_shards(shards))
    return list(itertools.islice((item for item in items if isinstance(item, Scene)), count))


def _frames(scene: Scene, explainer: legrad.LeGrad) -> tuple[Tensor, Tensor]:
    """Return the pixels of a scene, uint8 [1, height, width, 3], and the heat maps of its captions."""
    image = Image.open(io.BytesIO(scene.image))
    grids = explainer.relevance(explainer.preprocess([image]), explainer.embed_text(scene.captions))[0]
    pixels = torch.from_numpy(explainer.transform.resize(image))[None]
    return pixels, heatmaps_of(grids, *pixels.shape[1:3], explainer.tower.normalisation)


def _refined(pixels: Tensor, heatmaps: Tensor, kernel: str, device: str) -> tuple[Tensor, Tensor]:
    images = pixels.permute(0, 3, 1, 2).to(device)
    maps, owners = heatmaps.to(device), torch.zeros(len(heatmaps), dtype=torch.int64)
    refinement = legrad.Refinement(kernel)
    single = refined_maps_by_torch(images, maps, owners, refinement, MAX_BYTES)
    half = refined_maps(images, maps, owners, refinement, MAX_BYTES, tile_values=TILE_VALUES[device])
    return minmax_normalise(single).cpu(), minmax_normalise(half).cpu()


def _agreement(single: Tensor, half: Tensor) -> dict[str, Any]:
    difference = (half - single).abs()
    masks = [(maps >= 0.5).flatten(1) for maps in (single, half)]
    ious = ((masks[0] & masks[1]).sum(dim=1) / (masks[0] | masks[1]).sum(dim=1).clamp(min=1)).double()
    return {
        "maps": len(single),
        "frame": list(single.shape[1:]),
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "mask_iou": float(ious.mean()),
        "smallest_mask_iou": float(ious.min()),
        "equal_masks": float((ious == 1).double().mean()),
    }


if __name__ == "__main__":
    main()
