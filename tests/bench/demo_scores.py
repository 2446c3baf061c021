"""Maps, masks and recognition of the demo model on its scenes, beside baselines; left out: time.

    python tests/bench/demo_scores.py [--weights new|old] [--sets heldout newartist] [--write]

Annotates the sets with the demo's configuration and evaluates them, as `legrad demo` and `legrad evaluate`
do. JSON rows of three tables, each for every set (`perturbation.py` is a program of its own):

    maps           scores of each kind of map: LeGrad over the last blocks, and baselines on the same model
    masks          scores of the masks as written
    recognition    the model as a classifier of scenes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from demo_inputs import PUBLISHED_SETS, SETS, WEIGHTS, demo_files, demo_job, weights_path
from published import figure_parser, recording

from pipeline.demo import assets
from pipeline.evaluation.evaluate import evaluate_output
from pipeline.evaluation.result import EvaluationResult

# of the written masks: counts and scores of classes that no table has
UNUSED = ("class_iou", "shards_without_annotations", "damaged_files")


def main() -> None:
    """Annotate all sets in one job, then evaluate each."""
    arguments = options()
    data = demo_files(*arguments.sets, weights=arguments.weights)
    name = f"demo_scores-{arguments.weights}"
    also = ["pipeline/__main__.py"]
    with (
        recording(__file__, arguments, name=name, data=data, also=also) as record,
        tempfile.TemporaryDirectory() as out,
    ):
        annotate(arguments, out)
        for set_name in arguments.sets:
            found = evaluated(arguments, out, set_name)
            for table, row in rows_of(found):
                record(table, {"set": set_name, **row})


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = figure_parser(__doc__)
    parser.add_argument("--weights", choices=WEIGHTS, default="new", help="weights of the demo's model")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=PUBLISHED_SETS, help="sets of scenes")
    return parser.parse_args()


def annotate(arguments: argparse.Namespace, out: str) -> None:
    """Run `legrad annotate`."""
    shards = demo_job(arguments.sets).input.shards
    changes = [f"input.shards={json.dumps(shards)}", f"output.dir={out}"]
    if arguments.weights != "new":
        changes.append(f"model.pretrained={weights_path(arguments.weights)}")
    command = [sys.executable, "-m", "pipeline", "annotate", str(assets.demo_config_path()), *changes]
    subprocess.run(command, check=True, stdout=sys.stderr)


def evaluated(arguments: argparse.Namespace, out: str, set_name: str) -> EvaluationResult:
    """Evaluate one set of scenes."""
    things = set_name in assets.SHARD_SETS
    return evaluate_output(
        out,
        assets.demo_shard_paths(set_name),
        assets.demo_classes_path() if things else assets.demo_classes_with_stuff_path(),
        pretrained=None if arguments.weights == "new" else str(weights_path(arguments.weights)),
    )


def rows_of(found: EvaluationResult) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of an evaluation, each with the name of its table."""
    size = {"scenes": found.scenes, "pairs": found.pairs}
    for scores in found.maps:
        row = {key: value for key, value in vars(scores).items() if key not in ("method", "iou_curve")}
        yield "maps", {"map": scores.method, **size, **row}
    if found.written is not None:
        yield "masks", {key: value for key, value in vars(found.written).items() if key not in UNUSED}
    if found.recognition is not None:
        yield "recognition", vars(found.recognition)


if __name__ == "__main__":
    main()
