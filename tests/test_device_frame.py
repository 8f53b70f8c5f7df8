"""Frames in GPU memory; host arrays that say they are on a GPU stand in for it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from kp_runtime.device_frame import DeviceFrame
from kp_runtime.errors import ImageError

CUDA = (2, 3)
dlpack = pytest.mark.skipif(not hasattr(np.ndarray, "__dlpack__"), reason="numpy has DLPack from 1.22 on")


class Interface:
    """An array with `__cuda_array_interface__`, such as CuPy's."""

    def __init__(self, array: np.ndarray, **changed: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {**array.__array_interface__, "version": 3, **changed}


class Shared:
    """An array with DLPack on a device of that kind; numpy's capsule tells the rest."""

    def __init__(self, array: np.ndarray, device: Any = CUDA) -> None:
        self.array, self.device, self.stream = array, device, 0

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, stream: int) -> Any:
        self.stream = stream
        return self.array.__dlpack__()


def frames(array: np.ndarray, layout: str, luma_range: str = "full") -> list[DeviceFrame]:
    found = [DeviceFrame.from_cuda_array_interface(Interface(array), layout, luma_range, device_id=3)]
    if hasattr(array, "__dlpack__"):
        found.append(DeviceFrame.from_dlpack(Shared(array), layout, luma_range))
    return found


@pytest.mark.parametrize(
    ("shape", "layout", "size_hw", "pitch"),
    [
        ((4, 6), "gray", (4, 6), 6),
        ((4, 6, 1), "gray", (4, 6), 6),
        ((4, 6, 3), "bgr", (4, 6), 18),
        ((4, 6, 4), "rgba", (4, 6), 24),
        ((6, 8), "nv12", (4, 8), 8),
        ((6, 8), "i420", (4, 8), 8),
        ((1, 6, 3), "rgb", (1, 6), 18),
        ((5, 1, 3), "rgb", (5, 1), 3),
    ],
)
def test_contiguous_arrays(shape: tuple[int, ...], layout: str, size_hw: tuple[int, int], pitch: int) -> None:
    array = np.zeros(shape, np.uint8)
    for frame in frames(array, layout):
        stream = None if isinstance(frame.owner, Interface) else 1
        assert frame == DeviceFrame(array.ctypes.data, size_hw, pitch, layout, device_id=3, stream=stream)


def test_rows_apart_and_a_window() -> None:
    array = np.zeros((40, 60, 3), np.uint8)[7:20, 5:25]
    for frame in frames(array, "bgr"):
        assert (frame.pointer, frame.size_hw, frame.pitch) == (array.ctypes.data, (13, 20), 180)


def test_every_second_row_has_twice_the_pitch() -> None:
    for frame in frames(np.zeros((40, 60), np.uint8)[::2], "gray", "limited"):
        assert (frame.size_hw, frame.pitch, frame.range) == ((20, 60), 120, "limited")


def test_the_owner_is_kept_alive() -> None:
    holder = Interface(np.zeros((4, 6), np.uint8))
    assert DeviceFrame.from_cuda_array_interface(holder, "gray").owner is holder


@dlpack
def test_the_exporter_s_memory_is_freed_with_the_frame() -> None:
    array = np.full((4, 6), 3, np.uint8)
    alone = sys.getrefcount(array)
    frame = DeviceFrame.from_dlpack(Shared(array), "gray")
    assert sys.getrefcount(array) == alone + 1
    del frame
    assert sys.getrefcount(array) == alone


def test_stream_of_the_interface() -> None:
    array = np.zeros((4, 6), np.uint8)
    assert DeviceFrame.from_cuda_array_interface(Interface(array, stream=7), "gray").stream == 7
    assert DeviceFrame.from_cuda_array_interface(Interface(array), "gray").stream is None
    # PyTorch's, of version 2, knows no streams: what is written on the default one may be under way
    assert DeviceFrame.from_cuda_array_interface(Interface(array, version=2), "gray").stream == 1


@dlpack
def test_stream_that_dlpack_waits_for() -> None:
    for stream, waits_for in ((9, 9), (-1, None)):
        shared = Shared(np.zeros((4, 6), np.uint8))
        assert DeviceFrame.from_dlpack(shared, "gray", stream=stream).stream == waits_for
        assert shared.stream == stream


def test_read_only_arrays_are_fine() -> None:
    array = np.zeros((4, 6), np.uint8)
    array.setflags(write=False)
    assert DeviceFrame.from_cuda_array_interface(Interface(array), "gray").size_hw == (4, 6)


