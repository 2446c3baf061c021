"""What a step of `Engine.explain` gives to a device: kernel launches, waits and bytes, counted on the CPU.

    python tests/bench/step_counts.py [--images 64] [--prompts 1] [--refine par] [--width 768] [--write]

Prints one JSON row for each part of the step, and one for their sum. `tests.helpers.device_work` says how
operations are counted; nothing is timed, and no GPU is used. `--write` also replaces the table of
tests/bench/README.md.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from environment import environment
from published import publish, table

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.helpers.device_work import Work
from tests.helpers.steps import counted_step

COLUMNS = ("part", "launches", "waits of the CPU", "MB sent", "MB brought back", "GB moved on the device")


def main() -> None:
    """Count one step after another one, and print the rows."""
    options = vars(_options())
    is_published = options.pop("write")
    work = counted_step(**options)
    head = {"bench": "step_counts", **environment(), **options}
    parts = {**dict(sorted(work.by_part.items())), "total": work.total}
    for part, counts in parts.items():
        print(json.dumps({"part": part, **asdict(counts)} | head))
    if is_published:
        publish(Path(__file__).name, _published(parts, head))


def _published(parts: dict[str, Work], head: dict[str, Any]) -> list[str]:
    settings = (
        f"Commit {head['commit']}: {head['images']} images with {head['prompts']} new caption(s) each, "
        f"{head['precision']}, `masks.refine: {head['refine']}`, image tower of width {head['width']}."
    )
    cells = [
        (
            part,
            work.launches,
            work.waits,
            f"{work.uploaded_bytes / 1e6:.2f}",
            f"{work.downloaded_bytes / 1e6:.2f}",
            f"{work.moved_bytes / 1e9:.2f}",
        )
        for part, work in parts.items()
    ]
    return [settings, "", *table(COLUMNS, cells)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=1, help="prompts of each image, all different")
    parser.add_argument("--refine", choices=["none", "par", "pamr"], default="par")
    parser.add_argument("--width", type=int, default=768, help="of the image tower; 768 is ViT-B/16")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--write", action="store_true", help="replace the table of tests/bench/README.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
