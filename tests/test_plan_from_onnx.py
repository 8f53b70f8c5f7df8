"""The build of plans against a double of TensorRT that has the real names of 10.3.0 and 11.4.0.

What a real builder makes of a graph is not tested here: `test_on_this_gpu` does where there is one.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kp_export import plan_from_onnx as module
from kp_export.cuda_device import CudaDevice
from kp_export.plan_from_onnx import plan_blocker, plan_from_onnx
from kp_export.plan_options import PlanOptions, plan_name, rebuild_command, trtexec_command
from kp_export.precision_receipt import LEAST_SHARE
from kp_runtime.errors import BackendError, ExportError
from kp_runtime.files import sha256_of_file
from tests.models import tiny_graph
from tests.tensorrt_double import ORIN, PLAN, tensorrt_double

LOWERING = {"FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"}


@pytest.fixture(params=["10.3.0", "11.4.0"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.fp16.onnx").write_bytes(tiny_graph().SerializeToString())
    return tmp_path


def build(folder: Path, trt: Any, options: PlanOptions | None = None, precision: str = "fp16", **rest: Any) -> Any:
    return plan_from_onnx(
        folder / "model.fp16.onnx",
        folder / "a.plan",
        options,
        precision=precision,
        trt=trt,
        **{"device": ORIN, "cache_folder": folder / "cache"} | rest,
    )


def test_plan_is_the_engine_and_nothing_else(folder: Path, version: str) -> None:
    report = build(folder, tensorrt_double(version))
    assert (folder / "a.plan").read_bytes() == PLAN
    assert {p.name for p in folder.iterdir()} == {"a.plan", "model.fp16.onnx", "cache"}
    assert (report.gpu, report.compute_capability, report.cuda) == ("Orin", "8.7", "12.6")
    assert report.driver == "540.4.0"
    assert report.l4t is not None
    assert report.tensorrt.startswith(version)
    assert report.profile == (1, 8, 32)
    assert report.onnx_sha256 == sha256_of_file(folder / "model.fp16.onnx")


def test_report_fits_into_a_manifest(folder: Path, version: str) -> None:
    entry = json.loads(json.dumps(dataclasses.asdict(build(folder, tensorrt_double(version)))))
    assert entry["receipt"]["compute_shares"]["fp16"] > 0.99
    assert entry["options"]["workspace_mib"] == 1024


def test_network_is_strongly_typed_and_no_flag_lowers_precision(folder: Path, version: str) -> None:
    trt = tensorrt_double(version)
    options = PlanOptions(version_compatible=True, hardware_compatible=True)
    build(folder, trt, options, device=dataclasses.replace(ORIN, l4t=None))
    assert trt.tape.network_flags == [1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)]
    assert trt.tape.flags_set == ["VERSION_COMPATIBLE"]
    assert not LOWERING & set(trt.tape.flags_set + trt.tape.flags_cleared)
    assert trt.tape.flags_cleared == ["TF32"]
    assert trt.tape.config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert trt.tape.host_code


def test_only_a_version_compatible_plan_may_bring_code(folder: Path, version: str) -> None:
    trt = tensorrt_double(version)
    build(folder, trt)
    assert not trt.tape.host_code


def test_profile_and_workspace(folder: Path, version: str) -> None:
    trt = tensorrt_double(version)
    build(folder, trt, PlanOptions(2, 4, 6, workspace_mib=64))
    assert trt.tape.shapes == [("crops", (2, 1, 64, 64), (4, 1, 64, 64), (6, 1, 64, 64))]
    assert trt.tape.pools == {"WORKSPACE": 64 << 20}
    assert trt.tape.parsed == [(folder / "model.fp16.onnx").read_bytes()]


def test_progress_is_told_and_an_error_in_it_ends_the_build(folder: Path, version: str) -> None:
    told: list[tuple[str, float]] = []
    build(folder, tensorrt_double(version), progress=lambda *step: told.append(step))
    assert told == [("Building Engine", share) for share in (0.0, 0.5, 1.0, 1.0)]

    def stop(phase: str, share: float) -> None:
        raise KeyboardInterrupt

    (folder / "a.plan").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        build(folder, tensorrt_double(version), progress=stop)
    assert (folder / "a.plan").read_bytes() == b"old"


def test_timing_cache_is_used_again(folder: Path, version: str) -> None:
    trt = tensorrt_double(version)
    build(folder, trt)
    build(folder, trt)
    assert trt.tape.caches == [b"", b"+timings"]
    (kept,) = (folder / "cache").iterdir()
    assert kept.name == f"timing.orin.sm87.trt{trt.__version__}.cache"
    assert kept.read_bytes() == b"+timings+timings"


def test_timing_caches_lie_where_compiled_kernels_do(
    folder: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KP_CACHE", str(folder / "kept"))
    build(folder, tensorrt_double(version), cache_folder=None)
    assert [path.suffix for path in (folder / "kept" / "tensorrt").iterdir()] == [".cache"]


def test_a_user_without_a_home_is_told_what_to_set(folder: Path, version: str, no_home: None) -> None:
    with pytest.raises(BackendError, match="has no home; set KP_CACHE to a folder"):
        build(folder, tensorrt_double(version), cache_folder=None)


def test_stale_timing_cache_counts_as_none(folder: Path, version: str) -> None:
    trt = tensorrt_double(version, cache_accepted=False)
    build(folder, trt)
    build(folder, trt)
    assert trt.tape.caches == [b"", b"+timings", b""]


def test_cache_that_cannot_be_kept_does_not_fail_the_build(folder: Path, version: str) -> None:
    (folder / "cache").write_text("a file where the folder should be")
    build(folder, tensorrt_double(version))
    assert (folder / "a.plan").read_bytes() == PLAN


def test_parser_errors_are_in_message_and_log(folder: Path, version: str) -> None:
    (folder / "a.plan").write_bytes(b"old")
    trt = tensorrt_double(version, parse_errors=("Unsupported dilation", "and another"))
    with pytest.raises(ExportError, match=r"node node_conv2d \(Conv\): Unsupported dilation .*the log is .*build\.log"):
        build(folder, trt, log_path=folder / "build.log")
    log = (folder / "build.log").read_text()
    assert "Unsupported dilation" in log
    assert "and another" in log
    assert (folder / "a.plan").read_bytes() == b"old"


def test_build_that_returns_nothing(folder: Path, version: str) -> None:
    (folder / "a.plan").write_bytes(b"old")
    trt = tensorrt_double(version, built=None, build_message="Cuda Runtime (out of memory)")
    with pytest.raises(ExportError, match=r"out of memory.*lower max_batch \(32\)"):
        build(folder, trt)
    log = (folder / "a.plan.log").read_text()
    assert "[error] Cuda Runtime (out of memory)" in log
    assert "[info] Detected 1 inputs" in log
    assert "not kept" not in log
    assert (folder / "a.plan").read_bytes() == b"old"


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError("no memory"), TypeError("returned nullptr")])
def test_exceptions_of_tensorrt_are_export_errors(folder: Path, version: str, error: Exception) -> None:
    with pytest.raises(ExportError, match=str(error)):
        build(folder, tensorrt_double(version, raises=error))


def test_plan_that_does_not_load(folder: Path, version: str) -> None:
    with pytest.raises(ExportError, match="can't load the plan that it just built"):
        build(folder, tensorrt_double(version, loads=False))
    assert not (folder / "a.plan").exists()


def test_fp16_that_was_not_got_is_refused(folder: Path, version: str) -> None:
    trt = tensorrt_double(version, weights="Float")
    with pytest.raises(ExportError, match=r"fp16 was asked for, but only 0% .*compute is fp16.*100% fp32"):
        build(folder, trt, log_path=folder / "log")
    assert not (folder / "a.plan").exists()
    assert '"conv0 + relu"' in (folder / "log").read_text()
    assert build(folder, trt, precision="fp32").receipt.compute_shares == {"fp32": 1.0}


def test_int8_that_was_not_got_is_refused(folder: Path, version: str) -> None:
    with pytest.raises(ExportError, match="int8 was asked for"):
        build(folder, tensorrt_double(version), precision="int8")
    report = build(folder, tensorrt_double(version, weights="Int8"), precision="int8")
    assert report.receipt.compute_shares["int8"] > 0.99


def test_inspector_without_details_is_no_proof(folder: Path, version: str) -> None:
    with pytest.raises(ExportError, match="lists no layer with details"):
        build(folder, tensorrt_double(version, inspector='{"Layers": ["conv"]}'))


@pytest.mark.parametrize("makes_runtime", [False, True])
def test_cuda_that_tensorrt_can_not_use_is_known_before_a_builder_is_made(
    folder: Path, version: str, makes_runtime: bool
) -> None:
    trt = tensorrt_double(version, cuda_error="CUDA initialization failure with error: 35", makes_runtime=makes_runtime)
    trt.Builder = None
    assert "can't use CUDA here: CUDA initialization failure with error: 35; " in str(plan_blocker(trt, ORIN))
    with pytest.raises(BackendError, match=r"error: 35; the driver runs up to CUDA 12\.6: .*; a plan is built on the"):
        build(folder, trt)


def test_profile_that_is_refused(folder: Path, version: str) -> None:
    with pytest.raises(ExportError, match="refuses the batch sizes 1, 8, 32"):
        build(folder, tensorrt_double(version, profile_index=-1))


def test_graph_of_another_project(folder: Path, version: str) -> None:
    with pytest.raises(ExportError, match=r"inputs are \['image', 'size'\].*crops alone"):
        build(folder, tensorrt_double(version, inputs=("image", "size")))


def test_dla_that_is_not_there(folder: Path, version: str) -> None:
    with pytest.raises(ExportError, match=r"DLA core 0 was asked for, TensorRT \S+ offers 0 on Orin"):
        build(folder, tensorrt_double(version), PlanOptions(1, 1, 1, dla_core=0))


@pytest.mark.parametrize("on_dla", [0, 1])
def test_silent_fall_back_from_the_dla_is_refused(folder: Path, version: str, on_dla: int) -> None:
    trt = tensorrt_double(version, dla_cores=2, dla_convolutions=on_dla)
    with pytest.raises(ExportError, match=f"{2 - on_dla} fp16 and int8 convolutions fell back to the GPU"):
        build(folder, trt, PlanOptions(4, 4, 4, dla_core=1))


def test_dla(folder: Path, version: str) -> None:
    trt = tensorrt_double(version, dla_cores=2, dla_convolutions=2)
    report = build(folder, trt, PlanOptions(4, 4, 4, dla_core=1))
    assert trt.tape.config.default_device_type.name == "DLA"
    assert trt.tape.config.DLA_core == trt.tape.dla_core == 1  # the run-time that inspects it is told, too
    assert trt.tape.flags_set == ["GPU_FALLBACK"]
    assert report.receipt.dla_layers == 2
    with pytest.raises(ExportError, match="not in fp32"):
        build(folder, trt, PlanOptions(4, 4, 4, dla_core=1), precision="fp32")


def test_hardware_compatibility_needs_ampere(folder: Path, version: str) -> None:
    xavier = CudaDevice(0, "Xavier", "7.2", "11.4")
    with pytest.raises(ExportError, match=r"Ampere GPU \(8.0\) or newer, Xavier has 7.2"):
        plan_from_onnx(
            folder / "model.fp16.onnx", folder / "a.plan", PlanOptions(hardware_compatible=True), precision="fp16",
            trt=tensorrt_double(version), device=xavier, cache_folder=folder,
        )  # fmt: skip


def test_hardware_compatibility_is_not_for_a_jetson(folder: Path, version: str) -> None:
    with pytest.raises(ExportError, match="not support hardware-compatible plans on JetPack; build without hardware_c"):
        build(folder, tensorrt_double(version), PlanOptions(hardware_compatible=True))


def test_file_that_is_not_there(tmp_path: Path, version: str) -> None:
    with pytest.raises(ExportError, match=r"model\.fp16\.onnx can't be read"):
        build(tmp_path, tensorrt_double(version))


def test_precision_that_is_not_known(folder: Path, version: str) -> None:
    with pytest.raises(ExportError, match="must be one of fp32, fp16, int8, got 'fp8'"):
        build(folder, tensorrt_double(version), precision="fp8")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"min_batch": 0}, "1 <= min <= opt <= max"),
        ({"opt_batch": 64}, "1 <= min <= opt <= max"),
        ({"workspace_mib": 0}, "at least 1 MiB"),
        ({"dla_core": 0}, "the DLA takes one batch size"),
        ({"min_batch": 8, "max_batch": 8, "dla_core": -1}, "a core from 0 on"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        PlanOptions(**options)


def test_name() -> None:
    assert plan_name("fp16", ORIN, "10.3.0") == "model.fp16.sm87.trt10.3.0.plan"
    options = PlanOptions(4, 4, 4, version_compatible=True, hardware_compatible=True, dla_core=1)
    assert plan_name("int8", ORIN, "10.3.0", options) == "model.int8.sm87.trt10.3.0.dla1.newer.ampere.plan"
    options = PlanOptions(4, 4, 4, dla_core=0)
    assert plan_name("int8", ORIN, "10.3.0", options) == "model.int8.sm87.trt10.3.0.dla0.plan"


def test_rebuild_command_names_what_is_not_the_default() -> None:
    assert rebuild_command(PlanOptions(), "fp32") == "kp plan BUNDLE --precision fp32"
    options = PlanOptions(4, 4, 4, version_compatible=True, dla_core=0)
    assert rebuild_command(options, "fp16") == (
        "kp plan BUNDLE --precision fp16 --min-batch 4 --opt-batch 4 --max-batch 4 --version-compatible --dla-core 0"
    )


def test_trtexec_command() -> None:
    shapes = ((1, 1, 224, 224), (8, 1, 224, 224), (32, 1, 224, 224))
    old = trtexec_command("m.onnx", "a.plan", PlanOptions(), shapes, "10.3.0")
    assert old == (
        "trtexec --onnx=m.onnx --saveEngine=a.plan --stronglyTyped --noTF32 --minShapes=crops:1x1x224x224 "
        "--optShapes=crops:8x1x224x224 --maxShapes=crops:32x1x224x224 --memPoolSize=workspace:1024 "
        "--profilingVerbosity=detailed --skipInference"
    )
    assert trtexec_command("m.onnx", "a.plan", PlanOptions(), shapes, "11.4.0.106") == old.replace(
        "--stronglyTyped ", ""
    )
    for options, words in (
        (PlanOptions(version_compatible=True), " --versionCompatible"),
        (PlanOptions(hardware_compatible=True), " --hardwareCompatibilityLevel=ampere+"),
        (PlanOptions(4, 4, 4, dla_core=0), " --useDLACore=0 --allowGPUFallback"),
        (PlanOptions(4, 4, 4, dla_core=1), " --useDLACore=1 --allowGPUFallback"),
    ):
        assert trtexec_command("m.onnx", "a.plan", options, shapes, "10.3.0") == old + words


def test_blocker_is_one_line_with_the_next_step(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    trt = tensorrt_double(version)
    assert plan_blocker(trt, ORIN) is None

    def absent(*_: Any) -> None:
        raise BackendError("there is no CUDA device 0: this machine has 0, numbered from 0")

    monkeypatch.setattr(module, "cuda_device", absent)
    reason = plan_blocker(trt)
    assert reason is not None
    assert reason.startswith("there is no CUDA device 0")
    assert reason.endswith("kp plan BUNDLE --precision fp16")
    assert "\n" not in reason


def test_blocker_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    assert "TensorRT is not installed here" in str(plan_blocker(device=ORIN))


def test_blocker_of_an_old_tensorrt(version: str) -> None:
    trt = tensorrt_double(version)
    trt.__version__ = "8.6.1"
    assert "TensorRT 8.6.1 is too old, 10.3 to 11.4 are" in str(plan_blocker(trt, ORIN))


def test_device_is_looked_for_before_tensorrt_is_used(
    folder: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = tensorrt_double(version)
    used: list[str] = []
    monkeypatch.setattr(trt, "Builder", lambda logger: used.append("builder"))

    def absent() -> None:
        raise BackendError("CUDA does not work here")

    monkeypatch.setattr(module, "cuda_device", absent)
    with pytest.raises(BackendError, match="CUDA does not work here"):
        plan_from_onnx(folder / "model.fp16.onnx", folder / "a.plan", precision="fp16", trt=trt)
    assert not used


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_on_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEAST_SHARE, "fp32", 0.0)  # the tiny network has no layer with weights
    if blocker := plan_blocker():
        pytest.skip(blocker)
    (tmp_path / "model.fp32.onnx").write_bytes(tiny_graph().SerializeToString())
    report = plan_from_onnx(tmp_path / "model.fp32.onnx", tmp_path / "a.plan", precision="fp32", cache_folder=tmp_path)
    assert (tmp_path / report.file).stat().st_size > 0
