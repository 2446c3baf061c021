"""Many images, each with texts of its own: a figure, a table, and a folder that can be loaded again.

python legrad/examples/many_images.py [FOLDER]
"""

# %% The bundled model. A real one: MODEL = ("ViT-B-16", "laion2b_s34b_b88k"), a name and a tag of open_clip.
import legrad
from legrad.examples.demo_data import load, output_folder, scenes

MODEL = "demo"
OUT = output_folder("many_images")
paths, texts = zip(*scenes(OUT, 6), strict=True)

# %% Paths or PIL images, a list or a generator; one list of texts for all images, or a list for each.
explainer = load(MODEL, fit="keep")
explanations = legrad.explain_images(explainer, paths, texts, neutral="a photo of a", batch_size=4)
explanations.grid().save(OUT / "grid.png")  # what a notebook displays

# %% A table: a row for each image and text
table = explanations.to_dataframe({"otsu": legrad.MaskRule("otsu"), "half": legrad.MaskRule("fixed")})
table.to_csv(OUT / "table.csv", index=False)
print(table[["text", "similarity", "area_otsu", "area_half"]].round(3).to_string())

# %% A folder with heat maps, overlays, grids and a manifest; other masks need no model.
explanations.save(OUT / "saved", model_name=str(MODEL), overwrite=True)
loaded = legrad.Explanations.load(OUT / "saved")
print(loaded, "made with", loaded.made_by["versions"])
masks = loaded.masks(legrad.MaskRule("quantile", quantile=0.9))
print("pixels of the first image's masks:", masks[0].areas.tolist())
