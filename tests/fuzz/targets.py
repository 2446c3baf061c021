"""What is fuzzed: of each parser that meets foreign bytes the inputs, and what it may do with them.

A reader returns whether what it read belongs together. It may refuse with the errors that its target names,
and with nothing else; warnings are errors.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gzip
import io
import json
import os
import random
import shutil
import tarfile
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.tariterators import base_plus_ext

from legrad.errors import RleError
from legrad.images import ImageTransform
from legrad.masks.rle import check_rles, decode_rle, decode_runs, encode_rle, mask_area, mask_bbox_xywh
from legrad.tokens import RowTokenizer
from pipeline import storage
from pipeline.config.classes import ClassEntry, read_class_list
from pipeline.config.load import load_config
from pipeline.datasets.caption_tables import open_caption_table
from pipeline.datasets.coco import open_coco
from pipeline.datasets.parquet_images import open_parquet_images
from pipeline.errors import DamagedFileError, PipelineError, SampleFailure, UserError
from pipeline.output.folder import OutputFolder
from pipeline.output.runs import RunRecord
from pipeline.output.schema import ANNOTATION_SCHEMA, ERROR_SCHEMA
from pipeline.output.tables import open_table, read_record
from pipeline.prompts.mentions import MentionFinder
from pipeline.shards.captions import read_captions
from pipeline.shards.images import decode_image, open_image
from pipeline.shards.samples import RawSample, read_samples
from tests.fuzz.counts import FAULTS
from tests.fuzz.mutations import as_json, mutated, mutated_text, mutated_tree, with_other_chunk
from tests.helpers import hostile_outputs
from tests.helpers.compacted_jobs import compacted
from tests.helpers.dataset_trees import box_polygon, coco_object, write_coco
from tests.helpers.hostile_shards import (
    END,
    KEYS,
    TAR_FAULTS,
    animation,
    caption,
    good,
    image,
    jpeg_with_scans,
    odd,
    png_claiming,
    png_with_texts,
)

ROOT = Path(__file__).parents[2]
MOST_TAR_BYTES = 1 << 17
MAX_IMAGE_PIXELS = 1 << 20
IMAGE_TRANSFORM = ImageTransform(32, 32, (0.5,) * 3, (0.5,) * 3)
MAX_MASK_PIXELS = 1 << 20


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        make: an input, of the random numbers given.
        read: hands an input to the parser; returns whether what it read belongs together.
        refusals: the errors with which it may refuse.
    """

    make: Callable[[random.Random], Any]
    read: Callable[[Any, Path], bool]
    refusals: tuple[type[Exception], ...]


# ---------------------------------------------------------------- tar


@cache
def tars() -> tuple[bytes, ...]:
    # compressed ones have a target of their own
    made = [fault.make() for name, fault in TAR_FAULTS.items() if "gzip" not in name]
    return (*[good(KEYS) + END] * 10, *(tar for tar in made if len(tar) <= MOST_TAR_BYTES))


def make_tar(rng: random.Random) -> bytes:
    data = rng.choice(tars())
    if rng.random() < 0.5:
        return mutated(rng, data)
    blocks = [data[start : start + 512] for start in range(0, len(data), 512)]
    for _ in range(rng.randint(1, 3)):
        place, count = rng.randrange(len(blocks) + 1), rng.randint(1, 3)
        moved = blocks[place : place + count]
        if rng.random() < 0.5:
            blocks[place : place + count] = []
        elsewhere = rng.randrange(len(blocks) + 1)
        blocks[elsewhere:elsewhere] = rng.choice((moved, [bytes(512)] * count, [rng.randbytes(512)]))
    return b"".join(blocks)


def read_tar(data: bytes, _folder: Path) -> bool:
    """Fields are what tarfile finds under the name, or their own: of two PAX names it takes the first."""
    items = list(read_samples(io.BytesIO(data), max_member_bytes=1 << 20))
    samples = [item for item in items if isinstance(item, RawSample)]
    found = by_tarfile(data) if samples else {}
    return all(
        content in found.get((sample.key, extension), ()) or content == own_field(sample.key, extension)
        for sample in samples
        for extension, content in sample.fields.items()
    )


