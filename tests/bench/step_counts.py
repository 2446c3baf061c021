"""What a step of `Engine.explain` gives to a device: kernel launches, waits and bytes, counted on the CPU.

    python tests/bench/step_counts.py [--images 64] [--prompts 1] [--refine par] [--width 768]

Prints one JSON row for each part of the step, and one for their sum. `tests.helpers.device_work` says how
operations are counted; nothing is timed.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from environment import environment

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.helpers.steps import counted_step


def main() -> None:
    """Count one step after another one, and print the rows."""
    options = _options()
    work = counted_step(**vars(options))
    head = {"bench": "step_counts", **environment(), **vars(options)}
    for part, counts in [*sorted(work.by_part.items()), ("total", work.total)]:
        print(json.dumps({"part": part, **asdict(counts)} | head))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=1, help="prompts of each image, all different")
    parser.add_argument("--refine", choices=["none", "par", "pamr"], default="par")
    parser.add_argument("--width", type=int, default=768, help="of the image tower; 768 is ViT-B/16")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
