"""Where every sample is after each fault that tests/integration injects; left out: time.

    python tests/bench/faults.py [--tests PATTERN] [--write]

Runs the integration tests, whose audits read the files of each job and not the program's own counts. One
JSON row a fault: samples in = annotated + empty + in error + in shards given up + left; lost and duplicated
samples would be bugs. Some faults need root, and their tests skip elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measured_files import ROOT
from published import figure_parser, recording

TABLE_VARIABLE = "LEGRAD_FAULT_TABLE"


def main() -> None:
    """Run the tests, and record what they report."""
    parser = figure_parser(__doc__)
    parser.add_argument("--tests", default="", help="pytest's -k: only tests whose names match")
    arguments = parser.parse_args()
    also = ["tests/integration/*.py", "tests/helpers/*.py"]
    with recording(__file__, arguments, also=also) as record, tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "faults.jsonl"
        command = [sys.executable, "-m", "pytest", "tests/integration", "-q", "-k", arguments.tests]
        environment = {**os.environ, TABLE_VARIABLE: str(table)}
        subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=sys.stderr)
        for line in table.read_text().splitlines():
            record("faults", json.loads(line))


if __name__ == "__main__":
    main()