def own_field(key: str, extension: str) -> bytes | None:
    letter = key.rpartition("/")[2]
    if letter not in tuple(KEYS):
        return None
    return {"jpg": image(letter), "txt": caption(letter).encode()}.get(extension)


def make_compressed_tar(rng: random.Random) -> bytes:
    """A tar compressed in one or two parts, whose compressed bytes are changed or cut."""
    data, compress = rng.choice(tars()), rng.choice([gzip.compress, zstd])
    parts = rng.choice([[data], [data[:1000], data[1000:]]])
    return mutated(rng, b"".join(map(compress, parts)))


def zstd(data: bytes) -> bytes:
    """One frame of zstd."""
    packed: bytes = pa.Codec("zstd").compress(data, asbytes=True)
    return packed


def read_compressed_tar(data: bytes, _folder: Path) -> bool:
    """Whatever is wrong, samples keep their order, and an error of the shard comes last."""
    items = list(read_samples(io.BytesIO(data), max_member_bytes=1 << 16))
    indices = [item.index if isinstance(item, RawSample) else item.sample_index for item in items]
    numbered = [index for index in indices if index is not None]
    return numbered == list(range(len(numbered)))


def by_tarfile(data: bytes) -> dict[tuple[str, str], list[bytes]]:
    found: dict[tuple[str, str], list[bytes]] = defaultdict(list)
    # whatever tarfile raises, it ends here
    with (
        contextlib.suppress(Exception),
        tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as tar,
    ):
        for member in tar:
            key, extension = base_plus_ext(member.name)
            if key is not None and member.isreg():
                found[key, extension.lower()].append(tar.extractfile(member).read())
    return found


# ---------------------------------------------------------------- images


