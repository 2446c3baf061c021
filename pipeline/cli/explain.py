"""The `explain` command: heat maps of one image for several texts or classes, in files of safe names."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.common import open_console
from pipeline.errors import SampleFailure, UserError
from pipeline.text import printable

if TYPE_CHECKING:
    from PIL import Image

    import legrad
    from pipeline.config.schema import ModelConfig

DEFAULT_MODEL, DEFAULT_TAG = "ViT-B-16", "laion2b_s34b_b88k"
SIDE_BY_SIDE_FILE = "side-by-side.png"
MAX_TEXTS = 100
MAX_SLUG = 40


@dataclass(frozen=True)
class ClassifierModel:
    """A classifier, and how it is explained.

    Attributes:
        name: `timm:NAME` or `torchvision:NAME`, see `legrad.LeGrad.from_classifier`.
        checkpoint: path of its weights, or None for those that the name stands for.
        settings: layers, fit and precision.
    """

    name: str
    checkpoint: str | None
    settings: ModelConfig


@dataclass(frozen=True)
class ExplainedText:
    """The pictures of one text.

    Attributes:
        text: what the heat maps are of.
        similarity: cosine of image and text; of a classifier, the logit of the class.
        overlay: file name of the heat map over the image.
        layers: file name of the heat maps of the layers, side by side.
    """

    text: str
    similarity: float
    overlay: str
    layers: str
    score_name: str = "similarity"


def explain(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="Path or URL of a JPEG, PNG, WebP, BMP or GIF.")
    ],
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT...",
            help="Texts to draw a heat map for, such as 'a dog'; with a classifier, names or numbers of its "
            "classes.",
        ),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of an open_clip model, hf-hub:..., local-dir:...; hf:REPOSITORY or hf:./FOLDER for a "
            "model of Hugging Face transformers; demo, the bundled model, which knows 64 things and needs no "
            "download; or a classifier, such as timm:vit_base_patch16_224.augreg_in1k or "
            "torchvision:vit_b_16. Default: ViT-B-16 with laion2b_s34b_b88k, 600 MB from the hub the first "
            "time.",
        ),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(metavar="TAG", help="Pretrained tag, or path of a checkpoint.")
    ] = None,
    layers: Annotated[
        str, typer.Option(metavar="N|all", help="Number of last transformer blocks to explain.")
    ] = "2",
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the pictures.")] = "out/explain",
    fit: Annotated[
        str,
        typer.Option(
            metavar="stretch|keep",
            help="How the image fills the model's input: stretched to its size, or in its own aspect ratio.",
        ),
    ] = "stretch",
    precision: Annotated[
        str,
        typer.Option(
            metavar="auto|fp32|bf16|fp16",
            help="Precision of the model's weights and activations; auto: bf16 on a GPU that computes it, "
            "otherwise fp32.",
        ),
    ] = "fp32",
) -> None:
    """Draw a heat map of the image for each text: over the image, layer by layer, and side by side."""
    settings = {"layers": layers, "fit": fit, "precision": precision}
    chosen: ModelConfig | ClassifierModel
    from pipeline.config.schema import CLASSIFIER_PREFIXES

    if model is not None and model.startswith(CLASSIFIER_PREFIXES):
        chosen = ClassifierModel(model, pretrained, model_named("demo", None, **settings))
    else:
        chosen = model_named(model, pretrained, **settings)
    explained = explain_file(image, texts, chosen, out)
    for line in explained_lines(explained, out):
        open_console().print(line, soft_wrap=True)


def model_named(
    name: str | None,
    tag: str | None,
    *,
    tag_option: str = "--pretrained",
    without_tag: str = "omit --pretrained",
    **settings: object,
) -> ModelConfig:
    """Return the model section of a configuration for the options of a command.

    Args:
        name: an open_clip name, ``demo`` for the bundled model, or None for the default.
        tag: a pretrained tag or a checkpoint's path; None for the default model, and for names that bring
            their own weights.
        tag_option: option that gives the tag, for messages.
        without_tag: how the command is run without a tag, for messages.
        settings: further keys of the section.

    Raises:
        UserError: the model is unknown or not supported, needs a tag and has none, or a setting is out of
            range.
    """
    from pydantic import ValidationError

    from pipeline.config.schema import ADDRESS_PREFIXES, DEMO, ModelConfig
    from pipeline.demo import assets
    from pipeline.text import received

    if tag is not None and name is not None and name.startswith(ADDRESS_PREFIXES):
        raise UserError(f"{tag_option}: {name} brings its own weights; {without_tag}")
    if DEMO in (name, tag):
        if name not in (None, DEMO, assets.DEMO_MODEL_NAME) or tag not in (None, DEMO):
            raise UserError(
                f"{tag_option}: the bundled model goes with its own weights only, got model {name} with "
                f"{tag}; {without_tag}"
            )
        name, tag = assets.DEMO_MODEL_NAME, DEMO
    elif name is None:
        name, tag = DEFAULT_MODEL, tag or DEFAULT_TAG
    elif name == DEFAULT_MODEL:
        tag = tag or DEFAULT_TAG
    if tag is None and not name.startswith(ADDRESS_PREFIXES):
        _check_architecture(name)
        raise UserError(f"--pretrained: --model {name} needs a pretrained tag, or the path of a checkpoint")
    try:
        model = ModelConfig.model_validate({"name": name, "pretrained": tag, **settings})
    except ValidationError as error:
        problem = error.errors()[0]
        key, message = problem["loc"][0], problem["msg"].removeprefix("Value error, ")
        raise UserError(
            f"--{'model' if key == 'name' else key}: {message[0].lower()}{message[1:]}, "
            f"got {received(problem['input'])}"
        ) from None
    if model.fit == "tile":
        raise UserError("--fit: expected stretch or keep, got 'tile', which is for legrad annotate only")
    _check_architecture(name)
    return model


def _check_architecture(name: str) -> None:
    from pipeline.annotate.architecture import check_architecture
    from pipeline.config.schema import ADDRESS_PREFIXES
    from pipeline.demo import assets

    if not name.startswith(ADDRESS_PREFIXES) and name != assets.DEMO_MODEL_NAME:
        check_architecture(name, "--model")


def explain_file(
    image_url: str, texts: Sequence[str], model: ModelConfig | ClassifierModel, folder: str
) -> list[ExplainedText]:
    """Explain an image for several texts, and write the pictures.

    Args:
        image_url: a path or URL; the formats are those that a job takes.
        texts: at most MAX_TEXTS; for a classifier, names or numbers of its classes.
        model: the model, and how it explains.
        folder: for the pictures; made if needed.

    Returns:
        The pictures of each text, in the order of the texts; SIDE_BY_SIDE_FILE holds all of them.

    Raises:
        UserError: the image cannot be read, a text is empty or too long, or there is no such model or class.
        OutputError: the pictures cannot be written.
    """
    # everything that needs no model comes before the imports of one, which take seconds
    _check_texts(texts)
    _check_folder(folder)
    content = _read_content(image_url)

    import legrad
    from legrad.errors import LeGradError

    image = _opened(content, image_url)
    explainer = _load(model)
    try:
        explanation = legrad.explain_image(explainer, image, texts, resize=_input_default("resize"))
    except LeGradError as error:
        raise UserError(str(error)) from error
    explained = []
    pictures = zip(
        explanation.texts,
        explanation.similarities.tolist(),
        explanation.overlays,
        explanation.layer_strips,
        strict=True,
    )
    for number, (text, similarity, overlay, strip) in enumerate(pictures):
        stem = f"{number:02d}-{slug(text)}"
        _publish(folder, f"{stem}.png", overlay)
        _publish(folder, f"{stem}-layers.png", strip)
        explained.append(
            ExplainedText(text, similarity, f"{stem}.png", f"{stem}-layers.png", explanation.score_name)
        )
    _publish(folder, SIDE_BY_SIDE_FILE, explanation.side_by_side())
    return explained


def explained_lines(explained: Sequence[ExplainedText], folder: str) -> list[str]:
    """Return what is printed once the pictures are written."""
    from pipeline import storage

    shown = storage.shown_url(folder)
    lines = [
        f"{found.score_name} {found.similarity:+.3f}  {printable(found.text)}\n"
        f"  {storage.join_url(shown, found.overlay)}\n  {storage.join_url(shown, found.layers)}"
        for found in explained
    ]
    return [*lines, f"side by side\n  {storage.join_url(shown, SIDE_BY_SIDE_FILE)}"]


def _check_texts(texts: Sequence[str]) -> None:
    from pipeline.shards.captions import MAX_CAPTION_CHARACTERS

    if len(texts) > MAX_TEXTS:
        raise UserError(f"TEXT: {len(texts)} texts; the limit is {MAX_TEXTS}")
    for text in texts:
        if not text.strip():
            raise UserError("TEXT: one of the texts is empty")
        if len(text) > MAX_CAPTION_CHARACTERS:
            raise UserError(
                f"TEXT: {text[:40]!r}... has {len(text)} characters; the limit is {MAX_CAPTION_CHARACTERS}"
            )


def _check_folder(folder: str) -> None:
    from pipeline.run.destination import destination_problem

    for problem in destination_problem(folder):
        raise UserError(problem.replace("output.dir", "--out", 1))


def _load(model: ModelConfig | ClassifierModel) -> legrad.LeGrad:
    if isinstance(model, ClassifierModel):
        return _load_classifier(model)
    import torch

    from pipeline.annotate.model import load_explainer
    from pipeline.config.schema import DEMO

    try:
        return load_explainer(model, "cuda" if torch.cuda.is_available() else "cpu")
    except UserError as error:
        hint = "" if model.pretrained == DEMO else "\n  Offline, use the bundled model: --model demo"
        raise UserError(f"{error}{hint}") from error


def _load_classifier(model: ClassifierModel) -> legrad.LeGrad:
    import legrad
    from legrad.errors import LeGradError

    settings = model.settings
    try:
        return legrad.LeGrad.from_classifier(
            model.name,
            model.checkpoint,
            layers=settings.layers,
            fit="keep" if settings.fit == "keep" else "stretch",
            precision=settings.precision,
        )
    except (LeGradError, OSError) as error:
        raise UserError(f"--model {model.name}: {error}") from error


def _read_content(url: str) -> bytes:
    """Return the bytes of an image; raises UserError for what cannot be read, or is of another kind."""
    from pipeline import storage
    from pipeline.shards.file_kinds import kind_of

    shown = storage.shown_url(url)
    try:
        content = storage.read_bytes(url, max_bytes=_input_default("max_member_bytes"))
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {error.strerror or error}") from error
    kind = kind_of(content)
    if kind is not None and not kind.is_read:
        raise UserError(f"{shown}: expected a JPEG, PNG, WebP, BMP or GIF, got {kind.name}")
    return content


def _opened(content: bytes, url: str) -> Image.Image:
    from pipeline import storage
    from pipeline.shards.images import open_image

    try:
        return open_image(content, max_image_pixels=_input_default("max_image_pixels"))
    except SampleFailure as failure:
        raise UserError(f"{storage.shown_url(url)}: {failure.message}") from failure


def _input_default(key: str) -> Any:
    """Return the value of a key of the section `input` in a job that does not set it."""
    from pipeline.config.schema import InputConfig

    return InputConfig.model_fields[key].default


def slug(text: str) -> str:
    """Reduce a text to what is safe in a file name on any system; where nothing is left, to ``text``."""
    plain = unicodedata.normalize("NFKD", text[: 4 * MAX_SLUG]).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:MAX_SLUG].strip("-") or "text"


def _publish(folder: str, name: str, picture: Image.Image) -> None:
    from pipeline import storage

    sink = io.BytesIO()
    picture.save(sink, "PNG")
    storage.publish(folder, name, sink.getvalue())
