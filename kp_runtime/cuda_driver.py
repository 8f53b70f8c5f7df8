"""The CUDA driver by cuda-python: one device, its primary context, its errors as `BackendError`.

cuda-python is imported here alone in the run-time (and its NVRTC in `cubin`), when a device is opened.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

from kp_runtime.errors import BackendError, MissingExtraError

__all__ = ["CudaDriver", "bindings", "has_driver", "stream_handle"]

PURPOSE = "running on a GPU (with CUDA 13: the extra cuda13)"


def has_driver() -> bool:
    """Whether this machine has NVIDIA's driver library: a look that costs nothing where it has not."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def bindings(name: str) -> Any:
    """A module of cuda-python such as `driver`, or the error that says how to get it."""
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise MissingExtraError("cuda-python", "cuda12", PURPOSE) from error


class CudaDriver:
    """A CUDA device with its primary context, which is made the calling thread's current one.

    Args:
        device_id: number of the GPU.

    Attributes:
        arch: the GPU's architecture, such as `sm_87`.
        cuda: the newest CUDA version that the driver runs, such as `12.6`.

    Raises:
        MissingExtraError: cuda-python is not installed.
        BackendError: there is no driver or no such device.
    """

    def __init__(self, device_id: int = 0) -> None:
        self.api = bindings("driver")
        self.device_id = device_id
        try:
            self.call("cuInit", 0)
            count = self.call("cuDeviceGetCount")
        except BackendError:
            raise
        except Exception as error:  # a missing libcuda is an error of another kind in each release
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BackendError(
                f"there is no CUDA device: the NVIDIA driver's libcuda can't be loaded ({reason}); where there is a "
                "GPU, install its driver; elsewhere run on the CPU"
            ) from error
        if not 0 <= device_id < count:
            raise BackendError(f"there is no CUDA device {device_id}: this machine has {count}, numbered from 0")
        device = self.call("cuDeviceGet", device_id)
        attributes = self.api.CUdevice_attribute
        major = self.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self.call("cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.arch = f"sm_{int(major)}{int(minor)}"
        version = int(self.call("cuDriverGetVersion"))
        self.cuda = f"{version // 1000}.{version % 1000 // 10}"
        self._context = self.call("cuDevicePrimaryCtxRetain", device)
        self.make_current()

    def make_current(self) -> None:
        """Makes the device's context the calling thread's current one."""
        self.call("cuCtxSetCurrent", self._context)

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls a function of the driver, whose first result is a status, and gives the next one.

        Raises:
            BackendError: any other status than success.
        """
        status, *values = getattr(self.api, name)(*arguments)
        if status != self.api.CUresult.CUDA_SUCCESS:
            raise BackendError(
                f"CUDA failed: {name} says {getattr(status, 'name', status)}; see that nvidia-smi (tegrastats on a "
                "Jetson) shows a GPU with free memory"
            )
        return values[0] if values else None


def stream_handle(stream: Any) -> int:
    """The handle of a CUDA stream: a number, or an object with `__cuda_stream__` (cuda.core, CuPy, ...).

    Raises:
        BackendError: it is neither.
    """
    protocol = getattr(stream, "__cuda_stream__", None)
    try:
        return int(protocol()[1]) if protocol is not None else int(stream)
    except (TypeError, ValueError) as error:
        raise BackendError(
            f"a CUDA stream must be its handle or an object with __cuda_stream__, got {type(stream).__name__}"
        ) from error
