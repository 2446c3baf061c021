"""Write a first configuration for a corpus, with comments that say what was found."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from pipeline import storage
from pipeline.config.schema import InputConfig, ModelConfig
from pipeline.corpus.contents import Contents, TextField, counted, first_middle_last, look_at_contents
from pipeline.corpus.folders import shard_pattern
from pipeline.errors import UserError
from pipeline.storage import ShardSource
from pipeline.text import printable

CLASSES_FILE = "classes.yaml"
SHOWN_UNREADABLE = 3
_PLAIN_SCALAR = re.compile(r"[A-Za-z./][\w./;+-]*(?::[\w.-]+)?")
_YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")


@dataclass(frozen=True)
class FirstConfig:
    """A configuration for a corpus.

    Attributes:
        text: the YAML file.
        samples: number of samples that were looked at.
        shards: number of shards that they are from.
        to_do: what must be done before a job can run, in one line each.
    """

    text: str
    samples: int
    shards: int
    to_do: tuple[str, ...]


def first_config(corpus: str, model: ModelConfig) -> FirstConfig:
    """Look at three shards of a corpus, and write a configuration that takes its images and captions.

    Args:
        corpus: a pattern of shards, or a local folder of tars.
        model: the model to name.

    Raises:
        UserError: there is no shard, none of those looked at can be read, or their samples hold no image
            that is read. The error says how to make shards of what is there.
    """
    pattern = shard_pattern(corpus)
    if storage.shown_url(pattern) != pattern:
        raise UserError(
            f"{storage.shown_url(corpus)}: has credentials, a signature or a query, which the file would "
            "contain; write the URLs to a list, one a line, and name it as @LIST"
        )
    shards = storage.list_shards(pattern, named="CORPUS")
    contents = look_at_contents(first_middle_last(shards), max_member_bytes=_default("max_member_bytes"))
    _check(contents, pattern)
    prompts, to_do = _prompts(contents)
    sections = [_heading(corpus), _input(pattern, shards, contents), _model(model), prompts, _output(pattern)]
    text = "\n\n".join("\n".join(lines) for lines in sections) + "\n"
    return FirstConfig(text, contents.samples, contents.shards, to_do)


def _check(contents: Contents, pattern: str) -> None:
    if not contents.samples:
        reasons = [f"\n  {url}: {message}" for url, message in contents.unreadable[:SHOWN_UNREADABLE]]
        raise UserError(f"{pattern}: none of the shards looked at has a sample{''.join(reasons)}")
    if not contents.images:
        present = counted(contents.fields.items())
        others = "; ".join(f"{name} is {kind}" for name, kind in contents.unread_images.items())
        reason = f"; {others}, which is not read" if others else ""
        raise UserError(
            f"{pattern}: no field of {contents.samples} samples is a JPEG, PNG, WebP, BMP or GIF; fields "
            f"present: {present}{reason}"
        )


def _heading(corpus: str) -> list[str]:
    command = printable(shlex.join(["legrad", "init", corpus]))
    return [
        f"# Written by `{command}`; the comments say what was found.",
        "# configs/README.md lists all keys.",
        "#",
        "#   legrad annotate THIS_FILE --dry-run       check it on the first samples",
        "#   legrad annotate THIS_FILE --limit 3       annotate three shards, and extrapolate",
        "#   legrad annotate THIS_FILE",
        "#   legrad remask OUT NEW masks.value=0.6     other masks from the stored maps, without the model",
    ]


def _input(pattern: str, shards: Sequence[ShardSource], contents: Contents) -> list[str]:
    size_bytes = sum(shard.size_bytes or 0 for shard in shards)
    images = ";".join(contents.image_fields)
    return [
        "input:",
        f"  # {len(shards):,} shard(s), {decimal(size_bytes)}; {contents.samples:,} samples of "
        f"{contents.shards} shard(s) were looked at.",
        f"  shards: {_scalar(pattern)}",
        f"  # Fields: {counted(contents.fields.items())}. Of several names, the first one that a sample has.",
        f"  image: {_scalar(images)}",
        *_caption(contents),
    ]


def _caption(contents: Contents) -> Iterator[str]:
    found = contents.caption
    if found is None:
        return
    yield f"  # In {found.samples:,} of {contents.samples:,} samples, such as {_example(found)}."
    others = [field.spec for field in contents.texts if field is not found and not field.is_class]
    if others:
        yield f"  # Other fields with texts: {', '.join(map(printable, others[:6]))}."
    yield f"  caption: {_scalar(found.spec)}"


def _model(model: ModelConfig) -> list[str]:
    return [
        "model:",
        "  # `legrad models` lists the others; `legrad models --fetch NAME TAG` downloads one.",
        f"  name: {_scalar(model.name)}",
        f"  pretrained: {'null' if model.pretrained is None else _scalar(model.pretrained)}",
    ]


def _prompts(contents: Contents) -> tuple[list[str], tuple[str, ...]]:
    """Return the section, and what must be done before a job can run."""
    caption = contents.caption
    if caption is not None:
        source = "captions" if caption.kind == "list of texts" else "caption"
        return [
            "prompts:",
            "  # caption: the whole caption is one prompt. captions: each text of a JSON list is one.",
            "  # classes: the names in prompts.classes; with prompts.mentioned_in, those mentioned there.",
            f"  source: {source}",
        ], ()
    lines = [
        "prompts:",
        "  # No field holds captions, so the prompts are classes.",
        "  source: classes",
        "  # A list of classes: - {name: dog, synonyms: [puppy]}",
        f"  classes: {CLASSES_FILE}",
    ]
    to_do = f"write {CLASSES_FILE}, a YAML list of the classes: - {{name: dog, synonyms: [puppy]}}"
    found = contents.class_field
    if found is None:
        return lines, (to_do,)
    lines += [
        f"  # The class of an image, such as {_example(found)}: a name or synonym of one in the list.",
        f"  mentioned_in: {_scalar(found.spec)}",
    ]
    if found.kind == "class number":
        to_do += (
            f"; as synonym of each, its number in {found.spec}, in quotes: - {{name: dog, synonyms: ['0']}}"
        )
    return lines, (to_do,)


def _output(pattern: str) -> list[str]:
    return [
        "output:",
        "  # A new folder; on a cluster one that all machines see, such as s3://BUCKET/FOLDER.",
        f"  dir: {_scalar(f'out/{_corpus_name(pattern)}')}",
    ]


def _corpus_name(pattern: str) -> str:
    """Return the name of the folder above the shards, in letters that are safe in a path."""
    literal = re.split(r"[*?\[{]", pattern.lstrip("@"), maxsplit=1)[0]
    folder = literal.rpartition("/")[0]
    name = folder.rpartition("/")[2] if folder else Path.cwd().name
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "corpus"


def _example(field: TextField) -> str:
    return json.dumps(field.examples[0], ensure_ascii=False)


def _scalar(text: str) -> str:
    """Return a text as a YAML scalar: plain where that is safe, else in double quotes."""
    if _PLAIN_SCALAR.fullmatch(text) and text.lower() not in _YAML_WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)


def _default(key: str) -> int:
    value: int = InputConfig.model_fields[key].default
    return value
