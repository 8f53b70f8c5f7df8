"""The folder of wheels for a board without internet, filled from a folder of made-up wheels: no network."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import wheelhouse
from wheelhouse import TARGETS, fill_wheelhouse, main
from wheels import build_model_wheel

from kp_runtime.errors import ExportError, InputError
from kp_runtime.manifest import Manifest, file_entry
from tests.models import tiny_bundle

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pip", "setuptools", "uv"))), reason="needs pip, setuptools and uv"
)
ROOT = Path(__file__).resolve().parents[1]
PURE = "py3-none-any"
OFFERED = [
    ("annotated-doc", "1.0", PURE, []),
    ("backport", "1.0", PURE, []),
    ("cryptography", "50.0", "cp310-abi3-manylinux_2_28_aarch64", []),
    ("cuda-python", "12.9.1", PURE, []),
    ("cuda-python", "13.0.0", PURE, []),
    ("fastapi", "0.200", PURE, ["backport; python_version < '3.11'"]),
    ("numpy", "1.26.4", "cp310-cp310-manylinux_2_17_aarch64.manylinux2014_aarch64", []),
    ("numpy", "1.26.4", "cp312-cp312-manylinux_2_17_aarch64.manylinux2014_aarch64", []),
    ("numpy", "1.26.4", "cp310-cp310-manylinux_2_17_x86_64.manylinux2014_x86_64", []),
    ("numpy", "2.2.6", "cp310-cp310-manylinux_2_17_aarch64.manylinux2014_aarch64", []),
    ("onnxruntime", "1.23.2", "cp310-cp310-manylinux_2_28_aarch64", ["numpy>=1.21.6"]),
    ("onnxruntime", "1.32.0", "cp312-cp312-manylinux_2_39_aarch64", ["numpy>=1.21.6"]),
    ("onnxruntime", "1.33.0", "cp312-cp312-manylinux_2_41_aarch64", ["numpy>=1.21.6"]),
    ("opencv-python-headless", "4.11.0", "cp37-abi3-manylinux_2_17_aarch64.manylinux2014_aarch64", ["numpy>=1.22"]),
    ("prometheus-client", "0.30", PURE, []),
    ("rich", "15.0", PURE, []),
    ("typer", "0.29", PURE, ["annotated-doc"]),
    ("uvicorn", "0.50", PURE, []),
]
"""Name, version, tags and dependencies."""


@pytest.fixture(scope="module")
def offered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offered")
    for name, version, tags, needs in OFFERED:
        stem = f"{name.replace('-', '_')}-{version}"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
        tag = "".join(f"Tag: {part}\n" for part in tags.split("."))
        with zipfile.ZipFile(folder / f"{stem}-{tags}.whl", "w") as archive:
            archive.writestr(f"{stem}.dist-info/METADATA", metadata)
            archive.writestr(f"{stem}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n{tag}")
            archive.writestr(f"{stem}.dist-info/RECORD", "")
    return folder


@pytest.fixture(scope="module")
def own(wheel: Path, tools_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The project's wheels, and one of a bundle with a tiny int8 file."""
    out = tmp_path_factory.mktemp("own")
    bundle = tiny_bundle(out / "small")
    (bundle / "model.fp32.onnx").rename(bundle / "model.int8.onnx")
    entry = file_entry(bundle / "model.int8.onnx", "onnx", precision="int8")
    dataclasses.replace(Manifest.read(bundle), files={"model.int8.onnx": entry}).write(bundle)
    return wheel, tools_wheel, build_model_wheel(bundle, out)


@pytest.fixture(autouse=True)
def built_once(own: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(wheel: Path, out: Path) -> Path:
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))

    project, tools, model = own
    monkeypatch.setattr(wheelhouse, "build_project_wheel", lambda out: copied(project, out))
    monkeypatch.setattr(wheelhouse, "build_tools_wheel", lambda out: copied(tools, out))
    monkeypatch.setattr(wheelhouse, "build_model_wheel", lambda bundle, out: copied(model, out))


def names(wheels: list[Path]) -> set[str]:
    return {"-".join(wheel.name.split("-")[:2]) for wheel in wheels if not wheel.name.startswith("kp_edge")}


