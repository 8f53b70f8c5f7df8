"""The whole way on a real GPU against the CPU. **None of it has been run yet: no GPU was at hand.**

It wants onnxruntime-gpu for `ort-cuda`; TensorRT's tests want an fp16 plan that fits the device, in the bundle
that `KP_GPU_BUNDLE` names (`kp plan BUNDLE --precision fp16`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kp_runtime import BackendError, DeviceFrame, ImageError, Model, StageTimer, image_from_file, load
from kp_runtime.backend_by_name import kind_of
from kp_runtime.backend_trt import MODULES
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.manifest import Manifest
from kp_runtime.pipeline import IN_FLIGHT
from kp_runtime.pipeline_cuda import LANES
from tests.tolerances import FP16_PX, GPU_PX, assert_close

pytestmark = pytest.mark.gpu

BUNDLE = Path(os.environ.get("KP_GPU_BUNDLE") or Path(__file__).resolve().parents[1] / "engines" / "resnet18-68")
FACE = np.array([177.0, 80, 270, 180])


@pytest.fixture(scope="module", params=["ort-cuda", "tensorrt"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """Skips where the GPU, the engine or the file is not there; what is there and does not work is a failure."""
    engine, precision = request.param, "fp32" if request.param == "ort-cuda" else "fp16"
    try:
        CudaDriver()
    except BackendError as error:
        pytest.skip(str(error))
    if engine == "tensorrt" and not any(map(importlib.util.find_spec, MODULES)):
        pytest.skip("TensorRT is not installed")
    if engine == "ort-cuda":
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has no CUDAExecutionProvider")
    files = {(entry.kind, entry.precision) for entry in Manifest.read(BUNDLE).files.values()}
    if (kind_of(engine), precision) not in files:
        pytest.skip(f"{BUNDLE} has no {precision} file for {engine}")
    with load(BUNDLE, engine, precision=precision) as opened:
        yield opened


@pytest.fixture(scope="module")
def cpu(model: Model) -> Model:
    """ONNX Runtime on the CPU, in the same precision."""
    return load(BUNDLE, "ort-cpu", precision=model.backend.report.precision)


@pytest.fixture(scope="module")
def image(astronaut: Path) -> np.ndarray:
    return image_from_file(astronaut)


def boxes_of(n: int) -> np.ndarray:
    """The face, moved a little."""
    return FACE + np.random.default_rng(n).uniform(-12, 12, (n, 4))


def check(model: Model, cpu: Model, image: np.ndarray, boxes: np.ndarray) -> None:
    most = GPU_PX if model.backend.report.precision == "fp32" else FP16_PX
    found, wanted = model(image, boxes), cpu(image, boxes)
    assert_close(found.xy, wanted.xy, most, "keypoints")
    assert_close(found.lost_score, wanted.lost_score, 1e-3 if most == GPU_PX else 0.02, "lost scores")


@pytest.mark.parametrize("n", [0, 1, 3, 8, 33])
def test_keypoints_are_the_cpu_s(n: int, model: Model, cpu: Model, image: np.ndarray) -> None:
    for _ in range(3):  # plain, captured, by the graph
        check(model, cpu, image, boxes_of(n))
    for other in (image[:, :, 0], image[::-1], image[40:400, 100:420]):
        check(model, cpu, other, np.clip(boxes_of(n), 0, 300))


def test_graphs_pass_their_canary(model: Model, image: np.ndarray) -> None:
    model.warmup(2)
    assert model.graphs.off is None
    assert {(3, 1), (3, 2)} <= set(model.graphs.captured)


def test_graphs_change_nothing(model: Model, image: np.ndarray) -> None:
    """With a timer no graph is used; in between other sizes go the same way."""
    for n in (1, 2, 1, 5, 2, 1):
        plain = model(image, boxes_of(n), timer=StageTimer()).xy
        assert_close(model(image, boxes_of(n)).xy, plain, 0.01, "keypoints by a graph")


def test_submitted_frames_come_in_order_and_right(model: Model, image: np.ndarray) -> None:
    images = [np.roll(image, 3 * i, axis=1) for i in range(20)]
    wanted = [model(one, boxes_of(1)).xy for one in images]
    done: list[int] = []
    futures = []
    for i, one in enumerate(images):
        futures.append(model.submit(one, boxes_of(1)))
        futures[-1].add_done_callback(lambda _, i=i: done.append(i))
    for future, want in zip(futures, wanted, strict=True):
        assert_close(future.result(60).xy, want, 0.01, "keypoints of submit()")
    model.submit(image, []).result(60)
    assert done == list(range(20))


def test_threads_share_a_model(model: Model, image: np.ndarray) -> None:
    images = [np.roll(image, 3 * i, axis=1) for i in range(8)]
    wanted = [model(one, boxes_of(1 + i % 3)).xy for i, one in enumerate(images)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = pool.map(lambda i: model(images[i], boxes_of(1 + i % 3)).xy, range(8))
            for one, want in zip(got, wanted, strict=True):
                assert_close(one, want, 0.01, "keypoints in threads")


def test_device_frames_and_frames_that_are_gone(model: Model, cpu: Model, image: np.ndarray) -> None:
    driver = CudaDriver()
    pointer, default = int(driver.call("cuMemAlloc", image.nbytes)), driver.api.CUstream(1)
    driver.call("cuMemcpyHtoDAsync", pointer, np.ascontiguousarray(image).ctypes.data, image.nbytes, default)
    driver.call("cuStreamSynchronize", default)
    frame = DeviceFrame(pointer, (image.shape[0], image.shape[1]), image.shape[1] * 3, "bgr")
    assert np.array_equal(model(frame, boxes_of(2)).xy, model(image, boxes_of(2)).xy)
    with pytest.raises(ImageError, match="is not in CUDA memory"):
        model(DeviceFrame(image.ctypes.data, frame.size_hw, frame.pitch, "bgr"), boxes_of(2))
    driver.call("cuMemFree", pointer)
    with pytest.raises(ImageError, match="is not in CUDA memory"):
        model(frame, boxes_of(2))
    check(model, cpu, image, boxes_of(2))


def test_more_faces_than_there_is_memory_for(model: Model, cpu: Model, image: np.ndarray) -> None:
    """No device has room for so many; what was open before goes on."""
    check(model, cpu, image, boxes_of(2))
    with pytest.raises(BackendError, match=f"no room for {1 << 32} faces on the GPU: .*OUT_OF_MEMORY"):
        model.warmup(1 << 32)
    check(model, cpu, image, boxes_of(2))


def test_frames_a_second(model: Model, image: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    """Calls one after another beside submit(); the numbers are printed, no time is asserted."""
    import time

    large = np.tile(image, (2, 4, 1))[:1080, :1920]
    model.warmup(8)
    model(large, boxes_of(8))

    def per_frame(work: object) -> float:
        start = time.perf_counter()
        assert callable(work)
        work(200)
        return (time.perf_counter() - start) / 200 * 1e3

    alone = per_frame(lambda n: [model(large, boxes_of(8)) for _ in range(n)])
    plain = per_frame(lambda n: [model(large, boxes_of(8), timer=StageTimer()) for _ in range(n)])
    line = per_frame(lambda n: [f.result() for f in [model.submit(large, boxes_of(8)) for _ in range(n)]])
    with capsys.disabled():
        print(
            f"\n{model.backend.name}, 8 faces in 1920 x 1080: {alone:.2f} ms a call, {plain:.2f} ms stage by stage, "
            f"{line:.2f} ms with submit ({LANES} lanes, {IN_FLIGHT} in flight)"
        )
