"""The host's part of cropping on a GPU: against a double of the driver, and on a real GPU where there is one."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.device_frame import DeviceFrame
from kp_runtime.errors import BackendError, ImageError, MissingExtraError
from kp_runtime.frame import Frame
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.preprocess_cuda import CropKernels, CudaCropper
from kp_runtime.probes import crops as crops_on_the_gpu
from tests.cuda_driver_double import DriverDouble, Result
from tests.emulation import EmulatedKernel
from tests.test_pipeline_cuda import on_device

SIZE = 48


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> DriverDouble:
    double = DriverDouble(None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", double)
    return double


def some_matrices(rng: np.random.Generator, n: int) -> np.ndarray:
    corner = rng.uniform(0, 300, (n, 2))
    return matrices_from_boxes(np.concatenate([corner, corner + rng.uniform(20, 200, (n, 2))], axis=1), SIZE, 1.3)


@pytest.mark.parametrize("layout", ["bgr", "rgba", "gray"])
def test_crops_of_many_calls_under_way_at_once(
    driver: DriverDouble, kernel: EmulatedKernel, layout: str, rng: np.random.Generator
) -> None:
    driver.kernel = kernel
    shape = {"bgr": (300, 401, 3), "rgba": (300, 401, 4), "gray": (300, 401)}[layout]
    frame = Frame(rng.integers(0, 256, shape, dtype=np.uint8), layout, "limited" if layout == "gray" else "full")
    matrices = [some_matrices(rng, n) for n in (3, 70, 1, 0, 200, 2, 5, 1, 90, 4)]
    outs = [np.full((len(m), 1, SIZE, SIZE), 77, np.uint8) for m in matrices]
    with CudaCropper(cubin=b"cubin") as cropper:
        for some, out in zip(matrices, outs, strict=True):
            cropper.crops_from_frame(on_device(driver, frame), some, SIZE, out.ctypes.data, 5)
    for some, out in zip(matrices, outs, strict=True):
        assert np.array_equal(out, crops_from_frame(frame, some, SIZE))
    assert driver.memory == {}
    launches = [call for call in driver.asked if call[0] == "cuLaunchKernel"]
    assert len(launches) == 9  # one for all faces of a frame, none for no face


def test_crops_wait_for_the_frame_s_own_stream(driver: DriverDouble, rng: np.random.Generator) -> None:
    frame = Frame(rng.integers(0, 256, (300, 401), dtype=np.uint8), "gray")
    cropper = CudaCropper(cubin=b"cubin")
    driver.failing["cuLaunchKernel"] = Result.CUDA_SUCCESS  # nothing is computed here
    cropper.crops_from_frame(on_device(driver, frame, stream=9), some_matrices(rng, 1), SIZE, 1, 5)
    events = [call for call in driver.asked if call[0] in ("cuEventRecord", "cuStreamWaitEvent")]
    ready, wait, done = events
    assert ready[2] == 9
    assert wait[1:3] == (5, ready[1])
    assert done[2] == 5
    assert done[1] != ready[1]


def test_records_of_a_launch_that_failed_stay_until_they_are_copied(
    driver: DriverDouble, kernel: EmulatedKernel, rng: np.random.Generator
) -> None:
    driver.kernel = kernel
    frame = Frame(rng.integers(0, 256, (300, 401), dtype=np.uint8), "gray")
    matrices = [some_matrices(rng, n) for n in (2, 70, 70, 70, 70)]  # more than the 64 that there is room for
    out = np.zeros((70, 1, SIZE, SIZE), np.uint8)
    with CudaCropper(cubin=b"cubin") as cropper:
        driver.failing["cuLaunchKernel"] = Result.CUDA_ERROR_OUT_OF_MEMORY
        with pytest.raises(BackendError, match="cuLaunchKernel says CUDA_ERROR_OUT_OF_MEMORY"):
            cropper.crops_from_frame(on_device(driver, frame), matrices[0], SIZE, out.ctypes.data, 5)
        del driver.failing["cuLaunchKernel"]
        for some in matrices[1:]:
            cropper.crops_from_frame(on_device(driver, frame), some, SIZE, out.ctypes.data, 5)
    assert np.array_equal(out, crops_from_frame(frame, matrices[-1], SIZE))


class Surface:
    """What owns a frame's memory, which goes to a next picture when nobody holds it."""


