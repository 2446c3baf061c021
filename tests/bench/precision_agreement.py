"""How near half precision stays to single: every family on seeded weights, and the demo model on its scenes.

    python tests/bench/precision_agreement.py [--device cuda] [--scenes 64] [--models ViT-B-32 ...] [--write]

Seeded weights make maps that look like noise, the hard case: none stands out. `relative_error` is the
Frobenius norm of the difference of raw relevance over that of single precision; `correlation` is Pearson's,
of heat maps, averaged over prompts; `mask_iou` is between masks cut at 0.5, averaged over prompts.
"""

import copy
import importlib.util
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from demo_inputs import demo_files
from PIL import Image
from published import figure_parser, recording
from torch import Tensor

import legrad
from legrad.heatmaps import minmax_normalise
from pipeline.config.schema import InputConfig
from pipeline.demo import assets
from pipeline.shards.ground_truth import Scene, list_truth_shards, read_scenes

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
MODELS = (
    "ViT-B-32",
    "ViT-B-16-quickgelu",
    "coca_ViT-B-32",
    "ViT-B-16-SigLIP",
    "EVA02-B-16",
    "PE-Core-B-16",
    "MobileCLIP-B",
    "ViTamin-S",
    "vit_medium_patch16_gap_256",
    "vit_relpos_medium_patch16_cls_224",
)
GOLDEN_RECIPE = Path(__file__).parents[1] / "golden" / "recipe.py"
BATCH, PROMPTS, LAYERS = 2, 4, 2


def main() -> None:
    """Measure each model and precision."""
    parser = figure_parser(__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scenes", type=int, default=64, help="held-out demo scenes")
    parser.add_argument("--models", nargs="*", default=MODELS)
    arguments = parser.parse_args()
    also = ["tests/golden/recipe.py"]
    with recording(__file__, arguments, data=demo_files("heldout"), also=also) as record:
        for name in arguments.models:
            for row in _seeded(name, arguments.device):
                record("models", row)
        for row in _demo(arguments.scenes, arguments.device):
            record("models", row)


def _seeded(name: str, device: str) -> Iterator[dict[str, Any]]:
    model = _seeded_model(name).to(device)
    explainer = legrad.LeGrad(model, layers=LAYERS)
    generator = torch.Generator().manual_seed(0)
    size = (explainer.transform.height, explainer.transform.width)
    images = torch.randn(BATCH, 3, *size, generator=generator).to(device)
    texts = torch.randn(PROMPTS, explainer.embed_dim, generator=generator).to(device)
    single = explainer.relevance(images, texts).flatten(0, 1)
    for precision, dtype in PRECISIONS.items():
        half_model = copy.deepcopy(model).to(dtype)
        half = legrad.LeGrad(half_model, layers=LAYERS).relevance(images.to(dtype), texts).flatten(0, 1)
        yield {
            "model": name,
            "weights": "seeded",
            "family": explainer.tower.family,
            "precision": precision,
        } | _agreement(single, half)


def _demo(scenes: int, device: str) -> Iterator[dict[str, Any]]:
    explainers = {precision: _demo_explainer(precision, device) for precision in ("fp32", *PRECISIONS)}
    shards = [str(path) for path in assets.demo_shard_paths("heldout")]
    settings = InputConfig(shards=shards)
    items = itertools.chain.from_iterable(read_scenes(shard, settings) for shard in list_truth_shards(shards))
    found = (item for item in items if isinstance(item, Scene))
    grids: dict[str, list[Tensor]] = {precision: [] for precision in explainers}
    for scene in itertools.islice(found, scenes):
        for precision, explainer in explainers.items():
            images = explainer.preprocess([Image.open(io.BytesIO(scene.image))])
            grids[precision].append(explainer.relevance(images, explainer.embed_text(scene.captions))[0])
    single = torch.cat(grids["fp32"])
    for precision in PRECISIONS:
        agreement = _agreement(single, torch.cat(grids[precision]))
        yield {"model": "demo", "weights": "trained", "family": "clip", "precision": precision} | agreement


def _demo_explainer(precision: str, device: str) -> legrad.LeGrad:
    return legrad.LeGrad.from_open_clip(
        assets.register_demo_model(),
        str(assets.demo_weights_path()),
        layers=LAYERS,
        device=device,
        precision=precision,
    )


def _seeded_model(name: str) -> torch.nn.Module:
    specification = importlib.util.spec_from_file_location("golden_recipe", GOLDEN_RECIPE)
    recipe = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(recipe)
    config = open_clip.get_model_config(name)
    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    model = open_clip.CLIP(
        config["embed_dim"], config["vision_cfg"], text, quick_gelu=config.get("quick_gelu", False)
    )
    weights = recipe.recipe_weights(model.visual.state_dict())
    # The recipe draws around zero what is no weight; a variance has to be positive.
    variances = {key: value.abs() + 0.5 for key, value in weights.items() if key.endswith("running_var")}
    model.visual.load_state_dict(weights | variances)
    return model.eval()


def _agreement(single: Tensor, half: Tensor) -> dict[str, Any]:
    maps = [minmax_normalise(grids.double().cpu()).flatten(1) for grids in (single, half)]
    centred = [map_ - map_.mean(dim=1, keepdim=True) for map_ in maps]
    correlations = torch.nn.functional.cosine_similarity(*centred, dim=1)
    masks = [map_ > 0.5 for map_ in maps]
    union = (masks[0] | masks[1]).sum(dim=1).clamp(min=1)
    ious = (masks[0] & masks[1]).sum(dim=1) / union
    return {
        "prompts": len(single),
        "relative_error": float((half - single).norm() / single.norm()),
        "correlation": float(correlations.mean()),
        "lowest_correlation": float(correlations.min()),
        "mask_iou": float(ious.double().mean()),
    }


if __name__ == "__main__":
    main()
