from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import re
import shutil
import sys
import threading
import types
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from kp_runtime.backend import BackendReport
from kp_runtime.backend_by_name import open_backend
from kp_runtime.backend_ort import OrtCpuBackend, import_onnxruntime
from kp_runtime.cores import usable_cores
from kp_runtime.errors import (
    BackendError,
    BundleError,
    InputError,
    KpWarning,
    MissingExtraError,
    missing_or_broken,
    reason_of,
)
from kp_runtime.feeding import TRIES
from kp_runtime.golden import GOLDEN_NAME
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.spec import ModelSpec
from tests.conftest import until
from tests.models import SIZE, tiny_bundle, tiny_graph, tiny_keypoints, tiny_scores
from tests.tolerances import FP32_PX, MAP_PX, assert_close

MODEL = "model.fp32.onnx"
NO_DRIVER = "this machine has no NVIDIA driver (libcuda.so.1); where there is a GPU, install it"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the CPU, and what is said where there is no GPU."""
    monkeypatch.setattr("kp_runtime.backend_by_name.has_driver", lambda: False)


@pytest.fixture
def crops(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (5, 1, SIZE, SIZE), dtype=np.uint8)


def add_file(bundle: Path, name: str, content: bytes, kind: str = "onnx", **fields: Any) -> Path:
    """Writes a file into a bundle, with a manifest that agrees with it."""
    (bundle / name).write_bytes(content)
    manifest = Manifest.read(bundle)
    manifest.files[name] = file_entry(bundle / name, kind, **fields)
    manifest.write(bundle)
    return bundle


@pytest.mark.parametrize("n", [1, 2, 5])
def test_keypoints_are_the_graph_s(n: int, bundle: Path, crops: np.ndarray) -> None:
    keypoints = open_backend(bundle, threads=1).infer(crops[:n])
    assert keypoints.dtype == np.float32
    assert keypoints.shape == (n, 68, 2)
    assert_close(keypoints, tiny_keypoints(crops[:n]), FP32_PX, "keypoints")


def test_no_crops_and_strided_crops(bundle: Path, crops: np.ndarray) -> None:
    backend = open_backend(bundle, threads=1)
    assert backend.infer(crops[:0]).shape == (0, 68, 2)
    assert np.array_equal(backend.infer(crops[::2]), backend.infer(crops)[::2])


def test_another_crop_size(tmp_path: Path, rng: np.random.Generator) -> None:
    crops = rng.integers(0, 256, (2, 1, 96, 96), dtype=np.uint8)
    keypoints = open_backend(tiny_bundle(tmp_path, size=96), threads=1).infer(crops)
    assert_close(keypoints, tiny_keypoints(crops), FP32_PX, "keypoints")


def test_several_threads_get_their_own_answers(bundle: Path, crops: np.ndarray) -> None:
    backend = open_backend(bundle, threads=1)
    alone = [backend.infer(crop[None]) for crop in crops]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(backend.infer, [crop[None] for crop in crops] * 8))
    assert all(np.array_equal(a, b) for a, b in zip(alone * 8, together, strict=True))


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((1, 1, SIZE, SIZE), np.float32),
        np.zeros((1, 3, SIZE, SIZE), np.uint8),
        np.zeros((1, 1, SIZE, SIZE + 1), np.uint8),
        np.zeros((1, SIZE, SIZE), np.uint8),
    ],
)
def test_crops_of_another_contract(bad: np.ndarray, bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"crops must be uint8 \(n, 1, 64, 64\), got"):
        open_backend(bundle, threads=1).infer(bad)


def test_report(bundle: Path, tmp_path: Path) -> None:
    report = open_backend(bundle).report
    assert report.golden_error_px is not None
    assert report.golden_error_px < FP32_PX
    rejected = (f"tensorrt: {NO_DRIVER}", f"ort-cuda: {NO_DRIVER}", "int8: not in the bundle")
    sha256 = hashlib.sha256((bundle / MODEL).read_bytes()).hexdigest()
    wanted = BackendReport("ort-cpu", MODEL, "fp32", rejected, report.golden_error_px, sha256=sha256)
    assert report == wanted
    assert open_backend(tiny_bundle(tmp_path, golden=False)).report.golden_error_px is None


@pytest.mark.parametrize(
    ("asked", "file"), [("auto", MODEL), ("fp16", "model.fp16.onnx"), ("fp32", MODEL)], ids=["auto", "fp16", "fp32"]
)
def test_precision_that_is_asked_for_runs(asked: str, file: str, tmp_path: Path) -> None:
    bundle = add_file(tiny_bundle(tmp_path), "model.fp16.onnx", tiny_graph().SerializeToString(), precision="fp16")
    assert open_backend(bundle, precision=asked).report.file == file
    assert open_backend(bundle / file, precision=asked).report.file == file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt"}, re.escape(NO_DRIVER)),
        ({"backend": "ort-tensorrt"}, re.escape(NO_DRIVER)),
        ({"backend": "ort-cuda"}, re.escape(NO_DRIVER)),
        ({"precision": "int8"}, "has no int8 file, only fp32; kp export can add it"),
    ],
)
def test_what_is_not_there_is_refused(arguments: dict[str, Any], message: str, bundle: Path) -> None:
    with pytest.raises(BackendError, match=message):
        open_backend(bundle, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "onnx-cpu"}, "no backend 'onnx-cpu'; choose auto or tensorrt, ort-tensorrt, ort-cuda, ort-cpu"),
        ({"precision": "bf16"}, "no precision 'bf16'; choose auto or fp32, fp16, int8, int8-trt"),
        ({"threads": 0}, "threads must be 1 to .*, the cores that this process may use; got 0"),
        ({"threads": usable_cores() + 1}, f"threads must be 1 to {usable_cores()}, .*got {usable_cores() + 1}"),
        ({"threads": "1"}, "threads must be 1 to .*got '1'"),
        ({"threads": 1.0}, "threads must be 1 to .*got 1.0"),
        ({"threads": True}, "threads must be 1 to .*got True"),
    ],
)
def test_what_there_is_nowhere_is_the_caller_s_mistake(arguments: dict[str, Any], message: str, bundle: Path) -> None:
    """No `BackendError`, after which a program takes another engine and goes on without a word."""
    with pytest.raises(InputError, match=message):
        open_backend(bundle, **arguments)


def test_bundle_without_onnx(tmp_path: Path) -> None:
    Manifest(spec=ModelSpec("empty")).write(tmp_path)
    with pytest.raises(BackendError, match="holds no ONNX file; make one with: kp export"):
        open_backend(tmp_path)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        open_backend(tmp_path / "none")


@pytest.mark.parametrize(("name", "reason"), [("a\0b", "null "), ("\ud800", "surrogates"), ("n" * 300, "too long")])
def test_a_bundle_s_path_that_the_system_does_not_take(name: str, reason: str) -> None:
    with pytest.raises(BundleError, match=f"can't be read .*{reason}"):
        open_backend(name)


@pytest.mark.parametrize(
    ("file", "precision", "message"),
    [
        (GOLDEN_NAME, "auto", "is a golden file of precision None; give an ONNX file"),
        (MODEL, "fp16", "with precision fp16"),
    ],
)
def test_file_that_can_not_run(file: str, precision: str, message: str, bundle: Path) -> None:
    with pytest.raises(BackendError, match=message):
        open_backend(bundle / file, precision=precision)


def test_a_file_named_by_its_path_is_hashed_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is read, and not before."""
    monkeypatch.setattr("kp_runtime.manifest.sha256_of_open_file", lambda _: pytest.fail("hashed by itself"))
    assert open_backend(bundle / MODEL, threads=1).report.file == MODEL


