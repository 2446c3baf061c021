"""The `shards` commands, which turn datasets with ground truth into shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import Destination, open_console

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.datasets.truth_dataset import TruthDataset
    from pipeline.datasets.writing import Conversion

NAMES_SHOWN = 3

shards_app = typer.Typer(
    name="shards",
    help="Turn a dataset with ground truth, laid out as its owners ship it, into shards.",
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

    _convert(open_voc(root, split), dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


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

    _convert(open_coco(root, split), dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


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

    dataset = open_imagenet_s(root, split, variant, categories)
    _convert(dataset, dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


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

    dataset = open_openimages(root, split, images)
    _convert(dataset, dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


def _convert(
    dataset: TruthDataset, dest: str, limits: tuple[int, int], *, resume: bool, overwrite: bool
) -> None:
    from pipeline.datasets.writing import ShardLimits, write_shards
    from pipeline.storage import shown_url

    console = open_console()
    conversion = write_shards(
        dataset,
        dest,
        ShardLimits(*limits),
        resume=resume,
        overwrite=overwrite,
        on_shard=lambda name, samples, size_bytes: console.print(
            f"{name}: {samples} samples, {size_bytes / 1e6:.1f} MB"
        ),
    )
    console.print(_counts(conversion))
    console.print(
        f"{shown_url(dest)}: {len(conversion.shards)} shard(s), classes.txt ({len(dataset.class_names)} "
        "classes), conversion.json (all counts, and the names of what was skipped)",
        soft_wrap=True,
    )


def _counts(conversion: Conversion) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("images", "count", "examples")
    table.add_row("listed", str(conversion.images), "")
    table.add_row("written", str(conversion.written), "")
    for reason, count in sorted(conversion.skipped.items()):
        names = [name for name, _ in conversion.skipped_names[reason][:NAMES_SHOWN]]
        table.add_row(f"skipped: {reason}", str(count), Text(repr(names)[1:-1]))
    for kind, count in sorted(conversion.omitted.items()):
        names = conversion.omitted_names.get(kind, [])[:NAMES_SHOWN]
        table.add_row(f"records skipped: {kind}", str(count), Text("; ".join(names)))
    return table
