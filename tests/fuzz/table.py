"""Tries inputs and writes what came of them to README.md and results.json here; arguments: TIMES [SEED].

python -m tests.fuzz.table 20
"""

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.fuzz.counts import INPUTS
from tests.fuzz.harness import HANG_S, ROOT, Found, fuzz

HERE = Path(__file__).parent
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
HEAD = (
    "| parser | inputs | read | refused | crashes | hangs | leaks | wrong pairings | slowest, CPU s |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)
PACKAGES = ("pillow", "pyarrow", "numpy", "pyyaml", "pydantic", "pycocotools")


def row(name: str, found: Found) -> dict:
    """What the table says of a target."""
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
        "slowest_cpu_s": round(found.worst_s, 3),
    }


def commit() -> str:
    """The commit that was tried, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Try, write the data and the page."""
    times, seed = float(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 1
    tried = commit()
    found = fuzz({name: int(count * times) for name, count in INPUTS.items()}, seed)
    rows = [row(name, of_target) for name, of_target in found.items()]
    versions = {package: version(package) for package in PACKAGES}
    record = {"commit": tried, "seed": seed, "times": times, "python": platform.python_version()}
    record |= {"versions": versions, "hang_cpu_s": HANG_S, "rows": rows}
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    lines = "".join("| " + " | ".join(str(value) for value in each.values()) + " |\n" for each in rows)
    packages = ", ".join(f"{package} {number}" for package, number in versions.items())
    said = f"Commit {tried}, seed {seed}, Python {record['python']}, {packages}.\n"
    page.write_text(f"{before}{BEGIN}\n{HEAD}{lines}\n{said}{END}{rest.partition(END)[2]}")
    for name, of_target in found.items():
        for number, crash in of_target.crashes.items():
            print(f"{name} {number}: {crash}")


if __name__ == "__main__":
    main()
