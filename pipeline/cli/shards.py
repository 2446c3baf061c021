"""`legrad shards voc | coco | imagenet-s | openimages`: a dataset with ground truth becomes shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pipeline.console import PrintableConsole
from pipeline.storage import shown_url

if TYPE_CHECKING:
    from pipeline.datasets.dataset import TruthDataset
    from pipeline.datasets.writing import Conversion

NAMES_SHOWN = 3

shards_app = typer.Typer(
    name="shards",
    help="Turn a dataset with ground truth, laid out as its owners ship it, into shards.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
console = PrintableConsole()

Root = Annotated[Path, typer.Argument(metavar="ROOT", help="The dataset's folder, as its owners ship it.")]
Dest = Annotated[str, typer.Argument(metavar="DEST", help="A folder of its own: local path, s3:// or gs://.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Samples of one shard.")]
MaxShardBytes = Annotated[int, typer.Option(min=1, help="Bytes of one shard.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on after the last shard that stands in DEST.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the shards in DEST first.")]
DEFAULT_SIZE, DEFAULT_BYTES = 1000, 1 << 30


@shards_app.command()
def voc(
    root: Root,
    dest: Dest,
    *,
    split: Annotated[str, typer.Option(help="A list in ImageSets/Segmentation.")] = "val",
    shard_size: ShardSize = DEFAULT_SIZE,
    max_shard_bytes: MaxShardBytes = DEFAULT_BYTES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """PASCAL VOC 2012, segmentation: ROOT is VOCdevkit, VOC2012, or holds one of them."""
    from pipeline.datasets.voc import open_voc

    _convert(open_voc(root, split), dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


@shards_app.command()
def coco(
    root: Root,
    dest: Dest,
    *,
    split: Annotated[str, typer.Option(help="val2017, train2017, val2014 or train2014.")] = "val2017",
    shard_size: ShardSize = DEFAULT_SIZE,
    max_shard_bytes: MaxShardBytes = DEFAULT_BYTES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """COCO, objects and captions: ROOT holds annotations/ and val2017/."""
    from pipeline.datasets.coco import open_coco

    _convert(open_coco(root, split), dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


@shards_app.command("imagenet-s")
def imagenet_s(
    root: Root,
    dest: Dest,
    *,
    split: Annotated[str, typer.Option(help="validation or train-semi.")] = "validation",
    variant: Annotated[int, typer.Option(help="How many classes: 50, 300 or 919.")] = 919,
    categories: Annotated[
        Path | None, typer.Option(help="The authors' ImageNetS_categories file, where class folders lack.")
    ] = None,
    shard_size: ShardSize = DEFAULT_SIZE,
    max_shard_bytes: MaxShardBytes = DEFAULT_BYTES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """ImageNet-S: ROOT is ImageNetS919, ImageNetS300 or ImageNetS50, or holds it."""
    from pipeline.datasets.imagenet_s import open_imagenet_s

    dataset = open_imagenet_s(root, split, variant, categories)
    _convert(dataset, dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


@shards_app.command()
def openimages(
    root: Root,
    dest: Dest,
    *,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; else ROOT/validation, train or test.")
    ] = None,
    shard_size: ShardSize = DEFAULT_SIZE,
    max_shard_bytes: MaxShardBytes = DEFAULT_BYTES,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Open Images V7, point labels: ROOT holds the two oidv7-*.csv tables and the images' folder."""
    from pipeline.datasets.openimages import open_openimages

    dataset = open_openimages(root, split, images)
    _convert(dataset, dest, (shard_size, max_shard_bytes), resume=resume, overwrite=overwrite)


def _convert(
    dataset: TruthDataset, dest: str, limits: tuple[int, int], *, resume: bool, overwrite: bool
) -> None:
    from pipeline.datasets.writing import ShardLimits, write_shards

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
        "classes), conversion.json (every count, and the names of what was skipped)",
        soft_wrap=True,
    )


def _counts(conversion: Conversion) -> Table:
    from rich.text import Text

    table = Table("images", "count", "such as")
    table.add_row("listed", str(conversion.images), "")
    table.add_row("written", str(conversion.written), "")
    for reason, count in sorted(conversion.skipped.items()):
        names = [name for name, _ in conversion.skipped_names[reason][:NAMES_SHOWN]]
        table.add_row(f"skipped: {reason}", str(count), Text(repr(names)[1:-1]))
    for kind, count in sorted(conversion.left_out.items()):
        names = conversion.left_out_names.get(kind, [])[:NAMES_SHOWN]
        table.add_row(f"records left out: {kind}", str(count), Text("; ".join(names)))
    return table
