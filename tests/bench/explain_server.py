"""One process that explains images in one way, which reads orders as lines of JSON and answers in the same.

Runs in two environments: this package's, and the one of the packages that it is compared with, whose
`legrad_torch` installs a module of the same name. So all it imports from the repository is the recipe of the
golden maps' weights.

    {"op": "prepare", "way": ..., "model": ..., ...}    make the model, run once  -> {"versions": ...}
    {"op": "run"}                                       -> {"seconds": ..., "peak_mib": ..., "added_mib": ...}
    {"op": "maps", "path": ...}                         write the maps of a run as .npy
"""

import gc
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

sys.path.append(str(Path(__file__).parents[1] / "golden"))
from recipe import golden_inputs, recipe_weights

Explain = Callable[[], torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_open_clip(
    case: dict[str, Any], *, resized: bool = False
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Model with the recipe's vision weights, images, and unit text embeddings.

    `resized`: built for the case's size, for what cannot take images of another.
    """
    model = open_clip.create_model(case["model"], force_image_size=case["image_size"] if resized else None)
    state = model.visual.state_dict()
    model.visual.load_state_dict(recipe_weights(state))
    embed_dim = model.text_projection.shape[1] if hasattr(model, "text_projection") else 768
    images, texts = golden_inputs(0, case["batch"], case["image_size"], case["prompts"], embed_dim)
    dtype = DTYPES[case["precision"]]
    return model.eval().to(dtype), images.to(dtype), texts


def forward_only(case: dict[str, Any]) -> Explain:
    model, images, _ = make_open_clip(case, resized=True)

    @torch.no_grad()
    def explain() -> torch.Tensor:
        return model.encode_image(images)

    return explain


def ours(case: dict[str, Any]) -> Explain:
    import legrad

    model, images, texts = make_open_clip(case)
    options = {"compile": True} if case.get("compile") else {}
    explainer = legrad.LeGrad(model, layers=case["layers"], **options)
    return lambda: explainer.heatmaps(images, texts)


def authors(case: dict[str, Any]) -> Explain:
    from legrad import LeWrapper

    model, images, texts = make_open_clip(case)
    layers = case["layers"]
    blocks = (
        model.visual.trunk.blocks if hasattr(model.visual, "trunk") else model.visual.transformer.resblocks
    )
    wrapper = LeWrapper(model, layer_index=-(len(blocks) if layers == "all" else layers))
    options = {"apply_correction": False}

    def explain() -> torch.Tensor:
        # One image at a time: its prompts are its batch.
        maps = [wrapper.compute_legrad(texts, image[None], **options).detach() for image in images]
        return torch.stack([image_maps.reshape(len(texts), *image_maps.shape[-2:]) for image_maps in maps])

    return explain


def grad_cam(case: dict[str, Any]) -> Explain:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images, texts = make_open_clip(case, resized=True)
    grid = case["image_size"] // model.visual.patch_size[0]

    class Cosines(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = model.visual

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(self.visual(batch), dim=-1) @ texts.T

    def patches(tokens: torch.Tensor) -> torch.Tensor:  # this open_clip has tokens first
        return tokens.permute(1, 2, 0)[:, :, 1:].unflatten(-1, (grid, grid))

    layer = model.visual.transformer.resblocks[-1].ln_1
    method = GradCAM(model=Cosines(), target_layers=[layer], reshape_transform=patches)
    pairs = images.repeat_interleave(len(texts), dim=0)
    targets = [ClassifierOutputTarget(prompt) for _ in images for prompt in range(len(texts))]
    return lambda: torch.from_numpy(method(input_tensor=pairs, targets=targets))


def torchcam_legrad(case: dict[str, Any]) -> Explain:
    from torchcam.methods import LeGrad
    from torchvision.models import VisionTransformer

    shapes = {"ViT-B-16": (16, 12, 12, 768, 3072), "ViT-L-14": (14, 24, 16, 1024, 4096)}
    patch, layers, heads, width, mlp = shapes[case["model"]]
    model = VisionTransformer(
        case["image_size"], patch, layers, heads, width, mlp, num_classes=case["prompts"]
    ).eval()
    images, _ = golden_inputs(0, case["batch"], case["image_size"], 1, 1)
    blocks = list(model.encoder.layers)
    method = LeGrad(model, blocks if case["layers"] == "all" else blocks[-case["layers"] :])

    def explain() -> torch.Tensor:
        scores = model(images)
        last = case["prompts"] - 1
        maps = [
            torch.stack(method(prompt, scores, retain_graph=prompt < last)).detach()
            for prompt in range(case["prompts"])
        ]
        return torch.stack(maps)

    return explain


WAYS = {
    "forward": forward_only,
    "ours": ours,
    "authors": authors,
    "grad_cam": grad_cam,
    "torchcam": torchcam_legrad,
}


def resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def timed(explain: Explain) -> dict[str, float]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before_mib, started_s = resident_mib("VmRSS"), time.perf_counter()
    explain()
    seconds, peak_mib = time.perf_counter() - started_s, resident_mib("VmHWM")
    return {"seconds": seconds, "peak_mib": peak_mib, "added_mib": peak_mib - before_mib}


def answer(request: dict[str, Any], held: dict[str, Explain]) -> dict[str, Any]:
    if request["op"] == "prepare":
        held.clear()
        gc.collect()
        torch.set_num_threads(request["threads"])
        torch.manual_seed(0)
        held["explain"] = WAYS[request["way"]](request)
        held["explain"]()
        names = ("torch", "open_clip_torch", "timm", "legrad_torch", "torchcam", "grad_cam")
        installed = importlib.metadata.distributions()
        found = {dist.metadata["Name"].replace("-", "_"): dist.version for dist in installed}
        return {"versions": {name: found[name] for name in names if name in found}}
    if request["op"] == "maps":
        np.save(request["path"], held["explain"]().float().numpy())
        return {}
    return timed(held["explain"])


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what packages print is not an answer
    held: dict[str, Explain] = {}
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), held)
        except Exception as error:  # reported in the row; the other ways go on
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
