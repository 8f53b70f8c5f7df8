"""What training imports of the run-time, and that no files are a circle; import-linter holds the other rules."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ALLOWED = {
    "errors",
    "files",
    "frame",
    "geometry",
    "interchange",
    "labelled_face",
    "manifest",
    "pts",
    "scheme68",
    "spec",
}
ROOT = Path(__file__).resolve().parents[1]


def imported_modules(text: str, package: str) -> set[str]:
    """The modules of a package that a text imports, wherever it does; the package itself as an empty name."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            names |= {f"{package}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.partition(".")[2] for name in names if name.partition(".")[0] == package}


def test_every_way_to_import_is_seen() -> None:
    lines = [
        "import kp_runtime",
        "import kp_runtime.tune as t",
        "from kp_runtime import load",
        "def function():",
        "    from kp_runtime.video import x",
    ]
    assert imported_modules("\n".join(lines), "kp_runtime") == {"", "tune", "load", "video"}


def test_training_knows_the_contract_the_points_the_crop_rule_and_files() -> None:
    files = sorted((ROOT / "kp_train").glob("*.py"))
    assert len(files) > 10
    for file in files:
        assert imported_modules(file.read_text(encoding="utf-8"), "kp_runtime") <= ALLOWED, file.name


@pytest.mark.parametrize("package", ["kp_runtime", "kp_train", "kp_export", "kp_cli", "benchmarks"])
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    """Each can be read knowing those below it alone. A package's `__init__` names its files and is none of them."""
    files = [file for file in (ROOT / package).glob("*.py") if file.stem != "__init__"]
    assert len(files) >= 7
    imports = {file.stem: imported_modules(file.read_text(encoding="utf-8"), package) for file in files}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"{package}: {' imports '.join(reversed(error.args[1]))}")
