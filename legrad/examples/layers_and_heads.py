"""What each layer contributes, and what the library keeps of each head.

python legrad/examples/layers_and_heads.py [FOLDER]
"""

# %% The bundled model. A real one: MODEL = ("ViT-B-16", "laion2b_s34b_b88k"), a name and a tag of open_clip.
from PIL import Image

import legrad
from legrad.examples.demo_data import load, output_folder, scenes

MODEL = "demo"
OUT = output_folder("layers_and_heads")
path, texts = scenes(OUT, 1)[0]
image = Image.open(path)

# %% All blocks, one grid for each; the default explains the last two and returns their sum.
explainer = load(MODEL, layers="all")
trace = explainer.encode(explainer.preprocess([image]))
text_embeddings = explainer.embed_text(texts)
by_layer = explainer.relevance(trace, text_embeddings, per_layer=True)[:, 0]  # [layers, texts, rows, columns]
shares = by_layer.sum(dim=(-2, -1)) / by_layer.sum(dim=(0, -2, -1))
for layer, share in zip(trace.layers, shares[:, 0].tolist(), strict=True):
    print(f"{texts[0]}: block {layer.index} contributes {share:.0%}")

# %% The same as pictures: one panel for each block, and the sum
legrad.layer_strip(explainer, image, texts[0]).save(OUT / "layers.png")

# %% A choice of layers needs no second forward pass: sum their grids.
last_three = by_layer[-3:].sum(dim=0)
heatmaps = legrad.heatmaps_of(last_three, image.height, image.width, explainer.tower.normalisation)
legrad.overlay(image, heatmaps[0]).save(OUT / "last-three.png")

# %% Heads. Relevance is the mean over heads, taken within the closed form, and there is no map of one head.
# It would need the gradient of each head's attention matrix before the ReLU, which only autograd gives:
# tests/helpers/oracle.py computes relevance in that way. The trace keeps the values of each head:
values = trace.layers[-1].values  # [batch, heads, tokens, head_dim]
lengths = values[0].norm(dim=-1).mean(dim=-1)
print(
    "mean length of the values in each head of the last block:", [round(each, 2) for each in lengths.tolist()]
)
