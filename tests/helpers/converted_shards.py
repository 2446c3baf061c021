"""What is in the shards that `legrad shards` wrote, as webdataset's own reader groups it."""

import json
from pathlib import Path

from webdataset.tariterators import group_by_keys, tar_file_expander


def converted(folder):
    """Samples by key, in order; JSON members are parsed, texts decoded."""
    samples = {}
    for path in sorted(Path(folder).glob("*.tar")):
        with path.open("rb") as stream:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                fields = {name: value for name, value in sample.items() if not name.startswith("__")}
                fields["json"] = json.loads(fields["json"])
                if "txt" in fields:
                    fields["txt"] = fields["txt"].decode()
                assert sample["__key__"] not in samples
                samples[sample["__key__"]] = fields
    return samples


def record(folder):
    """The counts in conversion.json."""
    return json.loads((Path(folder) / "conversion.json").read_text())
