"""LeGrad for open_clip: which patches of an image speak for which text, in closed form.

    explainer = legrad.LeGrad.from_open_clip("ViT-B-16", "laion2b_s34b_b88k")
    trace = explainer.encode(explainer.preprocess(images))
    relevance_grids = explainer.relevance(trace, explainer.embed_text(["a dog", "a car"]))

Source: Bousselham et al., "LeGrad: An Explainability Method for Vision Transformers via Feature Formation
Sensitivity", https://arxiv.org/abs/2404.03214.
"""

from legrad.errors import InputError, LeGradError, ModelLoadError, TokenizerError, UnsupportedModelError
from legrad.explainer import LeGrad
from legrad.explanation import Explanation, explain_image, layer_strip
from legrad.families import ModelSupport, supported_models
from legrad.images import ImageTransform
from legrad.masks.refine import Refinement, refine_heatmaps
from legrad.method.trace import LayerTrace, Trace
from legrad.pictures import overlay
from legrad.views import Views, view_relevance

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "ImageTransform",
    "InputError",
    "LayerTrace",
    "LeGrad",
    "LeGradError",
    "ModelLoadError",
    "ModelSupport",
    "Refinement",
    "TokenizerError",
    "Trace",
    "UnsupportedModelError",
    "Views",
    "explain_image",
    "layer_strip",
    "overlay",
    "refine_heatmaps",
    "supported_models",
    "view_relevance",
]
