"""The wheel that is installed on a board: small, pure Python, and with no package but numpy unless asked for."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

# not imported: setuptools refuses to be where the standard library's distutils was imported before
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pip", "setuptools"))), reason="pip and setuptools build the wheel"
)
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kp_runtime", "kp_train", "kp_export")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PIP = (sys.executable, "-m", "pip", "--isolated", "--quiet", "--disable-pip-version-check")
EXTRAS = {
    "image": {"numpy", "opencv-python-headless"},
    "ort": {"onnxruntime"},
    "ort-gpu": {"onnxruntime-gpu"},
    "cuda12": {"cuda-python"},
    "cuda13": {"cuda-python"},
    "cli": {"typer", "rich"},
}
"""What each extra of the run-time adds; nothing may slip in."""

IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
import kp_runtime
assert pathlib.Path(kp_runtime.__file__).parents[1] == pathlib.Path(sys.argv[1]), kp_runtime.__file__
names = [module.name for module in pkgutil.iter_modules(kp_runtime.__path__)]
for name in names:
    importlib.import_module(f"kp_runtime.{name}")
import kp_cli
print(kp_runtime.__version__, len(names))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy: setuptools leaves files in the folder, and takes old ones from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "kp_cli.py", "kp_report.py"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def pip(*words: str) -> None:
    done = subprocess.run([*PIP, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def requirements(metadata: Message, extra: str = "", python: str = "3.12") -> list[Requirement]:
    """What an extra adds, extras of extras included; the base's own when it has no name."""
    found = []
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        asked, base = ({"extra": name, "python_version": python} for name in (extra, ""))
        marker = requirement.marker
        if marker and (not marker.evaluate(asked) or (extra and marker.evaluate(base))):
            continue
        if extra and not marker:
            continue
        if requirement.name == "kp-edge":
            found += [more for name in requirement.extras for more in requirements(metadata, name, python)]
        else:
            found.append(requirement)
    return found


def names(metadata: Message, extra: str = "", python: str = "3.12") -> set[str]:
    return {requirement.name for requirement in requirements(metadata, extra, python)}


def test_wheel_is_small_and_pure(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 300_000


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"} | {"kp_cli.py", "kp_report.py"}
    assert "kp_runtime/py.typed" in held
    assert wanted == held, "name files that are not Python in pyproject.toml's package-data"


@pytest.mark.parametrize("python", PYTHONS)
def test_install_brings_numpy_alone(metadata: Message, python: str) -> None:
    assert names(metadata, python=python) == {"numpy"}


@pytest.mark.parametrize(("python", "system"), [("3.10", "1.21.5"), ("3.12", "1.26.4")])
def test_the_numpy_of_a_board_is_kept(metadata: Message, python: str, system: str) -> None:
    """Ubuntu 22.04's and 24.04's: pip would put another in front of it, which the system's OpenCV can't work with."""
    for extra in ("", "ort", "ort-gpu", "cuda12", "cuda13", "cli"):
        for requirement in requirements(metadata, extra, python):
            assert requirement.name != "numpy" or system in requirement.specifier, f"[{extra}] wants {requirement}"


@pytest.mark.parametrize("python", PYTHONS)
def test_extras_of_the_run_time_add_what_they_say(metadata: Message, python: str) -> None:
    assert {extra: names(metadata, extra, python) for extra in EXTRAS} == EXTRAS


def test_opencv_and_engines_come_only_where_they_are_meant(metadata: Message) -> None:
    added = {extra: names(metadata, extra) for extra in metadata.get_all("Provides-Extra") or []}
    assert {*EXTRAS, "train", "export", "dev"} <= set(added)
    for_people = {"train", "export", "bench", "dev"} & set(added)
    with_opencv = {extra for extra, found in added.items() if any(re.match("opencv", name) for name in found)}
    assert with_opencv == {"image"} | for_people
    assert {extra for extra, found in added.items() if "onnxruntime" in found} == {"ort"} | for_people - {"train"}
    # the two packages write into one folder, each over the other's files
    assert {extra for extra, found in added.items() if "onnxruntime-gpu" in found} == {"ort-gpu"}
    assert {name for found in added.values() for name in found if "opencv" in name} == {"opencv-python-headless"}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_bound_of_the_run_time_can_be_tested(metadata: Message, python: str) -> None:
    for extra in ("", *EXTRAS):
        for requirement in requirements(metadata, extra, python):
            least = [part.version for part in requirement.specifier if part.operator == ">="]
            assert len(least) == 1, f"[{extra}] {requirement} has no lower bound that noxfile.py could pin"


def test_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_ALL, str(target)], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={"PYTHONPATH": str(target)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version, modules = done.stdout.split()
    assert version == re.findall(r"-(.*?)-", wheel.name)[0]
    assert int(modules) >= 15
