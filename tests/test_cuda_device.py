"""What is said of the CUDA device that a plan is built on: with a double of the driver, and on a real GPU."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kp_export import cuda_device as module
from kp_export.cuda_device import CudaDevice, cuda_device
from kp_runtime.errors import BackendError
from kp_runtime.machine import driver_version, l4t_release
from tests.cuda_driver_double import ARGUMENTS, DriverDouble, Result


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    double = DriverDouble(None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", double)
    monkeypatch.setattr(module, "driver_version", partial(driver_version, tmp_path))
    monkeypatch.setattr(module, "l4t_release", partial(l4t_release, tmp_path))
    return double


def test_device(driver: DriverDouble, tmp_path: Path) -> None:
    release, version = tmp_path / "etc/nv_tegra_release", tmp_path / "proc/driver/nvidia/version"
    release.parent.mkdir(parents=True)
    release.write_text("# R36 (release), REVISION: 4.0, GCID: 1\nmore\n")
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n")
    device = cuda_device()
    assert device == CudaDevice(0, "Orin", "8.7", "12.6", "540.4.0", "R36 (release), REVISION: 4.0, GCID: 1", 16)
    assert device.sm == "sm87"
    assert "cuCtxSetCurrent" in [name for name, *_ in driver.asked]


def test_machine_that_is_no_jetson(driver: DriverDouble) -> None:
    device = cuda_device()
    assert device.l4t is None
    assert device.driver is None


def test_cuda_that_does_not_work(driver: DriverDouble) -> None:
    driver.failing["cuInit"] = Result.CUDA_ERROR_NO_BINARY_FOR_GPU
    with pytest.raises(BackendError, match="cuInit says CUDA_ERROR_NO_BINARY_FOR_GPU; see that nvidia-smi"):
        cuda_device()
    driver.failing["cuInit"] = Result.CUDA_ERROR_NOT_INITIALIZED
    with pytest.raises(BackendError, match="forked from one that had used CUDA, start it by spawn"):
        cuda_device()


def test_no_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(BackendError, match=r"with CUDA 13: the extra cuda13.*pip install 'kp-edge\[cuda12\]'"):
        cuda_device()


@pytest.mark.gpu
def test_the_real_device() -> None:
    try:
        device = cuda_device()
    except BackendError as error:
        pytest.skip(str(error))
    assert device.name
    assert float(device.compute_capability) >= 5


def test_the_double_takes_what_the_driver_s_functions_take() -> None:
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    for name, count in ARGUMENTS.items():
        signature = getattr(real, name).__doc__.splitlines()[0]
        given = signature[len(name) + 1 : -1]
        assert len(given.split(",")) * bool(given) == count, signature


def test_what_is_asked_of_the_driver_is_what_the_double_plays() -> None:
    """So no copy or fill goes to the default stream, where it may be under way still when a stream of ours goes on."""
    root, asked = Path(__file__).resolve().parents[1], set[str]()
    for path in (*root.glob("kp_*/*.py"), *root.glob("benchmarks/*.py"), *root.glob("tests/*.py")):
        asked |= set(re.findall(r'"(cu[A-Z]\w+)"', path.read_text(encoding="utf-8")))
    assert asked - ARGUMENTS.keys() == {"cuEventElapsedTime", "cuGraphGetNodes"}  # times, and one of its own making