@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_cut_off_graph_with_a_manifest_that_agrees(part: float, tmp_path: Path) -> None:
    data = tiny_graph().SerializeToString()
    bundle = add_file(tiny_bundle(tmp_path), MODEL, data[: int(part * len(data))], precision="fp32")
    with pytest.raises(BackendError, match=r"ONNX Runtime .* can't open .*; update onnxruntime or export") as caught:
        open_backend(bundle)
    assert "\n" not in str(caught.value)


def test_graph_of_another_crop_size(tmp_path: Path) -> None:
    bundle = add_file(tiny_bundle(tmp_path), MODEL, tiny_graph(96).SerializeToString(), precision="fp32")
    with pytest.raises(
        BackendError, match=r"does not have the contract's input and output.*96, 96.*instead of.*64, 64"
    ):
        open_backend(bundle)


def test_engine_that_fails_while_it_runs(tmp_path: Path, crops: np.ndarray) -> None:
    graph = tiny_graph()
    for constant in graph.graph.initializer:
        if constant.name == "shape":  # from any batch to a batch of one
            constant.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 1, 1], np.int64), "shape"))
    bundle = add_file(tiny_bundle(tmp_path), MODEL, graph.SerializeToString(), precision="fp32")
    backend = open_backend(bundle, threads=1)
    with pytest.raises(BackendError, match="ONNX Runtime failed on 2 crops") as caught:
        backend.infer(crops[:2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("0", "0")])
