"""Builds the project's two wheels and the default model's, the same bytes each time.

    python scripts/wheels.py --out dist

Needs pip and setuptools, not torch. kp-edge is what runs a model, kp-edge-tools what trains, exports and builds
plans: a checkout has both. The model's wheel holds the int8 files of a full bundle and the face detector's, packed.
Its version is the project's with the sha256 of both packed manifests as label, so other weights are another version.
Such labels have no order, and pip would take the largest of them: the folder keeps the new wheel alone.
All are built from copies: setuptools leaves files in the folder, and takes old ones from it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import kp_runtime
from kp_export.pack import pack_bundle
from kp_runtime.errors import ExportError, KpError
from kp_runtime.files import sha256_of_file
from kp_runtime.manifest import MANIFEST_NAME

__all__ = ["BUNDLE", "build_model_wheel", "build_project_wheel", "build_tools_wheel", "main"]

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ("pyproject.toml", "README.md", "LICENSE", "kp_runtime", "kp_cli")
TOOLS = ("LICENSE", "kp_train", "kp_export")
BUNDLE = ROOT / "engines" / "resnet18-68"
DETECTOR = ROOT / "engines" / "face-detector"
CARD = "MODEL_CARD.md"
EARLIEST = "315532800"
"""The first second that a zip file can name, 1980: what a wheel holds decides its bytes, not when it was made."""


def build_project_wheel(out: Path) -> Path:
    """Builds `kp-edge` into the folder `out`.

    Raises:
        ExportError: pip or setuptools failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source = _copied(PROJECT, Path(temporary))
        _leave_the_checkout(source / "README.md")
        return _wheel_from(source, out)


def build_tools_wheel(out: Path) -> Path:
    """Builds `kp-edge-tools` into the folder `out`.

    Raises:
        ExportError: pip or setuptools failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source = _copied(TOOLS, Path(shutil.copytree(ROOT / "packaging" / "tools", Path(temporary) / "tools")))
        (source / "VERSION").write_text(f"{kp_runtime.__version__}\n", encoding="utf-8")
        (source / "REQUIREMENTS").write_text(f"kp-edge=={kp_runtime.__version__}\n", encoding="utf-8")
        return _wheel_from(source, out)


def build_model_wheel(bundle: Path, out: Path) -> Path:
    """Builds `kp-edge-model` into the folder `out`, from the int8 files of a full bundle and the face detector's.

    Others of the name are removed there.

    Raises:
        BundleError: the bundle has no int8 file, or a file is not the manifest's.
        ExportError: pip or setuptools failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(shutil.copytree(ROOT / "packaging" / "model", Path(temporary) / "model"))
        manifests = hashlib.sha256()
        for package, full, precision in (("kp_model", bundle, "int8"), ("kp_face_detector", DETECTOR, "fp32")):
            shutil.rmtree(source / package / "__pycache__", ignore_errors=True)
            pack_bundle(full, source / package, [precision])
            if (full / CARD).exists():
                shutil.copyfile(full / CARD, source / package / CARD)
            manifests.update((source / package / MANIFEST_NAME).read_bytes())
        label = manifests.hexdigest()[:12]
        (source / "VERSION").write_text(f"{kp_runtime.__version__}+m{label}\n", encoding="utf-8")
        wheel = _wheel_from(source, out)
    for other in set(out.glob("kp_edge_model-*.whl")) - {wheel}:
        other.unlink()
    return wheel


def _leave_the_checkout(readme: Path) -> None:
    """Makes a README fit to be read without a checkout: no picture, and words in place of links to files."""
    text = re.sub(r"!\[[^]]*\]\([^)]*\)\n*", "", readme.read_text(encoding="utf-8"))
    readme.write_text(re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text), encoding="utf-8")


def _copied(names: Sequence[str], folder: Path) -> Path:
    """The folder, with these files and folders of the project in it."""
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def _wheel_from(source: Path, out: Path) -> Path:
    """Builds the project in `source`; modes are set, as the wheel would hold this user's."""
    for path in source.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as built:
        words = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", built, str(source))
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "wheel", *words],
            capture_output=True, text=True, check=False, umask=0o022,
            env={"SOURCE_DATE_EPOCH": EARLIEST} | dict(os.environ),
        )  # fmt: skip
        if done.returncode:
            raise ExportError(
                f"pip can't build the wheel of {source.name}; it needs setuptools 77 or newer here. It said: "
                + (done.stderr.strip() or done.stdout.strip())
            )
        (wheel,) = Path(built).glob("*.whl")
        os.replace(wheel, out / wheel.name)
        return out / wheel.name


def main(words: list[str] | None = None) -> None:
    """Builds them all and prints their paths and sizes."""
    parser = argparse.ArgumentParser(description="Build the wheels of kp-edge, of its tools and of its default model.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder to fill; dist when left out")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="a full bundle with an int8 file")
    asked = parser.parse_args(words)
    try:
        own = build_project_wheel(asked.out), build_tools_wheel(asked.out)
        wheels = *own, build_model_wheel(asked.bundle, asked.out)
    except (KpError, OSError) as error:
        sys.exit(f"wheels: {' '.join(str(error).split())}")
    for wheel in wheels:
        print(f"{wheel}: {wheel.stat().st_size:,} bytes, sha256 {sha256_of_file(wheel)}")


if __name__ == "__main__":
    main()
