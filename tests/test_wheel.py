"""The wheels that are installed on a board: one small, pure Python, and with no package but numpy unless asked for;
one with what trains and exports; one with the default model's data alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from wheels import build_model_wheel, build_project_wheel

from kp_runtime.errors import BundleError, ExportError
from kp_runtime.manifest import any_manifest
from tests.models import tiny_bundle

# not imported: setuptools refuses to be where the standard library's distutils was imported before
pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pip", "setuptools"))), reason="pip and setuptools build the wheel"
)
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kp_runtime", "kp_cli")
TOOLS = ("kp_train", "kp_export")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PIP = (sys.executable, "-m", "pip", "--isolated", "--quiet", "--disable-pip-version-check")
EXTRAS = {
    "image": {"numpy", "opencv-python-headless"},
    "ort": {"onnxruntime"},
    "ort-gpu": {"onnxruntime-gpu"},
    "cuda12": {"cuda-python"},
    "cuda13": {"cuda-python"},
    "cli": {"typer", "rich"},
    "model": {"kp-edge-model"},
    "parquet": {"pyarrow"},
    "serve": {"fastapi", "uvicorn"},
    "sign": {"cryptography"},
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
def model_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_wheel(ROOT / "engines" / "resnet18-68", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return metadata_of(wheel)


def metadata_of(wheel: Path) -> Message:
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


def test_the_wheel_tells_its_pythons_and_links_to_no_file_of_a_checkout(metadata: Message) -> None:
    prefix = "Programming Language :: Python :: "
    told = [text.removeprefix(prefix) for text in metadata.get_all("Classifier") or [] if text.startswith(prefix)]
    assert told == list(PYTHONS)
    readme = str(metadata.get_payload())
    assert "**The documentation** goes from a first picture to your own data" in readme
    assert re.findall(r"\]\(.*?\)", readme) == []


def test_a_source_distribution_holds_no_part_of_the_tests(tmp_path: Path) -> None:
    """Which are of no use without the rest: doubles, models, scripts."""
    for name in (
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "kp_runtime/__init__.py",
        "tests/test_wheel.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        held = [name.partition("/")[2] for name in archive.getnames()]
    assert "kp_runtime/__init__.py" in held
    assert [name for name in held if name.startswith("tests")] == []


def check_held(wheel: Path, packages: tuple[str, ...]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = [path for name in packages for path in (ROOT / name).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
    assert wanted == held, "name files that are not Python in pyproject.toml's package-data"
    assert {f"{name}/py.typed" for name in packages} - {"kp_cli/py.typed"} <= held, "type checkers take no annotation"


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    check_held(wheel, PACKAGES)


def test_the_tools_come_beside_the_run_time_of_their_version(tools_wheel: Path, metadata: Message) -> None:
    check_held(tools_wheel, TOOLS)
    found = metadata_of(tools_wheel)
    assert (found["Name"], found["Version"]) == ("kp-edge-tools", metadata["Version"])
    assert found.get_all("Requires-Dist") == [f"kp-edge=={metadata['Version']}"]


@pytest.mark.parametrize("python", PYTHONS)
def test_install_brings_numpy_alone(metadata: Message, python: str) -> None:
    assert names(metadata, python=python) == {"numpy"}


@pytest.mark.parametrize(("python", "system"), [("3.10", "1.21.5"), ("3.12", "1.26.4")])
def test_the_numpy_of_a_board_is_kept(metadata: Message, python: str, system: str) -> None:
    """Ubuntu 22.04's and 24.04's: pip would put another in front of it, which the system's OpenCV can't work with."""
    for extra in ("", *EXTRAS.keys() - {"image"}):
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


def test_the_model_wheel_is_the_packed_bundles_and_nothing_else(model_wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(model_wheel) as archive:
        archive.extractall(tmp_path)
    for package, kinds in (("kp_model", {"onnx", "golden", "report"}), ("kp_face_detector", {"onnx", "golden"})):
        folder = tmp_path / package
        manifest = any_manifest(folder)
        held = {path.name for path in folder.iterdir()}
        assert held == {*manifest.files, "manifest.json", "MODEL_CARD.md", "__init__.py"}
        assert {entry.kind for entry in manifest.files.values()} == kinds
        for name in manifest.files:
            manifest.check_file(folder, name)
    others = {path.name.partition(".dist-info")[0] for path in tmp_path.iterdir()} - {"kp_model", "kp_face_detector"}
    assert others == {"-".join(model_wheel.name.split("-")[:2])}


def test_the_model_wheel_names_its_licence_its_weights_and_no_package(model_wheel: Path, metadata: Message) -> None:
    found = metadata_of(model_wheel)
    assert found["License-Expression"] == "LicenseRef-Research-Not-Commercial"
    assert found.get_all("License-File") == ["LICENSE"]
    assert "not commercial" in found["Summary"]
    assert "**Licence: the weights are for research that is not commercial**" in str(found.get_payload())
    assert found.get_all("Requires-Dist") is None
    with zipfile.ZipFile(model_wheel) as archive:
        manifests = b"".join(archive.read(f"{name}/manifest.json") for name in ("kp_model", "kp_face_detector"))
        (licence,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/LICENSE")]
    assert "research that is not commercial" in licence
    assert found["Version"] == f"{metadata['Version']}+m{hashlib.sha256(manifests).hexdigest()[:12]}"
    (wanted,) = requirements(metadata, "model")
    assert found["Version"] in wanted.specifier


def test_the_same_files_give_the_same_wheel(model_wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "kp_edge_model-0.1.0+mffffffffffff-py3-none-any.whl").touch()
    before = os.umask(0o077)
    try:
        again = build_model_wheel(ROOT / "engines" / "resnet18-68", tmp_path)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == [again.name], "pip would take the largest hash"
    assert again.name == model_wheel.name
    assert again.read_bytes() == model_wheel.read_bytes()


def test_a_wheel_that_can_not_be_built_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="has no model of precision int8, only fp32"):
        build_model_wheel(tiny_bundle(tmp_path / "tiny"), tmp_path)
    monkeypatch.setattr("wheels.PROJECT", ("LICENSE", "README.md"))
    with pytest.raises(ExportError, match="pip can't build the wheel"):
        build_project_wheel(tmp_path)
    assert not list(tmp_path.glob("*.whl"))


def test_installed_wheels_import_and_the_model_is_found(
    wheel: Path, tools_wheel: Path, model_wheel: Path, tmp_path: Path
) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    tiny_bundle(elsewhere / "kp_model")  # must not be taken for the wheel's

    def python(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-B", "-c", code, str(target)], capture_output=True, text=True, check=False,
            cwd=elsewhere, env={"PYTHONPATH": str(target)},
        )  # fmt: skip

    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    done = python(IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    version, modules = done.stdout.split()
    assert version == re.findall(r"-(.*?)-", wheel.name)[0]
    assert int(modules) >= 15
    done = python("import kp_runtime; kp_runtime.load()")
    assert "BundleError: no model was named and there is no default one: name a bundle (a checkout has" in done.stderr
    pack = "import sys, kp_cli; sys.argv = ['kp', 'pack', 'x', '--precision', 'int8', '--out', 'y']; kp_cli.main()"
    done = python("import sys; sys.modules['kp_export'] = None; " + pack)  # whatever this Python has of its own
    assert "run: pip install kp-edge-tools 'kp-edge[export]'" in done.stderr
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(tools_wheel))
    assert str(target) in python("import kp_export.pack; print(kp_export.__file__)").stdout
    assert "x is not a bundle" in python(pack).stderr
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(model_wheel))
    done = python(
        "import kp_runtime; model = kp_runtime.load(); print(model.spec.name, model.backend.report.precision); "
        "print(kp_runtime.load_detector().spec.name)"
    )
    assert done.stdout.split() == ["resnet18-68", "int8", "face-detector"], done.stderr