def test_onnxruntime_reports_to_nobody_unless_told_to(
    given: str | None, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", given or "")
    if given is None:
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    import_onnxruntime("ort", "a test")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == kept


def test_what_onnxruntime_warns_of_is_not_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graph = tiny_graph()
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(3, np.float32), "of no use"))
    open_backend(add_file(tiny_bundle(tmp_path), MODEL, graph.SerializeToString(), precision="fp32"))
    assert "of no use" not in capfd.readouterr().err


def test_an_open_model_does_not_keep_its_file(bundle: Path) -> None:
    data = (bundle / MODEL).read_bytes()
    before = sys.getrefcount(data)
    backend = OrtCpuBackend(bundle / MODEL, ModelSpec("x", SIZE, lost_limit=0.5), 1, read=lambda: data)
    assert backend.threads == 1
    assert sys.getrefcount(data) == before


def test_a_model_without_a_lost_score(tmp_path: Path, crops: np.ndarray) -> None:
    answer = open_backend(tiny_bundle(tmp_path, lost_limit=None)).answer(crops)
    assert_close(answer.keypoints, tiny_keypoints(crops), FP32_PX, "keypoints")
    assert answer.lost_score is None
    manifest = Manifest.read(tmp_path)
    dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, lost_limit=0.5)).write(tmp_path)
    with pytest.raises(
        BackendError, match=r"does not have the contract's input and output: .* instead of .*lost_score"
    ):
        open_backend(tmp_path)


def test_without_onnxruntime_the_error_has_the_pip_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime, which is not installed.*pip install 'kp-edge\[ort\]'"):
        open_backend(bundle)


def test_an_opset_that_the_runtime_can_not_run(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b", golden=False)
    model = tiny_graph()
    model.opset_import[0].version = 99
    (bundle / "model.fp32.onnx").write_bytes(model.SerializeToString())
    files = {"model.fp32.onnx": file_entry(bundle / "model.fp32.onnx", "onnx", precision="fp32")}
    Manifest(spec=Manifest.read(bundle).spec, files=files).write(bundle)
    with pytest.raises(BackendError, match=r"can't open .*opset.*update onnxruntime or export again"):
        open_backend(bundle)


two_cores = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=two_cores)])
def test_every_way_to_feed_a_batch_gives_every_crop_its_own_answer(
    threads: int, bundle: Path, rng: np.random.Generator
) -> None:
    backend = open_backend(bundle, threads=threads)
    for n in (2, 3, 9):
        crops = rng.integers(0, 256, (n, 1, SIZE, SIZE), dtype=np.uint8)
        wanted = tiny_keypoints(crops)
        for _ in range(4 * (TRIES + 1) + 2):
            answer = backend.answer(crops)
            assert_close(answer.keypoints, wanted, MAP_PX, f"{n} crops on {threads} threads")
            assert_close(answer.lost_score, tiny_scores(crops), 1e-6, f"scores of {n} crops")
    assert list(backend.batch_times()) == [2, 4, 16]
    names = {"whole", "one by one", "by 4"} | ({"side by side"} if threads > 1 else set())
    assert set(backend.batch_times()[16]) == names
    assert all(ms > 0 for times in backend.batch_times().values() for ms in times.values())


