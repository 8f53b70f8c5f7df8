"""Fills a folder with all wheels that a Jetson without internet installs, for its own Python and processor.

    python scripts/wheelhouse.py --target jetpack6 --out dist/jetpack6

uv resolves for the board (pip would judge the conditions of each dependency by this machine's Python), pip
downloads. What a board's image brings, OpenCV, TensorRT and CUDA, must not come: pip would put a second one
in front of it. In the folder: wheels/, requirements.txt with the sha256 of every wheel, README.txt.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wheels import BUNDLE, build_model_wheel, build_project_wheel, build_tools_wheel

from kp_runtime.errors import ExportError, InputError, KpError
from kp_runtime.files import sha256_of_file

__all__ = ["TARGETS", "Target", "fill_wheelhouse", "main"]


@dataclass(frozen=True)
class Target:
    """A board's system: its Python, its C library (the minor number of glibc 2), and what is installed on it.

    `constraints` hold versions down to what works with the system's packages.
    """

    python: str
    glibc: int
    extras: tuple[str, ...]
    constraints: tuple[str, ...]


EXTRAS = ("cli", "ort", "serve", "metrics", "sign", "model")
"""What a board runs on whatever its CUDA: `kp`, the service with its metrics, and signatures."""

# numpy: 1.26.4 is Ubuntu 24.04's own, which then stays. Ubuntu 22.04's 1.21.5 is too old for onnxruntime, and the
# system's OpenCV can't be imported with numpy 2.
TARGETS = {
    "jetpack6": Target("3.10", 35, (*EXTRAS, "cuda12"), ("numpy==1.26.4",)),
    "jetpack7": Target("3.12", 39, (*EXTRAS, "cuda13"), ("numpy==1.26.4",)),
}
OF_THE_BOARD = re.compile(r"(opencv|tensorrt|nvidia|torch|onnxruntime-gpu)\b")
"""Names of packages that JetPack brings, or that have no code for a Jetson's GPU."""

README = """\
kp-edge for {name}: Python {python} on aarch64 with glibc 2.{glibc} or newer

Copy this folder to the board. There, in this folder:

    python3 -m venv --clear --system-site-packages ~/kp
    ~/kp/bin/pip install --no-index --find-links wheels --require-hashes -r requirements.txt
    ~/kp/bin/kp predict photo.jpg

--clear empties an environment that is there: releases may have one version, and pip would keep the older code.
--system-site-packages lets the environment see the board's own OpenCV and TensorRT: they are not in here and
stay as they are. Numpy is held at {numpy}, which works with them.

The weights in kp-edge-model are for research that is not commercial; their licence is in the wheel. Without
it: delete its two lines in requirements.txt, and name your own bundle in the variable KP_MODEL.

{wheels}
"""


def fill_wheelhouse(name: str, out: Path, *, bundle: Path = BUNDLE, find_links: Path | None = None) -> list[Path]:
    """Builds the project's wheels, downloads the rest, and writes down what is there.

    Args:
        name: of `TARGETS`.
        out: the folder to make; it must not be there yet, or be empty.
        bundle: the model that goes in.
        find_links: a folder of wheels to take in place of the package index.

    Returns:
        The wheels.

    Raises:
        InputError: there is no such target, or `out` holds something.
        ExportError: a package can't be found for the board, or one came that the board has itself.
    """
    if name not in TARGETS:
        raise InputError(f"there is no target {name!r}; choose from {', '.join(TARGETS)}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is not empty; name a new folder, so that no old wheel stays in it")
    target = TARGETS[name]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        made = Path(temporary) / "made"
        folder = made / "wheels"
        own = [build_project_wheel(folder), build_tools_wheel(folder), build_model_wheel(bundle, folder)]
        pins = _resolve(target, own, find_links)
        if odd := [pin for pin in pins if OF_THE_BOARD.match(pin)]:
            raise ExportError(f"{odd[0]} would come too, which {name} brings itself or can't use; check the extras")
        _download(target, pins, folder, find_links)
        wheels = sorted(folder.glob("*.whl"))
        _check_complete(wheels, [*own, *pins])
        (made / "requirements.txt").write_text("".join(map(_requirement, wheels)), encoding="utf-8")
        (made / "README.txt").write_text(_readme(name, target, wheels), encoding="utf-8")
        made.chmod(0o755)
        made.replace(out)
    return sorted((out / "wheels").glob("*.whl"))


