"""A notebook's mistakes are refused in a sentence that names the way out; what is meant is taken."""

import json
import subprocess
import sys

import pytest

from tests.helpers.processes import REPOSITORY

pytestmark = pytest.mark.medium  # starts a process

MISTAKES = {
    # models and options
    "LeGrad('ViT-B-16')": (
        "model: expected a torch module, received 'ViT-B-16' (str); pass legrad.LeGrad.from_open_"
    ),
    "LeGrad((model, None, None))": (
        "model: expected a torch module, received a tuple of 3 (CLIP, ...); pass the model"
    ),
    "LeGrad(model, tokenizer='ViT-B-16')": "tokenizer: expected a callable, received 'ViT-B-16' (str)",
    "LeGrad(model, image_size='32')": (
        "image_size: expected (height, width) or one number for both, in whole pixels, received '32'"
    ),
    "LeGrad(model, image_size=32.0)": (
        "image_size: expected (height, width) or one number for both, in whole pixels"
    ),
    "LeGrad(model, image_size=(16, 16, 3))": "image_size: expected (height, width) or one number for both",
    "LeGrad(model, image_size=0)": "image_size: expected at least 1 x 1 pixels, received 0 x 0",
    "LeGrad(model, image_size=True)": "image_size: expected (height, width) or one number for both",
    "LeGrad(model, layers=-1)": (
        "layers: expected 'all' or a number from 1 to 3, received -1; layers=[-1] names block 2"
    ),
    "LeGrad(model, layers=[])": "layers: expected the index of at least one of 3 blocks, received ()",
    "LeGrad(model, layers=[0, 3])": (
        "layers: expected indices from 0 to 2, or from -3 (the first block) to -1"
    ),
    "LeGrad(model, layers=[2, -1])": "layers: expected different blocks, received block 2 twice in [2, -1]",
    "LeGrad(model, layers=[True])": "layers: expected indices from 0 to 2",
    "LeGrad(model, layers=[1.0])": "layers: expected indices from 0 to 2",
    "LeGrad(model, layers=['last'])": "layers: expected indices from 0 to 2",
    "LeGrad(model, layers=2.0)": "layers: expected 'all' or a number from 1 to 3, received 2.0",
    "LeGrad(model, layers=None)": "layers: expected 'all' or a number from 1 to 3, received None",
    "LeGrad(model, layers=[0, 1], layer_weights=[1])": (
        "layer_weights: expected 2 finite numbers of at least 0, one for each layer, received 1: [1.0]"
    ),
    "LeGrad(model, layer_weights=[1, -1])": "layer_weights: expected 2 finite numbers of at least 0",
    "LeGrad(model, layer_weights=[0, 0])": (
        "layer_weights: expected 2 finite numbers of at least 0, one for each layer, not all of them 0"
    ),
    "LeGrad(model, layer_weights=[float('nan'), 1])": "layer_weights: expected 2 finite numbers",
    "LeGrad(model, layer_weights=0.5)": "layer_weights: expected 2 finite numbers",
    # texts
    "explainer.embed_text('a cat')": (
        "texts: expected a list of texts, received the text 'a cat'; pass ['a cat']"
    ),
    "explainer.embed_text(['a cat', None])": "texts[1]: expected a text (str), received None",
    "explainer.embed_text(pd.Series(['a cat', None]))": "texts[1]: expected a text (str), received ",
    "explainer.embed_text(['a cat', float('nan')])": "texts[1]: expected a text (str), received nan",
    "explainer.embed_text([b'a cat'])": "texts[0]: expected a text (str), received bytes; decode them first",
    "explainer.embed_text([7])": "texts[0]: expected a text (str), received 7 (int)",
    "explainer.embed_text(np.array([['a', 'b']]))": "texts[0]: expected a text (str), received a ndarray [2]",
    "explainer.embed_text(['a \\ud800'])": (
        "texts[0]: expected Unicode text, received the surrogate '\\ud800' at character 2"
    ),
    "explainer.embed_text({'a cat', 'a dog'})": "texts: expected a list of texts, received a set",
    "explainer.embed_text({'a cat': 1})": "texts: expected a list of texts, received a dict",
    "explainer.embed_text(pd.DataFrame({'caption': ['a cat']}))": (
        "texts: expected texts, received a DataFrame; pass one column"
    ),
    "explainer.embed_text(None)": "texts: expected a list of texts, received None",
    "explainer.embed_text(texts)": "texts[0]: expected a text (str), received a Tensor [24]",
    # images
    "explainer.preprocess(image)": "images: expected a list of images, received one image; pass [image]",
    "explainer.preprocess('cat.jpg')": "images: expected a list of images, received one image; pass [image]",
    "explainer.preprocess(np.asarray(image))": (
        "images: expected a list of images, received one image; pass [image]"
    ),
    "explainer.preprocess(images)": "images: expected a list of images, received a tensor [2, 3, 12, 20]",
    "explainer.preprocess([images[0]])": (
        "images[0]: expected a PIL image, a path, or a uint8 array [height, width, 3], received a tensor "
        "[3, 12, 20] of torch.float32; pass preprocessed tensors to `encode`"
    ),
    "explainer.preprocess([image, None])": "images[1]: expected a PIL image, a path",
    "explainer.preprocess(['/nowhere/cat.jpg'])": (
        "images[0]: cannot read /nowhere/cat.jpg (No such file or directory)"
    ),
    "explainer.preprocess(['https://a.org/cat.jpg'])": "images[0]: cannot read https:/a.org/cat.jpg",
    "explainer.preprocess(['cat\\0.jpg'])": "images[0]: cannot read cat",
    "explainer.preprocess(['/dev/zero'])": "images[0]: /dev/zero is no regular file",
    "explainer.preprocess([text_file])": "images[0]: ",
    "explainer.preprocess([cut_file])": "images[0]: ",
    "explainer.preprocess([closed])": "images[0]: the image cannot be decoded (",
    "explainer.preprocess([np.zeros((3, 20, 30), np.uint8)])": (
        "images[0]: expected [height, width, channels], received [3, 20, 30]; pass array.transpose(1, 2, 0)"
    ),
    "explainer.preprocess([np.zeros((20, 30, 3), np.float32)])": (
        "images[0]: expected an array of uint8 (0 to 255; grey also uint16), received float32 from 0 to "
        "0; pass (255 * array).round().astype(numpy.uint8)"
    ),
    "explainer.preprocess([np.zeros((20, 30, 3), np.int64)])": "images[0]: expected an array of uint8",
    "explainer.preprocess([np.zeros((0, 30, 3), np.uint8)])": "images[0]: expected pixels [height, width] or",
    "explainer.preprocess([Image.new('RGB', (0, 0))])": (
        "images[0]: expected pixels, received an image of 0 x 0"
    ),
    "explainer.preprocess([Image.new('LAB', (9, 9))])": (
        "images[0]: image mode LAB has no defined conversion to RGB"
    ),
    "explainer.preprocess([Image.new('I', (9, 9), -5)])": (
        "images[0]: image of mode I has values from -5 to -5; expected 0 to 255 (8 bits) or 0 to 65535 "
        "(16 bits)"
    ),
    "explainer.preprocess([Image.new('F', (9, 9), float('nan'))])": (
        "images[0]: image of mode F has NaN or infinite pixels"
    ),
    "explainer.preprocess([image], resize='cheap')": "resize: expected 'exact' or 'fast', received 'cheap'",
    "explainer.encode([image])": (
        "images: expected a tensor [batch, 3, height, width] or a trace, received a list of 1"
    ),
    "explainer.encode(images.numpy())": "images: expected a tensor [batch, 3, height, width] or a trace",
    "explainer.encode(with_nan)": "images[1]: expected finite pixels, received 2 that are NaN or infinite",
    "explainer.heatmaps(with_nan, texts)": "images[1]: expected finite pixels",
    "legrad.explain_image(explainer, [image], ['a cat'])": "image: expected a PIL image, a path",
    "legrad.explain_image(model, image, ['a cat'])": "explainer: expected a LeGrad, received CLIP",
    "legrad.explain_image(explainer, image, [])": (
        "texts: expected a list of at least one text, received none"
    ),
    # embeddings and indices
    "explainer.relevance(images, ['a cat'])": (
        "text_embeddings: expected [batch, prompts, 24] or [prompts, 24], received a list of 1 (str, "
        "...); pass explainer.embed_text(texts)"
    ),
    "explainer.relevance(images, texts.numpy())": (
        "text_embeddings: expected [batch, prompts, 24] or [prompts, 24], received a ndarray [3, 24]; "
        "pass torch.from_numpy(array)"
    ),
    "explainer.similarity(trace, None)": (
        "text_embeddings: expected [batch, prompts, 24] or [prompts, 24], received"
    ),
    "explainer.heatmaps(trace, texts[:, :7])": (
        "text_embeddings: expected [batch, prompts, 24] or [prompts, 24]"
    ),
    "explainer.relevance(trace, torch.cat([texts, texts * 0]))": (
        "text_embeddings: expected rows of finite length above zero, received others: row 3 and 2 more"
    ),
    "explainer.relevance(trace, texts, 0)": (
        "image_index: expected a list of rows of images, one for each prompt"
    ),
    "explainer.relevance(trace, texts, [0, 1])": (
        "image_index: expected text_embeddings [prompts, embed_dim] and image_index [prompts], received "
        "[3, 24] and [2]"
    ),
    "explainer.relevance(trace, texts, [0, 1, 9])": "image_index: expected rows from 0 to 1, received 0 to 9",
    "explainer.relevance(trace, texts, ['a', 'b', 'c'])": "image_index: expected whole numbers, received",
    "explainer.relevance(trace, texts, [0, 0.5, 1])": "image_index: expected whole numbers, received",
    "explainer.relevance(trace, texts, [[0], [0, 1], []])": "image_index: expected whole numbers, received",
    "explainer.heatmaps(trace, texts, neutral_embedding=texts)": (
        "neutral_embedding: expected one embedding [24] or [1, 24], received [3, 24]"
    ),
    "explainer.heatmaps(trace, texts, neutral_embedding='a photo of a')": (
        "neutral_embedding: expected one embedding [24] or [1, 24], received 'a photo of a' (str); pass "
        "explainer.embed_text(texts)"
    ),
    "explainer.heatmaps(trace, texts, neutral_threshold='0.5')": (
        "neutral_threshold: expected a value from 0 to 1, received '0.5'"
    ),
    "explainer.heatmaps(trace, texts, neutral_threshold=float('nan'))": (
        "neutral_threshold: expected a value from 0"
    ),
    "explainer.heatmaps(trace, texts, neutral_threshold=None)": (
        "neutral_threshold: expected a value from 0 to 1"
    ),
    "explainer.heatmaps(trace, texts, output_size='big')": (
        "output_size: expected (height, width) or one number for both, in whole pixels, received 'big'"
    ),
    "explainer.heatmaps(trace, texts, output_size=(0, 5))": (
        "output_size: expected at least 1 x 1 pixels, received 0 x 5"
    ),
    "explainer.heatmaps(trace, texts, output_size=[(5, 5)])": (
        "output_size: expected one (height, width), or one for each of 2 images, received 1"
    ),
    "explainer.heatmaps(trace, texts, output_size=[(5, 5), (5, 5.5)])": (
        "output_size[1]: expected (height, width)"
    ),
    "explainer.heatmaps(trace, texts, memory_budget_bytes='1GB')": (
        "memory_budget_bytes: expected a positive whole number of bytes, received '1GB'"
    ),
    "explainer.relevance(trace, texts, memory_budget_bytes=0)": (
        "memory_budget_bytes: expected a positive whole number"
    ),
    "explainer.relevance(trace)": "expected text_embeddings, received neither texts nor classes",
    "explainer.relevance(trace, class_index=0)": "class_index: this model (clip) compares images with texts",
    # classifiers
    "classifier.relevance(pixels)": "expected class_index=..., as this model is a classifier",
    "classifier.relevance(pixels, texts)": "text_embeddings: this model (timm-classifier) is a classifier",
    "classifier.relevance(pixels, class_index=-1)": "class_index: expected whole numbers from 0 to 6, as the",
    "classifier.relevance(pixels, class_index='a cat')": "class_index: expected whole numbers, one class",
    "classifier.relevance(pixels, class_index=True)": "class_index: expected whole numbers from 0 to 6",
    "classifier.find_class(-1)": "class -1: expected a name, or an index from 0 to 6, received -1 (int)",
    "classifier.find_class(None)": "class None: expected a name, or an index from 0 to 6, received None",
    "LeGrad(vit, class_names=3)": (
        "class_names: expected a list of 7 names, one for each class, received 3 (int)"
    ),
    "LeGrad(vit, processor=object())": "processor: expected None, as only models of transformers have one",
    "LeGrad(model, processor=object())": "processor: expected None, as only models of transformers have one",
    "legrad.explain_image(classifier, image, [-1])": "class '-1': the names of this model's classes",
    "legrad.explain_image(classifier, image, [True])": "texts[0]: expected a text (str)",
    "legrad.explain_images(classifier, [image], [99])": "class 99: the model has 7 classes, from 0 to 6",
    "legrad.explain_images(classifier, [image], ['1'], 'a photo of a')": (
        "neutral: this model (timm-classifier) is a classifier and has no text tower"
    ),
    "legrad.view_relevance(classifier, [image], texts, views=legrad.Views())": (
        "text_embeddings: this model (timm-classifier) is a classifier"
    ),
    "LeGrad.from_classifier(3)": "name: expected the name of a model, received 3 (int)",
    "LeGrad.from_hugging_face(3)": "name: expected the name of a model, received 3 (int)",
    "LeGrad.from_open_clip(None)": "name: expected the name of a model, received None",
    # many images
    "legrad.explain_images(model, [image], ['a cat'])": "explainer: expected a LeGrad, received CLIP",
    "legrad.explain_images(explainer, [image], 'a cat')": "texts: expected a list of texts",
    "legrad.explain_images(explainer, [image], None)": "texts: expected a list of texts, received None",
    "legrad.explain_images(explainer, [image], [7])": "texts[0]: expected a text (str), received 7 (int)",
    "legrad.explain_images(explainer, [image], [['a cat'], []])": (
        "texts[1]: expected a list of at least one text, received none"
    ),
    "legrad.explain_images(explainer, [image], [['a cat'], 'a'])": "texts[1]: expected a list",
    "legrad.explain_images(explainer, None, ['a cat'])": "images: expected a list of images, received None",
    "legrad.explain_images(explainer, images, ['a cat'])": "images: expected a list",
    "legrad.explain_images(explainer, {'a': image}, ['a cat'])": "images: expected a list of images",
    "legrad.explain_images(explainer, [image], ['a cat'], neutral_threshold='x')": (
        "neutral_threshold: expected a value from 0 to 1, received 'x'"
    ),
    "explained.save(3)": "folder: expected a path, received 3 (int)",
    "legrad.Explanations.load(None)": "folder: expected a path, received None",
    "explained.masks(0.4)": "rule: expected the name of a rule or a legrad.MaskRule, received 0.4 (float)",
    "explained.to_dataframe(3)": "rules: expected a list of names, received 3",
    "explained.grid(panel_side='big')": "grid: expected whole panel_side",
    "explained.overlays(9)": "position: expected 0 to 0, received 9",
    # metrics and views
    "legrad.view_relevance(explainer, [image], texts, views=3)": (
        "views: expected legrad.Views(...), received 3 (int)"
    ),
    "legrad.baseline(explainer, images, 'rollout')": "method: expected one of gradcam",
    "legrad.insertion_deletion(explainer, images, grids.numpy(), texts)": (
        "relevance_grids: expected a tensor, received a ndarray [2, 3, 3, 5]; pass torch.as_tensor"
    ),
    "legrad.insertion_deletion(explainer, images, grids, texts, class_embeddings=texts, right_class=[0])": (
        "right_class: expected whole numbers [2, 3], received torch.int64 [1]"
    ),
    "legrad.insertion_deletion(explainer, images, grids, texts, class_embeddings=texts, right_class=['a'])": (
        "right_class: expected whole numbers, received ['a']"
    ),
    "legrad.insertion_deletion(explainer, images, grids, texts, class_embeddings=[1], right_class=[0])": (
        "class_embeddings: expected a tensor, received a list of 1"
    ),
    "legrad.map_localisation(torch.eye(3), None)": "heatmap, truth, valid: expected tensors or arrays",
    "legrad.localisation_scores(3)": "maps: expected a list of measurements, received 3",
    "legrad.localisation_scores([3])": "maps[0]: expected what map_localisation returns, received 3",
    # traces
    "LeGrad(model, layers=[0]).relevance(trace, texts)": (
        "trace: expected block 0, received blocks 1, 2; encode the images with this explainer"
    ),
    "explainer.relevance(trace.to('meta'), texts)": (
        "trace: expected device cpu, as the model, received meta; pass trace.to"
    ),
    "LeGrad(copy.deepcopy(model).double()).relevance(copy.deepcopy(trace), texts)": (
        "trace: expected torch.float64, as the model's weights, received torch.float32; encode the "
        "images again"
    ),
    "LeGrad(copy.deepcopy(model)).relevance(trace, texts)": "trace: made by another model",
    "explainer.relevance('trace.pt', texts)": (
        "images: expected a tensor [batch, 3, height, width] or a trace, received"
    ),
    # pictures
    "legrad.overlay(image, torch.rand(2, 3, 5))": (
        "heatmap: expected one map [height, width], received [2, 3, 5]; pass one of them, such as heatmaps[0]"
    ),
    "legrad.overlay(image, torch.rand(5))": "heatmap: expected one map [height, width], received [5]",
    "legrad.overlay(image, torch.full((3, 5), float('nan')))": (
        "heatmap: expected values from 0 to 1, received NaN"
    ),
    "legrad.overlay(image, [[0.5]])": (
        "heatmap: expected a tensor or an array [height, width], received [[0.5]] (list)"
    ),
    "legrad.overlay(image, np.array([['a']]))": "heatmap: expected numbers, received <U1",
    "legrad.overlay(images[0], torch.rand(3, 5))": "image: expected a PIL image, a path, or a uint8 array",
}

