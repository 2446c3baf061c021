"""Five lines from a model to its first heat map.

python legrad/examples/first_map.py [FOLDER]
"""

# %% The bundled model. A real one: MODEL = ("ViT-B-16", "laion2b_s34b_b88k"), a name and a tag of open_clip.
from PIL import Image

import legrad
from legrad.examples.demo_data import load, output_folder, scenes

MODEL = "demo"
OUT = output_folder("first_map")
path, texts = scenes(OUT, 1)[0]

# %% Five lines. `load(MODEL)` is legrad.LeGrad.from_open_clip(*MODEL). A notebook displays an explanation.
explainer = load(MODEL)
explanation = legrad.explain_image(explainer, Image.open(path), texts)
for text, similarity in zip(explanation.texts, explanation.similarities.tolist(), strict=True):
    print(f"{text}: similarity {similarity:.3f}")
explanation.side_by_side().save(OUT / "side-by-side.png")

# %% One text's heat map over the image, and where it is highest, in pixels of the model's input
explanation.overlays[0].save(OUT / "overlay.png")
row, column = divmod(int(explanation.heatmaps[0].argmax()), explanation.heatmaps.shape[-1])
print(f"{texts[0]}: highest at row {row}, column {column}")