@cache
def images() -> tuple[bytes, ...]:
    kinds = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
    others = (
        ("CMYK", "JPEG"),
        ("I;16", "PNG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
    )
    return (
        *(image("c", kind) for kind in kinds),
        *(odd(mode, kind) for mode, kind in others),
        *(jpeg_with_scans(5), animation(), png_with_texts(2), png_claiming(10**5, 10**5)),
    )


def make_image(rng: random.Random) -> bytes:
    data = rng.choice(images())
    if data.startswith(b"\x89PNG") and rng.random() < 0.6:
        return with_other_chunk(rng, data)
    return mutated(rng, data)


def read_image(data: bytes, _folder: Path) -> bool:
    opened = open_image(data, max_image_pixels=MAX_IMAGE_PIXELS)
    pixels = np.asarray(opened.resize((32, 32)).convert("RGB"))
    fast = decode_image(data, IMAGE_TRANSFORM, max_image_pixels=MAX_IMAGE_PIXELS, resize="fast")
    same_size = (fast.image_width, fast.image_height) == opened.size
    return pixels.shape == (32, 32, 3) and same_size and opened.width * opened.height <= MAX_IMAGE_PIXELS


# ---------------------------------------------------------------- captions

SYMBOLS = (
    *(
        "a",
        "dog",
        " ",
        "\n",
        "\0",
        "\x1b[2J",
        "\u0301",
        "\U0001f600",
        "\u202e",
        "\ufeff",
        "\u1100",
        "'s",
        "&amp;",
    ),
    *('"', "\\ud83d", "\\u0000", "[", "{", "}", "]", ":", ",", "1e999", "NaN", "null", "-", "9" * 400),
)


@cache
def captions() -> tuple[bytes, ...]:
    texts = [caption(key).encode() for key in KEYS]
    documents = [b'{"caption": "a dog"}', b'{"caption": ["a dog", "a cat", "", 3]}', b'{"caption": {"a": 1}}']
    return (*texts, *documents, "\u00e9\u72ac ".encode() * 50)


def make_caption(rng: random.Random) -> bytes:
    kind = rng.randrange(10)
    if kind == 0:
        return (rng.choice(SYMBOLS) * rng.choice((300, 5000, 16_384))).encode("utf-8", "surrogatepass")
    if kind == 1:
        return "".join(
            chr(rng.choice((rng.randrange(0x300), rng.randrange(0xD800)))) for _ in range(2000)
        ).encode()
    return mutated(rng, rng.choice(captions()), [symbol.encode() for symbol in SYMBOLS])


@cache
def tokenizer() -> Any:
    return RowTokenizer(open_clip.tokenizer.SimpleTokenizer())


@cache
def finder() -> MentionFinder:
    return MentionFinder(
        [ClassEntry(id=rank, name=name) for rank, name in enumerate(("dog", "hot dog", "cat", "person"), 1)]
    )


def read_caption(data: bytes, _folder: Path) -> bool:
    """As text and as JSON; each of several captions is in its place."""
    refusals, is_right = [], True
    for spec in ("txt", "json:caption"):
        try:
            found = read_captions({"txt": data, "json": data}, spec, several=None)
        except SampleFailure as failure:
            refusals.append(failure)
            continue
        texts = [text for text in found if isinstance(text, str)]
        for text in texts[:3]:
            tokenizer()([text])
            finder().mentioned(text)
        expected = data.decode("utf-8-sig") if spec == "txt" else json.loads(data)["caption"]
        expected = expected if isinstance(expected, list) else [expected]
        is_right &= len(found) == len(expected) and all(
            text == source.strip()
            for text, source in zip(found, expected, strict=True)
            if isinstance(text, str)
        )
    if len(refusals) == 2:
        raise refusals[0]
    return is_right


# ---------------------------------------------------------------- run lengths


@cache
def masks() -> tuple[dict, ...]:
    rng = np.random.default_rng(0)
    grids = [
        rng.random((1, height, width)) < share
        for height, width, share in (
            (48, 64, 0.5),
            (1, 1, 1),
            (640, 480, 0.001),
            (7, 300, 0.9),
            (100, 100, 0),
        )
    ]
    return tuple(encode_rle(grid)[0] for grid in grids)


def make_rle(rng: random.Random) -> Any:
    rle = rng.choice(masks())
    kind = rng.randrange(4)
    if kind == 0:
        return mutated_tree(rng, dict(rle))
    if kind == 1:
        runs = [
            rng.choice((0, 1, 5, 1000, -1, 2**31, 2**70, 0.5, None, True)) for _ in range(rng.randrange(9))
        ]
        return {"size": [rng.randrange(60), rng.randrange(60)], "counts": runs}
    alphabet = b"0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmno"
    counts = mutated(rng, rle["counts"].encode()[:5000] or b"0", [bytes([letter]) for letter in alphabet])
    return {"size": list(rle["size"]), "counts": counts.decode("latin-1")}


def read_rle(rle: Any, _folder: Path) -> bool:
    """Area and box say what the pixels say."""
    limit = {"max_pixels": MAX_MASK_PIXELS}
    if isinstance(rle.get("counts"), list):
        size = rle.get("size")
        if not isinstance(size, list) or len(size) != 2:
            return True
        return decode_runs(rle["counts"], *size, **limit).shape == tuple(size)
    try:
        pixels = decode_rle(rle, **limit)
    except RleError:
        for reader in (mask_area, mask_bbox_xywh, check_rles):
            with contextlib.suppress(RleError):
                reader([rle], **limit)
                return False
        raise
    check_rles([rle], **limit)
    rows, columns = np.nonzero(pixels)
    box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1] if len(rows) else [0, 0, 0, 0]
    return (mask_area([rle], **limit)[0], *mask_bbox_xywh([rle], **limit)[0]) == (len(rows), *box)


# ---------------------------------------------------------------- footers and records

PLACES = ("job.json", "shards.parquet", "annotations", "errors", "failed", "runs")


@cache
def output() -> Path:
    """A good output folder, of which one file after the other is spoiled and put back."""
    return hostile_outputs.good_output(Path(os.environ["LEGRAD_FUZZ_FOLDER"]) / "good")


def make_record(rng: random.Random) -> tuple[str, bytes]:
    place = rng.choice(PLACES)
    path = hostile_outputs.target_of(output(), place)
    data = path.read_bytes()
    if path.suffix == ".json":
        tree = rng.random() < 0.5
        return place, as_json(mutated_tree(rng, json.loads(data))) if tree else mutated(rng, data)
    if rng.random() < 0.3 and place in ("annotations", "errors"):
        return place, with_other_footer(rng, path)
    # near the end are the footers: their lengths, columns and offsets
    cut = max(0, len(data) - rng.choice((64, 512, 4096, len(data))))
    return place, data[:cut] + mutated(rng, data[cut:])


