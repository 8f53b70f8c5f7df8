"""The CUDA crop kernel on the CPU: its source through a C++ compiler and `cuda_shim.h`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kp_runtime.device_frame import DeviceFrame
from kp_runtime.frame import CHANNELS, Frame
from kp_runtime.preprocess_cuda import FACE, IMAGE, faces_from_matrices, record_from_frame, weights_of_layout

SOURCE = Path(__file__).with_name("preprocess_emulated.cpp")
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror")  # older NVRTCs take ISO C++ alone


def built(folder: Path, *options: str) -> Path:
    """Compiles the kernel; skips where there is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed: the CUDA kernel can't be run on the CPU")
    program = folder / "preprocess_emulated"
    done = subprocess.run(
        [compiler, *WARNINGS, *options, str(SOURCE), "-o", str(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return program


class EmulatedKernel:
    """The kernel as a library; `crops` is the CPU path's function once more."""

    def __init__(self, folder: Path) -> None:
        library = built(folder, "-O2", "-shared", "-fPIC")
        try:
            self._emulate = ctypes.CDLL(str(library)).emulate
        except OSError as error:  # such as in an emulated Python that finds this machine's compiler
            pytest.skip(f"what g++ makes can't be loaded into this Python: {error}")
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._emulate.argtypes = [number, number, pointer, pointer, number, number, pointer]

    def crops(self, frame: Frame, matrices: np.ndarray, size: int, order: int = 0, poison: int = 0) -> np.ndarray:
        """`(n, 1, size, size)` uint8; `order` of the threads: 0 forwards, 1 backwards, 2 mixed."""
        faces = faces_from_matrices(matrices, size, frame.size_hw)
        crops = np.full((len(faces), 1, size, size), poison, np.uint8)
        device = DeviceFrame(
            frame.data.ctypes.data, frame.size_hw, frame.data.strides[0], frame.layout, frame.range, owner=frame.data
        )
        record = record_from_frame(device)
        values = (record.ctypes.data, faces.ctypes.data, size, crops.ctypes.data)
        self.launch(CHANNELS[frame.layout], len(faces), values, order)
        return crops

    def launch(self, bytes_a_pixel: int, n: int, values: tuple[int, ...], order: int = 0) -> None:
        """Runs a kernel over its grid; `values` are the kernel's arguments, pointers to host memory."""
        records = self._emulate(order, bytes_a_pixel, *values[:2], n, *values[2:])
        assert records == IMAGE.itemsize + FACE.itemsize


def case_bytes(frame: Frame, matrices: np.ndarray, size: int, missing: int = 0) -> bytes:
    """A case for the program: its data end with the last pixel that may be read, or `missing` bytes before."""
    faces = faces_from_matrices(matrices, size, frame.size_hw)
    bytes_a_pixel, (height, width), pitch = CHANNELS[frame.layout], frame.size_hw, frame.data.strides[0]
    rows = np.zeros((height, pitch), np.uint8)
    rows[:, : width * bytes_a_pixel] = frame.data[:height].reshape(height, -1)
    data = rows.tobytes()[: (height - 1) * pitch + width * bytes_a_pixel - missing]
    limited = int(frame.range == "limited")
    numbers = (bytes_a_pixel, pitch, *weights_of_layout(frame.layout), limited, len(faces), size, len(data), 0)
    return np.array(numbers, np.int64).tobytes() + data + faces.tobytes()