def test_a_wheelhouse_is_whole_and_for_its_board(offered: Path, tmp_path: Path) -> None:
    out = tmp_path / "house"
    wheels = fill_wheelhouse("jetpack6", out, find_links=offered)
    assert names(wheels) == {
        "annotated_doc-1.0", "backport-1.0", "cryptography-50.0", "cuda_python-12.9.1", "fastapi-0.200", "numpy-1.26.4",
        "onnxruntime-1.23.2", "prometheus_client-0.30", "rich-15.0", "typer-0.29", "uvicorn-0.50",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == {"wheels", "requirements.txt", "README.txt"}
    assert not any("x86_64" in wheel.name for wheel in wheels)
    text = (out / "requirements.txt").read_text()
    assert re.findall(r"sha256:(\w+)", text) == [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
    readme = (out / "README.txt").read_text()
    assert all(wheel.name in readme for wheel in wheels)
    assert "not commercial" in readme
    commands = re.findall("^    (.+)", readme, re.MULTILINE)[:3]
    assert "venv --clear " in commands[0], "pip keeps the code that is there of a release of the same version"
    assert "\n".join(commands) in (ROOT / "docs" / "jetson.md").read_text(encoding="utf-8")
    assert install(out).returncode == 0
    # a wheel that was changed on the way is refused
    (numpy,) = [wheel for wheel in wheels if wheel.name.startswith("numpy")]
    with zipfile.ZipFile(numpy, "a") as archive:
        archive.writestr("numpy/extra.py", "")
    assert "DO NOT MATCH THE HASHES" in install(out).stderr


def install(house: Path) -> subprocess.CompletedProcess[str]:
    """The line of README.txt, for the board's Python and processor, writing nothing."""
    (line,) = re.findall(r"bin/pip (install .*)", (house / "README.txt").read_text())
    other = ["--dry-run", "--ignore-installed", "--target", str(house / "site"), "--only-binary=:all:"]
    if sys.version_info >= (3, 13):  # pip asks markers about the Python that it runs on, for which numpy is newer
        other.append("--no-deps")
    board = ["--python-version", "3.10", "--platform", "manylinux_2_17_aarch64", "--platform", "manylinux_2_28_aarch64"]
    return subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", *line.split(), *other, *board],
        capture_output=True, text=True, check=False, cwd=house,
    )  # fmt: skip


def test_each_target_has_its_own_python_cuda_and_c_library(offered: Path, tmp_path: Path) -> None:
    found = names(fill_wheelhouse("jetpack7", tmp_path / "house", find_links=offered))
    assert {"cuda_python-13.0.0", "onnxruntime-1.32.0", "numpy-1.26.4"} <= found
    assert "backport-1.0" not in found


def test_a_second_opencv_is_refused(offered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["jetpack6"]
    monkeypatch.setitem(TARGETS, "jetpack6", dataclasses.replace(target, extras=(*target.extras, "image")))
    with pytest.raises(ExportError, match=r"opencv-python-headless.* which jetpack6 brings itself"):
        fill_wheelhouse("jetpack6", tmp_path / "house", find_links=offered)
    assert not (tmp_path / "house").exists()


def test_faults_are_one_line(offered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no target 'nano'; choose from jetpack6, jetpack7"):
        fill_wheelhouse("nano", tmp_path / "house")
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        fill_wheelhouse("jetpack6", offered)
    with pytest.raises(SystemExit) as ended:
        main(["--target", "jetpack6", "--out", str(tmp_path / "h"), "--find-links", str(tmp_path)])
    assert re.match(r"wheelhouse: can't resolve the wheelhouse: .*numpy", str(ended.value.code))
    assert "\n" not in str(ended.value.code)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "executable", str(write_python_without_uv(tmp_path)))
    with pytest.raises(ExportError, match="No module named uv; run: pip install uv"):
        wheelhouse._run("resolve", "uv")


def write_python_without_uv(folder: Path) -> Path:
    script = folder / "python"
    script.write_text('#!/bin/sh\necho "$0: No module named $2" >&2\nexit 1\n')
    script.chmod(0o755)
    return script
