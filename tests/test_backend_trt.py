"""TensorRT plans on doubles of TensorRT 10.3 and 11.4 and of the CUDA driver; no GPU is needed."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kp_runtime.backend_by_name import open_backend
from kp_runtime.backend_trt import MODULES, TensorRtBackend, tensorrt_module
from kp_runtime.cuda_graphs import GraphWarning
from kp_runtime.device_backend import DeviceBackend
from kp_runtime.errors import BackendError, IntegrityError, MissingExtraError
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.pipeline import load
from tests.cuda_driver_double import DriverDouble, Result
from tests.emulation import EmulatedKernel
from tests.models import SIZE, some_crops, tiny_bundle, tiny_keypoints, tiny_scores
from tests.real_tensorrt import WHEELS
from tests.tensorrt_double import PLAN, TENSORS, tensorrt_double
from tests.tolerances import FP32_PX, MAP_PX, assert_close

NAME = "model.fp16.sm87.trt10.3.0.plan"
MADE: dict[str, Any] = {
    "gpu": "Orin",
    "compute_capability": "8.7",
    "tensorrt": "10.3.0",
    "cuda": "12.6",
    "rebuild": "kp plan BUNDLE --precision fp16 --opt-batch 4",
    "options": {"version_compatible": False, "hardware_compatible": False, "dla_core": None},
}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> DriverDouble:
    double = DriverDouble(None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", double)
    monkeypatch.setattr("kp_runtime.backend_by_name.has_driver", lambda: True)
    return double


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, driver: DriverDouble) -> Any:
    """Installs a double of TensorRT under a name, and of its other packages none."""

    def put(version: str = "10.3.0", name: str = "tensorrt", **answers: Any) -> Any:
        double = tensorrt_double(version, device=driver, **answers)
        double.__name__ = name
        for module in MODULES:
            monkeypatch.setitem(sys.modules, module, double if module == name else None)
        return double

    return put


def with_plan(folder: Path, content: bytes = PLAN, name: str = NAME, **made: Any) -> Path:
    """A bundle with a plan; `made` replaces what its entry says of how it was made, or what its options were."""
    bundle = folder if (folder / "manifest.json").exists() else tiny_bundle(folder)
    (bundle / name).write_bytes(content)
    manifest = Manifest.read(bundle)
    options = MADE["options"] | {key: value for key, value in made.items() if key in MADE["options"]}
    how = MADE | {key: value for key, value in made.items() if key not in options} | {"options": options}
    manifest.files[name] = file_entry(bundle / name, "plan", precision="fp16", made=how)
    manifest.write(bundle)
    return bundle


def opened(bundle: Path, **more: Any) -> DeviceBackend:
    backend = open_backend(bundle, "tensorrt", **more)
    assert isinstance(backend, DeviceBackend)
    return backend


def streams(driver: DriverDouble, function: str = "cuStreamCreate") -> int:
    """How many streams were made, or ended."""
    return sum(asked[0] == function for asked in driver.asked)


@pytest.mark.parametrize("version", WHEELS)
def test_keypoints_of_every_number_of_crops(version: str, install: Any, tmp_path: Path, rng: Any) -> None:
    trt = install(version, profile=(2, 8, 10))
    backend = opened(with_plan(tmp_path, tensorrt=version))
    trt.tape.batches.clear()
    for n in (3, 1, 23, 10, 2, 0, 11):
        crops = some_crops(rng, n)
        answer = backend.answer(crops)
        assert_close(answer.keypoints, tiny_keypoints(crops), FP32_PX, f"{n} crops")
        assert_close(answer.lost_score, tiny_scores(crops), 1e-6, f"scores of {n} crops")
    assert trt.tape.batches == [3, 2, 10, 10, 3, 10, 2, 10, 2]  # parts of at most 10; one crop runs as two
    assert backend.report.backend == "tensorrt"
    assert (backend.report.file, backend.report.precision, backend.report.rejected) == (
        NAME,
        "fp16",
        ("int8: not in the bundle",),
    )
    assert backend.report.golden_error_px is not None


def test_lanes_keep_their_own_memory_and_streams(install: Any, driver: DriverDouble, tmp_path: Path, rng: Any) -> None:
    install()
    backend = opened(with_plan(tmp_path))
    first, second = backend.open_lane(5), backend.open_lane(70)
    assert len({first.stream, second.stream, first.input_ptr, second.input_ptr}) == 4
    assert first.capturable
    a, b = some_crops(rng, 5), some_crops(rng, 70)
    ctypes.memmove(first.input_ptr, a.ctypes.data, a.nbytes)
    ctypes.memmove(second.input_ptr, b.ctypes.data, b.nbytes)
    first.enqueue(5)
    second.enqueue(70)
    driver.cuStreamSynchronize(second.stream)
    driver.cuStreamSynchronize(first.stream)
    for lane, crops in ((first, a), (second, b)):
        found = np.frombuffer(ctypes.string_at(lane.output_ptrs[0], len(crops) * 544), np.float32).reshape(-1, 68, 2)
        assert_close(found, tiny_keypoints(crops), FP32_PX, "keypoints")
    for bad in (0, 6):
        with pytest.raises(BackendError, match=f"this lane takes 1 to 5 faces, got {bad}; open a larger one"):
            first.enqueue(bad)
    with pytest.raises(BackendError, match="a lane needs room for 1 face or more, got 0"):
        backend.open_lane(0)


def test_memory_goes_back(install: Any, driver: DriverDouble, tmp_path: Path, rng: Any) -> None:
    install()
    backend = opened(with_plan(tmp_path))
    with backend.open_lane(40) as lane:
        lane.enqueue(40)
    lane.close()  # a second time is fine
    backend.infer(some_crops(rng, 3))
    backend.infer(some_crops(rng, 50))
    assert len(driver.memory) == 6  # the thread's one lane: input, two outputs, and a part of each
    del backend
    gc.collect()
    assert driver.memory == {}
    assert streams(driver) == streams(driver, "cuStreamDestroy")


def test_each_thread_has_its_own_lane(install: Any, driver: DriverDouble, tmp_path: Path, rng: Any) -> None:
    install()
    backend = opened(with_plan(tmp_path))
    crops, found = some_crops(rng, 2), []
    backend.infer(crops)
    before = streams(driver)
    thread = threading.Thread(target=lambda: found.append(backend.infer(crops)))
    thread.start()
    thread.join()
    assert_close(found[0], tiny_keypoints(crops), FP32_PX, "keypoints")
    assert streams(driver) == before + 1


def test_no_memory_for_more_faces_leaves_the_rest_usable(
    install: Any, driver: DriverDouble, tmp_path: Path, rng: Any
) -> None:
    trt = install()
    backend = opened(with_plan(tmp_path))
    crops = some_crops(rng, 40)
    memory = dict(driver.memory)
    driver.failing["cuMemAlloc"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(BackendError, match=r"no room for 64 faces on the GPU: .*OUT_OF_MEMORY.*; use fewer at once"):
        backend.infer(crops)
    assert driver.memory == memory
    assert_close(backend.infer(crops[:1]), tiny_keypoints(crops[:1]), FP32_PX, "after it")
    driver.failing.clear()
    trt.script.contexts = 0
    with pytest.raises(BackendError, match=r"no memory for another execution context: it gave no reason; close other"):
        backend.infer(crops)
    assert driver.memory == memory
    assert_close(backend.infer(crops[:1]), tiny_keypoints(crops[:1]), FP32_PX, "after it")


@pytest.mark.parametrize(
    ("made", "here", "reason"),
    [
        ({"compute_capability": "9.0", "gpu": "H200"}, {}, r"is for H200 \(sm_90\), this GPU is sm_87"),
        ({"compute_capability": "7.5", "gpu": "T4", "hardware_compatible": True}, {}, r"is for T4 \(sm_75\)"),
        ({"tensorrt": "10.7.0"}, {}, r"is for TensorRT 10\.7\.0, here is 10\.3\.0"),
        ({"tensorrt": "10.7.0", "version_compatible": True}, {}, r"is for TensorRT 10\.7\.0, here is 10\.3\.0"),
        ({}, {"version": "11.4.0"}, r"is for TensorRT 10\.3\.0, here is 11\.4\.0"),
        ({}, {"name": "tensorrt_lean"}, r"needs the package tensorrt, here is tensorrt_lean"),
        ({"tensorrt": "10.2.0.post1"}, {}, r"is for TensorRT 10\.2\.0\.post1, here is 10\.3\.0"),
        ({"tensorrt": "10.3.0\nrm -r"}, {}, r"has an entry that does not say for which GPU and TensorRT it is"),
        ({"dla_core": "x"}, {}, r"has an entry that does not say for which GPU and TensorRT it is"),
        ({"gpu": "a\nb", "compute_capability": "9.0"}, {}, r"is for a b \(sm_90\)"),
        ({"processor": "riscv64\n"}, {}, rf"is for a riscv64 machine, this one is {platform.machine()}"),
        ({"tensorrt": None}, {}, r"has an entry that does not say for which GPU and TensorRT it is"),
    ],
)
def test_plan_for_another_machine_is_never_loaded(
    made: Any, here: Any, reason: str, install: Any, tmp_path: Path
) -> None:
    trt = install(**here, loads=False)
    bundle = with_plan(tmp_path / "a b", **made)
    with pytest.raises(BackendError, match=reason) as caught:
        opened(bundle)
    assert str(caught.value).endswith(f"build one here: kp plan '{bundle}' --precision fp16 --opt-batch 4")
    assert "\n" not in str(caught.value)
    assert trt.tape.asked_runtime == 0


def test_a_foreign_command_is_not_shown(install: Any, tmp_path: Path) -> None:
    install("11.4.0")
    with pytest.raises(BackendError, match=rf"; build one here: kp plan {tmp_path} --precision fp16$"):
        opened(with_plan(tmp_path, rebuild="kp plan BUNDLE; rm -r ~"))


@pytest.mark.parametrize(
    ("made", "here"),
    [
        ({"compute_capability": "8.0", "hardware_compatible": True}, {}),
        ({"version_compatible": True}, {"version": "11.4.0"}),
        ({"version_compatible": True}, {"name": "tensorrt_lean", "version": "11.4.0"}),
        ({"version_compatible": True}, {"name": "tensorrt_dispatch"}),
        ({"tensorrt": "10.3.0.26"}, {}),
        ({"tensorrt": "10.3.0.26.post1"}, {}),
        ({"cuda": "13.2"}, {}),  # of the driver where it was built: here one of 12.6 runs the same TensorRT
        ({"processor": platform.machine()}, {}),
    ],
)
def test_plan_that_fits_in_another_way(made: Any, here: Any, install: Any, tmp_path: Path) -> None:
    trt = install(**here)
    assert opened(with_plan(tmp_path, **made)).report.file == NAME
    assert trt.tape.host_code == bool(made.get("version_compatible"))


def test_tensorrt_that_was_packed_a_second_time(install: Any, tmp_path: Path) -> None:
    install().__version__ = "10.3.0.post1"
    assert opened(with_plan(tmp_path)).report.file == NAME


def test_the_plan_that_fits_is_taken(install: Any, tmp_path: Path) -> None:
    install()
    bundle = with_plan(with_plan(tmp_path), name="model.fp16.sm90.plan", compute_capability="9.0", gpu="H200")
    report = opened(bundle).report
    assert (report.file, report.rejected) == (NAME, ("int8: not in the bundle",))
    assert opened(bundle / NAME).report.file == NAME
    with pytest.raises(BackendError, match=r"model\.fp16\.sm90\.plan is for H200"):
        opened(bundle / "model.fp16.sm90.plan")


def test_a_plan_of_another_model_of_the_gpu_is_told_of(install: Any, tmp_path: Path) -> None:
    install(warning="Using an engine plan file across different\nmodels of devices is not recommended")
    bundle, said = with_plan(tmp_path, multiprocessors=8), "TensorRT: Using an engine plan file across different models"
    told = f"{NAME} was built on a GPU with 8 multiprocessors, this one has 16; build one here: kp plan {bundle}"
    ours, theirs = opened(bundle).report.warnings
    assert (ours, theirs) == (f"{told} --precision fp16 --opt-batch 4", f"{said} of devices is not recommended")
    assert len(opened(with_plan(tmp_path, multiprocessors=8, hardware_compatible=True)).report.warnings) == 1
    install()
    for made in ({"multiprocessors": 16}, {"multiprocessors": None}, {}):
        assert opened(with_plan(tmp_path, **made)).report.warnings == ()


def test_a_dla_core_is_asked_for(install: Any, tmp_path: Path) -> None:
    trt = install(profile=(8, 8, 8))
    opened(with_plan(tmp_path, dla_core=1))
    assert trt.tape.dla_core == 1


@pytest.mark.parametrize("backend", ["tensorrt", "auto"])
@pytest.mark.parametrize(("content", "reason"), [(PLAN[:5], "it is cut off"), (PLAN[::-1], "sha256")])
def test_damaged_plan(backend: str, content: bytes, reason: str, install: Any, tmp_path: Path) -> None:
    trt = install(loads=False)
    bundle = with_plan(tmp_path)
    (bundle / NAME).write_bytes(content)
    with pytest.raises(IntegrityError, match=rf"{NAME} has .*{reason}"):
        open_backend(bundle, backend)
    assert trt.tape.asked_runtime == 0


def test_plan_that_tensorrt_refuses(install: Any, tmp_path: Path) -> None:
    install(loads=False)
    with pytest.raises(BackendError, match=r"TensorRT 10\.3\.0 can't load the plan: .*; build one here: kp plan"):
        opened(with_plan(tmp_path))


def test_a_plan_that_tensorrt_refuses_does_not_stand_before_one_that_it_takes(install: Any, tmp_path: Path) -> None:
    install(refuses=b"ftrt of another platform")
    with_plan(tmp_path, name="model.fp16.sm90.plan", compute_capability="9.0", gpu="H200")
    bundle = with_plan(tmp_path, b"ftrt of another platform", "model.fp16.second.plan")
    with pytest.raises(
        BackendError, match=r"sm90\.plan is for H200 .*; model\.fp16\.second\.plan is refused:"
    ) as raised:
        opened(bundle)
    assert str(raised.value).count("build one here") == 1
    report = opened(with_plan(bundle)).report
    assert report.file == NAME
    for told in ("sm90.plan is for H200", "model.fp16.second.plan is refused: TensorRT 10.3.0 can't load the plan"):
        assert sum(told in reason for reason in report.rejected) == 1


def test_a_folder_of_that_name_is_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))  # what Python makes of such a folder
    with pytest.raises(BackendError, match=r"not installed here \(tensorrt is a folder without code"):
        tensorrt_module()


def test_plan_of_another_contract(install: Any, tmp_path: Path) -> None:
    install(tensors=TENSORS | {"crops": ("INPUT", "FLOAT", (-1, 1, SIZE, SIZE))})
    with pytest.raises(BackendError, match=r"the plan does not have the contract's input and output: .*FLOAT.*UINT8"):
        opened(with_plan(tmp_path))
    install(tensors={name: tensor for name, tensor in TENSORS.items() if name != "lost_score"})
    with pytest.raises(BackendError, match=r"the plan does not have the contract's input and output: .*lost_score"):
        opened(with_plan(tmp_path))
    answer = opened(with_plan(tiny_bundle(tmp_path / "older", lost_limit=None))).answer(
        np.zeros((1, 1, SIZE, SIZE), np.uint8)
    )
    assert answer.lost_score is None


def test_cuda_that_tensorrt_can_not_use(install: Any, tmp_path: Path) -> None:
    trt = install(cuda_error="CUDA initialization failure\nwith error: 35")
    with pytest.raises(
        BackendError,
        match=r"can't use CUDA here: CUDA initialization failure with error: 35; the driver runs up to CUDA 12\.6: "
        "update it, or install the TensorRT that is made for it",
    ):
        opened(with_plan(tmp_path))
    gc.collect()
    assert trt.tape.ended == 0


def test_a_runtime_that_is_not_made_leaves_the_cpu(install: Any, tmp_path: Path) -> None:
    """As by the full package; without a word, too."""
    install(cuda_error="CUDA initialization failure with error: 35", makes_runtime=False)
    bundle = with_plan(tmp_path)
    with pytest.raises(BackendError, match="can't use CUDA here: CUDA initialization failure with error: 35; the dri"):
        opened(bundle)
    report = open_backend(bundle).report
    assert report.backend == "ort-cpu"
    assert "error: 35" in report.rejected[0]
    install(makes_runtime=False)
    with pytest.raises(BackendError, match=r"can't use CUDA here: pybind11::init\(\): factory .* nullptr; the driver"):
        opened(bundle)


def test_driver_that_is_too_old_for_cuda_python(
    install: Any, driver: DriverDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError('Function "cuStreamCreate" not found')

    install()
    monkeypatch.setattr(driver, "cuStreamCreate", missing, raising=False)
    with pytest.raises(BackendError, match=r"has no cuStreamCreate \(.*not found\): it is older .*; update the driver"):
        opened(with_plan(tmp_path))


def test_engine_that_fails_while_it_runs(install: Any, tmp_path: Path, rng: Any) -> None:
    trt = install()
    backend = opened(with_plan(tmp_path))
    trt.script.executes = False
    with pytest.raises(BackendError, match="TensorRT failed on 3 crops: it gave no reason; see that nvidia-smi"):
        backend.infer(some_crops(rng, 3))


def test_what_is_queued_is_waited_for_where_a_call_fails(
    install: Any, driver: DriverDouble, tmp_path: Path, rng: Any
) -> None:
    """It reads and writes arrays that would be freed meanwhile."""
    install()
    backend, crops = opened(with_plan(tmp_path)), some_crops(rng, 2)
    backend.answer(crops)
    driver.failing["cuMemcpyDtoHAsync"] = Result.CUDA_ERROR_ILLEGAL_ADDRESS
    before = len(driver.asked)
    with pytest.raises(BackendError, match="cuMemcpyDtoHAsync"):
        backend.answer(crops)
    assert [call[0] for call in driver.asked[before:]][-1] == "cuStreamSynchronize"


def test_no_tensorrt(install: Any, tmp_path: Path) -> None:
    install(name="none")
    with pytest.raises(
        BackendError, match=r"TensorRT is not installed here \(.*\): JetPack .*pip install tensorrt-cu12 or"
    ):
        tensorrt_module()
    with pytest.raises(BackendError, match="TensorRT is not installed here"):
        opened(with_plan(tmp_path))


def test_no_cuda_python(install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kp-edge\[cuda12\]'"):
        opened(with_plan(tmp_path))


def test_wrong_keypoints_are_refused(install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setattr("tests.tensorrt_double.tiny_outputs", lambda crops: (tiny_keypoints(crops) + 0.6,))
    with pytest.raises(BackendError, match=r"tensorrt puts a golden keypoint 0\.8\d\d px from PyTorch's"):
        opened(with_plan(tmp_path))
    backend = opened(tmp_path, golden=False)
    assert isinstance(backend, TensorRtBackend)
    assert backend.report.golden_error_px is None


@pytest.fixture
def cutting(driver: DriverDouble, kernel: EmulatedKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops are cut by the emulated kernel."""
    driver.kernel = kernel
    (tmp_path / "kernel").write_bytes(b"cubin")
    monkeypatch.setenv("KP_CUBIN", str(tmp_path / "kernel"))


