"""Seconds, and memory, of explaining images on the CPU, beside other packages and a forward pass alone.

    python tests/bench/explain.py [--write]     half an hour or more on two cores
    python tests/bench/explain.py --models ViT-B-16:224 --prompts 1,4,16,64 --layers 2,all --batches 1,8 \
        --ways ours,forward,authors,torchcam,grad_cam --rounds 5

Each way runs in a process of its own, on the same weights and inputs, and they take turns; medians. The
other packages (`legrad_torch` 1.1 with `open_clip_torch` 2.23.0, `torchcam`, `grad-cam`) get an environment
of their own in .cache/bench. Prints one JSON row a case as soon as it is known; `ratio` says how many times
as long as `ours` a way takes. torchcam's model is torchvision's, with random weights: the same work, other
maps.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from published import figure_parser, recording

ROOT = Path(__file__).parents[2]
OTHERS = ROOT / ".cache" / "bench" / "others"
OTHER_PACKAGES = ("legrad_torch==1.1", "open_clip_torch==2.23.0", "torchcam>=0.5", "grad-cam>=1.5.5")
IN_OTHERS = ("authors", "torchcam", "grad_cam")


@dataclass(frozen=True)
class Case:
    """One row."""

    model: str
    image_size: int
    batch: int
    prompts: int
    layers: int | str
    precision: str
    ways: tuple[str, ...]
    compile: bool = False


def default_cases() -> list[Case]:
    big, small = ("ViT-B-16", 448), ("ViT-B-16", 224)
    both, floor = ("ours", "authors"), ("ours", "forward")
    precisions = ["fp32", "bf16"] if has_bf16_instructions() else ["fp32"]
    cases = [Case(*big, 1, prompts, 2, "fp32", both) for prompts in (1, 4, 16)]
    cases.append(Case(*big, 1, 4, "all", "fp32", both))
    cases += [Case(*big, 1, prompts, 2, "bf16", both) for prompts in (1, 4, 16) if "bf16" in precisions]
    cases += [Case(*big, 8, prompts, 2, "fp32", floor) for prompts in (1, 4, 16)]
    cases += [Case(*small, 8, prompts, 2, precision, floor) for prompts in (1, 4) for precision in precisions]
    cases.append(Case("ViT-B-16-SigLIP", 224, 8, 1, 2, "fp32", floor))
    cases.append(Case(*small, 1, 4, 2, "fp32", ("ours", "forward", "authors", "torchcam", "grad_cam")))
    return cases


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    sized = [entry.split(":") for entry in arguments.models.split(",")]
    return [
        Case(
            model,
            int(size),
            int(batch),
            int(prompts),
            layers if layers == "all" else int(layers),
            precision,
            tuple(arguments.ways.split(",")),
            arguments.compile,
        )
        for model, size in sized
        for batch in arguments.batches.split(",")
        for precision in arguments.precisions.split(",")
        for layers in arguments.layers.split(",")
        for prompts in arguments.prompts.split(",")
    ]


def has_bf16_instructions() -> bool:
    return bool({"avx512_bf16", "amx_bf16"} & set(processor_flags()))


def processor_flags() -> list[str]:
    return next(line.split() for line in _processor_lines() if line.startswith("flags"))


def _processor_lines() -> list[str]:
    return Path("/proc/cpuinfo").read_text().splitlines()


def make_others_environment() -> None:
    """Install the packages that are compared with, with the same torch as here."""
    if (OTHERS / "done").exists():
        return
    import torch
    import torchvision

    subprocess.run([sys.executable, "-m", "venv", OTHERS], check=True)
    same = [f"{module.__name__}=={module.__version__.split('+')[0]}" for module in (torch, torchvision)]
    subprocess.run([OTHERS / "bin/python", "-m", "pip", "install", "-q", *same, *OTHER_PACKAGES], check=True)
    (OTHERS / "done").touch()


class Server:
    """One way of explaining, in its own process."""

    def __init__(self, way: str) -> None:
        self.way = way
        python = OTHERS / "bin/python" if way in IN_OTHERS else Path(sys.executable)
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("explain_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in reply:
            raise RuntimeError(f"{self.way}: {reply['error']}")
        return reply

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    servers = {way: Server(way) for way in case.ways}
    try:
        row: dict[str, Any] = {"versions": {}, "errors": {}}
        for way, server in list(servers.items()):
            # The others know no bf16 here: they stay in fp32, and the row says what that compares.
            precision = "fp32" if way in IN_OTHERS else case.precision
            try:
                request = asdict(case) | {"way": way, "precision": precision, "threads": threads}
                row["versions"][way] = server.ask(op="prepare", **request)["versions"]
            except RuntimeError as error:
                row["errors"][way] = str(error)
                servers.pop(way).close()
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in servers}
        for _ in range(rounds):
            for way, server in servers.items():
                runs[way].append(server.ask(op="run"))
        row |= summarise(runs, case.batch * case.prompts)
        if {"ours", "authors"} <= servers.keys():
            row["largest_difference_from_authors"] = largest_difference(servers)
        return row
    finally:
        for server in servers.values():
            server.close()


def summarise(runs: dict[str, list[dict[str, float]]], maps: int) -> dict[str, Any]:
    seconds = {way: [run["seconds"] for run in some] for way, some in runs.items()}
    medians = {way: statistics.median(some) for way, some in seconds.items()}
    return {
        "median_s": {way: round(median, 4) for way, median in medians.items()},
        "quartiles_s": {
            way: [round(float(q), 4) for q in np.quantile(some, (0.25, 0.75))]
            for way, some in seconds.items()
        },
        "ratio": {
            way: round(median / medians["ours"], 3) for way, median in medians.items() if "ours" in medians
        },
        "ours_maps_per_s": round(maps / medians["ours"], 2) if "ours" in medians else None,
        "peak_mib": {way: round(max(run["peak_mib"] for run in some)) for way, some in runs.items()},
        "added_mib": {way: round(max(run["added_mib"] for run in some)) for way, some in runs.items()},
    }


def largest_difference(servers: dict[str, Server]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        maps = []
        for way in ("ours", "authors"):
            servers[way].ask(op="maps", path=f"{folder}/{way}.npy")
            maps.append(np.load(f"{folder}/{way}.npy"))
    return float(np.abs(maps[0] - maps[1]).max())


def main() -> None:
    """Measure the default cases, or those that the options describe."""
    parser = figure_parser(__doc__)
    parser.add_argument("--models", help="name:size, comma-separated; without it the default cases run")
    parser.add_argument("--prompts", default="1,4")
    parser.add_argument("--layers", default="2")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--precisions", default="fp32")
    parser.add_argument("--ways", default="ours,forward,authors")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    cases = chosen_cases(arguments) if arguments.models else default_cases()
    if any(way in IN_OTHERS for case in cases for way in case.ways):
        make_others_environment()
    also = ["tests/bench/explain_server.py", "tests/golden/recipe.py"]
    with recording(__file__, arguments, also=also) as record:
        for case in cases:
            record("cases", asdict(case) | measure(case, arguments.rounds, arguments.threads))


if __name__ == "__main__":
    main()
