"""The CUDA device that a plan is built on: proven to work before TensorRT is touched.

TensorRT's runtime ends the process with a segmentation fault where CUDA can't be initialised, so
`cuda_device` opens the device through the CUDA driver first. It needs the package cuda-python,
imported here alone; nothing else of CUDA is needed to import this file.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kp_runtime.errors import BackendError

__all__ = ["CudaDevice", "cuda_device"]

L4T_RELEASE = Path("/etc/nv_tegra_release")
DRIVER_VERSION = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class CudaDevice:
    """A CUDA device that answered.

    Attributes:
        index: its number.
        name: such as `Orin`.
        compute_capability: such as `8.7`.
        cuda: the newest CUDA version that the driver runs, such as `12.6`.
        driver: version of the kernel driver, where Linux tells it.
        l4t: first line of `/etc/nv_tegra_release`, on a Jetson.
    """

    index: int
    name: str
    compute_capability: str
    cuda: str
    driver: str | None = None
    l4t: str | None = None

    @property
    def sm(self) -> str:
        """The compute capability as it stands in file names: `sm87`."""
        return "sm" + self.compute_capability.replace(".", "")


def cuda_device(index: int = 0) -> CudaDevice:
    """Opens a CUDA device, makes it the current one, and says what it is.

    Raises:
        BackendError: cuda-python, the driver or the device is missing, or does not work.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise BackendError(
            "there is no way to look for a CUDA device: cuda-python is not installed; run: "
            "pip install 'kp-edge[cuda12]', or 'kp-edge[cuda13]' where the driver is for CUDA 13"
        ) from error
    try:
        return _open(driver, index)
    except BackendError:
        raise
    except Exception as error:  # a missing libcuda is a RuntimeError of another package in each release
        raise BackendError(
            f"there is no CUDA device: the NVIDIA driver's libcuda can't be loaded ({_first_line(error)}); where there "
            "is a GPU, install its driver"
        ) from error


def _open(driver: Any, index: int) -> CudaDevice:
    _ask(driver, driver.cuInit, 0)
    count = _ask(driver, driver.cuDeviceGetCount)
    if not 0 <= index < count:
        raise BackendError(f"there is no CUDA device {index}: this machine has {count}, numbered from 0")
    device = _ask(driver, driver.cuDeviceGet, index)
    _ask(driver, driver.cuCtxSetCurrent, _ask(driver, driver.cuDevicePrimaryCtxRetain, device))
    attribute = driver.CUdevice_attribute
    major = _ask(driver, driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    minor = _ask(driver, driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    cuda = int(_ask(driver, driver.cuDriverGetVersion))
    name = bytes(_ask(driver, driver.cuDeviceGetName, 256, device)).split(b"\0")[0].decode("utf-8", "replace")
    return CudaDevice(
        index=index,
        name=name,
        compute_capability=f"{int(major)}.{int(minor)}",
        cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        driver=_driver_version(DRIVER_VERSION),
        l4t=_l4t(L4T_RELEASE),
    )


def _ask(driver: Any, function: Any, *arguments: Any) -> Any:
    """Calls a function of the CUDA driver, whose first result is a status."""
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(
            f"CUDA does not work here: {function.__name__} says {getattr(status, 'name', status)}; see that nvidia-smi "
            "(tegrastats on a Jetson) shows a GPU"
        )
    return values[0] if values else None


def _driver_version(path: Path) -> str | None:
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+[.\d]*)", path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found.group(1) if found else None


def _l4t(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[0].lstrip("# ").strip()
    except (OSError, IndexError):
        return None


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
