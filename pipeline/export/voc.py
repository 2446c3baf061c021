"""A tree of images and label maps, as mmsegmentation and readers of PASCAL VOC take it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline import storage
from pipeline.export.export_samples import ExportSample, index_png


@dataclass(frozen=True)
class VocExport:
    """DEST/img_dir/SPLIT/SHARD/NAME.jpg and, of the same name, DEST/ann_dir/SPLIT/SHARD/NAME.png.

    A label map is a palette PNG: 0 background, class ids, 255 ignored. `splits/SPLIT/SHARD.txt` lists the
    names of a shard.

    Attributes:
        dest: folder: local path, s3:// or gs://.
        split: name of the subfolder.
    """

    dest: str
    split: str

    def export_shard(self, number: int, shard_id: str, samples: Iterable[ExportSample]) -> int:
        """Write a shard's images and label maps; returns how many label maps.

        Args:
            number: of the shard in the job; plays no part.
            shard_id: names the subfolder.
            samples: read one at a time.

        Raises:
            UserError: a row has no class, or one beyond 254.
            OutputError: something cannot be written.
        """
        del number
        images, labels = (
            storage.join_url(self.dest, kind, self.split, shard_id) for kind in ("img_dir", "ann_dir")
        )
        names = []
        for sample in samples:
            storage.publish(labels, f"{sample.name}.png", index_png(sample.label_map()))
            storage.publish(images, f"{sample.name}.{sample.suffix}", sample.image)
            names.append(f"{shard_id}/{sample.name}\n")
        listed = storage.join_url(self.dest, "splits", self.split)
        storage.publish(listed, f"{shard_id}.txt", "".join(names).encode())
        return len(names)
