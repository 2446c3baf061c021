"""What `legrad status` costs on a folder of many shards, before and after it keeps footers, and compacted.

    python tests/bench/status_of_many_shards.py [--shards 10000] [--rows 50] [--s3-shards 300] [--write]

The folder is made here: shards of the same random rows. A process of its own reads the status each time: with
an empty cache, with a filled one, and on the compacted folder; then the same, with fewer shards, on an S3
server on this machine. CPU time is that of the process; the server's is not in it. One
JSON row a folder.
"""

import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from published import figure_parser, recording

from pipeline import storage
from pipeline.config.load import parse_config
from pipeline.demo.assets import DEMO_MODEL_NAME
from pipeline.output.compaction import write_compaction
from pipeline.output.compaction_plan import plan_compaction
from pipeline.output.folder import JOB_FILE, SHARDS_FILE, OutputFolder
from pipeline.output.records import JobStamp, job_document
from pipeline.output.tables import shard_list_bytes
from pipeline.output.writer import ROWS_SCHEMA, ShardWriter
from pipeline.storage import ShardSource

STATUS = "import sys; from pipeline.output.status import read_status; read_status(sys.argv[1])"
STAMP = JobStamp("0123456789abcdef", "0", {})
# before footers are kept, files have to be older than a minute
AGE_S = 3600


def random_rows(count: int) -> pa.Table:
    """Rows of accepted prompts, with masks and heat maps of random bytes."""
    generator = np.random.default_rng(0)
    letters = list("0123456789abcdefghijklmnopqrstuv")
    rows = [
        {
            "key": f"{index:06d}",
            "sample_index": index,
            "prompt_index": 0,
            "prompt": f"thing {index % 10}",
            "prompt_truncated": False,
            "class_id": index % 10,
            "status": "ok",
            "image_height": 480,
            "image_width": 640,
            "similarity": float(generator.random()),
            "peak": float(generator.random()),
            "threshold": 0.5,
            "area": 1000,
            "bbox_xywh": [0.0, 0.0, 10.0, 10.0],
            "mask": {"size": [480, 640], "counts": "".join(generator.choice(letters, 200))},
            "heatmap": generator.bytes(196),
            "heatmap_height": 14,
            "heatmap_width": 14,
        }
        for index in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=ROWS_SCHEMA)


def make_output(out: str, shards: int, rows: int) -> None:
    """Write the complete output of a job."""
    folder, content, listed = OutputFolder(out), random_rows(rows), []
    for number in range(shards):
        name = f"file:///corpus/{number:06d}.tar"
        shard = ShardSource(storage.shard_id(name), name, name, 10_240, number)
        with ShardWriter(shard, {"config_hash": STAMP.config_hash, "attempt": f"{number:012x}"}) as writer:
            writer.add(content, [], {"annotated": rows})
            writer.publish(out)
        listed.append(
            {
                "shard_id": shard.shard_id,
                "shard": name,
                "size_bytes": shard.size_bytes,
                "mtime_ns": shard.mtime_ns,
                "etag": None,
                "moved_from": None,
            }
        )
    model = {"name": DEMO_MODEL_NAME, "pretrained": "demo"}
    config = parse_config({"input": {"shards": "/corpus/*.tar"}, "model": model, "output": {"dir": out}})
    folder.publish(JOB_FILE, job_document(config, STAMP))
    folder.publish(SHARDS_FILE, shard_list_bytes(listed))
    if "://" not in out:
        for path in Path(out).glob("*/*.parquet"):
            os.utime(path, (time.time() - AGE_S,) * 2)


def measured(out: str, rounds: int = 3) -> dict[str, float]:
    """Seconds and CPU seconds of a process that reads the status; the median of some rounds."""
    walls, cpus = [], []
    for _ in range(rounds):
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", STATUS, out], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - begin)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall_s": round(float(np.median(walls)), 2), "cpu_s": round(float(np.median(cpus)), 2)}


def figures_of(out: str, cache: Path, *, settle_s: float = 0.0) -> dict[str, dict[str, float]]:
    """Measure the status with no cache, with a filled one, and of a compacted copy."""
    os.environ["XDG_CACHE_HOME"] = "/dev/null"
    found = {"without_cache": measured(out)}
    time.sleep(settle_s)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    measured(out, 1)
    found["cached"] = measured(out)
    write_compaction(plan_compaction(out, 512), f"{out}-compacted")
    return {**found, "compacted": measured(f"{out}-compacted")}


def figures_on_s3(folder: Path, shards: int, rows: int) -> dict[str, dict[str, float]]:
    """Do the same on an S3 server of this process."""
    import pyarrow.fs as pafs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    store = pafs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True)
    store.create_dir("masks")
    try:
        make_output("s3://masks/run-1", shards, rows)
        return figures_of("s3://masks/run-1", folder / "cache", settle_s=61)
    finally:
        server.stop()


def main() -> None:
    """Measure a local folder, and one on an S3 server."""
    parser = figure_parser(__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=50, help="annotation rows of each shard")
    parser.add_argument("--s3-shards", type=int, default=300, help="0: no S3")
    arguments = parser.parse_args()
    with recording(__file__, arguments) as record, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_output(str(folder / "out"), arguments.shards, arguments.rows)
        local = figures_of(str(folder / "out"), folder / "cache")
        record("folders", {"where": "local", "shards": arguments.shards, **local})
        if arguments.s3_shards:
            on_s3 = figures_on_s3(folder, arguments.s3_shards, arguments.rows)
            record("folders", {"where": "S3", "shards": arguments.s3_shards, **on_s3})


if __name__ == "__main__":
    main()
