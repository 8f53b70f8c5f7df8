"""The CUDA driver without a GPU: device memory is host memory, and the crop kernel runs emulated.

As on a GPU nothing happens when it is asked for: what a stream is told waits until somebody waits for
it, or for an event behind it, and no stream knows of another but by events. So memory that is used
again too early, or before another stream has written it, shows as wrong crops. A graph keeps
addresses and arguments, and nothing of what lies there. Freeing what a stream still needs, a thread
without a context, and waiting, allocating and freeing in a capture are errors.
"""

# ruff: noqa: N802, N815  the functions have CUDA's own names
from __future__ import annotations

import ctypes
import enum
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from kp_runtime.preprocess_cuda import THREADS, TILE
from tests.emulation import EmulatedKernel


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


@dataclass(eq=False)
class Step:
    """Work of a stream, or a mark that an event left there."""

    work: Callable[[], Any] | None
    touches: tuple[int, ...] = ()
    stream: int = 0
    over: bool = False
    kind: str = "kernel"


WITHOUT_CONTEXT = (
    "cuInit",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDriverGetVersion",
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
)


ARGUMENTS = {
    "cuCtxSetCurrent": 1, "cuDeviceGet": 1, "cuDeviceGetAttribute": 2, "cuDeviceGetCount": 0, "cuDeviceGetName": 2,
    "cuDevicePrimaryCtxRetain": 1, "cuDriverGetVersion": 0, "cuEventCreate": 1, "cuEventDestroy": 1, "cuEventRecord": 2,
    "cuEventSynchronize": 1, "cuGraphDestroy": 1, "cuGraphExecDestroy": 1, "cuGraphInstantiate": 2, "cuGraphLaunch": 2,
    "cuGraphNodeGetType": 1, "cuInit": 1, "cuLaunchKernel": 11, "cuMemAlloc": 1, "cuMemFree": 1, "cuMemFreeHost": 1,
    "cuMemGetInfo": 0, "cuMemHostAlloc": 2, "cuMemcpyDtoDAsync": 4, "cuMemcpyDtoHAsync": 4, "cuMemcpyHtoDAsync": 4,
    "cuMemsetD8Async": 4,
    "cuModuleGetFunction": 2, "cuModuleLoadData": 1, "cuModuleUnload": 1, "cuPointerGetAttribute": 2,
    "cuStreamBeginCapture": 2, "cuStreamCreate": 1, "cuStreamDestroy": 1, "cuStreamEndCapture": 1,
    "cuStreamSynchronize": 1, "cuStreamWaitEvent": 3,
}  # fmt: skip
"""How many each function takes, by cuda-python's own word; no other can be called."""


