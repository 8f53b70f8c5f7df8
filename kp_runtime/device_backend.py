"""What engines on a GPU have in common: lanes (a stream and buffers), and crops from the host's memory.

A lane holds the network's input and output in device memory, so that whatever is already there (crops
of `preprocess_cuda`) needs no way through the host. One backend opens many lanes.
"""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend import Backend
from kp_runtime.cuda_driver import Closing, CudaDriver
from kp_runtime.errors import BackendError
from kp_runtime.golden import check_golden_crop
from kp_runtime.spec import ModelSpec

__all__ = ["DeviceBackend", "Lane", "arrays_of"]


class Lane(Closing):
    """A CUDA stream with the network's input and output buffers. Used by one thread at a time.

    Args:
        driver: the device.
        spec: the model's contract.
        max_faces: most crops of one `enqueue`.
        batches: fewest and most crops that the engine takes at once; most None: any number.
        stream: a stream that is somebody else's and stays open; None makes one for this lane.

    Attributes:
        stream: the `CUstream`'s handle.
        input_ptr: address of uint8 `(max_faces, 1, size, size)` on the device.
        output_ptrs: addresses on the device, one for each of `ModelSpec.outputs`: float32 `(max_faces, 68, 2)`, and
            `(max_faces, 1)` of a model that says whether a face is lost.
        max_faces: most crops of one `enqueue`.
        at_once: most crops that the engine takes at once; more are fed in parts.
        capturable: whether `enqueue` of up to `at_once` faces may be captured into a CUDA graph.
        runs_before_capture: how often it must have run with as many faces before that.

    Raises:
        BackendError: no memory is left on the device; nothing is kept, other lanes stay usable.
    """

    capturable = False
    runs_before_capture = 1

    def __init__(
        self,
        driver: CudaDriver,
        spec: ModelSpec,
        max_faces: int,
        batches: tuple[int, int | None] = (1, None),
        stream: int | None = None,
    ) -> None:
        if max_faces < 1:
            raise BackendError(f"a lane needs room for 1 face or more, got {max_faces}")
        self.driver, self.spec, self.max_faces = driver, spec, max_faces
        self._least, self.at_once = batches[0], batches[1] or max_faces
        self._owned: list[tuple[str, Any]] = []
        self._crop_bytes, self._output_bytes = spec.size * spec.size, spec.output_bytes
        driver.make_current()
        try:
            self.stream = self._own("cuStreamDestroy", "cuStreamCreate", 1) if stream is None else stream
            self.input_ptr, self.output_ptrs = self._buffers(max(max_faces, self._least))
            self._part = self._buffers(self.at_once) if max_faces > self.at_once else (0, ())
        except BackendError as error:
            self.close()
            raise BackendError(f"no room for {max_faces} faces on the GPU: {error}; use fewer at once") from error

    def _buffers(self, faces: int) -> tuple[int, tuple[int, ...]]:
        crops, *outputs = (
            self._own("cuMemFree", "cuMemAlloc", faces * size) for size in (self._crop_bytes, *self._output_bytes)
        )
        return crops, tuple(outputs)

    def _own(self, release: str, function: str, argument: int) -> int:
        handle = self.driver.call(function, argument)
        self._owned.append((release, handle))
        return int(handle)

    def enqueue(self, faces: int) -> None:
        """Runs the network on the first `faces` crops of the input; asynchronous on `stream`.

        More than the engine takes at once are fed in parts, through memory of their own: engines want
        addresses at multiples of 256 bytes.

        Raises:
            BackendError: `faces` is not 1 to `max_faces`, or the engine failed.
        """
        if not 1 <= faces <= self.max_faces:
            raise BackendError(f"this lane takes 1 to {self.max_faces} faces, got {faces}; open a larger one")
        self.driver.make_current()
        if faces <= self.at_once:
            self._feed(self.input_ptr, self.output_ptrs, max(faces, self._least))
            return
        copy, stream = "cuMemcpyDtoDAsync", self.driver.api.CUstream(self.stream)
        crop, (crops, outputs) = self._crop_bytes, self._part
        for start in range(0, faces, self.at_once):
            count = min(self.at_once, faces - start)
            self.driver.call(copy, crops, self.input_ptr + start * crop, count * crop, stream)
            self._feed(crops, outputs, max(count, self._least))
            for whole, part, size in zip(self.output_ptrs, outputs, self._output_bytes, strict=True):
                self.driver.call(copy, whole + start * size, part, count * size, stream)

    def fetch(self, faces: int, address: int) -> None:
        """Copies the outputs of the first `faces` crops to the host, one behind the other; asynchronous on `stream`.

        Args:
            faces: as many as were run.
            address: of the host's memory, with room for `sum(ModelSpec.output_bytes)` a face.
        """
        stream = self.driver.api.CUstream(self.stream)
        for output, size in zip(self.output_ptrs, self._output_bytes, strict=True):
            self.driver.call("cuMemcpyDtoHAsync", address, output, faces * size, stream)
            address += faces * size

    @abstractmethod
    def _feed(self, input_ptr: int, output_ptrs: tuple[int, ...], count: int) -> None:
        """Runs the network on crops that it takes at once; asynchronous on `stream`.

        Raises:
            BackendError: the engine failed.
        """

    def close(self) -> None:
        """Waits for the stream and frees what the lane has; a second call does nothing."""
        if not self._owned:
            return
        self.driver.make_current()
        if hasattr(self, "stream"):
            self.driver.call("cuStreamSynchronize", self.driver.api.CUstream(self.stream))
        while self._owned:
            release, handle = self._owned.pop()
            self.driver.call(release, handle)


