"""A text followed through the frames of a video: a loop over frames, in bounded memory.

python legrad/examples/video_frames.py [FOLDER]
"""

# %% The bundled model. A real one: MODEL = ("ViT-B-16", "laion2b_s34b_b88k"), a name and a tag of open_clip.
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

import legrad
from legrad.examples.demo_data import load, output_folder, scenes

MODEL = "demo"
FRAMES = 12
OUT = output_folder("video_frames")
path, texts = scenes(OUT, 1)[0]


# %% Frames, one at a time. Here a camera moves over a picture. A folder of frames is a list of paths:
# sorted(Path("frames").glob("*.jpg")); a video file yields frames through OpenCV (cv2.VideoCapture) or PyAV:
# (Image.fromarray(frame[..., ::-1]) for frame in ...).
def frames(picture: Path) -> Iterator[Image.Image]:
    """Yield windows that move over a picture from left to right."""
    image = Image.open(picture).convert("RGB")
    side = min(image.size) * 3 // 4
    for number in range(FRAMES):
        left = (image.width - side) * number // (FRAMES - 1)
        top = (image.height - side) // 2
        yield image.crop((left, top, left + side, top + side))


# %% Only grids and reduced pictures of the frames are kept.
explainer = load(MODEL)
explanations = legrad.explain_images(explainer, frames(path), texts[:1], batch_size=4)

# %% When is it seen, and where? One colour scale for all frames, so that frames can be compared.
highest = max(float(grids.max()) for grids in explanations.grids)
overlays = [
    legrad.overlay(image.picture, image.grids[0] / max(highest, 1e-12)) for image in explanations.images
]
for number, similarities in enumerate(explanations.similarities):
    print(f"frame {number}: similarity with {texts[0]!r} {float(similarities[0]):.3f}")
overlays[0].save(OUT / "frames.gif", save_all=True, append_images=overlays[1:], duration=120, loop=0)
explanations.to_dataframe().to_csv(OUT / "frames.csv", index=False)