def test_a_frame_s_owner_lives_as_long_as_its_launch(driver: DriverDouble, rng: np.random.Generator) -> None:
    data, matrices = rng.integers(0, 256, (300, 401), dtype=np.uint8), some_matrices(rng, 1)
    driver.lend(data)
    driver.failing["cuLaunchKernel"] = Result.CUDA_SUCCESS
    surfaces: list[weakref.ref[Surface]] = []
    with CudaCropper(cubin=b"cubin") as cropper:
        for _ in range(6):
            frame = DeviceFrame(data.ctypes.data, data.shape, 401, "gray", owner=Surface())
            surfaces.append(weakref.ref(frame.owner))
            cropper.crops_from_frame(frame, matrices, SIZE, 1, 5)
            del frame
        assert [surface() is not None for surface in surfaces] == [False] * 2 + [True] * 4
    assert not any(surface() for surface in surfaces)


class Stream:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 42


def test_streams_of_other_libraries(driver: DriverDouble, rng: np.random.Generator) -> None:
    frame = on_device(driver, Frame(rng.integers(0, 256, (300, 401), dtype=np.uint8), "gray"))
    cropper = CudaCropper(cubin=b"cubin")
    driver.failing["cuLaunchKernel"] = Result.CUDA_SUCCESS
    cropper.crops_from_frame(frame, some_matrices(rng, 1), SIZE, 1, Stream())
    assert next(call for call in driver.asked if call[0] == "cuMemcpyHtoDAsync")[4] == 42
    with pytest.raises(BackendError, match="must be its handle or an object with __cuda_stream__, got str"):
        cropper.crops_from_frame(frame, some_matrices(rng, 1), SIZE, 1, "stream")


@pytest.mark.parametrize("uses", [0, 4])
def test_a_closed_cropper_says_so(driver: DriverDouble, rng: np.random.Generator, uses: int) -> None:
    frame = on_device(driver, Frame(rng.integers(0, 256, (300, 401), dtype=np.uint8), "gray"))
    cropper = CudaCropper(cubin=b"cubin")
    driver.failing["cuLaunchKernel"] = Result.CUDA_SUCCESS
    for _ in range(uses):
        cropper.crops_from_frame(frame, some_matrices(rng, 1), SIZE, 1, Stream())
    cropper.close()
    with pytest.raises(BackendError, match="this cropper is closed; make another one"):
        cropper.crops_from_frame(frame, some_matrices(rng, 1), SIZE, 1, Stream())


def test_a_frame_on_another_device(driver: DriverDouble) -> None:
    frame = DeviceFrame(1, (10, 10), 10, "gray", device_id=1)
    with pytest.raises(ImageError, match=r"on CUDA device 1, its crops are cut on 0; .*CUDA_VISIBLE_DEVICES=1"):
        CudaCropper(cubin=b"cubin").crops_from_frame(frame, np.zeros((1, 2, 3)), SIZE, 1, 0)


def test_cubin_of_the_environment(driver: DriverDouble, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"cubin of a file")
    monkeypatch.setenv("KP_CUBIN", str(tmp_path / "kernel"))
    CudaCropper()
    CudaCropper(cubin=tmp_path / "kernel")
    monkeypatch.setenv("KP_CUBIN", str(tmp_path / "none"))
    with pytest.raises(BackendError, match="none can't be read: No such file"):
        CudaCropper()


def test_a_cubin_for_another_gpu(driver: DriverDouble) -> None:
    driver.failing["cuModuleLoadData"] = Result.CUDA_ERROR_NO_BINARY_FOR_GPU
    with pytest.raises(
        BackendError,
        match=r"can't be used on this sm_87 GPU \(.*NO_BINARY_FOR_GPU.*compile it for sm_87 .*'s CUDA 12 or",
    ):
        CudaCropper(cubin=b"cubin")


