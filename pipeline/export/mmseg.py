"""A tree of images and label maps, as mmsegmentation's BaseSegDataset reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.export.export_samples import ExportSample, index_png
from pipeline.export.shard_files import ShardFiles, joined_lists


@dataclass(frozen=True)
class MmsegExport:
    """DEST/img_dir/SPLIT/SHARD/NAME.jpg and, of the same name, DEST/ann_dir/SPLIT/SHARD/NAME.png.

    A label map is a palette PNG: 0 background, class ids, 255 ignored. `splits/SPLIT.txt` lists the names of
    all shards, as `ann_file` takes them.

    Attributes:
        split: name of the subfolders and of the list.
    """

    split: str

    def export_shard(self, number: int, samples: Iterable[ExportSample], files: ShardFiles) -> int:
        """Write a shard's images and label maps; return how many label maps.

        Args:
            number: of the shard in the job; plays no part.
            samples: read one at a time.
            files: writes them.

        Raises:
            UserError: a row has no class, or one beyond 254.
            OutputError: something cannot be written.
        """
        del number
        names = []
        for sample in samples:
            below = f"{self.split}/{files.shard_id}"
            files.publish(f"ann_dir/{below}", f"{sample.name}.png", index_png(sample.label_map()))
            # the reader takes one suffix for all images
            files.publish(f"img_dir/{below}", f"{sample.name}.jpg", sample.as_jpeg())
            names.append(f"{files.shard_id}/{sample.name}")
        files.publish_list(names)
        return len(names)

    def finish(self, dest: str, shard_ids: Iterable[str], class_names: Mapping[int, str]) -> None:
        """Write the list of all names."""
        del class_names
        joined_lists(dest, shard_ids, "splits", f"{self.split}.txt")
