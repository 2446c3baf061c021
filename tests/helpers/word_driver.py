"""Run the real command line with workers that need no model and suffer faults: JOB.yaml SPEC.json."""

import json
import sys
from functools import partial
from pathlib import Path

from pipeline.cli import main as cli
from pipeline.run import runner
from tests.helpers.faults import Fault, struck_by


def main():
    """Stand in for `legrad annotate JOB.yaml`."""
    config, spec_path = sys.argv[1:]
    spec = json.loads(Path(spec_path).read_text())
    factory = struck_by(
        *(Fault(**fault) for fault in spec["faults"]),
        marks_folder=spec["marks_folder"],
        seconds_per_sample=spec["seconds_per_sample"],
    )
    runner.run_job = partial(runner.run_job, factory=factory)
    sys.argv = ["legrad", "annotate", config]
    cli.main()


if __name__ == "__main__":
    main()