def _resolve(target: Target, own: Sequence[Path], find_links: Path | None) -> list[str]:
    """Everything that the board needs beside `own`, as `name==version`."""
    project, *others = own
    wanted = f"kp-edge[{','.join(target.extras)}] @ {project.resolve().as_uri()}\n"
    wanted += "".join(f"{_distribution(wheel)} @ {wheel.resolve().as_uri()}\n" for wheel in others)
    with tempfile.TemporaryDirectory() as temporary:
        asked, held = Path(temporary) / "requirements.in", Path(temporary) / "constraints.txt"
        asked.write_text(wanted, encoding="utf-8")
        held.write_text("\n".join(target.constraints), encoding="utf-8")
        lines = _run(
            "resolve", "uv", "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate",
            "--only-binary", ":all:", "--python", sys.executable, "--python-version", target.python,
            "--python-platform", f"aarch64-manylinux_2_{target.glibc}", "--constraints", held,
            *_where(find_links), asked,
        )  # fmt: skip
    return [line for line in lines.splitlines() if "==" in line and not line.startswith("kp-edge")]


def _download(target: Target, pins: Sequence[str], folder: Path, find_links: Path | None) -> None:
    """The wheels of `pins` for the board: of any C library up to its own."""
    tags = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, target.glibc + 1))]
    _run(
        "download", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
        "--implementation", "cp", "--python-version", target.python, *(f"--platform={tag}" for tag in tags),
        "--dest", folder, *_where(find_links), *pins,
    )  # fmt: skip


def _where(find_links: Path | None) -> list[str]:
    return [] if find_links is None else ["--no-index", "--find-links", str(find_links.resolve())]


def _run(purpose: str, module: str, *words: str | Path) -> str:
    """What a module of this Python prints; its last words become the error."""
    done = subprocess.run([sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        hint = "; run: pip install uv" if f"No module named {module}" in said else ""
        raise ExportError(f"can't {purpose} the wheelhouse: {said}{hint}")
    return done.stdout


def _check_complete(wheels: Sequence[Path], wanted: Sequence[Path | str]) -> None:
    if len(wheels) != len(wanted):
        raise ExportError(f"{len(wheels)} wheels are there of {len(wanted)}; remove the folder and run this again")


def _distribution(wheel: Path) -> str:
    return wheel.name.split("-")[0].replace("_", "-")


def _requirement(wheel: Path) -> str:
    """A line of requirements.txt that takes this very file."""
    return f"{_distribution(wheel)}=={wheel.name.split('-')[1]} \\\n    --hash=sha256:{sha256_of_file(wheel)}\n"


def _readme(name: str, target: Target, wheels: Sequence[Path]) -> str:
    sizes = [(wheel.name, wheel.stat().st_size) for wheel in wheels]
    lines = [f"{size:>12,} bytes  {file}" for file, size in [*sizes, ("together", sum(size for _, size in sizes))]]
    (numpy,) = [wheel.name.split("-")[1] for wheel in wheels if wheel.name.startswith("numpy-")]
    return README.format(name=name, python=target.python, glibc=target.glibc, numpy=numpy, wheels="\n".join(lines))


def main(words: list[str] | None = None) -> None:
    """Fills a wheelhouse and prints what is in it."""
    parser = argparse.ArgumentParser(description="All wheels that a Jetson without internet installs.")
    parser.add_argument("--target", required=True, help=", ".join(TARGETS))
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="a full bundle with an int8 file")
    parser.add_argument("--find-links", type=Path, help="a folder of wheels, to take in place of the package index")
    asked = parser.parse_args(words)
    try:
        fill_wheelhouse(asked.target, asked.out, bundle=asked.bundle, find_links=asked.find_links)
    except (KpError, OSError) as error:
        sys.exit(f"wheelhouse: {' '.join(str(error).split())}")
    print((asked.out / "README.txt").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
