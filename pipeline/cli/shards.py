"""The `shards` commands, which turn images with captions and datasets with ground truth into shards."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import Destination, open_console
from pipeline.errors import OutputError

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.datasets.conversion import Conversion, SampleSource

NAMES_SHOWN = 3
NEWLINE = b"\n"
RESUME_ADVICE = "run the same command with --resume, without --overwrite"
NO_CAPTIONS = "none; annotate with prompts.source=classes and a list of classes"

shards_app = typer.Typer(
    name="shards",
    help="Turn a folder of images, Parquet files or a dataset with ground truth into shards.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Root = Annotated[
    Path, typer.Argument(metavar="ROOT", help="Folder of the dataset, laid out as its owners ship it.")
]
ShardSize = Annotated[int, typer.Option(metavar="N", min=1, help="Largest number of samples in a shard.")]
MaxShardBytes = Annotated[int, typer.Option(metavar="N", min=1, help="Largest size of a shard in bytes.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue after the last shard in DEST.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the shards in DEST first.")]
DEFAULT_SIZE, DEFAULT_BYTES = 1000, 1 << 30
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=256, help="Number of images read at a time; default: all cores."),
]


@shards_app.command("images")
def image_folder(
    root: Annotated[
        Path, typer.Argument(metavar="ROOT", help="Folder of images, which may have folders in it.")
    ],
    dest: Destination,
    *,
    captions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Table of captions (.csv, .tsv, .txt, .jsonl, .parquet) whose rows name images below ROOT; "
            "default: metadata.csv, .jsonl or .parquet in ROOT and in folders below it, else KEY.txt beside "
            "KEY.jpg; none: convert the images without captions.",
        ),
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column with the paths of images; default: file_name."),
    ] = None,
    caption_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column with the captions; default: text, else caption."),
    ] = None,
    threads: Threads = None,
    shard_size: ShardSize = DEFAULT_SIZE,
    max_shard_bytes: MaxShardBytes = DEFAULT_BYTES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a folder of images and their captions.

    Captions are in a table or in text files beside the images; Hugging Face's imagefolder is read as it is.
    Adjacent rows of a table that name the same image are its captions.
    """
    from pipeline.datasets.image_folder import open_image_folder

    found = open_image_folder(root, captions, image_column=image_column, caption_column=caption_column)
    console = open_console()
    console.print(f"captions: {found.captions or NO_CAPTIONS}", soft_wrap=True)
    if found.unread_table is not None:
        option = shlex.join(["--captions", str(found.unread_table)])
        console.print(
            f"not read: {found.unread_table}, which names images, too; {option} reads it instead",
            soft_wrap=True,
        )
    _convert(
        found.samples,
        dest,
        (shard_size, max_shard_bytes),
        resume=resume,
        overwrite=overwrite,
        threads=threads or _cores(),
    )


