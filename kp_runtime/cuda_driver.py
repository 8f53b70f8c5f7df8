"""The CUDA driver by cuda-python: one device, its primary context, its errors as `BackendError`.

cuda-python is imported here alone in the run-time (and its NVRTC in `cubin`), when a device is opened.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kp_runtime.errors import BackendError, missing_or_broken, reason_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Closing", "CudaDriver", "Memory", "bindings", "has_driver", "stream_handle"]

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
        raise missing_or_broken(error, "cuda", "cuda-python", "cuda12", PURPOSE) from error


class CudaDriver:
    """A CUDA device with its primary context, which is made the calling thread's current one.

    Args:
        device_id: number of the GPU.

    Attributes:
        arch: the GPU's architecture, such as `sm_87`.
        multiprocessors: how many the GPU has.
        cuda: the newest CUDA version that the driver runs, such as `12.6`.

    Raises:
        MissingExtraError: cuda-python is not installed.
        BackendError: there is no driver or no such device.
    """

    def __init__(self, device_id: int = 0) -> None:
        self.api = bindings("driver")
        self.device_id = device_id
        try:
            self.api.cuInit(0)
        except Exception as error:  # a missing libcuda is an error of another kind in each release
            raise BackendError(
                f"there is no CUDA device: the NVIDIA driver's libcuda can't be loaded ({reason_of(error, lines=1)}); "
                "where there is a GPU, install its driver; elsewhere run on the CPU"
            ) from error
        self.call("cuInit", 0)
        count = self.call("cuDeviceGetCount")
        if not 0 <= device_id < count:
            raise BackendError(f"there is no CUDA device {device_id}: this machine has {count}, numbered from 0")
        device = self.call("cuDeviceGet", device_id)
        known = self.api.CUdevice_attribute
        major, minor, self.multiprocessors = (
            int(self.call("cuDeviceGetAttribute", getattr(known, f"CU_DEVICE_ATTRIBUTE_{name}"), device))
            for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")
        )
        self.arch = f"sm_{major}{minor}"
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
            BackendError: any other status than success, or a driver that is too old to have the function.
        """
        try:
            status, *values = getattr(self.api, name)(*arguments)
        except RuntimeError as error:  # cuda-python looks for a function when it is called
            raise BackendError(
                f"the NVIDIA driver has no {name} ({error}): it is older than cuda-python needs; update the driver"
            ) from error
        self._check(name, status)
        return values[0] if values else None

    def wait_for(self, other: int | None, stream: Any, event: Any) -> None:
        """Makes a stream wait for what another one, given by its handle, was told so far; `event` is used for it."""
        if other is not None:
            self.call("cuEventRecord", event, self.api.CUstream(other))
            self.call("cuStreamWaitEvent", stream, event, 0)

    def pointer_attribute(self, name: str, address: int) -> int | None:
        """`CU_POINTER_ATTRIBUTE_<name>` of the memory at an address; None where CUDA knows of none.

        Raises:
            BackendError: CUDA failed.
        """
        attribute = getattr(self.api.CUpointer_attribute, f"CU_POINTER_ATTRIBUTE_{name}")
        status, *values = self.api.cuPointerGetAttribute(attribute, address)
        if status == self.api.CUresult.CUDA_ERROR_INVALID_VALUE:
            return None
        self._check("cuPointerGetAttribute", status)
        return int(values[0])

    def _check(self, name: str, status: Any) -> None:
        if status != self.api.CUresult.CUDA_SUCCESS:
            reason = str(getattr(status, "name", status))
            raise BackendError(f"CUDA failed: {name} says {reason}; {_advice(reason)}")


_BROKEN = (
    "ADDRESS",
    "LAUNCH_FAILED",
    "ILLEGAL_INSTRUCTION",
    "ASSERT",
    "HARDWARE_STACK",
    "LAUNCH_TIMEOUT",
    "INVALID_PC",
)
"""Words in the errors after which a process can't use its GPU any more."""


def _advice(reason: str) -> str:
    """What to do about an error of the driver."""
    if "OUT_OF_MEMORY" in reason:
        return (
            "take fewer faces at once, or end other programs on the GPU (nvidia-smi lists them, tegrastats on a Jetson)"
        )
    if any(word in reason for word in _BROKEN):
        return (
            "something read or wrote memory that is not there, such as a frame that was freed too early; "
            "this process can't use the GPU any more: start it again"
        )
    if "NOT_INITIALIZED" in reason:
        return (
            "where this process was forked from one that had used CUDA, start it by spawn instead, or load models "
            "after the fork and not before it"
        )
    return "see that nvidia-smi (tegrastats on a Jetson) shows a GPU that works"


class Closing(ABC):
    """What has memory or the like of a driver: a `with` block closes it, and it is closed where it was forgotten."""

    @abstractmethod
    def close(self) -> None:
        """Frees what it has; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # a program that ends takes the driver away first; what is left goes with it
        with contextlib.suppress(Exception):
            self.close()


class Memory:
    """A block of a device's memory, or of pinned memory of the host, that can grow. For one thread at a time.

    Args:
        driver: the device.
        pinned: memory of the host, which copies to and from the device want.

    Attributes:
        address: where the block is; 0 while there is none.
        size: its bytes.
    """

    def __init__(self, driver: CudaDriver, pinned: bool = False) -> None:
        self._driver, self._pinned = driver, pinned
        self.address = self.size = 0

    def reserve(self, size: int) -> None:
        """Makes room for so many bytes. A larger block takes the place of the old one, which nothing may be using.

        Raises:
            BackendError: no memory is left; the old block stays.
        """
        if size <= self.size:
            return
        function = ("cuMemHostAlloc", size, 0) if self._pinned else ("cuMemAlloc", size)
        address = int(self._driver.call(*function))
        self.free()
        self.address, self.size = address, size

    def array(self, shape: tuple[int, ...], dtype: DTypeLike, start: int = 0) -> NDArray[Any]:
        """An array in pinned memory, `start` bytes from its begin; valid until the block is freed or grows."""
        count = math.prod(shape) * np.dtype(dtype).itemsize
        memory = (ctypes.c_uint8 * count).from_address(self.address + start)
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def free(self) -> None:
        """Frees the block, which nothing may be using; a second call does nothing."""
        if self.address:
            self._driver.call("cuMemFreeHost" if self._pinned else "cuMemFree", self.address)
            self.address = self.size = 0

    def __del__(self) -> None:
        # a program that ends takes the driver away first; what is left goes with it
        with contextlib.suppress(Exception):
            self._driver.make_current()
            self.free()


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
