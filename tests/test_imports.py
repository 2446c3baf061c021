"""The layers of the house, read from the source: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imported_packages(source: Path) -> set[str]:
    """The first name of every import in a file, wherever in the file it stands."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(source.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
    return names


@pytest.mark.parametrize("source", _modules("legrad"), ids=lambda path: path.name)
def test_the_method_imports_neither_the_application_nor_ray(source):
    assert not _imported_packages(source) & {"pipeline", "ray"}


def test_only_the_package_run_imports_ray():
    importers = {
        path for path in _modules("legrad") + _modules("pipeline") if "ray" in _imported_packages(path)
    }
    assert importers == {ROOT / "pipeline" / "run" / name for name in ("cluster.py", "dispatcher.py")}


def test_imports_inside_functions_and_of_submodules_are_seen(tmp_path):
    source = ROOT / "tests" / "test_imports.py"
    assert _imported_packages(source) == {"ast", "pathlib", "pytest"}
    hidden = tmp_path / "hidden.py"
    hidden.write_text("def f():\n    import ray.util\n    from pipeline.run.dispatcher import main\n")
    assert _imported_packages(hidden) == {"ray", "pipeline"}
