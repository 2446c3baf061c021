"""A vision transformer with a classifier: maps of its classes, the most probable ones and the right one.

python legrad/examples/classifier.py [FOLDER]
"""

# %% The bundled model as a classifier of timm for its 64 things. The head's rows embed their names.
# A real one: legrad.LeGrad.from_classifier("timm:vit_base_patch16_224.augreg_in1k"). With
# MODEL = ("ViT-B-16", "laion2b_s34b_b88k") the sizes in `classifier` must be that model's.
from typing import Any

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

import legrad
from legrad.examples.demo_data import load, output_folder, scenes
from pipeline.demo import assets

MODEL = "demo"
OUT = output_folder("classifier")
path, texts = scenes(OUT, 1)[0]
image = Image.open(path)


@torch.no_grad()
def classifier(class_names: list[str]) -> nn.Module:
    """Return the vision tower of the demo model with a head for classes."""
    clip = load(MODEL, device="cpu")
    visual: Any = clip.model.visual
    classes = len(class_names)
    model = VisionTransformer(
        img_size=96, patch_size=8, embed_dim=192, depth=6, num_heads=3, pre_norm=True, num_classes=classes
    ).eval()
    weights = checkpoint_filter_fn(clip.model.state_dict(), model)
    head = clip.embed_text([f"a {name}" for name in class_names]) @ visual.proj.T
    model.load_state_dict({**weights, "head.weight": head, "head.bias": torch.zeros(classes)})
    return model


# %% The score of a class is its logit; the classes are named, or given by their index.
class_names = assets.demo_classes()
explainer = legrad.LeGrad(classifier(class_names), class_names=class_names)
trace = explainer.encode(explainer.preprocess([image]))
logits = explainer.logits(trace)[0]
top = logits.topk(3).indices.tolist()
print("highest logits:", {class_names[index]: round(float(logits[index]), 1) for index in top})

# %% One map for each class
right = [explainer.find_class(text.removeprefix("a ")) for text in texts]
grids = explainer.relevance(trace, class_index=right)[0]  # [classes, rows, columns]
heatmaps = explainer.heatmaps(trace, class_index=right)[0]
peaks = {class_names[index]: round(float(grid.max()), 3) for index, grid in zip(right, grids, strict=True)}
print("largest relevance:", peaks)
for index, heatmap in zip(right, heatmaps, strict=True):
    legrad.overlay(image, heatmap).save(OUT / f"class-{index}.png")