@two_cores
@pytest.mark.filterwarnings("error")
def test_a_model_of_a_relative_path_goes_on_in_another_folder(
    tmp_path: Path, crops: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Manifest.read(tiny_bundle(tmp_path / "bundle")).spec
    monkeypatch.chdir(tmp_path)
    file = Path("bundle") / "model.fp32.onnx"
    opened = [open_backend("bundle", threads=2), OrtCpuBackend(file, spec, threads=2)]
    monkeypatch.chdir("/")
    for backend in opened:
        backend.settle(len(crops), "side by side")  # which needs the file once more
        assert_close(backend.infer(crops), tiny_keypoints(crops), MAP_PX, "side by side")


@two_cores
@pytest.mark.parametrize("warns", ["default", "error"])
def test_an_open_model_goes_on_when_its_bundle_is_gone(tmp_path: Path, crops: np.ndarray, warns: str) -> None:
    backend = open_backend(tiny_bundle(tmp_path / "bundle"), threads=2)
    backend.settle(len(crops), "side by side")  # which needs the file once more
    shutil.rmtree(tmp_path / "bundle")
    what = "no longer fed side by side: .*model.fp32.onnx stands in the manifest but"
    if warns == "error":  # no failure of the engine, as which it was raised
        with warnings.catch_warnings():
            warnings.simplefilter("error", KpWarning)
            with pytest.raises(KpWarning, match=what):
                backend.infer(crops)
        first = backend.infer(crops)
    else:
        with pytest.warns(KpWarning, match=what):
            first = backend.infer(crops)
    for keypoints in (first, backend.infer(crops), backend.infer(crops)):  # later ones warn no more
        assert_close(keypoints, tiny_keypoints(crops), FP32_PX, "keypoints")


@two_cores
def test_an_engine_goes_with_its_last_user(bundle: Path) -> None:
    """And both its sessions with it: a collector that comes some time would leave thousands of them."""
    backend = open_backend(bundle, threads=2)
    backend.settle(4, "side by side")
    backend.infer(np.zeros((4, 1, SIZE, SIZE), np.uint8))
    there = weakref.ref(backend)
    gc.disable()
    try:
        del backend
        assert there() is None
    finally:
        gc.enable()


@two_cores
def test_warmup_chooses_for_every_size_up_to_the_one_given(bundle: Path) -> None:
    backend = open_backend(bundle, threads=2)
    backend.warmup()
    assert backend.batch_times() == {}
    backend.warmup(np.int64(6))  # type: ignore[arg-type]
    assert list(backend.batch_times()) == [2, 4, 8]
    for faces in (0, "6", 1.5):
        with pytest.raises(InputError, match=f"warmup needs the number of faces of a call, 1 or more; got {faces!r}"):
            backend.warmup(faces)  # type: ignore[arg-type]


@two_cores
def test_threads_of_a_dropped_backend_end(bundle: Path) -> None:
    backend = open_backend(bundle, threads=2)
    backend.warmup(2)
    assert any(thread.name.startswith("kp-faces") for thread in threading.enumerate())
    del backend
    gc.collect()
    until(lambda: not any(thread.name.startswith("kp-faces") for thread in threading.enumerate()))


def test_auto_keeps_the_reasons_of_every_engine(bundle: Path, tmp_path: Path) -> None:
    """A bundle with a plan alone, where no GPU is: that it holds no ONNX file is half of the story."""
    copied = Path(shutil.copytree(bundle, tmp_path / "planned"))
    (copied / MODEL).unlink()
    manifest = Manifest.read(copied)
    manifest.files.pop(MODEL)
    manifest.write(copied)
    add_file(copied, "model.plan", b"plan", "plan", precision="fp16")
    with pytest.raises(BackendError, match=r"no engine runs .* here: tensorrt: .*no NVIDIA driver.*ort-cpu: .*no ONNX"):
        open_backend(copied)


def test_an_onnxruntime_that_is_not_whole(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_over = types.ModuleType("onnxruntime")
    left_over.__path__ = ["site-packages/onnxruntime"]
    monkeypatch.setitem(sys.modules, "onnxruntime", left_over)
    with pytest.raises(BackendError, match=r"site-packages/onnxruntime.* holds none.*remove that folder"):
        open_backend(bundle)


def test_the_reason_of_an_error_is_a_line() -> None:
    error = OSError("\nno  libx.so\nlooked in\t/a\n")
    assert (reason_of(error), reason_of(error, lines=1)) == ("no libx.so looked in /a", "no libx.so")
    assert (reason_of(ValueError(" \n")), reason_of(ValueError(), lines=1)) == ("ValueError", "ValueError")
    assert len(reason_of(ValueError("x" * 1000), lines=1)) == 400


def test_a_package_that_does_not_load_is_not_called_missing() -> None:
    said = "cv2", "opencv-python-headless", "image", "cropping"
    absent = missing_or_broken(ModuleNotFoundError("No module named 'cv2'", name="cv2"), *said)
    assert isinstance(absent, MissingExtraError)
    for error in (ImportError("libGL.so.1: cannot open"), ModuleNotFoundError("No module named 'x'", name="x")):
        broken = missing_or_broken(error, *said)
        assert not isinstance(broken, MissingExtraError)
        assert "is here but can't be loaded: " in str(broken)
        assert "pip install" not in str(broken)


def test_ctrl_c_while_a_package_loads_is_not_called_a_broken_package() -> None:
    error = ImportError("initialization failed")  # as pybind11's modules say, ONNX Runtime's among them
    error.__cause__ = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        missing_or_broken(error, "onnxruntime", "onnxruntime", "ort", "running ONNX files")
