"""A segmenter trained on the demo's pseudo-masks, beside one trained on ground truth: `make train-demo`.

    python tests/bench/train_demo.py [--weights new|old] [--scale 1] [--write]

Runs `pipeline.demo.making.train_segmenter`, whose results are the rows: one for each kind of label maps of
the held-out scenes (mIoU over 64 classes, with and without background), one for each kind of errors, one that
compares the segmenters, and one with the seconds that each part took.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from demo_inputs import WEIGHTS, demo_files, weights_path
from published import figure_parser, recording

MODULE = "pipeline.demo.making.train_segmenter"
COMPARED = ("student_minus_masks", "student_minus_masks_classes_known", "student_share_of_supervised")


def main() -> None:
    """Train, and record the result."""
    parser = figure_parser(__doc__)
    parser.add_argument("--weights", choices=WEIGHTS, default="new", help="weights of the demo's model")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the scenes and steps")
    arguments = parser.parse_args()
    program, config = f"{MODULE.replace('.', '/')}.py", "pipeline/demo/making/train_demo.yaml"
    with (
        recording(
            __file__,
            arguments,
            name=f"train_demo-{arguments.weights}",
            data=[*demo_files("heldout", weights=arguments.weights), config],
            also=[program],
        ) as record,
        tempfile.TemporaryDirectory() as out,
    ):
        command = [sys.executable, "-m", MODULE, "--out", out, "--scale", str(arguments.scale)]
        command += ["--clip-weights", str(weights_path(arguments.weights))]
        subprocess.run(command, check=True, stdout=sys.stderr)
        result = json.loads((Path(out) / "result.json").read_text())
        for name, scores in result["miou"].items():
            record("label_maps", {"label_maps": name, **scores})
        for name, errors in result["errors"].items():
            record("errors", {"label_maps": name, **errors})
        record("comparison", {"plan": result["plan"], **{name: result[name] for name in COMPARED}})
        record("seconds", result["seconds"])


if __name__ == "__main__":
    main()
