"""The engines on a real GPU; each test is skipped where its GPU or packages are not there, with the reason."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kp_export.plan_bundle import add_plan
from kp_export.plan_from_onnx import plan_blocker
from kp_export.plan_options import PlanOptions
from kp_export.precision_receipt import LEAST_SHARE
from kp_runtime.backend_by_name import BACKENDS, open_backend
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.device_backend import DeviceBackend
from kp_runtime.errors import BackendError
from tests.models import SIZE, tiny_bundle, tiny_keypoints, tiny_scores
from tests.tolerances import MAP_PX, assert_close

pytestmark = pytest.mark.gpu

PROVIDERS = {"ort-cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}


@pytest.fixture(scope="module", params=[name for name in BACKENDS if name != "ort-cpu"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DeviceBackend:
    """An engine with the tiny network; its plan is built here, for at most eight faces."""
    name = request.param
    try:
        CudaDriver()
    except BackendError as error:
        pytest.skip(str(error))
    bundle = tiny_bundle(tmp_path_factory.mktemp(name), precision="fp16" if name == "ort-tensorrt" else "fp32")
    if name == "tensorrt":
        add_plan_for_eight(bundle)
    else:
        onnxruntime = pytest.importorskip("onnxruntime")
        if PROVIDERS[name] not in onnxruntime.get_available_providers():
            pytest.skip(f"this onnxruntime has no {PROVIDERS[name]}")
    opened = open_backend(bundle, name)
    assert isinstance(opened, DeviceBackend)
    return opened


def add_plan_for_eight(bundle: Path) -> None:
    if blocker := plan_blocker():
        pytest.skip(blocker)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LEAST_SHARE, "fp32", 0.0)  # the tiny network has no layer with weights
        add_plan(bundle, "fp32", PlanOptions(max_batch=8))


def some_crops(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 1, SIZE, SIZE), dtype=np.uint8)


@pytest.mark.parametrize("n", [1, 2, 8, 9, 31, 100])
def test_keypoints(n: int, engine: DeviceBackend) -> None:
    answer = engine.answer(some_crops(n))
    assert_close(answer.keypoints, tiny_keypoints(some_crops(n)), MAP_PX, f"{n} crops")
    assert_close(answer.lost_score, tiny_scores(some_crops(n)), 1e-4, f"lost scores of {n} crops")


def test_several_threads_at_once(engine: DeviceBackend) -> None:
    found: dict[int, np.ndarray] = {}

    def work(n: int) -> None:
        for _ in range(50):
            found[n] = engine.infer(some_crops(n))

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 3, 8, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in (1, 3, 8, 20):
        assert_close(found[n], tiny_keypoints(some_crops(n)), MAP_PX, f"{n} crops")


def test_a_lane_reads_and_writes_its_own_memory(engine: DeviceBackend) -> None:
    crops, keypoints = some_crops(20), np.zeros((20, 68, 2), np.float32)
    call = engine.driver.call
    with engine.open_lane(20) as lane:
        stream = engine.driver.api.CUstream(lane.stream)
        call("cuMemcpyHtoDAsync", lane.input_ptr, crops.ctypes.data, crops.nbytes, stream)
        lane.enqueue(20)
        call("cuMemcpyDtoHAsync", keypoints.ctypes.data, lane.output_ptrs[0], keypoints.nbytes, stream)
        call("cuStreamSynchronize", stream)
    assert_close(keypoints, tiny_keypoints(crops), MAP_PX, "keypoints")


def test_more_faces_than_the_memory_holds(engine: DeviceBackend) -> None:
    before = engine.infer(some_crops(2))
    with pytest.raises(BackendError, match=r"on the GPU: .*OUT_OF_MEMORY"):
        engine.open_lane(1 << 32)
    assert np.array_equal(engine.infer(some_crops(2)), before)


def test_time_of_the_golden_check(engine: DeviceBackend, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It should be under 50 ms; printed, as nothing here may fail for a busy machine."""
    bundle = tiny_bundle(tmp_path, precision="fp16" if engine.name == "ort-tensorrt" else "fp32")
    if engine.name == "tensorrt":
        add_plan_for_eight(bundle)
    seconds = {}
    for golden in (False, True, False, True):
        start = time.perf_counter()
        open_backend(bundle, engine.name, golden=golden)
        seconds[golden] = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n{engine.name}: load {seconds[False] * 1e3:.0f} ms, with the golden crop {seconds[True] * 1e3:.0f} ms")
