"""The whole way on a GPU, a call at a time, against doubles of driver and engine; the crop kernel runs emulated."""

from __future__ import annotations

import dataclasses
import gc
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kp_runtime import (
    BackendError,
    BoxError,
    DeviceFrame,
    Frame,
    ImageError,
    InputError,
    Model,
    StageTimer,
    tune,
)
from kp_runtime.backend import Backend, BackendReport
from kp_runtime.backend_by_name import open_backend
from kp_runtime.frame import as_frame
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.pipeline_cuda import LANES
from kp_runtime.tune_results import TuneSettings
from tests import device_double
from tests.cuda_driver_double import DriverDouble, Result
from tests.device_double import DeviceDouble
from tests.models import tiny_bundle, tiny_outputs

HEIGHT, WIDTH = 240, 320


def picture(seed: int, shape: tuple[int, ...] = (HEIGHT, WIDTH, 3)) -> np.ndarray:
    """Patches of 8 px, so that faces at other places and in other pictures have other mean grey levels."""
    small = (shape[0] // 8, shape[1] // 8, *shape[2:])
    patches = np.random.default_rng(seed).integers(0, 256, small, dtype=np.uint8)
    return np.ascontiguousarray(patches.repeat(8, axis=0).repeat(8, axis=1))


def boxes_of(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 150, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(30, 80, (n, 2))], axis=1)


def asked(driver: DriverDouble, name: str) -> int:
    return sum(call[0] == name for call in driver.asked)


def check(model: Model, cpu: Model, image: Any, boxes: np.ndarray, host: Any = None) -> None:
    """The same keypoints as on the CPU, whose crops are the same bits and whose network is ONNX Runtime's."""
    got, wanted = model(image, boxes), cpu(image if host is None else host, boxes)
    assert np.abs(got.xy - wanted.xy).max(initial=0) <= 1e-3
    assert np.array_equal(got.crop_from_image, wanted.crop_from_image)
    assert np.array_equal(got.boxes_xyxy, wanted.boxes_xyxy)
    assert (got.size_hw, got.xy.dtype) == (wanted.size_hw, np.float32)
    assert got.lost_score is not None
    assert wanted.lost_score is not None
    assert np.abs(got.lost_score - wanted.lost_score).max(initial=0) <= 1e-5
    assert got.lost_score.shape == (len(boxes),)


def test_every_layout_number_of_faces_and_size_of_frames(model: Model, cpu: Model, driver: DriverDouble) -> None:
    frames: list[Any] = [
        picture(0),
        picture(1, (160, 200, 3)),
        picture(2, (HEIGHT, WIDTH)),
        picture(3, (HEIGHT, WIDTH, 4)),
        picture(4)[::-1, ::-1],
        picture(5, (480, 640, 3))[::2, ::2],
        Frame(picture(6, (360, WIDTH)), "nv12", "limited"),
        Frame(picture(7), "rgb"),
    ]
    for i, frame in enumerate(frames):
        for n in (3, 1, 3, 0):
            check(model, cpu, frame, boxes_of(i + n, n))
    # of 3 faces and of 1, with 1, 3 and 4 bytes a pixel: what first came twice
    assert model.graphs.captured == ((1, 3), (3, 1), (3, 3), (4, 3))
    assert model.graphs.off is None
    assert asked(driver, "cuStreamCreate") == 1 + 4  # a thread alone needs one lane, and each graph has one


def test_the_golden_crop_is_cut_on_the_gpu(
    driver: DriverDouble, bundle_with_image: Path, request: pytest.FixtureRequest
) -> None:
    backend = DeviceDouble()
    backend.golden = open_backend(bundle_with_image, "ort-cpu", threads=1).golden
    Model(backend).close()
    assert backend.check_crops() == 0
    assert asked(driver, "cuLaunchKernel") == 2
    request.getfixturevalue("half_a_pixel_off")
    for check in (backend.check_crops, lambda: Model(backend)):
        with pytest.raises(BackendError, match=r"golden crop is cut with a grey level \d+ off .* the backend ort-cpu"):
            check()
    driver.failing["cuLaunchKernel"] = Result.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(BackendError, match="cuLaunchKernel says CUDA_ERROR_INVALID_VALUE"):
        backend.check_crops()
    assert not driver.memory


def on_device(driver: DriverDouble, frame: Frame, **more: Any) -> DeviceFrame:
    """A frame of the double's device memory, which is the host's."""
    data = frame.data
    driver.lend(data)
    return DeviceFrame(data.ctypes.data, frame.size_hw, data.strides[0], frame.layout, frame.range, owner=data, **more)


