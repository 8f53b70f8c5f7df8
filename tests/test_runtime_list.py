"""tests/runtime.txt lists the test files that run without torch and the other packages of training and export."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ALLOWED = {
    "cv2", "kp_runtime", "numpy", "onnx", "onnxruntime", "pytest",
    "kp_export.evaluate", "kp_export.robustness", "kp_train.data", "kp_train.metrics", "kp_train.synthetic",
}  # fmt: skip
"""What the lean environments of noxfile.py have, what measures a model's file there, and kp_train.synthetic, which
draws faces with OpenCV alone.
"""

NOT_OF_THE_RUN_TIME = {"test_imports.py", "test_readme.py", "test_runtime_list.py"}
"""These need no package, and test nothing that runs on a board."""


def imported(path: Path) -> set[str]:
    """What a file imports, wherever it does, and what the test helpers that it imports do."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("importorskip", "import_module")):
            found |= {word.value for word in node.args[:1] if isinstance(word, ast.Constant)}
    helpers = {name for name in found if name.startswith("tests.")} - {"tests.conftest"}
    for name in helpers:
        found |= imported(TESTS / (name.partition(".")[2] + ".py"))
    return found - helpers - {"tests", "tests.conftest", "__future__"}


def is_lean(path: Path) -> bool:
    return all(
        name in ALLOWED or name.partition(".")[0] in ALLOWED or name.partition(".")[0] in sys.stdlib_module_names
        for name in imported(path)
    )


def test_the_list_is_the_lean_test_files() -> None:
    listed = (TESTS / "runtime.txt").read_text(encoding="utf-8").split()
    lean = {path.name for path in TESTS.glob("test_*.py") if is_lean(path)} - NOT_OF_THE_RUN_TIME
    assert listed == sorted(f"tests/{name}" for name in lean)


def test_shared_fixtures_import_nothing_else_at_once() -> None:
    tree = ast.parse((TESTS / "conftest.py").read_text(encoding="utf-8"))
    at_once = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert at_once == {"__future__", "pathlib", "tests.models"}
    assert is_lean(TESTS / "models.py")
