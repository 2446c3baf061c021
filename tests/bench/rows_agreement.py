"""How far the rows of one corpus differ with the batch, the threads, the processor and the precision.

    python tests/bench/rows_agreement.py [--set newartist] [--device cpu] [--write]

Annotates a set of the demo's scenes with the demo's configuration in each way, and compares the rows of two
ways. `other_rows` differ in key, prompt or status; `beyond` are masks with an IoU below .99 and more than two
pixels of difference. The way without AVX-512 runs in a process of its own, in which torch, MKL and oneDNN are
set to AVX2.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from demo_inputs import SETS, demo_files, demo_job
from published import figure_parser, recording

from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.model import load_explainer
from pipeline.config.schema import JobConfig

sys.path.append(str(Path(__file__).parents[2]))

from tests.helpers.row_agreement import agreement

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


class Way(NamedTuple):
    """One way to annotate: precision, images in a batch, threads, and whether without AVX-512."""

    precision: str
    batch_size: int
    threads: int
    is_avx2: bool = False


FP32, BF16, FP16 = (Way(precision, 32, 1) for precision in ("fp32", "bf16", "fp16"))
# what is compared: its name, the way, and the way that it is held against
CASES: dict[str, tuple[Way, Way]] = {
    "batches of 1": (Way("fp32", 1, 1), FP32),
    "batches of 7": (Way("fp32", 7, 1), FP32),
    "batches of 32, two threads": (Way("fp32", 32, 2), FP32),
    "batches of 7, two threads": (Way("fp32", 7, 2), FP32),
    "without AVX-512 (torch, MKL and oneDNN set to AVX2)": (Way("fp32", 32, 1, is_avx2=True), FP32),
    "bf16, against fp32": (BF16, FP32),
    "fp16, against fp32": (FP16, FP32),
    "bf16, batches of 1 against 32": (Way("bf16", 1, 1), BF16),
    "bf16, batches of 7 against 32": (Way("bf16", 7, 1), BF16),
}


def main() -> None:
    """Compare the ways of each case."""
    arguments = options()
    if arguments.rows_of:
        *way, path = arguments.rows_of
        rows = rows_here(arguments, Way(way[0], int(way[1]), int(way[2])))
        Path(path).write_bytes(pickle.dumps(rows))
        return

    @cache
    def rows_of(way: Way) -> list[dict[str, Any]]:
        return rows_in_own_process(arguments, way) if way.is_avx2 else rows_here(arguments, way)

    with recording(__file__, arguments, data=demo_files(arguments.set)) as record:
        for name in arguments.cases:
            record("cases", row_of(name, rows_of))


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = figure_parser(__doc__)
    parser.add_argument("--set", default="newartist", choices=SETS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows-of", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def row_of(name: str, rows_of: Callable[[Way], list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the agreement of a case."""
    way, expected = CASES[name]
    vectors = "AVX2" if way.is_avx2 else torch.backends.cpu.get_cpu_capability()
    return {"case": name, "vectors": vectors, **vars(agreement(rows_of(way), rows_of(expected)))}


def rows_here(arguments: argparse.Namespace, way: Way) -> list[dict[str, Any]]:
    """Annotate in this process."""
    torch.set_num_threads(way.threads)
    with tempfile.TemporaryDirectory() as out:
        changes = [f"output.dir={out}", f"run.batch_size={way.batch_size}"]
        config = demo_job([arguments.set], [*changes, f"model.precision={way.precision}"])
        return _annotated(config, arguments.device)


def rows_in_own_process(arguments: argparse.Namespace, way: Way) -> list[dict[str, Any]]:
    """Annotate in a process of its own that computes without AVX-512."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        words = [way.precision, str(way.batch_size), str(way.threads), str(path)]
        command = [sys.executable, __file__, "--set", arguments.set, "--device", arguments.device]
        subprocess.run([*command, "--rows-of", *words], env={**os.environ, **AVX2}, check=True)
        rows: list[dict[str, Any]] = pickle.loads(path.read_bytes())
        return rows


def _annotated(config: JobConfig, device: str) -> list[dict[str, Any]]:
    explainer = load_explainer(config.model, device)
    annotator = ShardAnnotator(config, explainer, decode_threads=2, metadata={"config_hash": "h"})
    rows: list[dict[str, Any]] = []
    for shard in storage.list_shards(config.input.shards):
        annotator.annotate(shard)
        path = Path(config.output.dir) / "annotations" / f"{shard.shard_id}.parquet"
        rows += pq.read_table(path).to_pylist()
    annotator.close()
    return rows


if __name__ == "__main__":
    main()
