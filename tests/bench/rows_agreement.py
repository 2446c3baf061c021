"""How far the rows of one corpus differ with the batch, the threads and the processor.

    python tests/bench/rows_agreement.py [--set newartist] [--precision bf16] [--write rows.pickle]
    ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \\
        python tests/bench/rows_agreement.py --against rows.pickle

Annotates the demo's scenes with the demo's configuration (captions and background texts compete, two sizes,
refined) in batches of 32 on one thread, and holds every other way against that: batches of 1 and 7, two
threads. With `--against`, the rows that another process wrote, perhaps elsewhere.
`other_rows` differ in key, prompt or status; `beyond` are masks with an IoU below .99 and more than two
pixels of difference.
"""

import argparse
import dataclasses
import json
import pickle
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import torch
from environment import environment

from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.model import load_explainer
from pipeline.config.load import load_config
from pipeline.config.schema import JobConfig
from pipeline.demo import assets

sys.path.append(str(Path(__file__).parents[2]))

from tests.helpers.row_agreement import agreement

WAYS = ((1, 1), (7, 1), (32, 2), (7, 2))


def main() -> None:
    """Print one JSON row for each way."""
    options = _options()
    head = {"bench": "rows_agreement", **environment(), "vectors": torch.backends.cpu.get_cpu_capability()}
    head |= {"set": options.set, "precision": options.precision, "device": options.device}
    expected = _rows(options, 32, 1)
    if options.write:
        options.write.write_bytes(pickle.dumps(expected))
    if options.against:
        other = pickle.loads(options.against.read_bytes())
        print(json.dumps(head | {"against": options.against.name} | _agreement(expected, other)), flush=True)
        return
    for batch_size, threads in WAYS:
        agreement = _agreement(_rows(options, batch_size, threads), expected)
        print(json.dumps(head | {"batch_size": batch_size, "threads": threads} | agreement), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--set", default="newartist", choices=("heldout", "newartist"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help="where to leave the rows for another process")
    parser.add_argument("--against", type=Path, help="rows that another process left")
    return parser.parse_args()


def _agreement(rows: list[dict], expected: list[dict]) -> dict:
    return dataclasses.asdict(agreement(rows, expected))


def _rows(options: argparse.Namespace, batch_size: int, threads: int) -> list[dict]:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as out:
        shards = [f"input.shards={json.dumps([str(path) for path in assets.demo_shard_paths(options.set)])}"]
        changes = [
            f"output.dir={out}",
            f"run.batch_size={batch_size}",
            f"model.precision={options.precision}",
        ]
        return _annotated(load_config(assets.demo_config_path(), [*shards, *changes]), options.device)


def _annotated(config: JobConfig, device: str) -> list[dict]:
    explainer = load_explainer(config.model, device)
    annotator = ShardAnnotator(config, explainer, decode_threads=2, metadata={"config_hash": "h"})
    rows: list[dict] = []
    for shard in storage.list_shards(config.input.shards):
        annotator.annotate(shard)
        path = Path(config.output.dir) / "annotations" / f"{shard.shard_id}.parquet"
        rows += pq.read_table(path).to_pylist()
    annotator.close()
    return rows


if __name__ == "__main__":
    main()