def test_device_frames_are_not_copied(model: Model, cpu: Model, driver: DriverDouble) -> None:
    for i in range(4):
        frame = Frame(picture(i), "bgr")
        before = len(driver.asked)
        check(model, cpu, on_device(driver, frame), boxes_of(i, 2), frame)
        copied = [call[3] for call in driver.asked[before:] if call[0] == "cuMemcpyHtoDAsync"]
        assert frame.data.nbytes not in copied


def test_a_frame_s_own_stream_is_waited_for(model: Model, cpu: Model, driver: DriverDouble) -> None:
    for i in range(3):
        frame = Frame(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "bgr")
        device, pixels = on_device(driver, frame, stream=7), picture(i)
        driver.work(7, lambda frame=frame, pixels=pixels: np.copyto(frame.data, pixels))  # written when 7 comes so far
        check(model, cpu, device, boxes_of(i, 2), Frame(pixels, "bgr"))


def test_more_faces_need_larger_memory(model: Model, cpu: Model, driver: DriverDouble) -> None:
    for n in (1, 9, 70, 2):
        check(model, cpu, picture(n), boxes_of(n, n))
    assert asked(driver, "cuStreamCreate") == asked(driver, "cuStreamDestroy") + 1 == 3


def test_a_model_without_a_lost_score(driver: DriverDouble, cpu: Model) -> None:
    with Model(DeviceDouble(lost_limit=None)) as model:
        for i in range(4):
            got = model(picture(i), boxes_of(i, 4), mirror=i == 3)
            assert np.abs(got.xy - cpu(picture(i), boxes_of(i, 4), mirror=i == 3).xy).max() <= 1e-3
            assert got.lost_score is None
        assert model.graphs.captured == ((3, 4),)


def test_stages_are_timed_and_results_the_same(model: Model, driver: DriverDouble) -> None:
    timer = StageTimer()
    for n in (2, 2, 2, 0):
        timed = model(picture(n), boxes_of(n, n), timer=timer)
        assert np.array_equal(timed.xy, model(picture(n), boxes_of(n, n)).xy)
    assert {name: len(times) for name, times in timer.seconds.items()} == {"crop": 4, "infer": 4, "map back": 4}
    assert list(timer.seconds) == ["crop", "infer", "map back"]


def test_out_is_the_result(model: Model) -> None:
    out = np.zeros((2, 68, 2), np.float32)
    first = model(picture(0), boxes_of(0, 2), out=out)
    assert first.xy is out
    assert np.array_equal(out, model(picture(0), boxes_of(0, 2)).xy)
    assert model.submit(picture(1), boxes_of(1, 2), out=out).result(60).xy is out
    with pytest.raises(InputError, match=r"out must be a writable float32 array \(1, 68, 2\)"):
        model(picture(0), boxes_of(0, 1), out=out)


def test_results_are_not_written_over(model: Model) -> None:
    results = [model(picture(i), boxes_of(i, 2)) for i in range(4)]
    kept = [result.xy.copy() for result in results]
    for i in range(4):
        model(picture(9 + i), boxes_of(9 + i, 2))
    for result, xy in zip(results, kept, strict=True):
        assert np.array_equal(result.xy, xy)


# what can go wrong


def test_device_frames_on_the_cpu(cpu: Model) -> None:
    frame = DeviceFrame(512, (10, 10), 30, "bgr")
    with pytest.raises(ImageError, match=r"lies in GPU memory, but the model runs on ort-cpu; load it with an engine"):
        cpu(frame, [[0, 0, 9, 9]])


class OnGpu:
    """An array of another library in GPU memory."""

    __cuda_array_interface__ = {"shape": (1, 4), "typestr": "<f4", "data": (512, False), "version": 3}  # noqa: RUF012


