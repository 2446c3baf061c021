"""The `explain` command: pictures of one image and several texts, in files of safe names."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from pydantic import ValidationError

import legrad
from legrad.errors import LeGradError
from pipeline import storage
from pipeline.decode import MAX_CAPTION_CHARACTERS, open_image
from pipeline.demo import assets
from pipeline.errors import SampleFailure, UserError
from pipeline.model import DEMO, load_explainer
from pipeline.records import received
from pipeline.settings import ADDRESS_PREFIXES, InputConfig, ModelConfig
from pipeline.text import printable

DEFAULT_MODEL, DEFAULT_TAG = "ViT-B-16", "laion2b_s34b_b88k"
SIDE_BY_SIDE_FILE = "side-by-side.png"
MAX_TEXTS = 100
MAX_SLUG = 40


@dataclass(frozen=True)
class ExplainedText:
    """What was written for one text.

    Attributes:
        text: what was looked for.
        similarity: cosine of image and text.
        overlay: file name of the heat map over the image.
        layers: file name of the strip of layers.
    """

    text: str
    similarity: float
    overlay: str
    layers: str


def model_named(name: str | None, tag: str | None, **settings: object) -> ModelConfig:
    """The model section that the command's options name.

    Args:
        name: an open_clip name, ``demo`` for the shipped model, or None for the default.
        tag: a hub tag or a checkpoint's path; None: the default model's own, or for names that bring their
            weights; needed for other models.
        settings: further keys of the section.

    Raises:
        UserError: a model without a tag, or a setting out of range.
    """
    if DEMO in (name, tag):
        name, tag = assets.DEMO_MODEL_NAME, DEMO
    elif name is None:
        name, tag = DEFAULT_MODEL, tag or DEFAULT_TAG
    elif name == DEFAULT_MODEL:
        tag = tag or DEFAULT_TAG
    if tag is None and not name.startswith(ADDRESS_PREFIXES):
        raise UserError(f"--pretrained: expected a tag or a checkpoint's path for --model {name}, got none")
    try:
        model = ModelConfig.model_validate({"name": name, "pretrained": tag, **settings})
    except ValidationError as error:
        problem = error.errors()[0]
        key, told = problem["loc"][0], problem["msg"].removeprefix("Value error, ")
        raise UserError(
            f"--{'model' if key == 'name' else key}: {told[0].lower()}{told[1:]}, "
            f"got {received(problem['input'])}"
        ) from None
    if model.fit == "tile":
        raise UserError("--fit: expected stretch or keep, got 'tile', which only jobs do")
    return model


def explain_file(
    image_url: str, texts: Sequence[str], model: ModelConfig, folder: str
) -> list[ExplainedText]:
    """Explain an image for several texts, and write the pictures.

    Args:
        image_url: a path or URL; only formats that a job takes are opened.
        texts: what is looked for.
        model: the model, and how it explains.
        folder: where the pictures go; made if needed.

    Returns:
        What was written, in the texts' order; and beside it SIDE_BY_SIDE_FILE.

    Raises:
        UserError: unreadable image, texts that cannot be, no such model.
        OutputError: the pictures cannot be written.
    """
    _check_texts(texts)
    image = _read_image(image_url)
    explainer = _loaded(model)
    try:
        explanation = legrad.explain_image(explainer, image, texts)
    except LeGradError as error:
        raise UserError(str(error)) from error
    written = []
    pictures = zip(explanation.overlays, explanation.layer_strips, strict=True)
    for number, (overlay, strip) in enumerate(pictures):
        stem = f"{number:02d}-{_slug(texts[number])}"
        _publish(folder, f"{stem}.png", overlay)
        _publish(folder, f"{stem}-layers.png", strip)
        similarity = float(explanation.similarities[number])
        written.append(ExplainedText(texts[number], similarity, f"{stem}.png", f"{stem}-layers.png"))
    _publish(folder, SIDE_BY_SIDE_FILE, explanation.side_by_side())
    return written


def render_explained(written: Sequence[ExplainedText], folder: str) -> str:
    """What a person reads once the pictures are there."""
    shown = storage.shown_url(folder)
    lines = [
        f"similarity {found.similarity:+.3f}  {printable(found.text)}\n"
        f"  {storage.join_url(shown, found.overlay)}\n  {storage.join_url(shown, found.layers)}"
        for found in written
    ]
    return "\n".join([*lines, f"side by side\n  {storage.join_url(shown, SIDE_BY_SIDE_FILE)}"])


def _check_texts(texts: Sequence[str]) -> None:
    if len(texts) > MAX_TEXTS:
        raise UserError(f"TEXT: expected at most {MAX_TEXTS} texts, got {len(texts)}")
    for text in texts:
        if not text.strip():
            raise UserError("TEXT: expected a text, got an empty one")
        if len(text) > MAX_CAPTION_CHARACTERS:
            raise UserError(
                f"TEXT: expected at most {MAX_CAPTION_CHARACTERS} characters, got {len(text)}: {text[:40]!r}"
            )


def _loaded(model: ModelConfig) -> legrad.LeGrad:
    try:
        return load_explainer(model, "cuda" if torch.cuda.is_available() else "cpu")
    except UserError as error:
        hint = "" if model.pretrained == DEMO else "\n  --model demo is shipped, and needs no hub"
        raise UserError(f"{error}{hint}") from error


def _read_image(url: str) -> Image.Image:
    shown = storage.shown_url(url)
    limits = {
        name: InputConfig.model_fields[name].default for name in ("max_member_bytes", "max_image_pixels")
    }
    try:
        data = storage.read_bytes(url, max_bytes=limits["max_member_bytes"])
        return open_image(data, max_image_pixels=limits["max_image_pixels"])
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {error.strerror or error}") from error
    except SampleFailure as failure:
        raise UserError(f"{shown}: {failure.message}") from failure


def _slug(text: str) -> str:
    """What of a text is safe in a file name on any system; a text without any of it is ``text``."""
    plain = unicodedata.normalize("NFKD", text[: 4 * MAX_SLUG]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:MAX_SLUG].strip("-") or "text"


def _publish(folder: str, name: str, picture: Image.Image) -> None:
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    storage.publish(folder, name, sink.getvalue())