@pytest.mark.usefixtures("cutting")
def test_a_capture_wants_a_run_before_it(install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kp_runtime.backend_trt._TensorRtLane.runs_before_capture", 0)
    install()
    image, boxes = np.zeros((240, 320, 3), np.uint8), [[20, 20, 80, 80]]
    with load(with_plan(tmp_path / "bundle"), "tensorrt") as model:
        model(image, boxes)
        with pytest.warns(GraphWarning, match="TensorRT failed on 1 crops"):
            model(image, boxes)


@pytest.mark.usefixtures("cutting")
def test_the_whole_way_from_a_frame(install: Any, driver: DriverDouble, tmp_path: Path, rng: Any) -> None:
    """`load` with a plan: crops by the emulated kernel, parts, graphs on contexts of their own, submit()."""
    install(profile=(2, 4, 10))
    bundle = with_plan(tmp_path / "bundle")
    image = rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)
    corner = rng.uniform(0, 150, (23, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(30, 80, (23, 2))], axis=1)
    cpu = load(bundle, "ort-cpu", precision="fp32")
    with load(bundle, "tensorrt") as model:
        for n in (1, 3, 23, 3, 1, 23, 3, 1, 23, 0):
            wanted = cpu(image, boxes[:n]).xy
            assert_close(model(image, boxes[:n]).xy, wanted, MAP_PX, f"{n} faces")
            assert_close(model.submit(image, boxes[:n]).result(60).xy, wanted, MAP_PX, f"{n} faces, submitted")
        assert model.graphs.off is None
        assert set(model.graphs.captured) == {(3, 1), (3, 3)}  # 23 are fed in parts
    assert not driver.graphs