# Each pair of calls has the same result.
MEANT = {
    "explainer.embed_text(pd.Series(['a cat', 'a dog'], index=[7, 9]))": (
        "explainer.embed_text(['a cat', 'a dog'])"
    ),
    "explainer.embed_text(np.array(['a cat', 'a dog']))": "explainer.embed_text(['a cat', 'a dog'])",
    "explainer.embed_text(text for text in ('a cat', 'a dog'))": "explainer.embed_text(['a cat', 'a dog'])",
    "explainer.embed_text(('a cat', 'a dog'))": "explainer.embed_text(['a cat', 'a dog'])",
    "explainer.preprocess((image, image))": "explainer.preprocess([image, image])",
    "explainer.preprocess(each for each in [image])": "explainer.preprocess([image])",
    "explainer.preprocess([np.asarray(image)])": "explainer.preprocess([image])",
    "explainer.preprocess(np.asarray(image)[None])": "explainer.preprocess([image])",
    "explainer.preprocess([np.asarray(image)[..., 0]])": "explainer.preprocess([image.getchannel(0)])",
    "explainer.preprocess([np.asarray(image)[..., :1]])": "explainer.preprocess([image.getchannel(0)])",
    "explainer.preprocess(pd.Series([str(png_file)]))": "explainer.preprocess([image])",
    "explainer.preprocess([png_file])": "explainer.preprocess([image])",
    "explainer.preprocess([turned_file])": "explainer.preprocess([Image.open(turned_file).rotate(180)])",
    "explainer.relevance(trace, texts, [1, 0, 1])": (
        "explainer.relevance(trace, texts, torch.tensor([1, 0, 1]))"
    ),
    "explainer.relevance(trace, texts, np.array([1, 0, 1]))": "explainer.relevance(trace, texts, [1, 0, 1])",
    "explainer.similarity(trace, texts, pd.Series([1, 0, 1]))": (
        "explainer.similarity(trace, texts, [1, 0, 1])"
    ),
    "explainer.similarity(images, texts)": "explainer.similarity(trace, texts)",
    "explainer.relevance(trace, texts.double())": "explainer.relevance(trace, texts)",
    "explainer.relevance(trace, texts.half())": "explainer.relevance(trace, texts.half().float())",
    "LeGrad(model, image_size=[12, 20]).relevance(images, texts)": "explainer.relevance(images, texts)",
    "LeGrad(model, image_size=np.int64(16)).preprocess([image])": (
        "LeGrad(model, image_size=16).preprocess([image])"
    ),
    "LeGrad(model, layers=np.array([1, 2])).relevance(images, texts)": "explainer.relevance(images, texts)",
    "LeGrad(model, layers=(each for each in [1, 2])).relevance(images, texts)": (
        "explainer.relevance(images, texts)"
    ),
    "torch.from_numpy(np.array(legrad.overlay(png_file, np.eye(3)[None])))": (
        "torch.from_numpy(np.array(legrad.overlay(image, torch.eye(3))))"
    ),
    "legrad.explain_image(classifier, image, [1, 2]).heatmaps": (
        "legrad.explain_image(classifier, image, ['1', '2']).heatmaps"
    ),
    "legrad.explain_images(classifier, [image], np.array([1, 2])).maps[0]": (
        "legrad.explain_images(classifier, [image], ['1', '2']).maps[0]"
    ),
    "legrad.explain_images(classifier, [image], torch.tensor([1, 2])).maps[0]": (
        "legrad.explain_images(classifier, [image], [['1', '2']]).maps[0]"
    ),
    "legrad.explain_image(explainer, png_file, pd.Series(['a cat'])).heatmaps": (
        "legrad.explain_image(explainer, image, ['a cat']).heatmaps"
    ),
}