class WithGrad:
    """A tensor of PyTorch's on a GPU that requires grad."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")


@pytest.mark.parametrize("kind", [OnGpu, WithGrad])
def test_arrays_in_gpu_memory_that_should_not_be_there(kind: type, model: Model, cpu: Model) -> None:
    for either in (model, cpu):
        with pytest.raises(BoxError, match=r"the boxes lie in GPU memory; copy them to the host: boxes.cpu\(\)"):
            either(picture(0), kind())
        with pytest.raises(ImageError, match=r"the image, a \w+, lies in GPU memory; .*DeviceFrame.from_cuda_array"):
            either(kind(), [[0, 0, 9, 9]])
    with pytest.raises(ImageError, match=r"requires grad|must be uint8"):
        DeviceFrame.from_cuda_array_interface(kind(), "bgr")


def test_frames_that_are_gone_or_elsewhere(model: Model, cpu: Model, driver: DriverDouble) -> None:
    frame = Frame(picture(0), "bgr")
    device = on_device(driver, frame)
    for _ in range(3):
        model(device, boxes_of(0, 2))
    kept = driver.lent.pop()
    with pytest.raises(ImageError, match=r"first byte.* is not in CUDA memory: it was freed"):
        model(device, boxes_of(0, 2))
    driver.lent.append((*kept[:2], 1))
    with pytest.raises(ImageError, match="the frame is on CUDA device 1, its crops are cut on 0; copy it there"):
        model(device, boxes_of(0, 2))
    with pytest.raises(ImageError, match="the frame is on CUDA device 3"):
        model(DeviceFrame(512, (10, 10), 30, "bgr", device_id=3), [[0, 0, 9, 9]])
    check(model, cpu, picture(1), boxes_of(1, 2))


def test_no_memory_for_more_faces(model: Model, cpu: Model, driver: DriverDouble) -> None:
    for i in range(3):
        check(model, cpu, picture(i), boxes_of(i, 2))
    driver.room = 0
    for _ in range(2):
        with pytest.raises(BackendError, match=r"no room for 64 faces on the GPU: .*OUT_OF_MEMORY.*use fewer at once"):
            model(picture(0), boxes_of(0, 33))
    with pytest.raises(BackendError, match="cuMemAlloc says CUDA_ERROR_OUT_OF_MEMORY; take fewer faces"):
        model(picture(0, (480, 640, 3)), boxes_of(0, 2))
    check(model, cpu, picture(3), boxes_of(3, 2))
    assert model.graphs.captured == ((3, 2),)
    driver.room = None
    check(model, cpu, picture(4), boxes_of(4, 33))


def test_no_pinned_memory_for_a_lane(model: Model, cpu: Model, driver: DriverDouble) -> None:
    driver.failing["cuMemHostAlloc"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(BackendError, match="cuMemHostAlloc says CUDA_ERROR_OUT_OF_MEMORY"):
        model(picture(0), boxes_of(0, 2))
    gc.collect()
    assert not driver.memory  # nothing of the half lane is left
    driver.failing.clear()
    check(model, cpu, picture(0), boxes_of(0, 2))


@pytest.mark.parametrize("function", ["cuLaunchKernel", "cuMemcpyDtoHAsync", "cuEventSynchronize", "cuGraphLaunch"])
def test_calls_after_one_that_failed(function: str, model: Model, cpu: Model, driver: DriverDouble) -> None:
    for i in range(2 if function == "cuGraphLaunch" else 0):
        model(picture(i), boxes_of(i, 2))
    driver.failing[function] = Result.CUDA_ERROR_INVALID_VALUE
    for _ in range(LANES + 1):
        with pytest.raises(BackendError, match=f"{function} says CUDA_ERROR_INVALID_VALUE"):
            model(picture(0), boxes_of(0, 2))
        future = model.submit(picture(0), boxes_of(0, 2))
        assert function in str(future.exception(60))
        with (
            pytest.raises(BackendError, match=r"says CUDA_ERROR_INVALID_VALUE")
            if function != "cuGraphLaunch"
            else (warnings.catch_warnings())
        ):
            model(picture(0), boxes_of(0, 2), timer=StageTimer())
    driver.failing.clear()
    check(model, cpu, picture(3), boxes_of(3, 2))


class LateError(Exception):
    """A deadline's, by SIGALRM."""


def test_calls_after_one_that_a_signal_s_error_ended_anywhere(model: Model, cpu: Model, driver: DriverDouble) -> None:
    image, boxes, before = picture(0), boxes_of(0, 2), sys.gettrace()
    for _ in range(3):
        model(image, boxes)  # its graph is there
    left = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.endswith("pipeline_cuda.py"):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise LateError
        return trace

    for line in range(1000):
        left = line
        sys.settrace(trace)
        try:
            model(image, boxes)
            break
        except LateError:
            pass
        finally:
            sys.settrace(before)
        assert not model._gpu._taken, line
    assert line > 30
    check(model, cpu, picture(1), boxes_of(1, 2))


