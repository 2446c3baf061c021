"""LeGrad for open_clip: how much each patch of an image contributes to a text, in closed form.

    explainer = legrad.LeGrad.from_open_clip("ViT-B-16", "laion2b_s34b_b88k")
    trace = explainer.encode(explainer.preprocess([image]))
    relevance_grids = explainer.relevance(trace, explainer.embed_text(["a dog", "a car"]))
    masks = legrad.grid_to_masks(relevance_grids[0], image.height, image.width, legrad.MaskRule("otsu"))

Names are imported when they are first used, so that modules without a model, such as `legrad.masks.rle`, load
neither torch nor open_clip.

The docstring of each name has an example. Examples use `legrad`, numpy as `np`, `torch`, and these names:

    explainer   a LeGrad of the bundled demo model: 96 x 96 pixels, patches of 8, 6 blocks, 2 explained
    image       a PIL image of a banana, a cactus and a panda
    grids       relevance grids of the image for the texts "a banana" and "a panda", [2, 12, 12]
    folder      an empty folder, as a pathlib.Path

Source: Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation
Sensitivity", https://arxiv.org/abs/2404.03214.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from legrad.canvases import Views
    from legrad.errors import (
        InputError,
        LeGradError,
        MaskError,
        ModelLoadError,
        RleError,
        TokenizerError,
        UnsupportedModelError,
    )
    from legrad.explainer import LeGrad
    from legrad.explaining import explain_images
    from legrad.explanation import Explanation, explain_image, layer_strip
    from legrad.explanations import Explanations
    from legrad.heatmaps import heatmaps_of, minmax_normalise, upsample_grid
    from legrad.images import ImageTransform
    from legrad.masks.cleaning import Cleaning
    from legrad.masks.contrast import contrasted_grids, text_distances
    from legrad.masks.grids import ImageMasks, grid_to_masks
    from legrad.masks.refine import Refinement, dilations_for_patch, refine_heatmaps
    from legrad.masks.rle import Rle, decode_rle, encode_rle, mask_area, mask_bbox_xywh
    from legrad.masks.smoothing import smoothed_grids
    from legrad.masks.thresholds import MaskRule, otsu_threshold
    from legrad.method.trace import LayerTrace, Trace
    from legrad.pictures import overlay
    from legrad.quality.baselines import BASELINES, Baseline, baseline, baseline_grids
    from legrad.quality.localisation import (
        LocalisationScores,
        MapLocalisation,
        localisation_scores,
        map_localisation,
    )
    from legrad.quality.perturbation import PerturbationCurve, insertion_deletion
    from legrad.support import ModelSupport, supported_models
    from legrad.trace_files import load_trace, save_trace
    from legrad.views import view_relevance

__version__ = "0.1.0"

# Names of the authors' package. `pipeline.installation` recognises this file by the name of its distribution.
_OF_LEGRAD_TORCH = ("LePreprocess", "LeWrapper", "list_pretrained")
_DISTRIBUTION = "legrad-pipeline"

__all__ = [
    "BASELINES",
    "Baseline",
    "Cleaning",
    "Explanation",
    "Explanations",
    "ImageMasks",
    "ImageTransform",
    "InputError",
    "LayerTrace",
    "LeGrad",
    "LeGradError",
    "LocalisationScores",
    "MapLocalisation",
    "MaskError",
    "MaskRule",
    "ModelLoadError",
    "ModelSupport",
    "PerturbationCurve",
    "Refinement",
    "Rle",
    "RleError",
    "TokenizerError",
    "Trace",
    "UnsupportedModelError",
    "Views",
    "baseline",
    "baseline_grids",
    "contrasted_grids",
    "decode_rle",
    "dilations_for_patch",
    "encode_rle",
    "explain_image",
    "explain_images",
    "grid_to_masks",
    "heatmaps_of",
    "insertion_deletion",
    "layer_strip",
    "load_trace",
    "localisation_scores",
    "map_localisation",
    "mask_area",
    "mask_bbox_xywh",
    "minmax_normalise",
    "otsu_threshold",
    "overlay",
    "refine_heatmaps",
    "save_trace",
    "smoothed_grids",
    "supported_models",
    "text_distances",
    "upsample_grid",
    "view_relevance",
]

_MODULES = {
    "legrad.canvases": ["Views"],
    "legrad.errors": [
        "InputError",
        "LeGradError",
        "MaskError",
        "ModelLoadError",
        "RleError",
        "TokenizerError",
        "UnsupportedModelError",
    ],
    "legrad.explainer": ["LeGrad"],
    "legrad.explaining": ["explain_images"],
    "legrad.explanation": ["Explanation", "explain_image", "layer_strip"],
    "legrad.explanations": ["Explanations"],
    "legrad.heatmaps": ["heatmaps_of", "minmax_normalise", "upsample_grid"],
    "legrad.images": ["ImageTransform"],
    "legrad.masks.cleaning": ["Cleaning"],
    "legrad.masks.contrast": ["contrasted_grids", "text_distances"],
    "legrad.masks.grids": ["ImageMasks", "grid_to_masks"],
    "legrad.masks.refine": ["Refinement", "dilations_for_patch", "refine_heatmaps"],
    "legrad.masks.rle": ["Rle", "decode_rle", "encode_rle", "mask_area", "mask_bbox_xywh"],
    "legrad.masks.smoothing": ["smoothed_grids"],
    "legrad.masks.thresholds": ["MaskRule", "otsu_threshold"],
    "legrad.method.trace": ["LayerTrace", "Trace"],
    "legrad.pictures": ["overlay"],
    "legrad.support": ["ModelSupport", "supported_models"],
    "legrad.quality.baselines": ["BASELINES", "Baseline", "baseline", "baseline_grids"],
    "legrad.quality.localisation": [
        "LocalisationScores",
        "MapLocalisation",
        "localisation_scores",
        "map_localisation",
    ],
    "legrad.quality.perturbation": ["PerturbationCurve", "insertion_deletion"],
    "legrad.trace_files": ["load_trace", "save_trace"],
    "legrad.views": ["view_relevance"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # type checkers would take any name for one of this package's

    def __getattr__(name: str) -> Any:
        if name in _OF_LEGRAD_TORCH:
            # not an AttributeError, whose message `from legrad import ...` would replace by its own
            raise ImportError(
                f"this `legrad` is the library of {_DISTRIBUTION}; {name} belongs to the authors' package, "
                "legrad_torch, which installs a folder of the same name. Install each in an environment of "
                "its own; here, `legrad.LeGrad` explains a model"
            )
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'legrad' has no attribute {name!r}")
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
