"""LeGrad beside other methods, on the same model and the same forward pass.

python legrad/examples/comparing_methods.py [FOLDER]
"""

# %% The bundled model. A real one: MODEL = ("ViT-B-16", "laion2b_s34b_b88k"), a name and a tag of open_clip.
import torch
from PIL import Image

import legrad
from legrad.examples.demo_data import load, output_folder, scenes
from legrad.quality.baselines import baseline_grids

MODEL = "demo"
METHODS = ("LeGrad", "CLS attention", "attention rollout", "GradCAM, last block", "patch-text similarity")
OUT = output_folder("comparing_methods")
path, texts = scenes(OUT, 1)[0]
image = Image.open(path)

# %% Attention rollout needs the trace of all blocks; LeGrad's own default are the last two.
explainer = load(MODEL, layers="all")
pixels = explainer.preprocess([image])
trace = explainer.encode(pixels)
text_embeddings = explainer.embed_text(texts)
image_index = torch.zeros(len(texts), dtype=torch.int64, device=explainer.device)
grids = {
    "LeGrad": explainer.relevance(trace, text_embeddings, image_index, per_layer=True)[-2:].sum(dim=0),
    **baseline_grids(
        explainer.tower,
        trace,
        text_embeddings,
        image_index,
        generator=torch.Generator().manual_seed(0),
        images=pixels,
    ),
}

# %% One line for each method, one column for each text. Attention does not depend on the text.
figure = Image.new("RGB", (len(texts) * image.width, len(METHODS) * image.height))
normalisation = explainer.tower.normalisation
for row, method in enumerate(METHODS):
    heatmaps = legrad.heatmaps_of(grids[method].cpu(), image.height, image.width, normalisation)
    means = [round(each, 2) for each in heatmaps.mean(dim=(1, 2)).tolist()]
    print(f"{method}: mean of each text's heat map: {means}")
    for column, heatmap in enumerate(heatmaps):
        figure.paste(legrad.overlay(image, heatmap), (column * image.width, row * image.height))
figure.save(OUT / "methods.png")
