"""ONNX Runtime's GPU providers without a GPU: its CPU provider in their place, on the double of the driver.

What is real here: the session, its options, its record of what runs where, and the binding of our own
buffers. A call waits in the stream of the double until somebody waits for it, as a GPU's does.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from kp_runtime.backend import open_backend
from kp_runtime.backend_ort_gpu import OrtCudaBackend, OrtGpuBackend, OrtTensorRtBackend
from kp_runtime.device_backend import DeviceBackend
from kp_runtime.errors import BackendError, MissingExtraError
from kp_runtime.spec import Manifest, file_entry
from tests.cuda_driver_double import DriverDouble, Result
from tests.models import SIZE, tiny_bundle, tiny_graph, tiny_keypoints
from tests.tolerances import FP32_PX, assert_close

NAMES = {"ort-cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider"}
REAL = onnxruntime.InferenceSession


class Session:
    """A session on the CPU that says it is on the GPU; `said` is what it was opened with."""

    said: Any = None
    driver: DriverDouble
    elsewhere: tuple[str, ...] = ()
    left_out = False
    fails = ""

    def __init__(self, model: bytes, options: Any, providers: list[Any], enable_fallback: int) -> None:
        wanted = {"session.disable_cpu_ep_fallback": "1", "session.record_ep_graph_assignment_info": "1"}
        assert {key: options.get_session_config_entry(key) for key in wanted} == wanted
        assert enable_fallback == 0
        ((self._provider, chosen),) = providers
        type(self).said = SimpleNamespace(provider=self._provider, options=chosen)
        own = onnxruntime.SessionOptions()
        own.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self._real = REAL(model, own, providers=["CPUExecutionProvider"])
        self._stream = int(chosen["user_compute_stream"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"] if self.left_out else [self._provider, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        def where(node: Any) -> str:
            return "CPUExecutionProvider" if node.op_type in self.elsewhere else self._provider

        real = [SimpleNamespace(op_type="Cast"), SimpleNamespace(op_type="Reshape")]
        if hasattr(REAL, "get_provider_graph_assignment_info"):  # not in the oldest release
            real = [node for part in self._real.get_provider_graph_assignment_info() for node in part.get_nodes()]
        return [SimpleNamespace(ep_name=where(node), get_nodes=lambda node=node: [node]) for node in real]

    def run_with_iobinding(self, binding: Any, run_options: Any) -> None:
        assert run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        if self.fails:
            raise RuntimeError(self.fails)
        self.driver.work(self._stream, lambda: self._real.run_with_iobinding(binding))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> DriverDouble:
    """A machine with a driver and an onnxruntime that has both providers."""
    double = DriverDouble(None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", double)
    monkeypatch.setattr("kp_runtime.backend.has_driver", lambda: True)
    monkeypatch.setattr(Session, "driver", double, raising=False)
    monkeypatch.setattr(OrtGpuBackend, "device_type", "cpu")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr("kp_runtime.backend_ort.open_session", lambda model, read, threads: REAL(read()))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*NAMES.values(), "CPUExecutionProvider"])
    return double


def opened(bundle: Path, backend: str = "ort-cuda", **more: Any) -> DeviceBackend:
    found = open_backend(bundle, backend, **more)
    assert isinstance(found, DeviceBackend)
    return found


def some_crops(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 256, (n, 1, SIZE, SIZE), dtype=np.uint8)


@pytest.mark.parametrize("backend", NAMES)
def test_keypoints_of_every_number_of_crops(backend: str, driver: DriverDouble, bundle: Path, rng: Any) -> None:
    engine = opened(bundle, backend)
    for n in (3, 1, 70, 0, 32, 3):
        crops = some_crops(rng, n)
        assert_close(engine.infer(crops), tiny_keypoints(crops), FP32_PX, f"{n} crops")
    assert (engine.report.backend, Session.said.provider) == (backend, NAMES[backend])
    assert engine.report.golden_error_px is not None
    assert not engine.open_lane(1).capturable


def test_lanes_share_the_session_s_stream(driver: DriverDouble, bundle: Path) -> None:
    engine = opened(bundle)
    one, two = engine.open_lane(2), engine.open_lane(3)
    assert one.stream == two.stream == int(Session.said.options["user_compute_stream"])
    assert one.input_ptr != two.input_ptr
    one.close()
    two.enqueue(3)
    two.close()
    del one, two, engine
    assert driver.memory == {}
    asked = [name for name, *_ in driver.asked]
    assert asked.count("cuStreamCreate") == asked.count("cuStreamDestroy") == 1


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
        "trt_fp16_enable": "1",
        "trt_int8_enable": "0",
        "trt_engine_cache_path": str(tmp_path / "cache" / "ort-tensorrt" / entry.sha256),
        "trt_profile_max_shapes": f"crops:32x1x{SIZE}x{SIZE}",
    }
    assert wanted.items() <= Session.said.options.items()
    assert all(isinstance(value, str) for value in Session.said.options.values())


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
    monkeypatch.setattr("kp_runtime.backend.has_driver", lambda: True)
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
        (("onnxruntime",), r"only CPUExecutionProvider; run: pip uninstall -y onnxruntime && pip install .*ort-gpu"),
    ],
)
def test_onnxruntime_without_the_provider(
    installed: tuple[str, ...], message: str, driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distribution(name: str) -> None:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=rf"has no CUDAExecutionProvider.*{message}"):
        opened(bundle)


def test_what_is_not_installed(driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"running ONNX files on a GPU .*pip install 'kp-edge\[ort-gpu\]'"):
        opened(bundle)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kp-edge\[cuda12\]'"):
        opened(bundle)


def test_auto_takes_the_cuda_provider_where_no_plan_fits(driver: DriverDouble, bundle: Path) -> None:
    report = open_backend(bundle).report
    assert report.backend == "ort-cuda"
    assert [reason.split(";")[0] for reason in report.rejected] == [
        f"tensorrt: the bundle {bundle} holds no TensorRT plan",
        "fp16: not in the bundle",
    ]
    assert open_backend(bundle / "model.fp32.onnx").report.backend == "ort-cuda"
    assert open_backend(bundle, "ort-cpu").report.rejected == ("int8: not in the bundle",)


def test_auto_falls_back_to_the_cpu_and_says_why(
    driver: DriverDouble, bundle: Path, monkeypatch: pytest.MonkeyPatch, rng: Any
) -> None:
    monkeypatch.setattr(OrtCudaBackend, "_run", lambda self, crops: tiny_keypoints(crops) + 1)
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
    with pytest.raises(BackendError, match="ort-cuda runs files of precision fp16, fp32, not int8"):
        open_backend(bundle, "ort-cuda", "int8")
    with pytest.raises(BackendError, match=r"model\.int8\.onnx is no TensorRT plan, and tensorrt runs nothing else"):
        open_backend(bundle / "model.int8.onnx", "tensorrt")


def test_the_tensorrt_provider_is_never_an_automatic_choice(driver: DriverDouble, bundle: Path) -> None:
    assert OrtTensorRtBackend.name == "ort-tensorrt"
    assert not any("ort-tensorrt" in reason for reason in open_backend(bundle).report.rejected)
