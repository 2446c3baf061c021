"""WebDataset shards: each image with its label map beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import webdataset

from pipeline import storage
from pipeline.export.export_samples import ExportSample, index_png
from pipeline.export.shard_files import ShardFiles
from pipeline.shards.ground_truth import LABEL_MAP_FIELD


@dataclass(frozen=True)
class WebDatasetExport:
    """DEST/SHARD.tar with NAME.jpg (or png), NAME.seg.png and NAME.json for each sample.

    The JSON holds `key` (the sample's own), `captions` (prompts), `class_ids`, `class_names` and
    `similarities`, aligned with each other: what `pipeline.shards.ground_truth` reads too.
    """

    def export_shard(self, number: int, samples: Iterable[ExportSample], files: ShardFiles) -> int:
        """Write one tar, whole or not at all; return how many label maps it holds.

        Args:
            number: of the shard in the job; plays no part.
            samples: read one at a time.
            files: writes it.

        Raises:
            UserError: a row has no class, or one beyond 254.
            OutputError: the tar cannot be written.
        """
        del number
        written = 0
        with storage.Spool() as spool:
            # nothing of the machine or the hour: a second export writes the same bytes
            with webdataset.TarWriter(spool, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:
                for sample in samples:
                    tar.write({"__key__": sample.name, **_members(sample)})
                    written += 1
            files.publish("", f"{files.shard_id}.tar", spool)
        return written

    def finish(self, dest: str, shard_ids: Iterable[str], class_names: Mapping[int, str]) -> None:
        """Do nothing: every tar is complete by itself."""


def _members(sample: ExportSample) -> dict[str, bytes]:
    document = {
        "key": sample.key,
        "captions": [row["prompt"] for row in sample.rows],
        "class_ids": [row["class_id"] for row in sample.rows],
        "class_names": [row["class_name"] for row in sample.rows],
        "similarities": [row["similarity"] for row in sample.rows],
    }
    return {
        sample.suffix: sample.image,
        LABEL_MAP_FIELD: index_png(sample.label_map()),
        "json": json.dumps(document).encode(),
    }