def with_other_footer(rng: random.Random, path: Path) -> bytes:
    own = json.loads(hostile_outputs.ours_of(path))
    content = as_json(mutated_tree(rng, own)) if rng.random() < 0.7 else mutated(rng, as_json(own))
    sink, table = io.BytesIO(), pq.read_table(path)
    hostile_outputs.write_table(sink, table, content)
    return sink.getvalue()


def read_output(spoiled: tuple[str, bytes], folder: Path) -> bool:
    place, data = spoiled
    out = folder / "out"
    shutil.copytree(output(), out)
    path = hostile_outputs.target_of(out, place)
    path.write_bytes(data)
    url, folder = str(path), OutputFolder(str(out))
    match place:
        case "job.json":
            return isinstance(folder.job().config_hash, str)
        case "shards.parquet":
            rows = folder.shard_rows()
            return len({row["shard_id"] for row in rows}) == len(rows)
        case "failed":
            return folder.failure(path.stem) is not None
        case "runs":
            return read_record(url, RunRecord) is not None
    schema = ANNOTATION_SCHEMA if place == "annotations" else ERROR_SCHEMA
    with open_table(url, place) as table:
        with contextlib.suppress(DamagedFileError):
            table.footer()
        rows = list(table.rows(schema.names))
    return all(row["key"] is not None or place == "errors" for row in rows)


# ---------------------------------------------------------------- compacted folders

COMPACTED_PLACES = ("compacted.parquet", "compacted.parquet", "annotations", "errors")


@cache
def compacted_output() -> Path:
    """The good output folder, compacted."""
    return compacted(output(), output().parent / "compacted")


def make_compacted(rng: random.Random) -> tuple[str, bytes]:
    place = rng.choice(COMPACTED_PLACES)
    path = hostile_outputs.target_of(compacted_output(), place)
    if rng.random() < 0.3:
        return place, with_other_footer(rng, path)
    data = path.read_bytes()
    cut = max(0, len(data) - rng.choice((64, 512, 4096, len(data))))
    return place, data[:cut] + mutated(rng, data[cut:])


def read_compacted(spoiled: tuple[str, bytes], folder: Path) -> bool:
    place, data = spoiled
    out = folder / "out"
    shutil.copytree(compacted_output(), out)
    hostile_outputs.target_of(out, place).write_bytes(data)
    job = OutputFolder(str(out))
    for shard_id in sorted(job.ids("annotations")):
        job.own_footer(shard_id, job.job().config_hash)
        for table, schema in (("annotations", ANNOTATION_SCHEMA), ("errors", ERROR_SCHEMA)):
            with job.open(table, shard_id) as file:
                rows = list(file.rows(schema.names))
                if len(rows) != file.row_count or {row["shard"] for row in rows} - {file.footer().shard}:
                    return False
    return True


# ---------------------------------------------------------------- configurations and classes

YAML_TOKENS = (
    *(
        "&a ",
        "*a",
        "<<: ",
        "!!python/object/apply:os.system",
        "[",
        "]",
        "{",
        "}",
        ": ",
        "- ",
        "\n",
        "  ",
        "\t",
    ),
    *(
        "null",
        "true",
        ".nan",
        ".inf",
        "-1",
        "0x10",
        "1e400",
        "'",
        '"',
        "|",
        ">",
        "%YAML 1.1\n",
        "---\n",
        "\0",
    ),
    *("input:\n", "model:\n", "masks:\n", "[" * 3000, "9" * 5000, "\u2028", "\x1b[2J", "@", "`", "# "),
)


