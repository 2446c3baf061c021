"""The paper's figures and protocol, as far as they could be read in a source.

Paper: Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation
Sensitivity", ICCV 2025, arXiv:2404.03214. Its own tables could not be read while this file was written. The
figures here are those that a reading note quotes from it; a table says so, and figures that the note leaves
out are missing.

Protocol: a map of each class in the image, cut at 0.5 (segmentation, points); positive and negative deletion
from 0 to 90 % (perturbation), as configs/protocol describes them. 448 px and "a photo of a" are those of
the authors' example (https://github.com/WalBouss/LeGrad, README).

Metrics: the code of Chefer et al., "Transformer Interpretability Beyond Attention Visualization", CVPR 2021
(https://github.com/hila-chefer/Transformer-Explainability), which has the metrics that the note names; the
authors of LeGrad have published no code of their evaluation.
"""

from __future__ import annotations

FIGURES_SOURCE = (
    "arXiv:2404.03214, as quoted in the reading note github.com/zhaoyang97/Paper-Notes-en (commit 62d684b), "
    "docs/ICCV2025/segmentation/legrad_an_explainability_method_for_vision_transformers_via_feature_"
    "formation_se.md; not compared with the paper itself"
)
TEMPLATE = "a photo of a {}."
THRESHOLD = 0.5
IMAGE_SIZE = 448
LAYERS = 2  # the last blocks that the authors' package explains by default; the paper sums over layers
BASELINES = ("rollout", "raw_attention", "gradcam", "chefercam", "patch_text")

# By open_clip's name: the paper's name. Other models have no figures to compare with.
ARCHITECTURES = {
    "ViT-B-16": "ViT-B/16",
    "ViT-L-14": "ViT-L/14",
    "ViT-H-14": "ViT-H/14",
    "ViT-B-16-SigLIP": "SigLIP-B/16",
}

LEGRAD = "LeGrad"
# By table, architecture and metric: percentages by method.
FIGURES: dict[str, dict[str, dict[str, dict[str, float]]]] = {
    "imagenet-s": {
        "ViT-B/16": {
            "mean_iou": {LEGRAD: 58.66, "chefercam": 47.47, "TextSpan": 40.26, "rollout": 40.64},
            "pixel_accuracy": {LEGRAD: 77.52, "chefercam": 69.21, "TextSpan": 73.01, "rollout": 60.63},
        }
    },
    "openimages-v7": {
        "ViT-B/16": {"point_mean_iou": {LEGRAD: 48.38, "chefercam": 5.87, "TextSpan": 9.44, "rollout": 8.75}},
        "ViT-L/14": {
            "point_mean_iou": {LEGRAD: 47.69, "chefercam": 2.51, "TextSpan": 21.73, "rollout": 6.85}
        },
        "ViT-H/14": {
            "point_mean_iou": {LEGRAD: 46.51, "chefercam": 9.49, "TextSpan": 23.74, "rollout": 5.82}
        },
        "SigLIP-B/16": {"point_mean_iou": {LEGRAD: 25.40, "chefercam": 1.94, "rollout": 0.07}},
    },
    "perturbation": {},
}


def figures(table: str, model_name: str) -> dict[str, dict[str, float]]:
    """Return the paper's figures by metric and method, in percent, for a model by its open_clip name."""
    return FIGURES[table].get(ARCHITECTURES.get(model_name, ""), {})


def missing_figures(table: str, model_name: str) -> str:
    """Return why cells of the paper's columns are empty."""
    if not FIGURES[table]:
        return "The source quotes no figure of this table."
    if not figures(table, model_name):
        known = ", ".join(FIGURES[table])
        return f"The source has no figures of this model; it has those of {known}."
    return "Empty cells: figures that the source does not quote."
