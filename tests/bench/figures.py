"""Say which published figures are older than what they measure, renew them, and make the pages from them.

    python tests/bench/figures.py                 list all figures: `make figures`
    python tests/bench/figures.py --check         the same; exits with 1 if a figure is older
    python tests/bench/figures.py --run NAME      run the figure's program again: `make figures RUN=NAME`
    python tests/bench/figures.py --pages         rewrite the regions of all pages from the data files

A figure is a data file in tests/bench/figures, written by a program with `--write`. It is older when code or
data that it measures has changed since; `measured_files.py` says what counts as a change. On the pages,
figures lie between `<!-- figures: NAME begin -->` and `<!-- figures: NAME end -->`; `layouts.py` has the
layout of each such region.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path

from figure_values import Figure, names_of_figures, read_figure
from layouts import REGIONS, rendered
from measured_files import ROOT, measured_files

PAGE_PATTERNS = ("*.md", "configs/**/*.md", "legrad/**/*.md", "pipeline/**/*.md", "tests/**/*.md")
REGION = re.compile(r"(<!-- figures: ([\w-]+) begin -->)(.*?)(<!-- figures: \2 end -->)", re.DOTALL)
SHOWN_CHANGES = 4


def main() -> int:
    """Do what the options say."""
    options = _options()
    if options.pages:
        print(f"pages renewed: {renew_pages() or 'none'}")
        return 0
    if options.run:
        return run_again(options.run)
    changes = {name: changes_since(figure) for name, figure in _figures()}
    for name, figure in _figures():
        print("\n".join(account_of(figure, changes[name])))
    for name, command in sorted(not_measured().items()):
        print(f"{name}: not measured yet\n  renew: {command}")
    older = sum(map(bool, changes.values()))
    print(f"{len(changes)} figures, {older} of them older than what they measure")
    return int(options.check and older > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a figure is older")
    parser.add_argument("--run", metavar="NAME", help="run the program of a figure again, and publish it")
    parser.add_argument("--pages", action="store_true", help="rewrite the regions of all pages")
    return parser.parse_args()


def _figures() -> Iterator[tuple[str, Figure]]:
    for name in names_of_figures():
        figure = read_figure(name)
        if figure is not None:
            yield name, figure


def changes_since(figure: Figure, root: Path = ROOT) -> list[str]:
    """Return the measured files that differ from those that the figure was measured with."""
    document = figure.document
    before: Mapping[str, str] = document["files"]
    try:
        now = measured_files(document["programs"], document["data"], root)
    except FileNotFoundError as error:
        return [str(error)]
    return sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))


def account_of(figure: Figure, changed: list[str]) -> list[str]:
    """Return lines on the age of a figure, and how it is renewed."""
    document = figure.document
    days = (datetime.now(UTC).date() - date.fromisoformat(document["date"])).days
    state = f"OLDER: {len(changed)} measured files changed, are new or are gone" if changed else "current"
    took = document["took_s"]
    minutes = f"took {took / 60:.1f} minutes" if isinstance(took, int) else "time not recorded"
    needs = f"; needs {document['needs']}" if isinstance(document["needs"], str) else ""
    lines = [f"{figure.name}: {state}; commit {document['commit']}, {days} days ago"]
    if changed:
        more = f" and {len(changed) - SHOWN_CHANGES} more" if len(changed) > SHOWN_CHANGES else ""
        lines.append(f"  changed: {', '.join(changed[:SHOWN_CHANGES])}{more}")
    return [*lines, f"  renew: {document['command']}  ({minutes}{needs})"]


def not_measured() -> dict[str, str]:
    """Return the commands of the figures that regions show and that have no data file."""
    missing = {region.figure for region in REGIONS.values()} - set(names_of_figures())
    return {region.figure: region.command for region in REGIONS.values() if region.figure in missing}


def run_again(name: str) -> int:
    """Run the program of a figure as it was run, and publish what it measures."""
    figure = read_figure(name)
    command = figure.document["command"] if figure else not_measured().get(name)
    if command is None:
        known = ", ".join([*names_of_figures(), *not_measured()])
        raise SystemExit(f"no figure {name!r}; known: {known}")
    words = shlex.split(command)
    write = [] if "--write" in words else ["--write"]
    return subprocess.run([sys.executable, *words[1:], *write], cwd=ROOT, check=False).returncode


def renew_pages(root: Path = ROOT) -> list[str]:
    """Rewrite the regions of all pages; return the pages that changed."""
    renewed = []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        if (new := with_figures(text)) != text:
            page.write_text(new, encoding="utf-8")
            renewed.append(page.relative_to(root).as_posix())
    return renewed


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages of the repository that may have regions."""
    return sorted(path for pattern in PAGE_PATTERNS for path in root.glob(pattern))


def with_figures(text: str) -> str:
    """Return a page with its regions made from the data files.

    Raises:
        KeyError: `layouts.py` has no region of a name on the page.
    """

    def region(match: re.Match[str]) -> str:
        edge = "\n" if match[3].startswith("\n") else ""
        return f"{match[1]}{edge}{rendered(match[2])}{edge}{match[4]}"

    return REGION.sub(region, text)


if __name__ == "__main__":
    sys.exit(main())
