"""Peak memory of annotating one shard: does it grow with the shard?

    python tests/bench/memory_by_shard_size.py [--sizes 100 10000] [--rounds 3] [--write]

Every run is a process of its own: it loads the demo model (small input and one layer, since only what is held
matters), annotates one shard with heat maps and all masks stored, and reports its peak resident memory, and
what it had before the shard. Shards repeat the demo's images under new keys with captions of their own, so
that no cache helps. Rounds alternate; medians. Prints one JSON row
a size.
"""

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from demo_inputs import demo_files
from published import figure_parser, recording

from pipeline import storage
from pipeline.config.load import parse_config
from pipeline.demo import assets
from pipeline.run.worker import build_annotator


def write_shard(path: Path, samples: int) -> None:
    images = []
    for shard in assets.demo_shard_paths("heldout"):
        with tarfile.open(shard) as tar:
            images += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            captions = {"captions": [f"picture {number}", f"thing {number} of {samples}"]}
            content = {"jpg": images[number % len(images)], "json": json.dumps(captions).encode()}
            for field, data in content.items():
                info = tarfile.TarInfo(f"{number:08d}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def child(shard: str, out: str) -> None:
    config = parse_config(
        {
            "input": {"shards": [shard], "image": "jpg", "caption": "json:captions"},
            "model": {"name": assets.DEMO_MODEL_NAME, "pretrained": "demo", "layers": 1, "image_size": 48},
            "prompts": {"source": "captions"},
            "output": {"dir": out, "heatmap": True},
        }
    )
    annotator = build_annotator(config, {"config_hash": "memory"}, cpus=2, device="cpu")
    before = peak_mib()
    report = annotator.annotate(storage.list_shards([shard])[0])
    print(json.dumps({"before_mib": before, "peak_mib": peak_mib(), "rows": report.counts.rows}))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure both sizes in turn."""
    parser = figure_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 10_000], help="samples in a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("SHARD", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in arguments.sizes}
    with recording(__file__, arguments, data=demo_files("heldout")) as record:
        with tempfile.TemporaryDirectory() as folder:
            shards = {size: Path(folder) / f"{size}.tar" for size in arguments.sizes}
            for size, path in shards.items():
                write_shard(path, size)
            for _ in range(arguments.rounds):
                for size, path in shards.items():
                    runs[size].append(in_own_process(path, Path(folder) / "out"))
        for size, found in runs.items():
            medians = {name: statistics.median(run[name] for run in found) for name in found[0]}
            record("sizes", {"samples": size, **medians})


def in_own_process(shard: Path, out: Path) -> dict[str, float]:
    """Annotate a shard in a process of its own, and return its memory."""
    command = [sys.executable, __file__, "--child", str(shard), str(out)]
    found: dict[str, float] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