@shards_app.command("parquet")
def parquet_files(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES", help="Parquet files with the bytes of images: local paths, s3:// or gs://."
        ),
    ],
    dest: Destination,
    *,
    image: Annotated[
        str,
        typer.Option(
            metavar="COLUMN",
            help="Column with the images: bytes, or Hugging Face's struct of bytes and path.",
        ),
    ] = "image",
    caption: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Column with a caption or a list of captions for each image; default: no captions.",
        ),
    ] = None,
    threads: Threads = None,
    shard_size: ShardSize = DEFAULT_SIZE,
    max_shard_bytes: MaxShardBytes = DEFAULT_BYTES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert Parquet files of images and their captions.

    They hold the bytes of the images, such as those of Hugging Face or img2dataset.
    """
    from pipeline.datasets.parquet_images import open_parquet_images

    source = open_parquet_images(files, image, caption)
    open_console().print(
        f"captions: {NO_CAPTIONS if caption is None else f'column {caption}'}", soft_wrap=True
    )
    _convert(
        source,
        dest,
        (shard_size, max_shard_bytes),
        resume=resume,
        overwrite=overwrite,
        threads=threads or _cores(),
    )


@shards_app.command()
def voc(
    root: Root,
    dest: Destination,
    *,
    split: Annotated[
        str,
        typer.Option(
            help="Split to convert: name of a list in ImageSets/Segmentation, such as train or val."
        ),
    ] = "val",
    shard_size: ShardSize = DEFAULT_SIZE,
    max_shard_bytes: MaxShardBytes = DEFAULT_BYTES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert PASCAL VOC 2012, segmentation. ROOT is VOCdevkit or VOC2012, or holds one of them."""
    from pipeline.datasets.voc import open_voc
    from pipeline.datasets.writing import truth_source

    source = truth_source(open_voc(root, split))
    _convert(source, dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


@shards_app.command()
def coco(
    root: Root,
    dest: Destination,
    *,
    split: Annotated[
        str, typer.Option(help="Split to convert: val2017, train2017, val2014 or train2014.")
    ] = "val2017",
    shard_size: ShardSize = DEFAULT_SIZE,
    max_shard_bytes: MaxShardBytes = DEFAULT_BYTES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert COCO, objects and captions. ROOT holds annotations/ and the images, such as val2017/."""
    from pipeline.datasets.coco import open_coco
    from pipeline.datasets.writing import truth_source

    source = truth_source(open_coco(root, split))
    _convert(source, dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


@shards_app.command("imagenet-s")
def imagenet_s(
    root: Root,
    dest: Destination,
    *,
    split: Annotated[str, typer.Option(help="Split to convert: validation or train-semi.")] = "validation",
    variant: Annotated[int, typer.Option(help="Number of classes: 50, 300 or 919.")] = 919,
    categories: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The authors' ImageNetS_categories file; needed where class folders are missing.",
        ),
    ] = None,
    shard_size: ShardSize = DEFAULT_SIZE,
    max_shard_bytes: MaxShardBytes = DEFAULT_BYTES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert ImageNet-S. ROOT is ImageNetS919, ImageNetS300 or ImageNetS50, or the folder that holds it."""
    from pipeline.datasets.imagenet_s import open_imagenet_s
    from pipeline.datasets.writing import truth_source

    source = truth_source(open_imagenet_s(root, split, variant, categories))
    _convert(source, dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


@shards_app.command()
def openimages(
    root: Root,
    dest: Destination,
    *,
    split: Annotated[str, typer.Option(help="Split to convert: train, val or test.")] = "val",
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder of the images; default: ROOT/train, ROOT/validation or ROOT/test."
        ),
    ] = None,
    shard_size: ShardSize = DEFAULT_SIZE,
    max_shard_bytes: MaxShardBytes = DEFAULT_BYTES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert point labels of Open Images V7. ROOT holds two oidv7-*.csv tables and a folder of images."""
    from pipeline.datasets.openimages import open_openimages
    from pipeline.datasets.writing import truth_source

    source = truth_source(open_openimages(root, split, images))
    _convert(source, dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _convert(
    source: SampleSource,
    dest: str,
    limits: tuple[int, int],
    *,
    resume: bool,
    overwrite: bool,
    threads: int = 1,
) -> None:
    from rich.filesize import decimal

    from pipeline.datasets.conversion import ShardLimits, write_samples
    from pipeline.storage import shown_url

    console, published = open_console(), []

    def on_shard(name: str, samples: int, size_bytes: int) -> None:
        published.append(name)
        console.print(f"{name}: {samples} samples, {decimal(size_bytes)}")

    try:
        conversion = write_samples(
            source,
            dest,
            ShardLimits(*limits),
            resume=resume,
            overwrite=overwrite,
            threads=threads,
            on_shard=on_shard,
        )
    except OutputError as error:
        way_out = f"; then {RESUME_ADVICE}" if published else ""
        raise OutputError(f"{error}{way_out}") from error
    except KeyboardInterrupt:
        console.print(f"interrupted; {RESUME_ADVICE}", soft_wrap=True)
        raise
    console.print(_counts(conversion))
    files = "".join(f"{name} ({content.count(NEWLINE)} classes), " for name, content in source.files.items())
    console.print(
        f"{shown_url(dest)}: {len(conversion.shards)} shard(s), {files}conversion.json (all counts, and the "
        "names of what was skipped)",
        soft_wrap=True,
    )
    pattern = shlex.quote(f"{shown_url(dest).rstrip('/')}/{source.name}-*.tar")
    console.print(f"annotate them with input.shards={pattern}", soft_wrap=True)
    # captions or their lack are what a configuration is written from; ground truth has a list of classes
    if not source.files:
        console.print(f"Next: legrad init {pattern} --to job.yaml", soft_wrap=True)


def _counts(conversion: Conversion) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("images", "count", "examples")
    table.add_row("listed", str(conversion.images), "")
    table.add_row("written", str(conversion.written), "")
    for reason, count in sorted(conversion.skipped.items()):
        names = [name for name, _ in conversion.skipped_names[reason][:NAMES_SHOWN]]
        why = conversion.skipped_names[reason][0][1]
        table.add_row(f"skipped: {reason}", str(count), Text(f"{repr(names)[1:-1]}\n{why}"))
    for kind, count in sorted(conversion.omitted.items()):
        names = conversion.omitted_names.get(kind, [])[:NAMES_SHOWN]
        table.add_row(f"records skipped: {kind}", str(count), Text("; ".join(names)))
    return table
