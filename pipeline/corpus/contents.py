"""Find out which fields of a few samples hold images, captions or class numbers, by their content."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from pipeline import storage
from pipeline.config.schema import InputConfig
from pipeline.corpus.first_items import BoundedStream, first_items
from pipeline.errors import PipelineError
from pipeline.shards.captions import MAX_CAPTION_CHARACTERS, MAX_JSON_BYTES
from pipeline.shards.file_kinds import kind_of
from pipeline.shards.samples import RawSample
from pipeline.storage import ShardSource
from pipeline.storage.pipes import is_command
from pipeline.text import printable

SAMPLES_PER_SHARD = 16
# of an untrusted JSON object
MAX_KEYS = 64
EXAMPLE_CHARACTERS = 60

# by preference, where several fields hold texts
_CAPTION_NAMES = (
    *("caption", "captions", "txt", "text", "texts", "alt", "alt_text", "description", "title"),
    *("prompt", "sentences", "sentence"),
)
_CLASS_NAMES = ("cls", "class", "label", "labels", "category", "target")
# what says where an image is or comes from, and never what it shows
_NAMES_OF_OTHER_TEXTS = (
    *(
        "file_name",
        "filename",
        "file",
        "path",
        "filepath",
        "image",
        "image_path",
        "img_path",
        "key",
        "__key__",
    ),
    *("id", "image_id", "uid", "url", "source", "license", "status", "md5", "sha256", "phash", "mime"),
)
_FILE_NAME = re.compile(r".*\.(?:jpe?g|png|webp|bmp|gif|tiff?|heic|avif)", re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|www\.|/")
_DIGEST = re.compile(r"[0-9a-fA-F-]{16,}")

ValueKind = Literal["text", "list of texts", "class number"]


@dataclass(frozen=True)
class TextField:
    """A field, or a key of a JSON field, that may say what an image shows.

    Attributes:
        spec: its name as the configuration takes it: `txt`, or `json:NAME`.
        kind: what it holds in most samples.
        samples: number of samples that have it.
        examples: some of its texts, in one line each; at least one.
        is_varied: whether two samples differ in it.
    """

    spec: str
    kind: ValueKind
    samples: int
    examples: tuple[str, ...]
    is_varied: bool

    @property
    def name(self) -> str:
        """The last part of its name."""
        return re.split(r"[.:]", self.spec)[-1].lower()

    @property
    def is_class(self) -> bool:
        """Whether it names or numbers the class of the image, by the customs of classification datasets."""
        return self.kind == "class number" or self.name in _CLASS_NAMES


@dataclass(frozen=True)
class Contents:
    """What the fields of a few samples hold.

    Attributes:
        shards: number of shards that were read.
        samples: number of samples that were looked at.
        fields: number of samples with each field, the most frequent first.
        images: number of samples in which a field is an image of a format that is read, by field.
        unread_images: name of the format, for fields that hold images of other formats.
        texts: fields that hold texts or class numbers, the most likely caption first.
        unreadable: canonical URL and error of each shard that could not be read.
    """

    shards: int
    samples: int
    fields: dict[str, int]
    images: dict[str, int]
    unread_images: dict[str, str]
    texts: tuple[TextField, ...]
    unreadable: tuple[tuple[str, str], ...] = ()

    @property
    def image_fields(self) -> list[str]:
        """The fields with images by preference, no more than the samples looked at need."""
        usual = InputConfig.model_fields["image"].default.split(";")
        ranked = sorted(self.images, key=lambda name: (-self.images[name], name not in usual, name))
        needed: list[str] = []
        for name in ranked:
            if sum(self.images[taken] for taken in needed) >= self.samples:
                break
            needed.append(name)
        return needed

    @property
    def caption(self) -> TextField | None:
        """The field that is most likely the caption; None where no field holds texts."""
        return next((found for found in self.texts if not found.is_class), None)

    @property
    def class_field(self) -> TextField | None:
        """The field that is most likely the class of the image; None where there is none."""
        return next((found for found in self.texts if found.is_class), None)


@dataclass(frozen=True)
class _Value:
    spec: str
    kind: ValueKind
    text: str


def look_at_contents(
    shards: Sequence[ShardSource], *, max_member_bytes: int, samples_per_shard: int = SAMPLES_PER_SHARD
) -> Contents:
    """Read all fields of the first samples of shards, and find out what they hold.

    Args:
        shards: the shards.
        max_member_bytes: a sample with a larger member is skipped.
        samples_per_shard: number of samples that are looked at in each shard.
    """
    census = _Census()
    unreadable: list[tuple[str, str]] = []
    shards_read = 0
    for shard in shards:
        samples_before = census.samples
        try:
            with storage.open_shard(shard) as stream:
                items = first_items(
                    BoundedStream(stream), max_member_bytes=max_member_bytes, most=samples_per_shard
                )
                for item in items:
                    if isinstance(item, RawSample):
                        census.add(item)
                    elif item.damages_shard:
                        unreadable.append((shard.canonical_url, item.message))
        except (PipelineError, OSError) as error:
            unreadable.append((shard.canonical_url, without_url(shard, str(error))))
        # of an archive that is cut, what precedes the cut counts
        is_whole = not unreadable or unreadable[-1][0] != shard.canonical_url
        shards_read += is_whole or census.samples > samples_before
    return Contents(
        shards_read,
        census.samples,
        dict(census.fields.most_common()),
        dict(census.images.most_common()),
        census.unread_images,
        tuple(sorted(map(_text_field, census.values.values()), key=_unlikeliness)),
        tuple(unreadable),
    )


@dataclass
class _Census:
    """What was found in the samples so far."""

    samples: int = 0
    fields: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    unread_images: dict[str, str] = field(default_factory=dict)
    values: defaultdict[str, list[_Value]] = field(default_factory=lambda: defaultdict(list))

    def add(self, sample: RawSample) -> None:
        """Count the fields of a sample by what they hold."""
        self.samples += 1
        self.fields.update(sample.fields.keys())
        for name, content in sample.fields.items():
            kind = kind_of(content)
            if kind is not None and kind.is_image:
                self.images.update([name] if kind.is_read else [])
                self.unread_images |= {} if kind.is_read else {name: kind.name}
                continue
            for value in _values(name, content):
                self.values[value.spec].append(value)


def _values(name: str, content: bytes) -> Iterator[_Value]:
    """Yield the texts and class numbers of a field: itself, or what the keys of its JSON object hold."""
    if len(content) > MAX_JSON_BYTES:
        return
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return
    try:
        document = json.loads(text, parse_int=_bounded_int) if text.startswith(("{", "[")) else None
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict):
        for key, value in islice(document.items(), MAX_KEYS):
            if key and "\n" not in key and key == printable(key):
                yield from _value(f"{name}:{key}", value)
    elif document is None:
        yield from _value(name, int(text) if text.isdecimal() and len(text) <= 6 else text)


def _bounded_int(digits: str) -> int:
    # parsing long integers takes quadratic time
    return int(digits) if len(digits) <= 20 else 0


def _value(spec: str, value: object) -> Iterator[_Value]:
    match value:
        case bool():
            return
        case int() if value >= 0 and re.split(r"[.:]", spec)[-1].lower() in _CLASS_NAMES:
            yield _Value(spec, "class number", str(value))
        case _ if re.split(r"[.:]", spec)[-1].lower() in _NAMES_OF_OTHER_TEXTS:
            return
        case str() if _is_prose(value):
            yield _Value(spec, "text", value)
        case [str(first), *_] if _is_prose(first):
            yield _Value(spec, "list of texts", first)


def _is_prose(text: str) -> bool:
    """Return whether a text may describe an image: it has words, and is no URL, file name, digest or JSON."""
    text = text.strip()
    if not text or len(text) > MAX_CAPTION_CHARACTERS or "\0" in text or text.startswith(("{", "[")):
        return False
    if _URL.match(text) or _FILE_NAME.fullmatch(text) or _DIGEST.fullmatch(text):
        return False
    # the scripts of some languages are mostly marks, and short captions may count: "a cat and 2 dogs"
    letters = sum(character.isalpha() for character in text)
    return letters * 2 >= len(text) - sum(map(str.isspace, text))


def _text_field(values: Sequence[_Value]) -> TextField:
    kind = Counter(value.kind for value in values).most_common(1)[0][0]
    texts = list(dict.fromkeys(one_line(value.text) for value in values if value.kind == kind))
    return TextField(values[0].spec, kind, len(values), tuple(texts[:3]), len(texts) > 1)


def one_line(text: str) -> str:
    """Return the beginning of a text, in one printable line."""
    line = printable(" ".join(text[: 4 * EXAMPLE_CHARACTERS].split()))
    return line if len(line) <= EXAMPLE_CHARACTERS else f"{line[:EXAMPLE_CHARACTERS]}..."


def _unlikeliness(found: TextField) -> tuple[int, bool, int, float, str]:
    known = found.name in _CAPTION_NAMES
    words = sum(len(example.split()) for example in found.examples) / len(found.examples)
    place = _CAPTION_NAMES.index(found.name) if known else len(_CAPTION_NAMES)
    return place, not found.is_varied, -found.samples, -words, found.spec


def first_middle_last(shards: Sequence[ShardSource], most: int = 3) -> list[ShardSource]:
    """Return at most `most` shards, spread from the first to the last: a sorted corpus is not uniform.

    Shards of unknown size are missing, are no files or are commands. Commands are never run; the others are
    taken where there is nothing else.
    """
    shards = [shard for shard in shards if shard.size_bytes is not None] or [
        shard for shard in shards if not is_command(shard.url)
    ]
    if len(shards) <= most:
        return list(shards)
    return [shards[round(place * (len(shards) - 1) / (most - 1))] for place in range(most)]


def without_url(shard: ShardSource, message: str) -> str:
    """Return a message about a shard without the URL at its beginning, which is shown before it."""
    for url in (shard.canonical_url, shard.url):
        message = message.removeprefix(f"{url}: ")
    return message


def counted(names: Iterable[tuple[str, int]], most: int = 8) -> str:
    """Return names with the number of samples that have each: ``jpg (48), json (48) and 2 more``."""
    listed = list(names)
    shown = [f"{printable(name[:40])} ({count:,})" for name, count in listed[:most]]
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(shown) + more if shown else "none"