class DriverDouble:
    """What `cuda.bindings.driver` has of use here.

    Attributes:
        failing: names of functions with the error that each reports.
        room: bytes of device memory that are left; None: any number.
        lent: first addresses, sizes and devices of arrays of the tests that count as device memory.
        gate: what every wait for an event waits for first.
    """

    CUresult = Result
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=8,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=7,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
    )
    CUpointer_attribute = SimpleNamespace(
        CU_POINTER_ATTRIBUTE_MEMORY_TYPE="type",
        CU_POINTER_ATTRIBUTE_IS_MANAGED="managed",
        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL="device",
    )
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_HOST="host")
    CUstream = int

    def __init__(self, kernel: EmulatedKernel | None) -> None:
        self.kernel = kernel
        self.failing: dict[str, Result] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.memory: dict[int, Any] = {}
        self.pinned: set[int] = set()
        self.room: int | None = None
        self.lent: list[tuple[int, int, int]] = []
        self.queues: dict[int, list[Step]] = defaultdict(list)
        self.events: dict[int, Step | None] = {}
        self.captures: dict[int, list[Step]] = {}
        self.capturing: dict[int, int] = {}
        self.invalid: set[int] = set()
        self.graphs: dict[int, list[Step]] = {}
        self.handles = 1000
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.RLock()
        self._threads = threading.local()

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if name not in ARGUMENTS:
            raise AttributeError(name)

        def function(*arguments: Any) -> tuple[Any, ...]:
            assert len(arguments) == ARGUMENTS[name], name
            if name == "cuEventSynchronize":
                assert self.gate.wait(60)
            with self._lock:
                self.asked.append((name, *arguments))
                assert name in WITHOUT_CONTEXT or getattr(self._threads, "context", None), name
                if name in self.failing:
                    return (self.failing[name],)
                value = getattr(self, f"_{name}", lambda *_: None)(*arguments)
                if isinstance(value, Result):
                    return (value,)
                return (Result.CUDA_SUCCESS,) if value is None else (Result.CUDA_SUCCESS, value)

        return function

    def work(self, stream: int, function: Callable[[], Any], *touches: int, kind: str = "kernel") -> None:
        """What a stream does when it comes so far; `touches` is memory that it needs then, `kind` a graph's node."""
        steps = self.captures[stream] if stream in self.captures else self.queues[stream]
        steps.append(Step(function, touches, stream, kind=kind))

    def lend(self, array: np.ndarray, device: int = 0) -> None:
        """Makes a host array count as device memory."""
        self.lent.append((array.ctypes.data, array.nbytes, device))

    def _handle(self) -> int:
        self.handles += 1
        return self.handles

    def _cuDeviceGetCount(self) -> int:
        return 1

    def _cuDeviceGet(self, index: int) -> int:
        return index

    def _cuDeviceGetName(self, length: int, device: int) -> bytes:
        return b"Orin".ljust(length, b"\0")

    def _cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        return attribute

    def _cuDevicePrimaryCtxRetain(self, device: int) -> str:
        return "context"

    def _cuCtxSetCurrent(self, context: str) -> None:
        self._threads.context = context

    def _cuDriverGetVersion(self) -> int:
        return 12060

    def _cuModuleLoadData(self, image: int) -> str:
        assert ctypes.string_at(image, 5) == b"cubin"
        return "module"

    def _cuModuleGetFunction(self, module: str, name: bytes) -> bytes:
        return name

    # memory

    def _cuMemAlloc(self, size: int) -> int | Result:
        if self.room is not None:
            if size > self.room:
                return Result.CUDA_ERROR_OUT_OF_MEMORY
            self.room -= size
        return self._block(size)

    def _cuMemGetInfo(self) -> int:
        return (8 << 30) - sum(len(block) for address, block in self.memory.items() if address not in self.pinned)

    def _cuMemHostAlloc(self, size: int, flags: int) -> int | Result:
        address = self._block(size)
        self.pinned.add(address)
        return address

    def _block(self, size: int) -> int | Result:
        assert size > 0
        if threading.get_ident() in self.capturing.values():
            return self._forbidden()
        block = ctypes.create_string_buffer(b"\xee" * (size + 255), size + 255)
        address = -(-ctypes.addressof(block) // 256) * 256  # as the driver's memory is
        self.memory[address] = block
        return address

    def _cuMemFree(self, address: int) -> Result | None:
        if threading.get_ident() in self.capturing.values():
            return self._forbidden()
        end = address + len(self.memory[address]) - 255
        waiting = [step for queue in self.queues.values() for step in queue]
        assert not any(address <= touched < end for step in waiting for touched in step.touches), "freed while in use"
        if self.room is not None and address not in self.pinned:
            self.room += end - address
        self.pinned.discard(address)
        del self.memory[address]
        return None

    _cuMemFreeHost = _cuMemFree

    def _cuPointerGetAttribute(self, attribute: str, address: int) -> int | Result:
        for start, block in self.memory.items():
            if start <= address < start + len(block) - 255:
                return {"type": 1 if start in self.pinned else 2, "managed": 0, "device": 0}[attribute]
        for start, size, device in self.lent:
            if start <= address < start + size:
                return {"type": 2, "managed": 0, "device": device}[attribute]
        return Result.CUDA_ERROR_INVALID_VALUE

    def _cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> None:
        self.work(stream, lambda: ctypes.memmove(to, source, size), to, source)

    _cuMemcpyDtoHAsync = _cuMemcpyDtoDAsync = _cuMemcpyHtoDAsync

    # streams and events

    def _cuStreamCreate(self, flags: int) -> int:
        return self._handle()

    def _cuStreamDestroy(self, stream: int) -> None:
        assert not self.queues.pop(stream, []), "a stream with work was destroyed"

    def _cuEventCreate(self, flags: int) -> int:
        event = self._handle()
        self.events[event] = None
        return event

    def _cuEventDestroy(self, event: int) -> None:
        del self.events[event]

    def _cuEventRecord(self, event: int, stream: int) -> Result | None:
        if stream in self.captures:
            return self._forbidden()
        mark = self.events[event] = Step(None, (), stream)
        self.queues[stream].append(mark)
        return None

    def _cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        mark = self.events[event]
        if mark is not None:
            self.work(stream, lambda: self._advance(mark))

    def _cuEventSynchronize(self, event: int) -> Result | None:
        if threading.get_ident() in self.capturing.values():
            return self._forbidden()
        mark = self.events[event]
        if mark is not None:
            self._advance(mark)
        return None

    def _cuStreamSynchronize(self, stream: int) -> Result | None:
        if stream in self.captures:
            return self._forbidden()
        while self.queues[stream]:
            self._advance(self.queues[stream][-1])
        return None

    def _advance(self, last: Step) -> None:
        """Lets a stream work until a step of its is over."""
        queue = self.queues[last.stream]
        while not last.over:
            step = queue[0]
            if step.work is not None:
                step.work()
            step.over = True
            queue.pop(0)

    # graphs

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> None:
        assert stream not in self.captures
        self.captures[stream] = []
        self.capturing[stream] = threading.get_ident()

    def _forbidden(self) -> Result:
        """A call that no capture survives."""
        self.invalid |= {stream for stream, thread in self.capturing.items() if thread == threading.get_ident()}
        return Result.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED

    def _cuStreamEndCapture(self, stream: int) -> int | Result:
        assert self.capturing.pop(stream) == threading.get_ident()
        steps = self.captures.pop(stream)
        if stream in self.invalid:
            self.invalid.remove(stream)
            return Result.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
        graph = self._handle()
        self.graphs[graph] = steps
        return graph

    def _cuGraphInstantiate(self, graph: int, flags: int) -> int:
        made = self._handle()
        self.graphs[made] = list(self.graphs[graph])
        return made

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        for step in self.graphs[graph]:
            assert step.work is not None
            self.work(stream, step.work, *step.touches)

    def cuGraphGetNodes(self, graph: int, count: int = 0) -> tuple[Result, list[Step] | None, int | None]:
        if "cuGraphGetNodes" in self.failing:
            return self.failing["cuGraphGetNodes"], None, None
        steps = self.graphs[graph]
        return Result.CUDA_SUCCESS, steps[:count], len(steps)

    def _cuGraphNodeGetType(self, node: Step) -> str:
        return node.kind

    def _cuGraphDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    _cuGraphExecDestroy = _cuGraphDestroy

    # the kernel

    def _cuLaunchKernel(self, name: bytes, *arguments: Any) -> None:
        grid, block, (shared, stream, (values, types), extra) = arguments[:3], arguments[3:6], arguments[6:]
        image, faces, size, crops = values
        tiles = -(-size // TILE)
        assert (grid[:2], block, shared, extra) == ((tiles, tiles), (THREADS, 1, 1), 0, 0)
        assert len(types) == 4
        assert name.startswith(b"kp_crops_v2_")
        assert self.kernel is not None
        kernel = self.kernel
        self.work(stream, lambda: kernel.launch(int(name[-1:]), grid[2], values), image, faces, crops)