@pytest.mark.parametrize(
    ("array", "layout", "message"),
    [
        (np.zeros((4, 6, 3), np.float32), "bgr", "must be uint8.*convert it on the GPU first"),
        (np.zeros((4, 6, 3), np.int8), "bgr", "must be uint8"),
        (np.zeros((4, 6, 3), np.uint8), "gray", r"a gray frame of shape \(4, 6, 3\) is not taken"),
        (np.zeros((4, 6), np.uint8), "bgr", r"a bgr frame of shape \(4, 6\) is not taken; 'gray' is \(h, w\)"),
        (np.zeros((2, 4, 6, 3), np.uint8), "bgr", "is not taken"),
        (np.zeros((0, 6, 3), np.uint8), "bgr", "is not taken"),
        (np.zeros((4, 6), np.uint8), "nv12", r"a nv12 frame of shape \(4, 6\)"),
        (np.zeros((4, 6), np.uint8), "yuyv", "no layout 'yuyv'"),
        (np.zeros((3, 4, 6), np.uint8).transpose(1, 2, 0), "bgr", r"strides of \(6, 1, 24\) bytes: copy the array"),
        (np.zeros((4, 12, 3), np.uint8)[:, ::2], "bgr", "must lie side by side, row below row"),
        (np.zeros((4, 6, 4), np.uint8)[:, :, :3], "bgr", "must lie side by side"),
        (np.zeros((4, 6), np.uint8)[::-1], "gray", r"strides of \(-6, 1\) bytes"),
        (np.zeros((4, 6), np.uint8).T, "gray", "must lie side by side"),
    ],
)
def test_arrays_that_are_not_taken(array: np.ndarray, layout: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        DeviceFrame.from_cuda_array_interface(Interface(array), layout)
    if hasattr(array, "__dlpack__"):
        with pytest.raises(ImageError, match=message):
            DeviceFrame.from_dlpack(Shared(array), layout)


@pytest.mark.parametrize("given", [np.zeros((4, 6), np.uint8), None, Interface(np.zeros((4, 6), np.uint8), data=None)])
def test_objects_without_the_interface(given: object) -> None:
    with pytest.raises(ImageError, match=r"has no usable __cuda_array_interface__ \(.*give an array in GPU memory"):
        DeviceFrame.from_cuda_array_interface(given, "gray")


def test_objects_without_dlpack() -> None:
    with pytest.raises(ImageError, match="NoneType has no usable __dlpack_device__"):
        DeviceFrame.from_dlpack(None, "gray")


@dlpack
def test_arrays_on_the_host() -> None:
    with pytest.raises(ImageError, match="of DLPack's type 1, not in CUDA memory; copy it to the GPU"):
        DeviceFrame.from_dlpack(np.zeros((4, 6), np.uint8), "gray")


def test_exporters_that_fail() -> None:
    array = np.zeros((4, 6), np.uint8)
    array.setflags(write=False)
    shared = Shared(array)
    shared.__class__ = type("Failing", (Shared,), {"__dlpack__": lambda self, stream: 1 / 0})
    with pytest.raises(ImageError, match="Failing can't be shared by DLPack: division by zero"):
        DeviceFrame.from_dlpack(shared, "gray")
    shared.__class__ = type("Odd", (Shared,), {"__dlpack__": lambda self, stream: object()})
    with pytest.raises(ImageError, match="no fresh capsule named dltensor"):
        DeviceFrame.from_dlpack(shared, "gray")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size_hw": (0, 6)}, "must be 1 to 32767 pixels high and wide, got 0 x 6"),
        ({"size_hw": (4, 40000)}, "got 4 x 40000"),
        ({"size_hw": (4, 6, 3)}, "size_hw must be height and width, and .* whole numbers .too many values"),
        ({"size_hw": (4.0, 6)}, "whole numbers .'float' object"),
        ({"pointer": None}, "whole numbers .'NoneType' object"),
        ({"stream": "1"}, "whole numbers .'str' object"),
        ({"pointer": 0}, "needs the address of its pixels, got 0"),
        ({"pitch": 17}, "a row of 6 bgr pixels is 18 bytes long, but the pitch is 17"),
        ({"layout": "yuyv"}, "no layout 'yuyv'"),
        ({"range": "limited"}, "a bgr frame can't have limited range"),
    ],
)
def test_numbers_that_cannot_be_right(wrong: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"pointer": 512, "size_hw": (4, 6), "pitch": 18, "layout": "bgr"}
    assert DeviceFrame(**right).range == "full"
    with pytest.raises(ImageError, match=message):
        DeviceFrame(**{**right, **wrong})
