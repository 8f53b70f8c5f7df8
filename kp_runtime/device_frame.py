"""An image in a GPU's memory, as the GPU crop path takes it: a pointer and what lies there.

`DeviceFrame` copies nothing and needs no CUDA package; layouts and ranges are those of `frame`.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kp_runtime.errors import ImageError, reason_of
from kp_runtime.frame import CHANNELS, check_layout, size_hw_from_shape

__all__ = ["PER_THREAD_STREAM", "DeviceFrame", "is_on_gpu"]

_LONGEST = 32767
"""Longer images, which the CPU path takes, were not tried with the kernel."""

_DEFAULT_STREAM = 1  # the legacy one, as both interfaces number it
PER_THREAD_STREAM = 2
"""The default one of the calling thread, likewise."""
_CUDA, _CUDA_MANAGED, _UNSIGNED = 2, 13, 1
"""kDLCUDA, kDLCUDAManaged and kDLUInt of DLPack's dlpack.h."""


@dataclass(frozen=True)
class DeviceFrame:
    """A device image of uint8 samples; not copied.

    Attributes:
        pointer: address of the top-left pixel in the device's memory.
        size_hw: height and width in pixels.
        pitch: bytes from one row to the next.
        layout: `bgr`, `rgb`, `bgra`, `rgba`, `gray`, `nv12`, `i420`; of the last two nothing but
            the luma plane, at `pointer`, is read.
        range: `full` or `limited`, see `Frame`.
        device_id: number of the GPU.
        stream: handle of the CUDA stream that writes the pixels; the crops wait for it. None when
            they are written already, or on the stream that the crops are cut on.
        owner: what keeps the memory alive.

    Raises:
        ImageError: an unknown layout or range, or numbers that can't be right.
    """

    pointer: int
    size_hw: tuple[int, int]
    pitch: int
    layout: str
    range: str = "full"
    device_id: int = 0
    stream: int | None = None
    owner: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_layout(self.layout, self.range)
        try:
            height, width = map(_index, self.size_hw)
            for number in (self.pointer, self.pitch, self.device_id, self.stream or 0):
                _index(number)
        except (TypeError, ValueError) as error:
            raise ImageError(
                "a device frame's size_hw must be height and width, and pointer, pitch, device_id and stream whole "
                f"numbers ({error})"
            ) from error
        if not (0 < height <= _LONGEST and 0 < width <= _LONGEST):
            raise ImageError(f"a frame must be 1 to {_LONGEST} pixels high and wide, got {height} x {width}")
        if self.pointer <= 0:
            raise ImageError(f"a device frame needs the address of its pixels, got {self.pointer}")
        least = width * CHANNELS[self.layout]
        if self.pitch < least:
            raise ImageError(
                f"a row of {width} {self.layout} pixels is {least} bytes long, but the pitch is {self.pitch}; "
                "give the bytes from one row to the next"
            )

    @classmethod
    def from_cuda_array_interface(
        cls,
        array: Any,
        layout: str,
        range: str = "full",  # noqa: A002  as the attribute is called
        device_id: int = 0,
    ) -> DeviceFrame:
        """A frame of an object with `__cuda_array_interface__` (CuPy, Numba, PyTorch, VPI, ...).

        Args:
            array: shaped as `frame.Frame` wants its data; pixels without gaps, rows at any distance. The interface's
                version 3 names a stream that writes them, or none where they are written. Before it, as PyTorch's,
                there is no word of it: the crops wait for the default stream, and what another one writes must be
                waited for, or comes by `from_dlpack`.
            layout: see the class.
            range: see the class.
            device_id: the interface does not tell which GPU the memory belongs to.

        Raises:
            ImageError: another dtype or shape, gaps between pixels, or no such interface.
        """
        try:
            interface = array.__cuda_array_interface__
            shape, pointer = tuple(map(_index, interface["shape"])), _index(interface["data"][0])
            dtype, strides = str(interface["typestr"]), interface.get("strides")
            stream = interface.get("stream") if _index(interface.get("version", 0)) >= 3 else _DEFAULT_STREAM
            if strides is not None:
                strides = tuple(_index(stride) for stride, _ in zip(strides, shape, strict=True))
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ImageError(
                f"{type(array).__name__} has no usable __cuda_array_interface__ ({str(error)[:200]}); "
                "give an array in GPU memory"
            ) from error
        if dtype[1:] != "u1":
            raise ImageError(f"a device frame must be uint8 ('|u1'), got {dtype[:40]!r}; convert it on the GPU first")
        size_hw, pitch = _rows(layout, range, shape, strides)
        return cls(pointer, size_hw, pitch, layout, range, device_id, stream, array)

    @classmethod
    def from_dlpack(
        cls,
        array: Any,
        layout: str,
        range: str = "full",  # noqa: A002  as the attribute is called
        stream: int = _DEFAULT_STREAM,
    ) -> DeviceFrame:
        """A frame of an object with `__dlpack__` on a CUDA device (PyTorch, JAX, CuPy, ...).

        Args:
            array: shaped as `frame.Frame` wants its data; pixels without gaps, rows at any distance.
            layout: see the class.
            range: see the class.
            stream: handle of a stream that the exporter makes wait for the pixels, and the crops for it;
                1 is the default stream. -1: the pixels are written already.

        Raises:
            ImageError: another dtype or shape, gaps between pixels, memory of another kind of
                device, or no DLPack.
        """
        try:
            kind, device_id = (int(number) for number in array.__dlpack_device__())
        except (AttributeError, TypeError, ValueError) as error:
            raise ImageError(
                f"{type(array).__name__} has no usable __dlpack_device__ ({error}); give an array in GPU memory"
            ) from error
        if kind not in (_CUDA, _CUDA_MANAGED):
            raise ImageError(
                f"the array lies on a device of DLPack's type {kind}, not in CUDA memory; copy it to the GPU"
            )
        capsule = _capsule(array, stream)
        tensor = _tensor(capsule)
        if (tensor.code, tensor.bits, tensor.lanes) != (_UNSIGNED, 8, 1):
            raise ImageError(
                f"a device frame must be uint8, got DLPack's dtype {tensor.code} with {tensor.bits} bits; "
                "convert it on the GPU first"
            )
        shape = tuple(tensor.shape[: tensor.ndim])
        strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
        size_hw, pitch = _rows(layout, range, shape, strides)
        pointer, waits_for = (tensor.data or 0) + tensor.byte_offset, None if stream == -1 else stream
        # the capsule, never taken over, frees the exporter's memory when it goes
        return cls(pointer, size_hw, pitch, layout, range, device_id, waits_for, capsule)


