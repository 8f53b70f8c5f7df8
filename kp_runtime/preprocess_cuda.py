"""Crops on a GPU: a device frame and crop matrices in, the network's input out, by one launch.

The kernel is `preprocess.cu` beside this file; it gives the very bits of `preprocess_cpu`. The tests
run it on the CPU, block by block, and compile it for the GPUs named there. What is around it here,
memory, stream and launch, **has not been run on a GPU yet**; the tests that do it are marked `gpu`.

Matrices are `crop_from_image` of `geometry`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.cubin import cubin_from_source
from kp_runtime.cuda_driver import CudaDriver, stream_handle
from kp_runtime.device_frame import DeviceFrame
from kp_runtime.errors import BackendError, InputError
from kp_runtime.frame import CHANNELS
from kp_runtime.geometry import crop_plan

__all__ = ["FACE", "CudaCropper", "compile_cubin", "faces_from_matrices", "kernel_source", "weights_of_layout"]

FACE = np.dtype([("matrix", "<f8", 6), ("window", "<i4", 4), ("block", "<i4"), ("reserved", "<i4")])
"""The kernel's `Face`: the plan's matrix times 1024, x0 y0 x1 y1 of the window, the side of its blocks."""

TILE, THREADS = 32, 256
"""Of the kernel: side of the square of a crop that a block of threads makes, and their number."""

_MOST_FACES = 65535  # blocks along the third axis of a grid
_LARGEST_BLOCK = 4096  # k * k * 255 and the rounding are under 2^32
_ARGUMENTS = (  # types of the kernel's arguments
    ctypes.c_void_p,
    ctypes.c_longlong,
    *(ctypes.c_int,) * 3,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_void_p,
)


def kernel_source() -> str:
    """The CUDA source of the crop kernel."""
    return Path(__file__).with_name("preprocess.cu").read_text(encoding="utf-8")


def compile_cubin(arch: str, folder: Path | None = None) -> bytes:
    """The kernel's machine code for a GPU architecture such as `sm_87`, compiled or from the cache.

    Its bytes, written to a file, are what `KP_CUBIN` and `CudaCropper(cubin=...)` take on a device
    that has no NVRTC. See `cubin.cubin_from_source` for the folder and the errors.
    """
    return cubin_from_source(kernel_source(), arch, "preprocess", folder)


def weights_of_layout(layout: str) -> tuple[int, int]:
    """Weights of a pixel's first and third channel in luma, in 1/32768, as OpenCV's BGR2GRAY has them."""
    blue, red = 3735, 9798
    return (blue, red) if layout.startswith("bgr") else (red, blue)


def faces_from_matrices(crop_from_image: NDArray[np.floating], size: int, size_hw: tuple[int, int]) -> NDArray[np.void]:
    """The kernel's records of `(n, 2, 3)` crop matrices: `(n,)` of `FACE`.

    Raises:
        InputError: too many faces, another shape of matrices, or a face that is larger than any image.
    """
    matrices = np.asarray(crop_from_image, np.float64)
    if matrices.ndim != 3 or matrices.shape[1:] != (2, 3) or size < 1:
        raise InputError(f"crop matrices must be (n, 2, 3) and a size at least 1, got {matrices.shape} and {size}")
    if len(matrices) > _MOST_FACES:
        raise InputError(f"one launch crops at most {_MOST_FACES} faces, got {len(matrices)}; cut them in parts")
    faces = np.zeros(len(matrices), FACE)
    for face, matrix in zip(faces, matrices, strict=True):
        plan = crop_plan(matrix, size, size_hw)
        if plan.block > _LARGEST_BLOCK:
            raise InputError(f"a face is {plan.block} times larger than its crop; at most {_LARGEST_BLOCK} is taken")
        face["matrix"] = plan.source_from_crop.ravel() * 1024.0
        face["window"] = plan.x0, plan.y0, plan.x1, plan.y1
        face["block"] = plan.block
    return faces


@dataclass
class _Slot:
    """Memory that takes face records to the device.

    Attributes:
        host: pinned, where the records are written.
        device: as large, on the device.
        faces: how many fit.
        done: event behind the last launch that reads them.
        frame: what that launch reads, kept alive until then.
    """

    host: int
    device: int
    faces: int
    done: Any
    frame: DeviceFrame | None = None


class CudaCropper:
    """Cuts crops on one GPU. Not for two threads at once.

    Args:
        device_id: number of the GPU.
        cubin: the compiled kernel, its bytes or a file; when None the file that `KP_CUBIN` names, or
            what NVRTC makes of the source.

    Raises:
        MissingExtraError: cuda-python is not installed.
        BackendError: no device, or no kernel for it.
    """

    def __init__(self, device_id: int = 0, cubin: bytes | str | os.PathLike[str] | None = None) -> None:
        self._driver = CudaDriver(device_id)
        given = cubin if cubin is not None else os.environ.get("KP_CUBIN") or None
        code = compile_cubin(self._driver.arch) if given is None else _cubin_bytes(given)
        self._kernels = self._load(code)
        self._slots = [_Slot(0, 0, 0, self._driver.call("cuEventCreate", 2)) for _ in range(4)]  # 2: without times
        self._turns = itertools.cycle(self._slots)
        self._ready = self._driver.call("cuEventCreate", 2)

    def crops_from_frame(
        self, frame: DeviceFrame, crop_from_image: NDArray[np.floating], size: int, out: int, stream: Any
    ) -> None:
        """Cuts all faces of a frame by the crop rule (`geometry`), asynchronously.

        The crops are the same bits as `preprocess_cpu.crops_from_frame` gives. The frame and `out`
        must live until the stream has come so far; a call can't be captured into a CUDA graph.

        Args:
            frame: the image, on the device of this cropper.
            crop_from_image: `(n, 2, 3)` float64 on the host; `n` may be 0.
            size: side of a crop in pixels.
            out: address of `(n, 1, size, size)` uint8 on the device, filled.
            stream: a CUDA stream: its handle or an object with `__cuda_stream__`.

        Raises:
            InputError: matrices that are not taken, or a frame on another device.
            BackendError: CUDA failed.
        """
        if frame.device_id != self._driver.device_id:
            raise InputError(
                f"the frame is on CUDA device {frame.device_id}, the cropper on {self._driver.device_id}; "
                f"open a cropper with device_id={frame.device_id}"
            )
        faces = faces_from_matrices(crop_from_image, size, frame.size_hw)
        if len(faces) == 0:
            return
        call = self._driver.call
        self._driver.make_current()
        handle = self._driver.api.CUstream(stream_handle(stream))
        if frame.stream is not None:
            call("cuEventRecord", self._ready, self._driver.api.CUstream(frame.stream))
            call("cuStreamWaitEvent", handle, self._ready, 0)
        slot = self._slot(len(faces), frame)
        ctypes.memmove(slot.host, faces.ctypes.data, faces.nbytes)
        call("cuMemcpyHtoDAsync", slot.device, slot.host, faces.nbytes, handle)
        self._launch(frame, slot.device, len(faces), size, out, handle)
        call("cuEventRecord", slot.done, handle)

    def _launch(self, frame: DeviceFrame, faces: int, n: int, size: int, out: int, stream: Any) -> None:
        kernel = self._kernels[CHANNELS[frame.layout]]
        first, third = weights_of_layout(frame.layout)
        values = (frame.pointer, frame.pitch, first, third, int(frame.range == "limited"), faces, size, int(out))
        tiles = -(-size // TILE)
        grid, block = (tiles, tiles, n), (THREADS, 1, 1)
        self._driver.call("cuLaunchKernel", kernel, *grid, *block, 0, stream, (values, _ARGUMENTS), 0)

    def _slot(self, n: int, frame: DeviceFrame) -> _Slot:
        """The slot that was used longest ago, free again and large enough."""
        call = self._driver.call
        slot = next(self._turns)
        call("cuEventSynchronize", slot.done)
        slot.frame = frame
        if slot.faces < n:
            self._free(slot)
            many = max(64, n)
            slot.host = int(call("cuMemHostAlloc", many * FACE.itemsize, 0))
            slot.device = int(call("cuMemAlloc", many * FACE.itemsize))
            slot.faces = many
        return slot

    def _free(self, slot: _Slot) -> None:
        if slot.host:
            self._driver.call("cuMemFreeHost", slot.host)
        if slot.device:
            self._driver.call("cuMemFree", slot.device)
        slot.host = slot.device = slot.faces = 0

    def _load(self, cubin: bytes) -> dict[int, Any]:
        """The kernels by bytes a pixel."""
        try:
            image = np.frombuffer(cubin, np.uint8)
            self._module = self._driver.call("cuModuleLoadData", image.ctypes.data)
            return {n: self._driver.call("cuModuleGetFunction", self._module, b"kp_crops_v1_%d" % n) for n in (1, 3, 4)}
        except BackendError as error:
            raise BackendError(
                f"the compiled kernel can't be used on this {self._driver.arch} GPU ({error}); compile it for "
                f"{self._driver.arch} with this release, or unset KP_CUBIN"
            ) from error

    def close(self) -> None:
        """Waits for the launches under way and frees what they used."""
        self._driver.make_current()
        for slot in self._slots:
            self._driver.call("cuEventSynchronize", slot.done)
            self._free(slot)
            slot.frame = None

    def __enter__(self) -> CudaCropper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # a program that ends takes the driver away first; what is left goes with it
        if hasattr(self, "_ready"):
            with contextlib.suppress(Exception):
                self.close()


def _cubin_bytes(given: bytes | str | os.PathLike[str]) -> bytes:
    if isinstance(given, bytes):
        return given
    try:
        return Path(given).read_bytes()
    except OSError as error:
        raise BackendError(f"the compiled kernel {given} can't be read: {error.strerror or error}") from error