def test_no_memory_leaves_what_there_was(
    driver: DriverDouble, kernel: EmulatedKernel, rng: np.random.Generator
) -> None:
    driver.kernel = kernel
    frame = Frame(rng.integers(0, 256, (300, 401), dtype=np.uint8), "gray")
    out = np.zeros((1, 1, SIZE, SIZE), np.uint8)
    driver.room = 100_000
    with CudaCropper(cubin=b"cubin") as cropper:
        for faces in (2000, 2000, 1):
            matrices = some_matrices(rng, faces)
            if faces > 1:
                with pytest.raises(BackendError, match="cuMemAlloc says CUDA_ERROR_OUT_OF_MEMORY; take fewer faces"):
                    cropper.crops_from_frame(on_device(driver, frame), matrices, SIZE, out.ctypes.data, 5)
            else:
                cropper.crops_from_frame(on_device(driver, frame), matrices, SIZE, out.ctypes.data, 5)
    assert np.array_equal(out, crops_from_frame(frame, matrices, SIZE))
    assert (driver.memory, driver.room) == ({}, 100_000)


def test_frames_that_are_not_where_they_say(driver: DriverDouble, rng: np.random.Generator) -> None:
    memory = np.zeros((301, 401), np.uint8)  # so that behind the frame's last byte there is nothing of the double's
    frame = Frame(memory[:300], "gray")
    matrices = some_matrices(rng, 1)
    address = frame.data.ctypes.data
    with CudaCropper(cubin=b"cubin") as cropper:
        with pytest.raises(
            ImageError, match=r"first byte, at 0x.* is not in CUDA memory: it was freed, lies in the host"
        ):
            cropper.crops_from_frame(DeviceFrame(address, (300, 401), 401, "gray"), matrices, SIZE, 1, 0)
        driver.lend(frame.data)
        with pytest.raises(ImageError, match=r"last byte, at 0x.* is smaller than size and pitch say"):
            cropper.crops_from_frame(DeviceFrame(address, (301, 401), 401, "gray"), matrices, SIZE, 1, 0)
        driver.lent[:] = [(address, frame.data.nbytes, 1)]
        with pytest.raises(ImageError, match="frame is on CUDA device 1, its crops are cut on 0"):
            cropper.crops_from_frame(DeviceFrame(address, (300, 401), 401, "gray"), matrices, SIZE, 1, 0)


def test_errors_after_which_the_gpu_is_lost(driver: DriverDouble) -> None:
    with CudaCropper(cubin=b"cubin"):
        driver.failing["cuEventCreate"] = Result.CUDA_ERROR_ILLEGAL_ADDRESS
        with pytest.raises(BackendError, match=r"ILLEGAL_ADDRESS; something read or wrote memory .*start it again"):
            CudaCropper(cubin=b"cubin")


def test_kernels_go_with_what_used_them(driver: DriverDouble) -> None:
    cropper = CudaCropper(cubin=b"cubin")
    driver.failing["cuEventCreate"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(BackendError):
        CudaCropper(cubin=b"cubin")
    del cropper
    kernels = CropKernels(CudaDriver(), b"cubin")
    kernels.close()
    del kernels
    gc.collect()
    asked = [name for name, *_ in driver.asked]
    assert asked.count("cuModuleLoadData") == asked.count("cuModuleUnload") == 3


def test_no_such_device(driver: DriverDouble) -> None:
    with pytest.raises(BackendError, match="no CUDA device 3: this machine has 1, numbered from 0"):
        CudaCropper(3, cubin=b"cubin")


def test_no_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MissingExtraError, match=r"running on a GPU.*cuda-python.*pip install 'kp-edge\[cuda12\]'"):
        CudaCropper()


def test_no_driver_library(driver: DriverDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("libcuda.so.1 not found\nsecond line")

    monkeypatch.setattr(driver, "cuInit", missing, raising=False)
    with pytest.raises(BackendError, match=r"libcuda can't be loaded \(libcuda.so.1 not found\).*run on the CPU$"):
        CudaCropper()


def test_the_doctor_s_probe_compares_every_grey_level(
    driver: DriverDouble, kernel: EmulatedKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver.kernel = kernel
    (tmp_path / "kernel.cubin").write_bytes(b"cubin")
    monkeypatch.setenv("KP_CUBIN", str(tmp_path / "kernel.cubin"))
    assert crops_on_the_gpu() == {"levels": 2 * 64 * 64, "different": 0}
    monkeypatch.setattr(kernel, "launch", lambda *_: None)
    assert crops_on_the_gpu()["different"] > 8000
