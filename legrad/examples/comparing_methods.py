"""LeGrad beside other methods, on the same model and the same forward pass.

python legrad/examples/comparing_methods.py [FOLDER]
"""

# %% The bundled model. A real one: MODEL = ("ViT-B-16", "laion2b_s34b_b88k"), a name and a tag of open_clip.
from PIL import Image

import legrad
from legrad.examples.demo_data import load, output_folder, scenes

MODEL = "demo"
METHODS = ("LeGrad", "raw_attention", "rollout", "gradcam", "patch_text")
OUT = output_folder("comparing_methods")
path, texts = scenes(OUT, 1)[0]
image = Image.open(path)

# %% One forward pass for LeGrad, and one for all baselines; legrad.BASELINES names them and their sources.
explainer = load(MODEL)
pixels = explainer.preprocess([image])
text_embeddings = explainer.embed_text(texts)
grids = {
    "LeGrad": explainer.relevance(pixels, text_embeddings),
    **legrad.baseline_grids(explainer, pixels, text_embeddings, methods=METHODS[1:]),
}

# %% One line for each method, one column for each text. Attention does not depend on the text.
figure = Image.new("RGB", (len(texts) * image.width, len(METHODS) * image.height))
normalisation = explainer.tower.normalisation
for row, method in enumerate(METHODS):
    heatmaps = legrad.heatmaps_of(grids[method][0].cpu(), image.height, image.width, normalisation)
    means = [round(each, 2) for each in heatmaps.mean(dim=(1, 2)).tolist()]
    print(f"{method}: mean of each text's heat map: {means}")
    for column, heatmap in enumerate(heatmaps):
        figure.paste(legrad.overlay(image, heatmap), (column * image.width, row * image.height))
figure.save(OUT / "methods.png")
