"""The dataset card of an export: README.md, as the Hugging Face Hub shows it beside the files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import PurePosixPath

from pipeline.config.schema import JobConfig
from pipeline.export.write import ExportOptions, ExportTotals
from pipeline.text import printable

MAX_CLASSES_LISTED = 200
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
# layouts of which the Hub's viewer needs no description
_CONTENTS = {
    "coco": "COCO JSON (`annotations.json`, or one file a shard in `annotations/`)",
    "voc": "PASCAL VOC 2012 (`VOCdevkit/VOC2012`)",
    "mmseg": "mmsegmentation (`img_dir`, `ann_dir`, `splits`)",
    "yolo-seg": "YOLO segmentation (`data.yaml`, `images`, `labels`)",
    "webdataset": "WebDataset shards: image, label map `seg.png`, `json`",
}


def dataset_card(
    name: str, options: ExportOptions, config: JobConfig, totals: ExportTotals, meanings: Mapping[str, str]
) -> str:
    """Return the text of a dataset card; the licence is left to the owner of the images.

    Args:
        name: of the dataset.
        options: what was written.
        config: of the job that made the masks.
        totals: what became of it.
        meanings: description of each of the totals' counts.
    """
    counts = [f"- {count:,} {meanings[kind]}" for kind, count in sorted(totals.counts.items()) if count]
    return "\n".join(
        [
            "---",
            f"pretty_name: {json.dumps(printable(name))}",
            "# license: to be chosen by the owner of the images; the masks are made by a program",
            "task_categories:",
            "- image-segmentation",
            "tags:",
            "- pseudo-masks",
            "- legrad",
            "---",
            "",
            f"# {escaped(name)}",
            "",
            "Images with pseudo-masks: where an image-text model finds each text in the image. Nobody has "
            "drawn or checked them.",
            "",
            f"Format: {_CONTENTS[options.format]}. Class names: `classes.txt`, line i names class i.",
            "",
            "## Counts",
            "",
            f"- {totals.written:,} label maps, annotations or objects",
            *counts,
            "",
            "## How it was made",
            "",
            f"- Program: legrad-pipeline {escaped(version('legrad-pipeline'))}, LeGrad (arXiv:2404.03214)",
            f"- Model: {escaped(_model_name(config))}",
            f"- Masks: {escaped(_settings(config))}",
            "",
            *_class_lines(totals.class_names),
        ]
    )


def escaped(text: str) -> str:
    """Return untrusted text as Markdown that shows it, on one line."""
    return _PUNCTUATION.sub(r"\\\1", printable(text))


def _model_name(config: JobConfig) -> str:
    # a path names folders of the machine
    names = [PurePosixPath(str(part)).name for part in (config.model.name, config.model.pretrained) if part]
    return ", ".join(names)


def _settings(config: JobConfig) -> str:
    known = config.masks.model_dump(mode="json", exclude_none=True)
    return ", ".join(f"{key} {value}" for key, value in known.items() if isinstance(value, str | int | float))


def _class_lines(class_names: Mapping[int, str]) -> list[str]:
    if not class_names:
        return ["The prompts are captions without classes.", ""]
    listed = [f"- {number}: {escaped(name)}" for number, name in sorted(class_names.items())]
    further = len(listed) - MAX_CLASSES_LISTED
    more = [f"- {further:,} more"] if further > 0 else []
    return [f"## Classes ({len(listed):,})", "", *listed[:MAX_CLASSES_LISTED], *more, ""]