PROGRAM = """
import copy, json, sys, tempfile
from pathlib import Path
import numpy as np, pandas as pd, torch
from PIL import Image
import legrad
from legrad import LeGrad
from tests.helpers.classifiers import tiny_timm_classifier
from tests.helpers.tiny_models import *

class Tokenizer:
    def __call__(self, texts):
        return torch.tensor([[ord(text[2]) % 60 + 1] * 16 for text in texts])

folder = Path(tempfile.mkdtemp())
model, images, texts = tiny_clip(), tiny_images(2), unit_texts(3)
explainer = LeGrad(model, tokenizer=Tokenizer())
trace = explainer.encode(images)
grids = explainer.relevance(trace, texts)
vit = tiny_timm_classifier("vit_base_patch16_224")
classifier, pixels = LeGrad(vit), tiny_images(2)
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
png_file, text_file, cut_file = folder / "a.png", folder / "a.txt", folder / "cut.png"
turned_file = folder / "turned.png"
image.save(png_file)
exif = Image.Exif()
exif[0x0112] = 3
image.save(turned_file, exif=exif)
text_file.write_text("no image")
cut_file.write_bytes(png_file.read_bytes()[:500])
with Image.open(png_file) as closed:
    pass
explained = legrad.explain_images(explainer, [image], ["a cat"])
with_nan = images.clone()
with_nan[1, 0, 0, :2] = float("nan")
calls, pairs = json.load(sys.stdin)
said = {}
for call in calls:
    try:
        eval(call)
    except Exception as error:
        said[call] = [type(error).__name__, str(error)]
alike = {}
for call, meant in pairs.items():
    try:
        alike[call] = torch.equal(eval(call), eval(meant))
    except Exception as error:
        alike[call] = f"{type(error).__name__}: {error}"
print(json.dumps([said, alike]))
"""


@pytest.fixture(scope="module")
def answers() -> list[dict[str, list[str]]]:
    """What each call says, in one run where types and shapes are not checked, as for users."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        input=json.dumps([list(MISTAKES), MEANT]),
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.parametrize("call", MISTAKES)
def test_a_mistake_is_named_with_the_way_out(call, answers):
    kind, message = answers[0].get(call, ["nothing", "was refused"])
    assert message.startswith(MISTAKES[call])
    assert kind in ("InputError", "ImageFileError")
    assert len(message) < 300


@pytest.mark.parametrize("call", MEANT)
def test_what_can_mean_one_thing_only_is_taken(call, answers):
    assert answers[1][call] is True
