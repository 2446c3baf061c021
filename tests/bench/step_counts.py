"""What a step of `Engine.explain` gives to a device: kernel launches, waits and bytes, counted on the CPU.

    python tests/bench/step_counts.py [--images 64] [--prompts 1] [--refine par] [--width 768] [--write]

Prints one JSON row for each part of the step, and one for their sum. `tests.helpers.device_work` says how
operations are counted; nothing is timed, and no GPU is used.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from published import figure_parser, recording

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.helpers.device_work import Work
from tests.helpers.steps import counted_step


def main() -> None:
    """Count one step after another one, and print the rows."""
    arguments = options()
    step = {name: getattr(arguments, name) for name in ("images", "prompts", "refine", "width", "precision")}
    with recording(__file__, arguments) as record:
        work = counted_step(**step)
        for part, counts in {**dict(sorted(work.by_part.items())), "total": work.total}.items():
            record("parts", row_of(part, counts))


def row_of(part: str, work: Work) -> dict[str, Any]:
    """Return the counts of a part of the step."""
    return {
        "part": part,
        "launches": work.launches,
        "waits": work.waits,
        "sent_mb": work.uploaded_bytes / 1e6,
        "brought_back_mb": work.downloaded_bytes / 1e6,
        "moved_gb": work.moved_bytes / 1e9,
    }


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = figure_parser(__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=1, help="prompts of each image, all different")
    parser.add_argument("--refine", choices=["none", "par", "pamr"], default="par")
    parser.add_argument("--width", type=int, default=768, help="of the image tower; 768 is ViT-B/16")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
