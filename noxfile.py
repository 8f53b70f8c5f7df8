"""The run-time's tests on each Python that is here, with the oldest and the newest packages allowed.

    nox                      all but gpu_packages; a Python that is not on this machine is skipped, and said so
    nox -s runtime-3.12      one Python; "runtime-3.12(oldest)" is one end of the bounds
    nox -s gpu_packages      onnxruntime-gpu, some 250 MB for each Python and bound

The bounds are read from pyproject.toml and the tests from tests/runtime.txt, so neither is written
down twice.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
BOUNDS = (nox.param("oldest", id="oldest"), nox.param("newest", id="newest"))
TESTS_NEED = ("onnx", "pytest")
SYSTEM_PACKAGES = {
    "3.10": ("numpy==1.21.5", "opencv-python-headless==4.5.4.60", "onnxruntime==1.18.0"),
    "3.12": ("numpy==1.26.4", "opencv-python-headless==4.6.0.66", "onnxruntime==1.18.0"),
}
"""What Ubuntu 22.04 (JetPack 6) and 24.04 (JetPack 7) carry of numpy and OpenCV, and the oldest engine."""

OPEN_DEVICE = """
from cuda.bindings.driver import cuInit, cuDeviceGet, cuDevicePrimaryCtxRetain, CUresult, CUdevice_attribute
from kp_export.cuda_device import cuda_device
try:
    print(cuda_device())
except RuntimeError as error:
    print(error)
    assert "there is no CUDA device" in str(error), error
"""

COMPILE_KERNEL = """
from cuda.bindings.nvrtc import nvrtcGetSupportedArchs, nvrtcVersion
from kp_runtime.preprocess_cuda import compile_cubin
assert nvrtcVersion()[1:] == (12, 6), nvrtcVersion()
for number in nvrtcGetSupportedArchs()[1]:
    compile_cubin(f"sm_{number}")
"""

nox.options.sessions = ("runtime", "system_packages", "cuda")
nox.options.envdir = "build/nox"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "venv"
# pyenv's own commands refuse a version that is not switched on, so its folders come first
os.environ["PATH"] = os.pathsep.join(
    [*map(str, (Path.home() / ".pyenv" / "versions").glob("3.*/bin")), os.environ["PATH"]]
)


@nox.session(python=PYTHONS)
@nox.parametrize("bounds", BOUNDS)
def runtime(session: nox.Session, bounds: str) -> None:
    """The run-time on ONNX Runtime and OpenCV, and the command's help without anything of training."""
    _install(session, bounds, "image", "ort", "cli", needs=TESTS_NEED)
    _test(session)
    for command in ("", "predict", "bench", "export", "train"):
        session.run("python", "-c", "import kp_cli; kp_cli.main()", *command.split(), "--help", silent=True)


@nox.session(python=PYTHONS)
@nox.parametrize("bounds", BOUNDS)
def gpu_packages(session: nox.Session, bounds: str) -> None:
    """The run-time on onnxruntime-gpu's CPU provider; without a GPU that is all that can be asked of it."""
    _install(session, bounds, "image", "ort-gpu", needs=TESTS_NEED)
    _test(session)


@nox.session(python=PYTHONS)
@nox.parametrize("bounds", BOUNDS)
@nox.parametrize("extra", ["cuda12", "cuda13"])
def cuda(session: nox.Session, extra: str, bounds: str) -> None:
    """NVIDIA's bindings are there and have the names that are used; a device is opened where there is one.

    Those of CUDA 12 compile the crop kernel by JetPack 6's NVRTC, for each GPU that it knows.
    """
    _install(session, bounds, extra)
    session.run("python", "-c", OPEN_DEVICE)
    if extra == "cuda12":
        session.install("nvidia-cuda-nvrtc-cu12==12.6.85")
        session.run("python", "-c", COMPILE_KERNEL, env={"KP_CACHE": session.create_tmp()})


@nox.session(python=list(SYSTEM_PACKAGES))
def system_packages(session: nox.Session) -> None:
    """The run-time with the numpy and OpenCV that a board has from its system."""
    numpy, *others = SYSTEM_PACKAGES[str(session.python)]
    # onnx and its protobuf first, with any numpy; the named versions last, whatever they ask of each other
    session.install(*TESTS_NEED, *others[1:], "numpy<2")
    session.install("--no-deps", numpy, *others)
    _test(session)


def _install(session: nox.Session, bounds: str, *extras: str, needs: tuple[str, ...] = ()) -> None:
    """What the extras require at this end of the bounds, and the tests' own packages in any version."""
    upgrade = ("--upgrade",) if bounds == "newest" else ()
    session.install(*upgrade, *needs, *_requirements(session, bounds, *extras))


def _test(session: nox.Session) -> None:
    """Runs the list of the run-time's tests."""
    session.run("python", "-m", "pip", "list", "--format=freeze")
    photo = _photo()
    session.run(
        "python", "-m", "pytest", "-p", "no:cacheprovider", "-q", "@tests/runtime.txt", *session.posargs,
        env={"KP_ASTRONAUT": str(photo)} if photo else {},
    )  # fmt: skip


def _requirements(session: nox.Session, bounds: str, *extras: str) -> list[str]:
    """The base's and the extras' requirements on this Python; `oldest` pins each at its highest lower bound."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = [Requirement(line) for line in lines]
    found = [r for r in found if r.marker is None or r.marker.evaluate({"python_version": str(session.python)})]
    if bounds == "newest":
        return [f"{r.name}{r.specifier}" for r in found]
    lowest: dict[str, Version] = {}
    for requirement in found:
        (least,) = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        lowest[requirement.name] = max(lowest.get(requirement.name, least), least)
    return [f"{name}=={version}" for name, version in lowest.items()]


def _photo() -> Path | None:
    """The photograph that the detectors are tested on, from this environment's scikit-image."""
    spec = importlib.util.find_spec("skimage")
    return Path(spec.origin).parent / "data" / "astronaut.png" if spec and spec.origin else None