@cache
def yaml_texts() -> tuple[str, ...]:
    files = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/protocol/*.yaml")])
    return (
        *(path.read_text() for path in files),
        (ROOT / "pipeline/demo/classes.txt").read_text(),
        "- dog\n- {name: cat, synonyms: [kitten]}\n- {id: 7, name: person}\n",
    )


OVERRIDES = (
    "masks.rule=quantile",
    "run.workers=2",
    "input.shards=[a.tar,b.tar]",
    "masks.smooth=1.5",
    "views.scales=[1,2]",
)


def make_config(rng: random.Random) -> tuple[bytes, list[str]]:
    overrides = [
        mutated_text(rng, rng.choice(OVERRIDES), YAML_TOKENS).decode("utf-8", "replace")
        for _ in range(rng.randrange(3))
    ]
    return mutated_text(rng, rng.choice(yaml_texts()), YAML_TOKENS), overrides


def read_config(made: tuple[bytes, list[str]], folder: Path) -> bool:
    """The same bytes as a configuration, and as a list of classes in YAML and in plain text."""
    content, overrides = made
    refusals = []
    for name in ("config.yaml", "classes.yaml", "classes.txt"):
        path = folder / name
        path.write_bytes(content)
        try:
            if name == "config.yaml":
                load_config(path, overrides)
            else:
                entries = read_class_list(str(path))
                if any(not entry.name.isprintable() for entry in entries):
                    return False
        except UserError as error:
            require_short(error)
            refusals.append(error)
    if len(refusals) == 3:
        raise refusals[0]
    return True


def require_short(error: Exception) -> None:
    """A refusal fits on one screen."""
    if len(str(error)) > 8000:
        raise AssertionError(f"a refusal of {len(str(error))} characters")


# ---------------------------------------------------------------- lists of shards

LIST_TOKENS = (
    *(
        "{",
        "}",
        "{0..3}",
        "{0..3000000000}",
        ",",
        "..",
        "[",
        "]",
        "?",
        "*",
        "!",
        "\\",
        "\n",
        "\r",
        "\0",
        " ",
        "#",
    ),
    *(
        "pipe:cat x",
        "file://",
        "http://127.0.0.1:9/",
        "http://[::1",
        "s3:/",
        "@",
        "\u202e",
        "~",
        "%00",
        "{" * 3000,
    ),
)
LISTED = "0.tar\n{0..2}.tar\nsub/*.tar\n# said\nhttp://127.0.0.1:9/{a,b}.tar?token=x\n"


def make_list(rng: random.Random) -> bytes:
    text = mutated_text(rng, LISTED, LIST_TOKENS)
    # nothing that walks over this machine, follows another list, or asks a store
    for walks in (b"**", b"\n@", b"\n/", b"s3://", b"gs://", b"gcs://", b"../"):
        while walks in text:
            text = text.replace(walks, b"\n")
    return text.lstrip(b"@/")


def read_list(content: bytes, folder: Path) -> bool:
    """Each shard once, and each that is a file is in the folder."""
    (folder / "sub").mkdir()
    for name in ("0.tar", "1.tar", "2.tar", "sub/3.tar"):
        (folder / name).write_bytes(b"x")
    (folder / "list.txt").write_bytes(content)
    before = Path.cwd()
    os.chdir(folder)
    try:
        shards = storage.find_shards(["@list.txt"], check_inputs=False).shards
    except UserError as error:
        require_short(error)
        raise
    finally:
        os.chdir(before)
    return len({shard.shard_id for shard in shards}) == len(shards)


# ---------------------------------------------------------------- COCO


@cache
def coco() -> Path:
    root = Path(os.environ["LEGRAD_FUZZ_FOLDER"]) / "coco"
    runs = {"size": [30, 40], "counts": [100, 200, 900]}
    objects = [
        coco_object(1, 1, 1, box_polygon(2, 2, 20, 20)),
        coco_object(
            2, 1, 18, {"size": [30, 40], "counts": encode_rle(np.ones((1, 30, 40), bool))[0]["counts"]}
        ),
        coco_object(3, 2, 90, runs, 1),
    ]
    said = [{"id": 1, "image_id": 1, "caption": "a dog"}, {"id": 2, "image_id": 2, "caption": "a person"}]
    write_coco(root, objects, images={1: (30, 40), 2: (30, 40)}, captions=said)
    return root


def make_coco(rng: random.Random) -> tuple[str, bytes]:
    name = rng.choice(("instances", "instances", "captions"))
    data = (coco() / "annotations" / f"{name}_val2017.json").read_bytes()
    return name, as_json(mutated_tree(rng, json.loads(data))) if rng.random() < 0.8 else mutated(rng, data)


def read_coco(made: tuple[str, bytes], folder: Path) -> bool:
    name, content = made
    root = folder / "coco"
    shutil.copytree(coco(), root)
    (root / "annotations" / f"{name}_val2017.json").write_bytes(content)
    dataset = open_coco(root)
    is_right = True
    for image_name in dataset.image_names:
        with contextlib.suppress(SampleFailure):
            sample = dataset.read(image_name)
            is_right &= sample.label_map is None or sample.label_map.shape in ((30, 40), (40, 30))
    return is_right


# ---------------------------------------------------------------- what must be found


def make_fault(rng: random.Random) -> str:
    return rng.choice(FAULTS)


def misbehave(fault: str, _folder: Path) -> bool:
    """What no parser may do, for the test of the harness."""
    match fault:
        case "error":
            raise ZeroDivisionError
        case "file":
            os.close(tempfile.mkstemp()[0])
        case "segmentation fault":
            faulthandler._sigsegv()
        case "warning":
            warnings.warn("lenient", stacklevel=1)
    return fault != "wrong pairing"


# ---------------------------------------------------------------- tables of captions and of images

TABLE_ROWS = [
    {"file_name": f"{key}.jpg", "text": caption(key), "n": number} for number, key in enumerate(KEYS)
]
TABLE_TOKENS = [
    '"',
    ",",
    ";",
    "\t",
    "\n",
    "\r",
    "\0",
    "file_name",
    "text",
    "../",
    "{",
    "[",
    "null",
    "1e999",
    "\ufeff",
]


def make_table(rng: random.Random) -> bytes:
    """The ending of a table's name, a line feed, and its content."""
    if rng.random() < 0.5:
        lines = [
            "file_name,text,n",
            *(f'{row["file_name"]},"{row["text"]}",{row["n"]}' for row in TABLE_ROWS),
        ]
        return b".csv\n" + mutated_text(rng, "\n".join(lines), TABLE_TOKENS)
    return b".jsonl\n" + mutated_text(rng, "\n".join(map(json.dumps, TABLE_ROWS)), TABLE_TOKENS)


def read_table(data: bytes, folder: Path) -> bool:
    """Whatever is in it, no row names a file by anything but text."""
    ending, _, content = data.partition(b"\n")
    path = folder / f"table{ending.decode()}"
    path.write_bytes(content)
    rows = list(open_caption_table(path, None, None).rows())
    path.unlink()
    return all(isinstance(row.image, str | SampleFailure) and row.place for row in rows)


@cache
def parquet_of_images() -> bytes:
    sink = io.BytesIO()
    images = [{"bytes": image(key), "path": f"{key}.jpg"} for key in KEYS]
    table = pa.table({"image": images, "caption": [caption(key) for key in KEYS], "n": range(len(KEYS))})
    pq.write_table(table, sink, row_group_size=2)
    return sink.getvalue()


def make_parquet(rng: random.Random) -> bytes:
    return mutated(rng, parquet_of_images())


def read_parquet(data: bytes, folder: Path) -> bool:
    """An image that is read has the caption of its row, unless the damage is in one of them."""
    path = folder / "images.parquet"
    path.write_bytes(data)
    source = open_parquet_images([str(path)], "image", "caption")
    count = 0
    for item in source.items(0):
        count += 1
        with contextlib.suppress(SampleFailure):
            item.read()
    path.unlink()
    return count == source.images


TARGETS = {
    "tar": Target(make_tar, read_tar, ()),
    "compressed tar": Target(make_compressed_tar, read_compressed_tar, ()),
    "image": Target(make_image, read_image, (SampleFailure,)),
    "caption": Target(make_caption, read_caption, (SampleFailure,)),
    "RLE": Target(make_rle, read_rle, (RleError,)),
    "footers and records": Target(make_record, read_output, (PipelineError,)),
    "compacted folder": Target(make_compacted, read_compacted, (PipelineError,)),
    "config": Target(make_config, read_config, (UserError,)),
    "list file": Target(make_list, read_list, (UserError,)),
    "COCO JSON": Target(make_coco, read_coco, (UserError,)),
    "caption table": Target(make_table, read_table, (UserError,)),
    "Parquet of images": Target(make_parquet, read_parquet, (UserError,)),
    "self-test": Target(make_fault, misbehave, ()),
}


def warm_up() -> None:
    """Load and write what inputs have in common, so that no input pays for it."""
    for make in (tars, images, captions, tokenizer, finder, masks, compacted_output, yaml_texts, coco):
        make()
