"""Crops on a GPU: a device frame and crop matrices in, the network's input out, by one launch.

The kernel is `preprocess.cu` beside this file; it gives the very bits of `preprocess_cpu`. The tests
run it on the CPU, block by block, and compile it for the GPUs named there. What is around it here,
memory, stream and launch, **has not been run on a GPU yet**; the tests that do it are marked `gpu`.

Matrices are `crop_from_image` of `geometry`. `CropKernels` may be shared between threads, `CropRecords`
and `CudaCropper` are for one thread at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.cubin import cubin_from_source
from kp_runtime.cuda_driver import Closing, CudaDriver, Memory, stream_handle
from kp_runtime.device_frame import DeviceFrame
from kp_runtime.errors import BackendError, ImageError, InputError
from kp_runtime.frame import CHANNELS, Frame
from kp_runtime.geometry import crop_plan

__all__ = [
    "FACE",
    "IMAGE",
    "CropKernels",
    "CropRecords",
    "CudaCropper",
    "check_frame",
    "compile_cubin",
    "crops_to_host",
    "faces_from_matrices",
    "kernel_source",
    "record_from_frame",
    "weights_of_layout",
]

IMAGE = np.dtype([("data", "<u8"), ("pitch", "<i8"), ("weights", "<i4", 2), ("limited", "<i4"), ("reserved", "<i4")])
"""The kernel's `Image`: where the pixels lie, and how they turn grey."""

FACE = np.dtype([("matrix", "<f8", 6), ("window", "<i4", 4), ("block", "<i4"), ("reserved", "<i4")])
"""The kernel's `Face`: the plan's matrix times 1024, x0 y0 x1 y1 of the window, the side of its blocks."""

TILE, THREADS = 32, 256
"""Of the kernel: side of the square of a crop that a block of threads makes, and their number."""

_MOST_FACES = 65535  # blocks along the third axis of a grid
_DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE
_LARGEST_BLOCK = 4096  # k * k * 255 and the rounding are under 2^32
_ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)  # types of the kernel's arguments


def kernel_source() -> str:
    """The CUDA source of the crop kernel."""
    return Path(__file__).with_name("preprocess.cu").read_text(encoding="utf-8")


def compile_cubin(arch: str, folder: Path | None = None) -> bytes:
    """The kernel's machine code for a GPU architecture such as `sm_87`, compiled or from the cache.

    Its bytes, written to a file, are what `KP_CUBIN` and `CudaCropper(cubin=...)` take on a device
    that has no NVRTC. Its driver must be of the CUDA major version of the NVRTC here, or a newer one.
    See `cubin.cubin_from_source` for the folder and the errors.
    """
    return cubin_from_source(kernel_source(), arch, "preprocess", folder)


def weights_of_layout(layout: str) -> tuple[int, int]:
    """Weights of a pixel's first and third channel in luma, in 1/32768, as OpenCV's BGR2GRAY has them."""
    blue, red = 3735, 9798
    return (blue, red) if layout.startswith("bgr") else (red, blue)


def record_from_frame(frame: DeviceFrame) -> NDArray[np.void]:
    """The kernel's record of a frame: `(1,)` of `IMAGE`."""
    weights, limited = weights_of_layout(frame.layout), frame.range == "limited"
    return np.array([(frame.pointer, frame.pitch, weights, limited, 0)], IMAGE)


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
    plans = [crop_plan(matrix, size, size_hw) for matrix in matrices]
    largest = max((plan.block for plan in plans), default=1)
    if largest > _LARGEST_BLOCK:
        raise InputError(f"a face is {largest} times larger than its crop; at most {_LARGEST_BLOCK} is taken")
    records = [(p.source_from_crop.ravel() * 1024.0, (p.x0, p.y0, p.x1, p.y1), p.block, 0) for p in plans]
    return np.array(records, FACE)


def check_frame(frame: DeviceFrame, driver: CudaDriver) -> None:
    """Checks that the frame's pixels lie where the device can read them, as far as CUDA knows.

    CUDA is asked about the first and the last byte, so memory that was freed, or that is too small, is
    found unless something else lies there.

    Raises:
        ImageError: a frame on another device, or no CUDA memory.
    """
    if frame.device_id != driver.device_id:
        raise _on_another(frame.device_id, driver)
    last = frame.pointer + (frame.size_hw[0] - 1) * frame.pitch + frame.size_hw[1] * CHANNELS[frame.layout] - 1
    for name, address in (("first", frame.pointer), ("last", last)):
        kind = driver.pointer_attribute("MEMORY_TYPE", address)
        if not kind:
            raise ImageError(
                f"the frame's {name} byte, at {address:#x}, is not in CUDA memory: it was freed, lies in the host's "
                "memory, or is smaller than size and pitch say; keep the frame's owner alive, and give an "
                "array on the host as it is, without DeviceFrame"
            )
        # pinned and managed memory is of use to every GPU
        if kind == _DEVICE_MEMORY and not driver.pointer_attribute("IS_MANAGED", address):
            device = driver.pointer_attribute("DEVICE_ORDINAL", address)
            if device != driver.device_id:
                raise _on_another(device, driver)


