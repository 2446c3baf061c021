"""Read images and captions from Parquet files that hold the bytes of the images, such as Hugging Face's.

A column of images is either of bytes, as img2dataset writes it, or Hugging Face's struct<bytes, path>.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import types

from pipeline import storage
from pipeline.datasets.captioned import sample_members
from pipeline.datasets.conversion import Item, Members, SampleSource
from pipeline.datasets.parquet_rows import (
    Values,
    is_bytes,
    is_text,
    is_text_list,
    opened_parquet,
    rows_of_parquet,
    scalar_columns,
)
from pipeline.datasets.truth_dataset import MAX_FILE_BYTES, SkippedRecords
from pipeline.errors import SampleFailure, UserError
from pipeline.storage.urls import is_local, local_path
from pipeline.text import first_few, printable

FOOTERS_AT_ONCE = 16
MAX_STEM_CHARACTERS = 100


@dataclass(frozen=True)
class _File:
    """One Parquet file.

    Attributes:
        url: the URL to open.
        shown: the URL as it may be shown.
        stem: begins the keys of its samples.
        rows: number of rows.
        columns: names of the columns that are read.
        others: columns that are not read, with their types.
    """

    url: str
    shown: str
    stem: str
    rows: int
    columns: tuple[str, ...]
    others: tuple[str, ...]


def open_parquet_images(
    files: Sequence[str], image_column: str, caption_column: str | None, name: str = "parquet"
) -> SampleSource:
    """Open Parquet files whose rows become samples, in the order of the files' URLs.

    Args:
        files: local paths, s3:// or gs://, also with braces and globs.
        image_column: column with the bytes of the images.
        caption_column: column with a caption or a list of captions; None: the images have none.
        name: stem of the names of the shards.

    Raises:
        UserError: a file is missing or is not Parquet, or has no such columns.
    """
    shards = _listed(files)
    stems = _stems([storage.shown_url(shard.canonical_url) for shard in shards])
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        opened = list(
            pool.map(lambda shard, stem: _opened(shard, stem, image_column, caption_column), shards, stems)
        )
    if not any(file.rows for file in opened):
        raise UserError(f"{first_few([file.shown for file in opened], 3)}: no row in {len(opened)} file(s)")
    skipped = SkippedRecords()
    for file in opened:
        for other in file.others:
            skipped.add("columns_not_copied", other)
    identity = [(shard.canonical_url, shard.size_bytes, shard.mtime_ns, shard.etag) for shard in shards]
    what = repr((name, identity, [file.rows for file in opened], image_column, caption_column))
    return SampleSource(
        name,
        hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        sum(file.rows for file in opened),
        partial(_items, opened, image_column, caption_column),
        skipped=skipped,
    )


def _listed(files: Sequence[str]) -> list[storage.ShardSource]:
    for file in files:
        if Path(file).is_dir():
            pattern = shlex.quote(str(Path(file, "*.parquet")))
            raise UserError(f"{file}: is a folder; name its files, such as {pattern}")
        if file.startswith(("http://", "https://")):
            raise UserError(
                f"{storage.shown_url(file)}: Parquet is read from local paths, s3:// and gs://; download it "
                "first"
            )
    listed = storage.list_shards(files, named="FILES")
    for shard in listed:
        if is_local(shard.url) and not Path(local_path(shard.url)).exists():
            raise UserError(f"{local_path(shard.url)}: no such file")
    return listed


def _stems(urls: Sequence[str]) -> list[str]:
    """Return a different beginning of keys for each file: its stem, after its number where stems repeat."""
    stems = [
        re.sub(r"[^A-Za-z0-9_-]", "_", url.rpartition("/")[2].removesuffix(".parquet")).lstrip("_")[
            :MAX_STEM_CHARACTERS
        ]
        or "rows"
        for url in urls
    ]
    uses = Counter(stems)
    return [stem if uses[stem] == 1 else f"{number:05d}-{stem}" for number, stem in enumerate(stems)]


def _opened(shard: storage.ShardSource, stem: str, image_column: str, caption_column: str | None) -> _File:
    shown = storage.shown_url(shard.canonical_url).removeprefix("file://")
    with opened_parquet(shard.url) as file:
        schema = file.schema_arrow
        _check_image(shown, schema, image_column)
        captions = [] if caption_column is None else [_checked_caption(shown, schema, caption_column)]
        scalars = [name for name in scalar_columns(schema) if schema.names.count(name) == 1]
        columns = tuple(dict.fromkeys([image_column, *captions, *scalars]))
        others = tuple(
            f"{stem}: {column.name} ({column.type})" for column in schema if column.name not in columns
        )
        return _File(shard.url, shown, stem, file.metadata.num_rows, columns, others)


def _check_image(shown: str, schema: pa.Schema, name: str) -> None:
    column = _column(shown, schema, name, "--image").type
    if is_text(column):
        raise UserError(
            f"{shown}: column `{name}` holds texts (paths or URLs), not the bytes of images; download images "
            "first, such as with img2dataset; for local files: "
            f"legrad shards images ROOT DEST --captions FILE --image-column {name}"
        )
    if not _may_hold_images(column):
        raise UserError(
            f"{shown}: column `{name}` is {column}; expected bytes, or a struct with a field `bytes`"
        )


def _may_hold_images(column: pa.DataType) -> bool:
    if types.is_struct(column) and "bytes" in [field.name for field in column.fields]:
        column = column.field("bytes").type
    return is_bytes(column)


def _checked_caption(shown: str, schema: pa.Schema, name: str) -> str:
    column = _column(shown, schema, name, "--caption").type
    if not (is_text(column) or is_text_list(column)):
        raise UserError(
            f"{shown}: column `{name}` is {column}; expected texts, or lists of texts, as captions"
        )
    return name


def _column(shown: str, schema: pa.Schema, name: str, option: str) -> pa.Field:
    found = [column for column in schema if column.name == name]
    if len(found) == 1:
        return found[0]
    columns = first_few([f"{printable(column.name[:40])} ({column.type!s:.40})" for column in schema], 12)
    fits = _may_hold_images if option == "--image" else is_text
    likely = next((column.name for column in schema if fits(column.type)), None)
    example = "" if likely is None else f", such as {option} {shlex.quote(printable(likely))}"
    raise UserError(
        f"{shown}: has {len(found) or 'no'} column{'s' if found else ''} `{name}`; columns: "
        f"{columns or 'none'}; name the column with {option}{example}"
    )


def _items(
    files: Sequence[_File], image_column: str, caption_column: str | None, start: int
) -> Iterator[Item]:
    for file in files:
        if start < file.rows:
            for index, values in rows_of_parquet(file.url, file.columns, start):
                key = f"{file.stem}-{index:08d}"
                yield Item(
                    f"{file.shown}:{index + 1}", key, partial(_members, values, image_column, caption_column)
                )
        start = max(0, start - file.rows)


def _members(values: Callable[[], Values], image_column: str, caption_column: str | None) -> Members:
    row = values()
    image, path = _image(row.pop(image_column))
    captions = None if caption_column is None else row.pop(caption_column, None)
    if caption_column is not None and not isinstance(captions, list):
        captions = [captions]
    return sample_members(image, captions, row, path)


def _image(value: Any) -> tuple[bytes, str | None]:
    data, path = value, None
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        path = printable(path) if isinstance(path, str) else None
        if data is None and path is not None:
            message = (
                f"the row has no bytes, only the path {path}; write the file with the images in it "
                "(datasets.table.embed_table_storage), or convert their folder with legrad shards images"
            )
            raise SampleFailure("read", "image_not_in_file", message)
    if data is None:
        raise SampleFailure("read", "missing_image", "the image is null")
    if len(data) > MAX_FILE_BYTES:
        message = f"the image has {len(data)} bytes; the limit is {MAX_FILE_BYTES}"
        raise SampleFailure("read", "file_too_large", message)
    return bytes(data), path