def is_on_gpu(array: Any) -> bool:
    """Whether another library's array says that it lies in GPU memory."""
    try:
        return hasattr(array, "__cuda_array_interface__")
    except RuntimeError:  # PyTorch's, of a tensor there that requires grad
        return True


def _index(value: Any) -> int:
    """A whole number that fits 64 bits."""
    number = operator.index(value)
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError("a number is longer than 64 bits")
    return number


def _rows(
    layout: str, luma_range: str, shape: tuple[int, ...], strides: Sequence[int] | None
) -> tuple[tuple[int, int], int]:
    """Height and width, and the pitch, of an array of uint8 with these strides in bytes."""
    check_layout(layout, luma_range)
    size_hw = size_hw_from_shape(layout, shape)
    if size_hw is None:
        raise ImageError(
            f"a {layout} frame of shape {shape} is not taken; 'gray' is (h, w), 'bgr' (h, w, 3), 'bgra' (h, w, 4), "
            "'nv12' (h + h / 2, w)"
        )
    channels = CHANNELS[layout]
    if strides is None:
        return size_hw, shape[1] * channels
    # along an axis of length 1 the stride says nothing
    gaps = (shape[1] > 1 and strides[1] != channels) or (len(shape) == 3 and shape[2] > 1 and strides[2] != 1)
    pitch = strides[0] if shape[0] > 1 else shape[1] * channels
    if gaps or pitch < 0:
        raise ImageError(
            f"the pixels of a {layout} frame must lie side by side, row below row; got strides of {tuple(strides)} "
            "bytes: copy the array into contiguous memory (.contiguous(), ascontiguousarray)"
        )
    return size_hw, pitch


class _DLTensor(ctypes.Structure):
    """DLTensor of DLPack's dlpack.h, first in what an unversioned capsule points to."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _capsule(array: Any, stream: int) -> Any:
    try:
        return array.__dlpack__(stream=stream)
    except Exception as error:  # each exporter has errors of its own
        raise ImageError(f"{type(array).__name__} can't be shared by DLPack: {reason_of(error, lines=1)}") from error


def _tensor(capsule: Any) -> _DLTensor:
    """The tensor in a capsule; the capsule keeps it alive."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    try:
        address = get(capsule, b"dltensor")
    except ValueError as error:
        raise ImageError(f"DLPack gave no fresh capsule named dltensor ({error}); share the array again") from error
    return _DLTensor.from_address(address)
