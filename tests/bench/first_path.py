"""How long a new user's path takes, from a folder of images with captions to a model in training.

    python tests/bench/first_path.py [--images 200] [--steps 20] [--keep FOLDER] [--write]

Runs the commands that README.md names under "Your own data", each in a process of its own, in an empty
folder, and records the seconds of each: from the start of the process to its end, imports and the start of
Ray included. Each command runs once. The images are the demo's rendered scenes, 256 x 256 pixels, as JPEG
files; a CSV has their captions; the model is the demo's, with 64 classes that captions mention.

Then a model with random weights is trained on the export for a few steps, by torchvision and, where it is
installed, by ultralytics: `train_on_export.py`. A step that cannot run here is named with the reason.
"""

import argparse
import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from demo_inputs import demo_files
from measured_files import ROOT
from published import figure_parser, recording

from pipeline.demo import assets

OMITTED = (
    "installing, downloads, larger images and models, reading and editing files by hand, and how good the "
    "masks are"
)
BY_CLASSES = "prompts.source=classes prompts.classes=classes.txt prompts.mentioned_in=txt"
COUNTS = r"^samples: \d.*failed$"
TRAINING = "tests/bench/train_on_export.py"


@dataclass(frozen=True)
class Step:
    """A step of the path.

    Attributes:
        name: what it does.
        command: as a user types it.
        shown: matches the line of its output that says what became of the images.
        needs: a module without which it is skipped.
    """

    name: str
    command: str
    shown: str
    needs: str | None = None


def path_steps(steps: int) -> list[Step]:
    """Return the path, with the number of training steps at its end."""
    return [
        Step("shards from the folder", "legrad shards images photos data/photos", r"^.*\.tar: .*$"),
        Step("first configuration", "legrad init data/photos --to photos.yaml --model demo", r"written.*$"),
        Step("dry run", f"legrad annotate photos.yaml --dry-run {BY_CLASSES}", r"^samples: .*$"),
        Step("maps and masks", f"legrad annotate photos.yaml {BY_CLASSES}", COUNTS),
        Step("report", "legrad report out/photos", r"\d+ rows, .*$"),
        Step("masks above 0.4", "legrad remask out/photos out/lower masks.value=0.4", COUNTS),
        Step("masks above 0.6", "legrad remask out/photos out/higher masks.value=0.6", COUNTS),
        Step("export to YOLO", "legrad export out/lower to/yolo --format yolo-seg", r"^\d.*class.*$"),
        Step("export to COCO", "legrad export out/lower to/coco --format coco --polygons", r"^\d.*class.*$"),
        Step("export to VOC", "legrad export out/lower to/voc --format voc", r"^\d.*class.*$"),
        Step(
            f"{steps} steps by torchvision",
            f"python {TRAINING} torchvision to/voc --steps {steps}",
            r"^\d+ steps.*$",
        ),
        Step(
            f"{steps} steps by ultralytics",
            f"python {TRAINING} ultralytics to/yolo --steps {steps}",
            r"^\d+ steps.*$",
            needs="ultralytics",
        ),
    ]


def write_photos(folder: Path, images: int) -> None:
    """Write a folder of JPEG files with a table of captions, and a list of classes beside it.

    Raises:
        SystemExit: the demo has fewer images.
    """
    photos = folder / "photos"
    photos.mkdir()
    found = list(scenes("heldout"))
    if images > len(found):
        raise SystemExit(f"--images: the demo has {len(found)} images, fewer than {images}")
    with (photos / "metadata.csv").open("w", encoding="utf-8", newline="") as sink:
        table = csv.writer(sink)
        table.writerow(["file_name", "text"])
        for name, image, caption in found[:images]:
            (photos / name).write_bytes(image)
            table.writerow([name, caption])
    shutil.copy(assets.demo_classes_path(), folder / "classes.txt")


def scenes(set_name: str) -> Iterator[tuple[str, bytes, str]]:
    """Yield name, file and caption of each image of a set of the demo."""
    for path in assets.demo_shard_paths(set_name):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in sorted(members):
            if name.endswith(".jpg"):
                yield name, members[name], json.loads(members[name.removesuffix("jpg") + "json"])["caption"]


def timed(step: Step, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a step, and return its seconds and what it printed of its outcome.

    Raises:
        SystemExit: the command failed, or did not print what is expected.
    """
    row = {"step": step.name, "command": step.command}
    if step.needs and importlib.util.find_spec(step.needs) is None:
        return {**row, "seconds": None, "outcome": f"skipped: {step.needs} is not installed here"}
    started_s = time.perf_counter()
    done = subprocess.run(
        argv_of(step.command), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started_s
    shown = re.findall(step.shown, done.stdout, re.MULTILINE)
    if done.returncode or not shown:
        raise SystemExit(
            f"{step.command}: exit code {done.returncode}, and no line that matches {step.shown!r} expected"
            f"\n{done.stdout}{done.stderr}"
        )
    return {**row, "seconds": seconds, "outcome": shown[-1]}


def argv_of(command: str) -> list[str]:
    """Return the arguments that run a command with this Python and this checkout."""
    program, *words = shlex.split(command)
    if program == "legrad":
        return [sys.executable, "-m", "pipeline", *words]
    return [sys.executable, str(ROOT / words[0]), *words[1:]]


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Run all steps in a folder, and record them."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with recording(
        __file__,
        arguments,
        data=demo_files("heldout"),
        also=["pipeline/cli/main.py", TRAINING],
        omitted=OMITTED,
    ) as record:
        write_photos(folder, arguments.images)
        total_s = 0.0
        for step in path_steps(arguments.steps):
            row = timed(step, folder, environment)
            total_s += row["seconds"] or 0.0
            record("steps", row)
        record("total", {"images": arguments.images, "seconds": total_s})


def main() -> None:
    """Run the path in a folder of its own."""
    parser = figure_parser(__doc__)
    parser.add_argument("--images", type=int, default=200, help="number of images in the folder")
    parser.add_argument("--steps", type=int, default=20, help="number of training steps")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="run in this new folder, and keep it")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
        measure(arguments, arguments.keep)
        return
    with TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


if __name__ == "__main__":
    main()
