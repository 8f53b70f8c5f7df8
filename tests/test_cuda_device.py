"""Opening a CUDA device: against a double of cuda-python, and on the real one where there is a GPU."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kp_export import cuda_device as module
from kp_export.cuda_device import CudaDevice, cuda_device
from kp_runtime.errors import BackendError


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100


def driver_double(count: int = 1, init: Result = Result.CUDA_SUCCESS) -> Any:
    good = Result.CUDA_SUCCESS
    asked: list[str] = []

    def answer(name: str, *values: Any, status: Result = good) -> Any:
        def function(*_: Any) -> tuple[Any, ...]:
            asked.append(name)
            return (status, *values)

        function.__name__ = name
        return function

    def attribute(which: str, device: int) -> tuple[Result, int]:
        return good, {"major": 8, "minor": 7}[which]

    return SimpleNamespace(
        asked=asked,
        CUresult=Result,
        CUdevice_attribute=SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major", CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor"
        ),
        cuInit=answer("cuInit", status=init),
        cuDeviceGetCount=answer("cuDeviceGetCount", count),
        cuDeviceGet=answer("cuDeviceGet", 0),
        cuDevicePrimaryCtxRetain=answer("cuDevicePrimaryCtxRetain", "context"),
        cuCtxSetCurrent=answer("cuCtxSetCurrent"),
        cuDeviceGetAttribute=attribute,
        cuDriverGetVersion=answer("cuDriverGetVersion", 12060),
        cuDeviceGetName=answer("cuDeviceGetName", b"Orin" + b"\0" * 252),
    )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    double = driver_double(**getattr(request, "param", {}))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", double)
    return double


def test_device(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, version = tmp_path / "release", tmp_path / "version"
    release.write_text("# R36 (release), REVISION: 4.0, GCID: 1\nmore\n")
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n")
    monkeypatch.setattr(module, "L4T_RELEASE", release)
    monkeypatch.setattr(module, "DRIVER_VERSION", version)
    device = cuda_device()
    assert device == CudaDevice(0, "Orin", "8.7", "12.6", "540.4.0", "R36 (release), REVISION: 4.0, GCID: 1")
    assert device.sm == "sm87"
    assert "cuCtxSetCurrent" in driver.asked


def test_machine_that_is_no_jetson(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "L4T_RELEASE", tmp_path / "none")
    monkeypatch.setattr(module, "DRIVER_VERSION", tmp_path / "none")
    device = cuda_device()
    assert device.l4t is None
    assert device.driver is None


@pytest.mark.parametrize("driver", [{"count": 0}], indirect=True)
def test_no_device(driver: Any) -> None:
    with pytest.raises(BackendError, match="no CUDA device 0: this machine has 0"):
        cuda_device()


@pytest.mark.parametrize("driver", [{"init": Result.CUDA_ERROR_NO_DEVICE}], indirect=True)
def test_cuda_that_does_not_work(driver: Any) -> None:
    with pytest.raises(BackendError, match="cuInit says CUDA_ERROR_NO_DEVICE"):
        cuda_device()


def test_no_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(BackendError, match=r"pip install 'kp-edge\[cuda12\]', or 'kp-edge\[cuda13\]'"):
        cuda_device()


def test_no_driver_library(driver: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("libcuda.so.1 not found\nsecond line")

    driver.cuInit = fail
    with pytest.raises(BackendError, match=r"libcuda can't be loaded \(libcuda.so.1 not found\)"):
        cuda_device()


@pytest.mark.gpu
def test_the_real_device() -> None:
    try:
        device = cuda_device()
    except BackendError as error:
        pytest.skip(str(error))
    assert device.name
    assert float(device.compute_capability) >= 5
