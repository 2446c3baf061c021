"""What parsers of untrusted bytes do with damaged inputs: tests/fuzz, with other inputs than `make test` has.

    python tests/bench/fuzzing.py [--times 20] [--seed 1] [--write]

One JSON row a parser: inputs that were read and refused, and crashes, hangs, leaks and wrong pairings, of
which there should be none; tests/fuzz/README.md defines them. Crashes are listed on standard error.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from published import figure_parser, recording

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fuzz.counts import INPUTS
from tests.fuzz.harness import Found, fuzz

PACKAGES = ("pillow", "pyarrow", "numpy", "pyyaml", "pydantic", "pycocotools")


def main() -> None:
    """Try the inputs of all parsers."""
    parser = figure_parser(__doc__)
    parser.add_argument("--times", type=float, default=20.0, help="as many inputs as `make test` tries")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with recording(__file__, arguments, also=["tests/fuzz/*.py"]) as record:
        counts = {name: int(count * arguments.times) for name, count in INPUTS.items()}
        for name, found in fuzz(counts, arguments.seed).items():
            record("parsers", row_of(name, found))
            for number, crash in found.crashes.items():
                print(f"{name} {number}: {crash}", file=sys.stderr)
        record("packages", {package: version(package) for package in PACKAGES})


def row_of(name: str, found: Found) -> dict[str, Any]:
    """Return the counts of a parser."""
    bad = len(found.crashes) + len(found.wrong_pairings)
    return {
        "parser": name,
        "inputs": found.inputs,
        "read": found.inputs - found.refused - bad,
        "refused": found.refused,
        "crashes": len(found.crashes),
        "hangs": len(found.hangs),
        "leaks": len(found.leaks),
        "wrong_pairings": len(found.wrong_pairings),
        "slowest_cpu_s": found.worst_s,
    }


if __name__ == "__main__":
    main()