def test_an_answer_that_nobody_takes_leaves_its_lane(model: Model, cpu: Model, driver: DriverDouble) -> None:
    matrices = matrices_from_boxes(boxes_of(0, 2), model.spec.size, model.spec.margin)
    for _ in range(LANES + 1):
        model._gpu.start(as_frame(picture(0)), matrices)
        assert not model._gpu._taken
        assert driver.asked[-1][0] == "cuStreamSynchronize"  # the frame may go
    check(model, cpu, picture(1), boxes_of(1, 2))


def test_a_gpu_that_dies_within_a_with_block_is_told_by_the_call(driver: DriverDouble) -> None:
    model, dead = Model(DeviceDouble()), Result.CUDA_ERROR_ILLEGAL_ADDRESS
    model(picture(0), boxes_of(0, 1))
    driver.failing = dict.fromkeys(("cuEventSynchronize", "cuStreamSynchronize"), dead)
    with pytest.raises(BackendError, match=r"cuEventSynchronize says CUDA_ERROR_.*start it again"), model:
        model(picture(0), boxes_of(0, 1))
    driver.failing = {}
    with pytest.raises(BackendError, match="this model is closed"):
        model(picture(0), boxes_of(0, 1))


def test_engines_that_fail(driver: DriverDouble, cpu: Model) -> None:
    backend = DeviceDouble(fails=True)
    with Model(backend) as model:
        for _ in range(LANES + 1):
            with pytest.raises(BackendError, match="the engine failed"):
                model(picture(0), boxes_of(0, 2))
        backend.fails = False
        check(model, cpu, picture(0), boxes_of(0, 2))


def test_points_that_are_no_numbers_are_no_answer(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a plain call, by one of a CUDA graph, in stages and in the background."""
    image, boxes = picture(0), boxes_of(0, 2)
    for _ in range(2):
        model(image, boxes)
    assert model.graphs.captured
    monkeypatch.setattr(device_double, "tiny_outputs", lambda crops: [a * np.nan for a in tiny_outputs(crops)])
    for call in (
        lambda: model(image, boxes),
        lambda: model(image, boxes[:1]),
        lambda: model(image, boxes, timer=StageTimer()),
        lambda: model.submit(image, boxes).result(60),
    ):
        with pytest.raises(BackendError, match="none on double answers points that are not finite"):
            call()


def test_kp_tune_tries_a_plan(
    driver: DriverDouble, astronaut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside ONNX Runtime on the CPU, in the same turns; what nobody measured of it is not chosen."""
    bundle = tiny_bundle(tmp_path / "planned")
    (bundle / "model.plan").write_bytes(b"a plan")
    manifest = Manifest.read(bundle)
    plan = {"model.plan": file_entry(bundle / "model.plan", "plan", precision="fp16")}
    dataclasses.replace(manifest, files=manifest.files | plan).write(bundle)

    def opened(path: Path, engine: str = "auto", **more: Any) -> Backend:
        if engine != "tensorrt":
            return open_backend(path, engine, **more)
        double = DeviceDouble()
        double.name, double.report = engine, BackendReport(engine, path.name, "fp16", (), None)
        return double

    monkeypatch.setattr(tune, "open_backend", opened)
    monkeypatch.setattr(tune, "has_driver", lambda: True)
    monkeypatch.setattr(tune, "SCREENING_S", 0)
    found: dict[bool, dict[str, Any]] = {}
    for unknown in (False, True):
        settings = TuneSettings(
            backends=("tensorrt", "ort-cpu"), threads=(1,), allow_unknown=unknown, seconds=0, samples=2, faces=2
        )
        result = tune.run_tune([bundle], astronaut, lambda image: np.array([[181.0, 88, 269, 178]]), settings)
        found[unknown] = {trial.backend: trial for trial in result.trials}
    trial = found[False]["tensorrt"]
    assert (trial.file, trial.threads, trial.feeding, trial.rise.points) == ("model.plan", None, None, None)
    assert (trial.verdict, trial.times) == ("rise not known", None)
    assert found[True]["tensorrt"].times.summary.samples >= 2
    candidate = tune._Candidate(bundle, plan["model.plan"], Model(opened(bundle / "model.plan", "tensorrt")), None)
    tuned = tune._tuned(candidate, 2)
    assert (tuned.backend, tuned.threads, tuned.machine["GPU"]) == ("tensorrt", None, candidate.backend.driver.arch)
