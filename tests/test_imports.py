"""What training imports of the run-time; import-linter holds the other rules between the packages."""

from __future__ import annotations

import ast
from pathlib import Path

ALLOWED = {"errors", "files", "frame", "geometry", "interchange", "pts", "scheme68", "spec"}
TRAINING = Path(__file__).resolve().parents[1] / "kp_train"


def run_time_modules(text: str) -> set[str]:
    """The modules of the run-time that a text imports; the package itself as an empty name."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "kp_runtime":
            names |= {f"kp_runtime.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.partition(".")[2] for name in names if name.partition(".")[0] == "kp_runtime"}


def test_every_way_to_import_is_seen() -> None:
    lines = [
        "import kp_runtime",
        "import kp_runtime.tune as t",
        "from kp_runtime import load",
        "from kp_runtime.video import x",
    ]
    assert run_time_modules("\n".join(lines)) == {"", "tune", "load", "video"}


def test_training_knows_the_contract_the_points_the_crop_rule_and_files() -> None:
    files = sorted(TRAINING.glob("*.py"))
    assert len(files) > 10
    for file in files:
        assert run_time_modules(file.read_text(encoding="utf-8")) <= ALLOWED, file.name
