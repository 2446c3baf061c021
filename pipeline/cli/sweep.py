"""Compare mask settings and baselines over several models on ground truth:

python -m pipeline.cli.sweep configs/protocol/sweep.yaml --voc VOCdevkit --out out/sweep
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from pipeline import storage
from pipeline.cli.annotate import annotate_with_config
from pipeline.cli.common import ENVIRONMENT_ERROR, INCOMPLETE, INVALID_INPUT, open_console
from pipeline.console import PrintableConsole
from pipeline.datasets.voc import open_voc
from pipeline.datasets.writing import write_shards
from pipeline.errors import OutputError, PipelineError, UserError
from pipeline.evaluation.baseline_masks import write_baseline_masks
from pipeline.evaluation.mask_scores import WrittenMasks, collect_written_masks
from pipeline.evaluation.sweep import (
    Variant,
    VariantScores,
    as_json,
    as_markdown,
    read_sweep,
    score_variant,
)
from pipeline.output.folder import OutputFolder
from pipeline.shards.ground_truth import list_truth_shards
from pipeline.storage import ShardSource, shown_url

SHARDS_FOLDER, TABLE_FILE, JSON_FILE = "shards", "sweep.md", "sweep.json"


def sweep(
    config: Annotated[str, typer.Argument(metavar="SWEEP.yaml", help="The models and variants.")],
    *,
    voc: Annotated[
        str | None,
        typer.Option(
            metavar="ROOT", help="PASCAL VOC 2012 as its owners ship it: VOCdevkit or VOC2012, or above."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of VOC: name of a list in ImageSets/Segmentation.")
    ] = "val",
    shards: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Shards with ground truth, in place of --voc. Repeatable."),
    ] = None,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for shards, masks and tables.")] = (
        "out/sweep"
    ),
) -> None:
    """Annotate VOC with every variant of every model, and print a table of the scores of the masks.

    Run the same command again to resume: converted images and finished variants are skipped.
    """
    console = open_console()
    if (voc is None) == (not shards):
        raise UserError("expected one of --voc ROOT and --shards PATTERN")
    patterns = list(shards or [storage.join_url(storage.join_url(out, SHARDS_FOLDER), "*.tar")])
    # read before anything is converted: a wrong key must not cost the time
    variants = read_sweep(config, patterns, out)
    if voc is not None:
        conversion = write_shards(open_voc(voc, split), storage.join_url(out, SHARDS_FOLDER), resume=True)
        console.print(f"VOC {split}: {conversion.written:,} of {conversion.images:,} images in shards")
    sources = list_truth_shards(patterns)
    scores: list[VariantScores] = []
    for scored in _scored(variants, sources, console):
        scores.append(scored)
        storage.publish(out, TABLE_FILE, as_markdown(scores).encode())
        storage.publish(out, JSON_FILE, as_json(scores).encode())
    console.print(as_markdown(scores), soft_wrap=True)
    if len(scores) < len(variants):
        raise typer.Exit(INCOMPLETE)


def _scored(
    variants: Sequence[Variant], shards: Sequence[ShardSource], console: PrintableConsole
) -> Iterator[VariantScores]:
    """Annotate and score one variant after the other; those that are not complete are named and skipped."""
    first: dict[str, WrittenMasks] = {}
    for number, variant in enumerate(variants, start=1):
        console.print(f"{number} of {len(variants)}: {variant.model}, {variant.name}", soft_wrap=True)
        job_hash = _annotated(variant, shards, console)
        if job_hash is None:
            console.print(f"{shown_url(variant.config.output.dir)}: not complete; not scored", soft_wrap=True)
            continue
        folder, settings = OutputFolder(variant.config.output.dir), variant.config
        written = collect_written_masks(folder, shards, settings.input, settings.prompts.source, job_hash)
        if written.damaged_files:
            raise OutputError("; ".join(written.damaged_files[:3]))
        yield score_variant(variant, written, first.get(variant.model))
        if all(earlier.model != variant.model for earlier in variants[: number - 1]):
            first[variant.model] = written


def _annotated(variant: Variant, shards: Sequence[ShardSource], console: PrintableConsole) -> str | None:
    """Annotate the shards of a variant that are left; return the hash of its files, None if some are left."""
    if variant.baseline is None:
        if annotate_with_config(variant.config, console):
            return None
        return OutputFolder(variant.config.output.dir).job().config_hash
    return write_baseline_masks(
        variant.config,
        shards,
        variant.baseline,
        on_shard=lambda shard: console.print(f"done: {shown_url(shard.url)}", soft_wrap=True),
    )


def main() -> None:
    """Run the program; an error of the user's input takes one screen, without a traceback."""
    try:
        typer.run(sweep)
    except PipelineError as error:
        open_console(stderr=True).print(f"sweep: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(INVALID_INPUT if isinstance(error, UserError) else ENVIRONMENT_ERROR)


if __name__ == "__main__":
    main()