def arrays_of(fetched: NDArray[np.uint8], faces: int, spec: ModelSpec) -> list[NDArray[np.float32]]:
    """The arrays of `spec.outputs` in the bytes that `Lane.fetch` has written; they share their memory."""
    arrays, start = [], 0
    for shape, size in zip(spec.outputs.values(), spec.output_bytes, strict=True):
        arrays.append(fetched[start : start + faces * size].view(np.float32).reshape(faces, *shape))
        start += faces * size
    return arrays


class DeviceBackend(Backend):
    """An engine on a GPU. `infer` may be called from several threads at once: each has its own lane."""

    driver: CudaDriver

    def __init__(self, spec: ModelSpec, driver: CudaDriver) -> None:
        super().__init__(spec)
        self.driver = driver
        self._threads = threading.local()

    @abstractmethod
    def open_lane(self, max_faces: int) -> Lane:
        """A new lane with room for so many faces; one that has become too small is replaced by another.

        Raises:
            BackendError: no memory is left on the device; the lanes that are open stay usable.
        """

    def check_crops(self) -> int | None:
        """See `Backend.check_crops`: whether there is a crop kernel for this GPU, and cuts the golden crop."""
        from kp_runtime.preprocess_cuda import CropKernels, crops_to_host

        with contextlib.closing(CropKernels(self.driver)) as kernels:
            return check_golden_crop(self.golden, self.spec, partial(crops_to_host, self.driver, kernels))

    def release(self) -> None:
        """Frees what `infer` keeps for the calling thread; its next call opens another lane."""
        lane: Lane | None = self._threads.__dict__.pop("lane", None)
        if lane is not None:
            lane.close()

    def _run(self, crops: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        crops = np.ascontiguousarray(crops)
        given = np.empty(len(crops) * sum(self.spec.output_bytes), np.uint8)
        lane = self._lane(len(crops))
        call, stream = self.driver.call, self.driver.api.CUstream(lane.stream)
        self.driver.make_current()
        try:
            call("cuMemcpyHtoDAsync", lane.input_ptr, crops.ctypes.data, crops.nbytes, stream)
            lane.enqueue(len(crops))
            lane.fetch(len(crops), given.ctypes.data)
        except BaseException:
            with contextlib.suppress(BackendError):  # what is queued still reads and writes these arrays
                call("cuStreamSynchronize", stream)
            raise
        call("cuStreamSynchronize", stream)
        return arrays_of(given, len(crops), self.spec)

    def _lane(self, faces: int) -> Lane:
        """The calling thread's lane, replaced by a larger one where it must be."""
        lane: Lane | None = getattr(self._threads, "lane", None)
        if lane is None or lane.max_faces < faces:
            larger = self.open_lane(1 << (faces - 1).bit_length())
            if lane is not None:
                lane.close()
            lane = self._threads.lane = larger
        return lane
