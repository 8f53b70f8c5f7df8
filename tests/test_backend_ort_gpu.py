"""ONNX Runtime's GPU providers without a GPU: its CPU provider in their place, on the double of the driver."""

from __future__ import annotations

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from kp_runtime import BackendError, GraphWarning, MissingExtraError, Model, load, preprocess_cuda
from kp_runtime.backend_by_name import open_backend
from kp_runtime.backend_ort_gpu import OrtCudaBackend, OrtGpuBackend, OrtTensorRtBackend
from kp_runtime.device_backend import DeviceBackend
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.pipeline_cuda import LANES
from tests.cuda_driver_double import DriverDouble, Result
from tests.emulation import EmulatedKernel
from tests.models import SIZE, some_crops, tiny_bundle, tiny_graph, tiny_keypoints, tiny_outputs, tiny_scores
from tests.ort_gpu_double import REAL, Session
from tests.test_pipeline_cuda import boxes_of, picture
from tests.tolerances import FP32_PX, assert_close

NAMES = {"ort-cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}
TRAITS = {
    "waits": "ONNX Runtime failed on 2 crops: CUDA failure 900: operation not permitted when stream is capturing",
    "frees": "the work calls code of the host, which a graph would call again at each launch",
    "runs elsewhere": "a graph puts a keypoint .* px from where the same calls put it without one",
    "keeps its crops": "a graph puts a keypoint .* px from where the same calls put it without one",
}


@pytest.fixture
def cutting(driver: DriverDouble, kernel: EmulatedKernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Crops are cut by the emulated kernel."""
    (tmp_path / "kernel").write_bytes(b"cubin")
    monkeypatch.setenv("KP_CUBIN", str(tmp_path / "kernel"))
    driver.kernel = kernel


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DriverDouble:
    """A machine with a driver and an onnxruntime that has both providers."""
    double = DriverDouble(None)
    monkeypatch.setenv("KP_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(Session, "open", 0)
    monkeypatch.setattr(Session, "room", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", double)
    monkeypatch.setattr("kp_runtime.backend_by_name.has_driver", lambda: True)
    monkeypatch.setattr(Session, "driver", double, raising=False)
    monkeypatch.setattr(OrtGpuBackend, "device_type", "cpu")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr("kp_runtime.backend_ort.open_session", lambda model, read, threads: REAL(read()))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*NAMES.values(), "CPUExecutionProvider"])
    return double


@pytest.fixture
def half_bundle(tmp_path: Path) -> Path:
    """A bundle that both providers run."""
    return tiny_bundle(tmp_path / "half", precision="fp16")


def opened(bundle: Path, backend: str = "ort-cuda", **more: Any) -> DeviceBackend:
    found = open_backend(bundle, backend, **more)
    assert isinstance(found, DeviceBackend)
    return found


@pytest.mark.parametrize("backend", NAMES)
def test_keypoints_of_every_number_of_crops(backend: str, driver: DriverDouble, half_bundle: Path, rng: Any) -> None:
    engine = opened(half_bundle, backend)
    for n in (3, 1, 70, 0, 32, 3):
        crops = some_crops(rng, n)
        answer = engine.answer(crops)
        assert_close(answer.keypoints, tiny_keypoints(crops), FP32_PX, f"{n} crops")
        assert_close(answer.lost_score, tiny_scores(crops), 1e-6, f"scores of {n} crops")
    assert (engine.report.backend, Session.said.provider) == (backend, NAMES[backend])
    assert engine.report.golden_error_px is not None


def test_each_lane_has_a_session_and_a_stream_of_its_own(driver: DriverDouble, bundle: Path) -> None:
    engine = opened(bundle)
    one, two = engine.open_lane(2), engine.open_lane(3)
    assert Session.open == 3  # the golden crop's thread has one
    assert one.stream != two.stream == int(Session.said.options["user_compute_stream"])
    one.close()
    two.enqueue(3)
    two.close()
    assert Session.open == 2  # the last one that a lane has left
    with engine.open_lane(1) as three:
        assert (three.stream, Session.open) == (two.stream, 2)
        three.enqueue(1)
    engine.release()
    assert Session.open == 1
    del one, two, three, engine
    assert (driver.memory, Session.open) == ({}, 0)
    asked = [name for name, *_ in driver.asked]
    assert asked.count("cuStreamCreate") == asked.count("cuStreamDestroy") == 3


def test_a_forgotten_lane_s_session_comes_back_while_another_one_is_ended(
    driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the collector runs there."""
    engine = opened(bundle)
    sessions, make_current = engine._sessions, engine.driver.make_current
    three = [sessions.take() for _ in range(3)]

    def collected() -> None:
        if three:
            sessions.give(three.pop())
        make_current()

    with monkeypatch.context() as patched:
        patched.setattr(engine.driver, "make_current", collected)
        giving = threading.Thread(target=lambda: [sessions.give(three.pop()) for _ in range(2)], daemon=True)
        giving.start()
        giving.join(30)
    assert not giving.is_alive()
    assert Session.open == 2  # the golden crop's thread has the other one


def test_no_memory_for_another_session(driver: DriverDouble, bundle: Path, rng: Any) -> None:
    engine, crops = opened(bundle), some_crops(rng, 1)
    Session.room = 0
    with pytest.raises(BackendError, match=r"Failed to allocate memory; see .* that the GPU has free memory"):
        engine.open_lane(1)
    assert_close(engine.infer(crops), tiny_keypoints(crops), FP32_PX, "after it")


def test_a_session_that_failed_is_not_used_again(
    driver: DriverDouble, bundle: Path, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, crops = opened(bundle), some_crops(rng, 1)
    with monkeypatch.context() as patched, engine.open_lane(1) as lane:
        patched.setattr(Session, "fails", "bad")
        with pytest.raises(BackendError, match="failed on 1 crops: bad"):
            lane.enqueue(1)
    assert Session.open == 1
    assert_close(engine.infer(crops), tiny_keypoints(crops), FP32_PX, "after it")


# CUDA graphs of the whole way


def check(model: Model, cpu: Model, seed: int, n: int) -> None:
    image, boxes = picture(seed), boxes_of(seed, n)
    assert np.abs(model(image, boxes).xy - cpu(image, boxes).xy).max() <= 1e-3


@pytest.mark.usefixtures("cutting")
@pytest.mark.parametrize("backend", NAMES)
def test_graphs_go_the_whole_way(backend: str, driver: DriverDouble, half_bundle: Path) -> None:
    cpu = load(half_bundle, "ort-cpu")
    with load(half_bundle, backend) as model:
        for i, n in enumerate((1, 2, 2, 1, 2, 1)):
            check(model, cpu, i, n)
        assert (model.graphs.captured, model.graphs.off) == (((3, 1), (3, 2)), None)
        assert Session.open == 3  # the lane's, and one for each graph
        before = len(driver.asked)
        check(model, cpu, 9, 2)
        asked = [name for name, *_ in driver.asked[before:]]
        assert asked.count("cuGraphLaunch") == 1
        assert "cuLaunchKernel" not in asked
        model.warmup(2)
        assert model.graphs.captured == ((3, 1),) * LANES + ((3, 2),) * LANES
        streams = {call[2] for call in driver.asked if call[0] == "cuGraphLaunch"}
        assert len(streams) == LANES
    assert (driver.memory, driver.graphs) == ({}, {})


@pytest.mark.usefixtures("cutting")
@pytest.mark.parametrize("trait", TRAITS)
def test_graphs_that_are_dropped(
    trait: str, driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "captured", trait)
    cpu = load(bundle, "ort-cpu")
    with load(bundle, "ort-cuda") as model:
        check(model, cpu, 0, 2)
        with pytest.warns(GraphWarning, match=f"CUDA graphs are off, and calls take longer: {TRAITS[trait]}"):
            check(model, cpu, 1, 2)
        assert model.graphs.captured == ()
        assert model.graphs.off is not None
        for i in range(3):
            check(model, cpu, i, 2)
    assert (driver.memory, driver.graphs, driver.captures) == ({}, {}, {})


@pytest.mark.usefixtures("cutting")
def test_a_capture_wants_two_runs_before_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kp_runtime.backend_ort_gpu._OrtLane.runs_before_capture", 1)
    with load(bundle, "ort-cuda") as model:
        model(picture(0), boxes_of(0, 2))
        with pytest.warns(GraphWarning, match="CUDA failure 900"):
            model(picture(0), boxes_of(0, 2))


@pytest.mark.usefixtures("cutting")
def test_no_memory_for_a_graph_s_session(bundle: Path) -> None:
    cpu = load(bundle, "ort-cpu")
    with load(bundle, "ort-cuda") as model:
        check(model, cpu, 0, 2)
        Session.room = 0
        with pytest.warns(GraphWarning, match="calls of 2 faces have no CUDA graph.* Failed to allocate memory"):
            check(model, cpu, 1, 2)
        check(model, cpu, 2, 2)
        assert model.graphs.off is None


@pytest.mark.usefixtures("cutting")
def test_threads_share_a_model(driver: DriverDouble, bundle: Path) -> None:
    wanted = [load(bundle, "ort-cpu")(picture(i), boxes_of(i, i % 3)).xy for i in range(12)]
    with load(bundle, "ort-cuda") as model, ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            calls = [pool.submit(model, picture(i), boxes_of(i, i % 3)) for i in range(12)]
            calls += [model.submit(picture(i), boxes_of(i, i % 3)) for i in range(12)]
            for i, call in enumerate(calls):
                assert np.abs(call.result(60).xy - wanted[i % 12]).max(initial=0) <= 1e-3
        assert model.graphs.off is None
        assert Session.open <= LANES * 3  # a lane's own, and one for 1 and for 2 faces
    assert driver.memory == {}


@pytest.mark.usefixtures("cutting")
def test_faces_that_are_fed_in_parts_have_no_graph(half_bundle: Path) -> None:
    cpu = load(half_bundle, "ort-cpu")
    with load(half_bundle, "ort-tensorrt") as model:  # 32 at once
        for i in range(3):
            check(model, cpu, i, 40)
            check(model, cpu, i, 3)
        assert (model.graphs.captured, model.graphs.off) == (((3, 3),), None)


def test_options_of_the_providers(driver: DriverDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KP_CACHE", str(tmp_path / "cache"))
    bundle = tiny_bundle(tmp_path / "b")
    opened(bundle)
    assert {"use_tf32": "0", "enable_cuda_graph": "0", "device_id": "0"}.items() <= Session.said.options.items()
    (bundle / "model.fp16.onnx").write_bytes(tiny_graph().SerializeToString())
    manifest = Manifest.read(bundle)
    entry = manifest.files["model.fp16.onnx"] = file_entry(bundle / "model.fp16.onnx", "onnx", precision="fp16")
    manifest.write(bundle)
    assert opened(bundle, "ort-tensorrt").report.file == "model.fp16.onnx"
    wanted = {
        "trt_engine_cache_path": str(tmp_path / "cache" / "ort-tensorrt" / entry.sha256),
        "trt_profile_max_shapes": f"crops:32x1x{SIZE}x{SIZE}",
    }
    assert wanted.items() <= Session.said.options.items()
    assert not {"trt_fp16_enable", "trt_int8_enable"} & Session.said.options.keys()  # the types are the file's
    assert all(isinstance(value, str) for value in Session.said.options.values())
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KP_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"no engine can be kept in .*file/ort-tensorrt.* set KP_CACHE to a folder"):
        opened(bundle, "ort-tensorrt")


def test_a_library_that_lacks_is_named(
    driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime prints it, and its exception says nothing of it."""
    lacks = "Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file"
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print(f"a word\n{lacks}"), raising=False)
    monkeypatch.setattr(Session, "room", 0)
    told = rf"alone: Failed to allocate memory \({re.escape(lacks)}\); see that .*'onnxruntime-gpu\[cuda,cudnn\]<1\.27'"
    with pytest.raises(BackendError, match=told):
        opened(bundle)
    assert capsys.readouterr().out == ""


def test_a_kept_engine_that_can_not_be_read_is_told(
    driver: DriverDouble, half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off by a kill, or of the TensorRT before an update: each load from then on finds it."""
    entry = Manifest.read(half_bundle).files["model.fp16.onnx"]
    kept = str(tmp_path / "kept" / "ort-tensorrt" / entry.sha256)

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"EP_FAIL : TensorRT EP could not deserialize engine from cache: {kept}/x_sm87.engine")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refused)
    told = (
        rf"from cache: .*\.engine; the engine kept there is cut off or .*; rm -r {re.escape(kept)} has it built anew$"
    )
    with pytest.raises(BackendError, match=told):
        opened(half_bundle, "ort-tensorrt")


def test_a_node_that_runs_elsewhere_is_refused(
    driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "elsewhere", ("Reshape", "Cast"))
    with pytest.raises(
        BackendError,
        match=r"CUDAExecutionProvider would not run the whole network: Cast by CPUExecutionProvider, Reshape by CPU",
    ):
        opened(bundle)


def test_a_provider_that_was_left_out_is_refused(
    driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "left_out", True)
    with pytest.raises(BackendError, match="left CUDAExecutionProvider out and opened CPUExecutionProvider"):
        opened(bundle)


def test_the_real_session_refuses_nodes_on_the_cpu(
    driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A provider of this very package that takes no node: all would fall to the CPU's."""
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr("kp_runtime.backend_by_name.has_driver", lambda: True)
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no second provider")
    monkeypatch.setattr(OrtCudaBackend, "provider", "AzureExecutionProvider")
    monkeypatch.setattr(OrtCudaBackend, "provider_options", lambda *_: {})
    with pytest.raises(
        BackendError, match=r"can't run the file by AzureExecutionProvider alone: .*assigned to the default CPU EP"
    ) as caught:
        opened(bundle)
    assert "\n" not in str(caught.value)
    assert "".join(capfd.readouterr()) == ""


def test_no_memory_leaves_the_rest_usable(driver: DriverDouble, bundle: Path, rng: Any) -> None:
    engine, crops = opened(bundle), some_crops(rng, 9)
    driver.failing["cuMemAlloc"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(BackendError, match=r"no room for 16 faces on the GPU: .*OUT_OF_MEMORY"):
        engine.infer(crops)
    assert_close(engine.infer(crops[:1]), tiny_keypoints(crops[:1]), FP32_PX, "after it")


def test_engine_that_fails_while_it_runs(
    driver: DriverDouble, bundle: Path, rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(bundle)
    monkeypatch.setattr(Session, "fails", "Failed to allocate\nmemory")
    with pytest.raises(
        BackendError, match="ONNX Runtime failed on 2 crops: Failed to allocate memory; try fewer at once"
    ):
        engine.infer(some_crops(rng, 2))


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (("onnxruntime", "onnxruntime-gpu"), "are both installed .*; remove onnxruntime: pip uninstall -y"),
        (("onnxruntime",), r"only CPUExecutionProvider; run: pip uninstall -y onnxruntime && pip install "),
    ],
)
def test_onnxruntime_without_the_provider(
    installed: tuple[str, ...], message: str, driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda name: [name] * (name in installed))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    # an Orin: also in a container that hides what its system's files say
    with pytest.raises(BackendError, match="no wheel on PyPI has code for a Jetson's GPU, and") as caught:
        opened(bundle)
    assert "uninstall" not in str(caught.value)
    monkeypatch.setattr(driver, "_cuDeviceGetAttribute", lambda attribute, _: attribute + 1)  # 9.8
    told = rf"has no CUDAExecutionProvider.*{message}.*'kp-edge\[ort-gpu\]'"
    with pytest.raises(BackendError, match=rf"{told} 'onnxruntime-gpu<1\.27'$"):
        opened(bundle)
    monkeypatch.setattr(driver, "_cuDriverGetVersion", lambda: 13000)
    with pytest.raises(BackendError, match=f"{told}$"):
        opened(bundle)


def test_what_is_not_installed(driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"running ONNX files on a GPU .*pip install 'kp-edge\[ort-gpu\]'"):
        opened(bundle)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kp-edge\[cuda12\]'"):
        opened(bundle)


@pytest.mark.usefixtures("cutting")
def test_auto_takes_the_cuda_provider_where_no_plan_fits(driver: DriverDouble, bundle: Path) -> None:
    report = open_backend(bundle).report
    assert report.backend == "ort-cuda"
    assert [reason.split(";")[0] for reason in report.rejected] == [
        f"tensorrt: the bundle {bundle} holds no TensorRT plan",
        "fp16: not in the bundle",
    ]
    assert open_backend(bundle / "model.fp32.onnx").report.backend == "ort-cuda"
    assert open_backend(bundle, "ort-cpu").report.rejected == ("int8: not in the bundle",)


def nvrtc_that_can_not_be_loaded() -> None:
    raise RuntimeError("libnvrtc.so.13: cannot open shared object file\nnothing else")


@pytest.mark.parametrize(
    ("nvrtc", "reason"),
    [
        (None, r"pip install 'kp-edge\[cuda12\]'"),
        (
            SimpleNamespace(nvrtcVersion=nvrtc_that_can_not_be_loaded),
            "the crop kernel can't be compiled: NVRTC can't be loaded .libnvrtc.so.13: cannot open shared object file.*"
            ", or name a compiled kernel in KP_CUBIN",
        ),
    ],
)
def test_auto_passes_over_a_gpu_that_can_not_cut_crops(
    nvrtc: Any, reason: str, driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch, rng: Any
) -> None:
    monkeypatch.delenv("KP_CUBIN", raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", nvrtc)
    with load(bundle) as model:
        report = model.backend.report
        assert report.backend == "ort-cpu"
        assert re.match(f"ort-cuda: .*{reason}", report.rejected[1])
        assert len(model(picture(0), boxes_of(0, 2))) == 2
    with pytest.raises(BackendError, match=reason):
        load(bundle, "ort-cuda")
    crops = some_crops(rng, 2)  # crops from elsewhere can still be run
    assert_close(opened(bundle).infer(crops), tiny_keypoints(crops), FP32_PX, "keypoints")
    assert "cuLaunchKernel" not in [name for name, *_ in driver.asked]


@pytest.mark.usefixtures("cutting")
def test_auto_passes_over_a_gpu_that_cuts_crops_wrongly(
    driver: DriverDouble, bundle_with_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(bundle_with_image) as model:
        assert model.backend.report.backend == "ort-cuda"
    weights = preprocess_cuda.weights_of_layout
    monkeypatch.setattr(preprocess_cuda, "weights_of_layout", lambda layout: weights("rgb"))
    with load(bundle_with_image) as model:
        assert model.backend.report.backend == "ort-cpu"
        assert "ort-cuda: the golden crop is cut with a grey level 19 off" in model.backend.report.rejected[1]
    with pytest.raises(BackendError, match="golden crop is cut with a grey level 19 off"):
        load(bundle_with_image, "ort-cuda")


def test_auto_falls_back_to_the_cpu_and_says_why(
    driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrtCudaBackend, "_run", lambda self, crops: [a + 1 for a in tiny_outputs(crops)])
    backend = open_backend(bundle)
    assert backend.report.backend == "ort-cpu"
    assert "ort-cuda: ort-cuda puts a golden keypoint 1.414 px from PyTorch's" in backend.report.rejected[1]
    with pytest.raises(BackendError, match=r"puts a golden keypoint 1\.414 px"):
        open_backend(bundle, "ort-cuda")
    assert open_backend(bundle, "ort-cuda", golden=False).report.golden_error_px is None


def test_files_that_an_engine_does_not_run(driver: DriverDouble, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    (bundle / "model.int8.onnx").write_bytes(tiny_graph().SerializeToString())
    manifest = Manifest.read(bundle)
    manifest.files["model.int8.onnx"] = file_entry(bundle / "model.int8.onnx", "onnx", precision="int8")
    manifest.write(bundle)
    told = "ort-cuda runs files of precision fp16, fp32, not int8; take one of these, or another backend"
    with pytest.raises(BackendError, match=told):
        open_backend(bundle, "ort-cuda", "int8")
    with pytest.raises(BackendError, match="has no int8-trt or fp16 file, only fp32, int8; kp export can add it"):
        open_backend(bundle, "ort-tensorrt")  # it would compute float32 in TF32
    with pytest.raises(BackendError, match=r"model\.int8\.onnx is no TensorRT plan, and tensorrt runs nothing else"):
        open_backend(bundle / "model.int8.onnx", "tensorrt")


@pytest.mark.usefixtures("cutting")
def test_the_tensorrt_provider_is_never_an_automatic_choice(driver: DriverDouble, bundle: Path) -> None:
    assert OrtTensorRtBackend.name == "ort-tensorrt"
    assert not any("ort-tensorrt" in reason for reason in open_backend(bundle).report.rejected)
