"""Crops on a real GPU against the CPU path. **None of it has been run yet: no GPU was at hand.**"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.device_frame import DeviceFrame
from kp_runtime.errors import BackendError
from kp_runtime.frame import CHANNELS, Frame, as_frame, image_from_file
from kp_runtime.geometry import apply_matrix, crop_plan, invert_matrix, matrices_from_boxes
from kp_runtime.pipeline import load
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.preprocess_cuda import IMAGE, CudaCropper
from tests.test_preprocess_cuda import ALL, LAYOUTS, MARGIN, frame_of
from tests.tolerances import GPU_CROP_GREY, GPU_PX, assert_close

pytestmark = pytest.mark.gpu


class Gpu:
    """Device memory and a stream, by the driver. All copies are told that stream: it waits for no other."""

    def __init__(self) -> None:
        try:
            self.driver = CudaDriver()
        except BackendError as error:
            pytest.skip(str(error))
        self.cropper = CudaCropper()
        self.call = self.driver.call
        self.stream = self.call("cuStreamCreate", 1)  # 1: does not wait for the default stream

    def memory(self, size: int) -> int:
        pointer = int(self.call("cuMemAlloc", size))
        self.call("cuMemsetD8Async", pointer, 0xEE, size, self.stream)
        return pointer

    def upload(self, frame: Frame) -> DeviceFrame:
        rows = np.zeros((frame.data.shape[0], frame.data.strides[0]), np.uint8)
        rows[:, : frame.size_hw[1] * CHANNELS[frame.layout]] = frame.data.reshape(len(rows), -1)
        pointer = self.memory(rows.nbytes)
        self.call("cuMemcpyHtoDAsync", pointer, rows.ctypes.data, rows.nbytes, self.stream)
        self.call("cuStreamSynchronize", self.stream)  # rows goes
        return DeviceFrame(pointer, frame.size_hw, rows.shape[1], frame.layout, frame.range)

    def crops(self, frame: Frame, matrices: np.ndarray, size: int) -> np.ndarray:
        crops = np.empty((len(matrices), 1, size, size), np.uint8)
        device, out = self.upload(frame), self.memory(max(1, crops.nbytes))
        self.cropper.crops_from_frame(device, matrices, size, out, int(self.stream))
        if crops.size:
            self.call("cuMemcpyDtoHAsync", crops.ctypes.data, out, crops.nbytes, self.stream)
        self.call("cuStreamSynchronize", self.stream)
        for pointer in (device.pointer, out):
            self.call("cuMemFree", pointer)
        return crops

    def seconds(self, work: Any, times: int = 50) -> float:
        """Median time of some work on the stream."""
        events = [self.call("cuEventCreate", 0) for _ in range(times + 1)]
        for _ in range(5):
            work()
        self.call("cuEventRecord", events[0], self.stream)
        for event in events[1:]:
            work()
            self.call("cuEventRecord", event, self.stream)
        self.call("cuStreamSynchronize", self.stream)
        elapsed = [self.call("cuEventElapsedTime", *pair) for pair in itertools.pairwise(events)]
        return float(np.median(elapsed)) / 1000


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


@pytest.mark.parametrize("gap", [0, 13])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [64, 224])
def test_crops_are_the_cpu_path_s(gpu: Gpu, layout: str, gap: int, size: int, rng: np.random.Generator) -> None:
    bgr = rng.integers(0, 256, (302, 404, 3), dtype=np.uint8)
    frame = frame_of(layout, bgr, "limited" if layout == "nv12" else "full", gap)
    matrices = matrices_from_boxes(ALL, size, MARGIN, angle=np.linspace(-2, 2, len(ALL)))
    assert_close(gpu.crops(frame, matrices, size), crops_from_frame(frame, matrices, size), GPU_CROP_GREY, "crops")


@pytest.mark.parametrize("n", [0, 1, 256])
def test_numbers_of_faces(gpu: Gpu, n: int, rng: np.random.Generator) -> None:
    frame = as_frame(rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8))
    corner = rng.uniform(0, 1000, (n, 2))
    matrices = matrices_from_boxes(np.concatenate([corner, corner + rng.uniform(20, 900, (n, 2))], axis=1), 224, 1.3)
    assert_close(gpu.crops(frame, matrices, 224), crops_from_frame(frame, matrices, 224), GPU_CROP_GREY, "crops")


def test_keypoints_of_a_photograph(gpu: Gpu, bundle: Path, astronaut: Path) -> None:
    model = load(bundle)
    frame = as_frame(image_from_file(astronaut))
    matrices = matrices_from_boxes(np.array([[177.0, 80, 270, 180], [100, 20, 400, 330]]), model.spec.size, MARGIN)
    keypoints = [
        apply_matrix(invert_matrix(matrices), model.backend.infer(crops))
        for crops in (gpu.crops(frame, matrices, model.spec.size), crops_from_frame(frame, matrices, model.spec.size))
    ]
    assert_close(*keypoints, GPU_PX, "keypoints")


@pytest.mark.parametrize("layout", ["bgr", "nv12"])
def test_bytes_a_second(gpu: Gpu, layout: str, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]) -> None:
    """64 faces in 1080p beside a copy on the device; the numbers are printed, no time is asserted.

    Host work is part of a call, so the pauses between launches count where it is slower than the GPU.
    """
    frame = frame_of(layout, rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8))
    corner = rng.uniform(0, 900, (64, 2)) * [2, 1]
    matrices = matrices_from_boxes(np.concatenate([corner, corner + 150], axis=1), 224, 1.3)
    device, out = gpu.upload(frame), gpu.memory(64 * 224 * 224)
    plans = [crop_plan(matrix, 224, frame.size_hw) for matrix in matrices]
    moved = sum((p.x1 - p.x0) * (p.y1 - p.y0) for p in plans) * CHANNELS[layout] + 64 * 224 * 224
    call = gpu.seconds(lambda: gpu.cropper.crops_from_frame(device, matrices, 224, out, int(gpu.stream)))
    records = gpu.cropper._slots[0].records._device.address
    launch = (CHANNELS[layout], 64, records, records + IMAGE.itemsize, 224, out, gpu.stream)
    alone = gpu.seconds(lambda: gpu.cropper.kernels.launch(*launch))
    source, target, size = gpu.memory(1 << 28), gpu.memory(1 << 28), 1 << 28
    copied = 2 * size / gpu.seconds(lambda: gpu.call("cuMemcpyDtoDAsync", target, source, size, gpu.stream))
    with capsys.disabled():
        print(
            f"\n{layout}: kernel {alone * 1e6:.1f} us, {moved / alone / 1e9:.0f} GB/s of {copied / 1e9:.0f} GB/s "
            f"in a copy; with the host's work {call * 1e6:.0f} us"
        )
    for pointer in (device.pointer, out, source, target):
        gpu.call("cuMemFree", pointer)
