"""How near heat maps are to those of the authors' package, which tests/golden keeps; left out: time.

    python tests/bench/golden_agreement.py [--write]

Both have the same seeded random weights and inputs, no trained checkpoint, fp32 on the CPU. One JSON row a
golden case: the relative error (Frobenius norm of the difference over that of the golden maps) and the
largest difference. `tests/legrad/test_golden.py` holds the same cases to 1e-5.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from published import figure_parser, recording

import legrad

sys.path.append(str(Path(__file__).parents[1] / "golden"))

from recipe import golden_inputs, recipe_weights

GOLDEN = Path(__file__).parents[1] / "golden"


def main() -> None:
    """Measure each case."""
    arguments = figure_parser(__doc__).parse_args()
    golden = ["tests/golden/*.npz"]
    with recording(__file__, arguments, data=golden, also=["tests/golden/recipe.py"]) as record:
        for path in sorted(GOLDEN.glob("*.npz")):
            record("cases", row_of(path))


def row_of(path: Path) -> dict[str, Any]:
    """Return the agreement of a golden case."""
    golden = np.load(path)
    case, expected = json.loads(str(golden["case"])), torch.from_numpy(golden["maps"]).double()
    explainer = explainer_of(case["model"], case["layers"])
    images, texts = golden_inputs(
        case["seed"], case["batch"], case["image_size"], case["prompts"], explainer.embed_dim
    )
    neutral = neutral_embedding(case["seed"], explainer.embed_dim) if case.get("correction") else None
    found = explainer.heatmaps(images, texts, neutral_embedding=neutral)[..., ::4, ::4].double()
    return {
        **{key: case[key] for key in ("model", "image_size", "layers")},
        "neutral": neutral is not None,
        "relative_error": (found - expected).norm() / expected.norm(),
        "largest_difference": (found - expected).abs().max(),
    }


def explainer_of(name: str, layers: int) -> legrad.LeGrad:
    """Return an explainer of a model whose vision tower has the recipe's weights; its text tower is tiny."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(
            config["embed_dim"],
            config["vision_cfg"] | {"timm_model_pretrained": False},
            {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1},
            quick_gelu=config.get("quick_gelu", False),
        )
    model.visual.load_state_dict(recipe_weights(model.visual.state_dict()), assign=True)
    return legrad.LeGrad(model, layers=layers)


def neutral_embedding(seed: int, embed_dim: int) -> torch.Tensor:
    """Return the neutral text's embedding of a golden case."""
    row = np.random.default_rng(seed + 1000).standard_normal((1, embed_dim), dtype=np.float32)
    return torch.from_numpy(row / np.linalg.norm(row))


if __name__ == "__main__":
    main()
