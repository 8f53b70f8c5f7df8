"""The CUDA driver without a GPU: device memory is host memory, and the crop kernel runs emulated.

As on a GPU nothing happens when it is asked for: copies and launches wait until somebody waits for
an event behind them, so memory that is used again too early shows as wrong crops.
"""

# ruff: noqa: N802, N815  the functions have CUDA's own names
from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from kp_runtime.preprocess_cuda import THREADS, TILE
from tests.emulation import EmulatedKernel


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209


class DriverDouble:
    """What `cuda.bindings.driver` has of use here; `failing` names a function that reports an error."""

    CUresult = Result
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=8, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=7
    )
    CUstream = int

    def __init__(self, kernel: EmulatedKernel | None) -> None:
        self.kernel = kernel
        self.failing: dict[str, Result] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.memory: dict[int, Any] = {}
        self.queue: list[Callable[[], Any] | int] = []
        self.events = 0
        self.streams = 0

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            self.asked.append((name, *arguments))
            if name in self.failing:
                return (self.failing[name],)
            value = getattr(self, f"_{name}", lambda *_: None)(*arguments)
            return (Result.CUDA_SUCCESS,) if value is None else (Result.CUDA_SUCCESS, value)

        return function

    def _cuDeviceGetCount(self) -> int:
        return 1

    def _cuDeviceGet(self, index: int) -> int:
        return index

    def _cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        return attribute

    def _cuDevicePrimaryCtxRetain(self, device: int) -> str:
        return "context"

    def _cuDriverGetVersion(self) -> int:
        return 12060

    def _cuStreamCreate(self, flags: int) -> int:
        self.streams += 1
        return 1000 + self.streams

    def _cuStreamSynchronize(self, stream: int) -> None:
        while self.queue:
            step = self.queue.pop(0)
            if callable(step):
                step()

    def _cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: int) -> None:
        self.queue.append(lambda: ctypes.memmove(to, source, size))

    _cuMemcpyDtoDAsync = _cuMemcpyDtoHAsync

    def _cuModuleLoadData(self, image: int) -> str:
        assert ctypes.string_at(image, 5) == b"cubin"
        return "module"

    def _cuModuleGetFunction(self, module: str, name: bytes) -> bytes:
        return name

    def _cuEventCreate(self, flags: int) -> int:
        self.events += 1
        return self.events

    def _cuMemAlloc(self, size: int) -> int:
        block = ctypes.create_string_buffer(b"\xee" * size, size)
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _cuMemHostAlloc(self, size: int, flags: int) -> int:
        return self._cuMemAlloc(size)

    def _cuMemFree(self, address: int) -> None:
        del self.memory[address]

    _cuMemFreeHost = _cuMemFree

    def _cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> None:
        self.queue.append(lambda: ctypes.memmove(to, source, size))

    def _cuEventRecord(self, event: int, stream: int) -> None:
        self.queue.append(event)

    def _cuEventSynchronize(self, event: int) -> None:
        while event in self.queue:
            step = self.queue.pop(0)
            if callable(step):
                step()

    def _cuLaunchKernel(self, name: bytes, *arguments: Any) -> None:
        grid, block, (shared, _, (values, types), extra) = arguments[:3], arguments[3:6], arguments[6:]
        tiles = -(-values[6] // TILE)
        assert (grid[:2], block, shared, extra) == ((tiles, tiles), (THREADS, 1, 1), 0, 0)
        assert len(values) == len(types) == 8
        assert name.startswith(b"kp_crops_v1_")
        assert self.kernel is not None
        kernel = self.kernel
        self.queue.append(lambda: kernel.launch(int(name[-1:]), grid[2], values))