def _on_another(device: int | None, driver: CudaDriver) -> ImageError:
    return ImageError(
        f"the frame is on CUDA device {device}, its crops are cut on {driver.device_id}; "
        f"copy it there, or start the process with CUDA_VISIBLE_DEVICES={device}"
    )


class CropKernels(Closing):
    """The compiled kernels on one GPU. May be shared between threads.

    Args:
        driver: the device.
        cubin: the compiled kernels, their bytes or a file; when None the file that `KP_CUBIN` names, or
            what NVRTC makes of the source.

    Raises:
        MissingExtraError: cuda-python is not installed.
        BackendError: no kernel for this GPU.
    """

    def __init__(self, driver: CudaDriver, cubin: bytes | str | os.PathLike[str] | None = None) -> None:
        self._driver, self._kernels = driver, dict[int, Any]()
        given = cubin if cubin is not None else os.environ.get("KP_CUBIN") or None
        image = np.frombuffer(compile_cubin(driver.arch) if given is None else _cubin_bytes(given), np.uint8)
        driver.make_current()
        compiler = f"an NVRTC of the driver's CUDA {driver.cuda.partition('.')[0]} or an older one"
        what_to_do = f"compile it for {driver.arch} with this release and {compiler}, or unset KP_CUBIN"
        if given is None:
            what_to_do = f"take {compiler}, clear the kernel cache (KP_CACHE, else ~/.cache/kp-edge) and start again"
        try:
            self._module = driver.call("cuModuleLoadData", image.ctypes.data)
            try:
                self._kernels = {
                    n: driver.call("cuModuleGetFunction", self._module, b"kp_crops_v2_%d" % n) for n in (1, 3, 4)
                }
            except BackendError:
                driver.call("cuModuleUnload", self._module)
                raise
        except BackendError as error:
            raise BackendError(
                f"the compiled kernel can't be used on this {driver.arch} GPU ({error}); {what_to_do}"
            ) from error

    def launch(self, bytes_a_pixel: int, n: int, image: int, faces: int, size: int, out: int, stream: Any) -> None:
        """Cuts `n` crops, at least one; the addresses of the records and of `out` are the device's."""
        tiles = -(-size // TILE)
        grid, block = (tiles, tiles, n), (THREADS, 1, 1)
        arguments = ((image, faces, size, out), _ARGUMENTS)
        self._driver.call("cuLaunchKernel", self._kernels[bytes_a_pixel], *grid, *block, 0, stream, arguments, 0)

    def close(self) -> None:
        """Unloads the kernels, once nothing runs them any more; a second call does nothing."""
        if self._kernels:
            self._kernels = {}
            self._driver.make_current()
            self._driver.call("cuModuleUnload", self._module)


class CropRecords:
    """What one launch reads beside the pixels: the frame's record and the faces', in pinned memory and on the device.

    The addresses stay as they are until `reserve` has to make more room. For one thread at a time.

    Args:
        driver: the device.
        faces: how many there is room for.

    Raises:
        BackendError: no memory is left.
    """

    def __init__(self, driver: CudaDriver, faces: int) -> None:
        self._driver = driver
        self._host, self._device = Memory(driver, pinned=True), Memory(driver)
        self.reserve(faces)

    def reserve(self, faces: int) -> None:
        """Makes room; nothing on the GPU may be using the records.

        Raises:
            BackendError: no memory is left; the room that there was stays.
        """
        self._host.reserve(IMAGE.itemsize + faces * FACE.itemsize)
        self._device.reserve(IMAGE.itemsize + faces * FACE.itemsize)

    def write(self, frame: DeviceFrame, faces: NDArray[np.void]) -> None:
        """Writes the records to pinned memory; the launch before must be over."""
        self._host.array((1,), IMAGE)[:] = record_from_frame(frame)
        self._host.array(faces.shape, FACE, IMAGE.itemsize)[:] = faces

    def enqueue(self, kernels: CropKernels, bytes_a_pixel: int, n: int, size: int, out: int, stream: Any) -> None:
        """Copies `n` faces' records to the device and cuts them, asynchronously.

        May be captured into a CUDA graph, which then reads at each launch what was written last.
        """
        device = self._device.address
        self._driver.call("cuMemcpyHtoDAsync", device, self._host.address, IMAGE.itemsize + n * FACE.itemsize, stream)
        kernels.launch(bytes_a_pixel, n, device, device + IMAGE.itemsize, size, out, stream)

    def free(self) -> None:
        """Frees the memory, once nothing uses it any more; a second call does nothing."""
        self._host.free()
        self._device.free()


@dataclass
class _Slot:
    """Records of one launch, the event behind it, and the frame that it reads, kept alive until the slot's next one."""

    records: CropRecords
    done: Any
    frame: DeviceFrame | None = None


class CudaCropper(Closing):
    """Cuts crops on one GPU, for pipelines of one's own. Not for two threads at once.

    Args:
        device_id: number of the GPU.
        cubin: see `CropKernels`.

    Raises:
        MissingExtraError: cuda-python is not installed.
        BackendError: no device, no kernel for it, or no memory.
    """

    def __init__(self, device_id: int = 0, cubin: bytes | str | os.PathLike[str] | None = None) -> None:
        self._driver = driver = CudaDriver(device_id)
        self.kernels = CropKernels(driver, cubin)
        self._slots = [_Slot(CropRecords(driver, 64), driver.call("cuEventCreate", 2)) for _ in range(4)]  # 2: no times
        self._ready = driver.call("cuEventCreate", 2)

    def crops_from_frame(
        self, frame: DeviceFrame, crop_from_image: NDArray[np.floating], size: int, out: int, stream: Any
    ) -> None:
        """Cuts all faces of a frame by the crop rule (`geometry`), asynchronously.

        The crops are the same bits as `preprocess_cpu.crops_from_frame` gives. `out` must live, and the frame's pixels
        stay as they are, until the stream has come so far. The frames of the last four calls, and so what their `owner`
        keeps, live on in here until others take their place or `close`: a decoder needs so many surfaces more. A call
        can't be captured into a CUDA graph.

        Args:
            frame: the image, on the device of this cropper.
            crop_from_image: `(n, 2, 3)` float64 on the host; `n` may be 0.
            size: side of a crop in pixels.
            out: address of `(n, 1, size, size)` uint8 on the device, filled.
            stream: a CUDA stream: its handle or an object with `__cuda_stream__`.

        Raises:
            InputError: matrices that are not taken.
            ImageError: a frame on another device, or not in CUDA memory.
            BackendError: CUDA failed, or the cropper is closed.
        """
        if not self._slots:
            raise BackendError("this cropper is closed; make another one")
        call = self._driver.call
        self._driver.make_current()
        check_frame(frame, self._driver)
        faces = faces_from_matrices(crop_from_image, size, frame.size_hw)
        if len(faces) == 0:
            return
        handle = self._driver.api.CUstream(stream_handle(stream))
        self._driver.wait_for(frame.stream, handle, self._ready)
        slot = self._slots.pop(0)  # the one that was used longest ago
        self._slots.append(slot)
        call("cuEventSynchronize", slot.done)
        slot.records.reserve(len(faces))
        slot.frame = frame
        slot.records.write(frame, faces)
        try:
            slot.records.enqueue(self.kernels, CHANNELS[frame.layout], len(faces), size, int(out), handle)
        finally:  # where the launch failed, the records' copy is on its way all the same
            call("cuEventRecord", slot.done, handle)

    def close(self) -> None:
        """Waits for the launches under way and frees what they used; a second call does nothing."""
        if not self._slots:
            return
        self._driver.make_current()
        for slot in self._slots:
            self._driver.call("cuEventSynchronize", slot.done)
        while self._slots:
            slot = self._slots.pop()
            slot.records.free()
            self._driver.call("cuEventDestroy", slot.done)
        self._driver.call("cuEventDestroy", self._ready)
        self.kernels.close()


def crops_to_host(
    driver: CudaDriver, kernels: CropKernels, frame: Frame, crop_from_image: NDArray[np.floating], size: int
) -> NDArray[np.uint8]:
    """As `preprocess_cpu.crops_from_frame`, but cut on the GPU, with copies there and back: to compare the two.

    Raises:
        BackendError: CUDA failed.
    """
    pixels, call = np.ascontiguousarray(frame.data), driver.call
    faces = faces_from_matrices(crop_from_image, size, frame.size_hw)
    crops = np.empty((len(faces), 1, size, size), np.uint8)
    driver.make_current()
    with contextlib.ExitStack() as owned:
        records, there, out = CropRecords(driver, len(faces)), Memory(driver), Memory(driver)
        for memory, room in ((records, len(faces)), (there, pixels.nbytes), (out, crops.nbytes)):
            owned.callback(memory.free)
            memory.reserve(room)
        stream = call("cuStreamCreate", 1)  # 1: does not wait for the default stream
        owned.callback(call, "cuStreamDestroy", stream)
        owned.callback(call, "cuStreamSynchronize", stream)
        pitch = pixels.strides[0]
        records.write(
            DeviceFrame(there.address, frame.size_hw, pitch, frame.layout, frame.range, driver.device_id), faces
        )
        call("cuMemcpyHtoDAsync", there.address, pixels.ctypes.data, pixels.nbytes, stream)
        records.enqueue(kernels, CHANNELS[frame.layout], len(faces), size, out.address, stream)
        call("cuMemcpyDtoHAsync", crops.ctypes.data, out.address, crops.nbytes, stream)
    return crops


def _cubin_bytes(given: bytes | str | os.PathLike[str]) -> bytes:
    if isinstance(given, bytes):
        return given
    try:
        return Path(given).read_bytes()
    except OSError as error:
        raise BackendError(f"the compiled kernel {given} can't be read: {error.strerror or error}") from error
