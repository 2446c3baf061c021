"""Size of the import graph: modules, top-level units, and imports between units.

    python tests/bench/import_graph.py [REVISION...] [--write]

A unit is a direct child of `pipeline` or `legrad`: a package, or a module that is in none. One JSON row for
each git revision (the working tree without one) and package:

    modules, lines   files of Python, and their lines
    units            direct children of the package
    arrows           pairs of units of which one imports the other
    arrows_up        the fewest arrows without which the units would be in layers
"""

import importlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import grimp
from published import figure_parser, recording

ROOT = Path(__file__).parents[2]
PACKAGES = ("legrad", "pipeline")


def main() -> None:
    """Print the rows."""
    parser = figure_parser(__doc__)
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help="git revisions to read")
    arguments = parser.parse_args()
    with recording(__file__, arguments, also=["legrad/**/*.py", "pipeline/**/*.py"]) as record:
        for revision in arguments.revisions or [None]:
            with tempfile.TemporaryDirectory() as folder:
                tree = ROOT if revision is None else unpacked(revision, Path(folder))
                for package in PACKAGES:
                    record("packages", {"revision": revision or "working tree", **row(tree, package)})


def unpacked(revision: str, folder: Path) -> Path:
    """Return a folder with the packages as they are at a git revision."""
    archive = subprocess.check_output(["git", "archive", revision, *PACKAGES], cwd=ROOT)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def row(tree: Path, package: str) -> dict[str, str | int]:
    """Return the counts of one package of a source tree."""
    graph = graph_of(tree, package)
    arrows = {
        (unit(importer), unit(imported))
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    }
    upwards = {
        (unit(importer), unit(imported)) for importer, imported in graph.nominate_cycle_breakers(package)
    }
    sources = list((tree / package).rglob("*.py"))
    return {
        "package": package,
        "modules": len(sources),
        "lines": sum(source.read_bytes().count(b"\n") for source in sources),
        "units": len(graph.find_children(package)),
        "arrows": sum(
            importer != imported and package not in (importer, imported) for importer, imported in arrows
        ),
        "arrows_up": len(upwards),
    }


def graph_of(tree: Path, package: str) -> grimp.ImportGraph:
    """Return the imports between the modules of a package, which is found first in a source tree."""
    sys.path.insert(0, str(tree))
    importlib.invalidate_caches()
    try:
        return grimp.build_graph(package, cache_dir=None)
    finally:
        sys.path.remove(str(tree))


def unit(module: str) -> str:
    """Return the direct child of the package that a module is, or is in."""
    return ".".join(module.split(".")[:2])


if __name__ == "__main__":
    main()
