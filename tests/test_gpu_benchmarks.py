"""`make bench-gpu` without a GPU: its plan, its record and table, the makers on a CPU and on the driver's double."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, table
from benchmarks.command import run
from benchmarks.faces import varied_crops
from benchmarks.gpu import (
    COMPILED,
    COPY,
    EAGER,
    PARTS,
    Device,
    GpuPart,
    NotRun,
    Planned,
    boxes_of_faces,
    measure,
    plan,
)
from benchmarks.gpu_calls import (
    CropBench,
    Ready,
    kp_end_to_end,
    kp_network,
    ort_network,
    reference,
    torch_end_to_end,
    torch_network,
)
from benchmarks.record import Record, read_record, record_from, write_record
from kp_runtime.backend_by_name import BACKENDS
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.errors import BackendError, InputError
from kp_runtime.gpu_code import gpu_code_from_library
from kp_runtime.manifest import Manifest
from kp_runtime.pipeline import load
from kp_runtime.preprocess_cuda import CropKernels
from kp_runtime.spec import ModelSpec
from kp_train.checkpoint import save_checkpoint
from kp_train.model import KeypointNet
from tests.conftest import until
from tests.cuda_driver_double import DriverDouble
from tests.device_double import DeviceDouble
from tests.emulation import EmulatedKernel
from tests.models import SIZE, tiny_keypoints

ROOT = Path(__file__).resolve().parents[1]
DEVICE = Device("NVIDIA Made-up 9000", "9.0", "13.0", "580.1", 1 << 20)
FRAME = np.random.default_rng(1).integers(0, 256, (120, 200, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def net() -> KeypointNet:
    torch.manual_seed(0)
    return KeypointNet(SIZE).eval()


@pytest.fixture(scope="module")
def checkpoint(net: KeypointNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "small"
    save_checkpoint(folder, net, Manifest(ModelSpec("small", size=SIZE)))
    return folder


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return varied_crops(3, ModelSpec("tiny", size=SIZE))


def rest() -> None:
    time.sleep(0.01)


def broken() -> Ready:
    raise RuntimeError("no\ncompiler")


@pytest.fixture(scope="module")
def part() -> GpuPart:
    cases = [
        Planned(COPY, None, lambda: Ready(rest, 4, 4 * 10**6)),
        Planned("crop kernel", 8, lambda: Ready(rest, 2, 10**6)),
        Planned("engine", 8, lambda: Ready(rest, distance_px=0.25)),
        Planned("torch.compile", 8, broken),
        Planned("torch.compile", 64, broken),
        Planned("too slow", 8, broken),
    ]
    return measure(cases, DEVICE, without=["slow"], seconds=0, samples=3, warm_up=0)


@pytest.fixture(scope="module")
def records(part: GpuPart, checkpoint: Path) -> list[Record]:
    return [record_from(f"gpu-{name}", checkpoint, {"batches": [8]}, part) for name in PARTS]


def test_what_is_planned(checkpoint: Path) -> None:
    of_crops = [(p.what, p.batch) for p in plan("crops", checkpoint, (1, 256), DEVICE)]
    assert of_crops == [(COPY, None), *((what, n) for what in ("crop kernel", "CudaCropper") for n in (1, 256))]
    network = [(p.what, p.batch) for p in plan("network", checkpoint, (1, 2), DEVICE)]
    graphs = [f"ONNX Runtime CUDA {p}{g}" for p in ("fp32", "fp16") for g in ("", ", CUDA graph")]
    ours = [f"kp_runtime {name}" for name in BACKENDS]
    devices = ["tensorrt", "ort-tensorrt", "ort-cuda fp32", "ort-cuda fp16"]
    ours_there = [f"kp_runtime {name}{g}" for name in devices for g in ("", ", CUDA graph")]
    assert network == [(what, n) for n in (1, 2) for what in (EAGER, COMPILED, *graphs, *ours_there)]
    whole = [(p.what, p.batch) for p in plan("end-to-end", checkpoint, (1,), DEVICE)]
    assert whole == [(what, 1) for what in (*ours, EAGER, COMPILED)]
    with pytest.raises(InputError, match="no part 'all'; choose from crops, network, end-to-end"):
        plan("all", checkpoint, (1,), DEVICE)
    with pytest.raises(InputError, match="batch sizes must be 1 or more, got 0"):
        plan("crops", checkpoint, (0,), DEVICE)


def test_what_is_missing_has_a_reason_and_no_number(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    for name in PARTS:
        cases = plan(name, checkpoint, (1,), DEVICE, where="no such device")
        result = measure(cases, DEVICE, without=["compile"], seconds=0, samples=1, warm_up=0)
        assert result.cases == ()
        reasons = {left.what: left.reason for left in result.not_run}
        assert list(reasons) == [case.what for case in cases]
        assert all(reasons.values())
        if name == "network":
            assert reasons["ONNX Runtime CUDA fp16"] == "the bundle has no fp16 file; kp export adds one"
            assert reasons[COMPILED] == "left out by --without"


def test_what_is_measured(part: GpuPart) -> None:
    copy, kernel, engine = part.cases
    assert part.not_run == (
        NotRun("torch.compile", (8, 64), "no compiler"),
        NotRun("too slow", (8,), "left out by --without"),
    )
    for case, repeats, moved in ((copy, 4, 4e6), (kernel, 2, 1e6)):
        assert case.repeats == repeats
        assert case.time.samples == sum(map(len, case.turns_ms)) >= 3
        assert case.gb_a_second == pytest.approx(moved / case.time.p50_ms / 1e6)
    assert copy.of_copy == 1
    assert kernel.gb_a_second
    assert copy.gb_a_second
    assert kernel.of_copy == kernel.gb_a_second / copy.gb_a_second
    assert (engine.gb_a_second, engine.of_copy, engine.distance_px) == (None, None, 0.25)


def test_a_sample_of_many_calls_counts_as_its_share() -> None:
    turns = [[0.004, 0.008]]
    case = gpu._case(Planned("x", 1, broken), Ready(broken, 4, 2 * 10**6), turns)
    assert (case.time.min_ms, case.time.max_ms, case.turns_ms) == (1.0, 2.0, [[1.0, 2.0]])
    assert case.gb_a_second == pytest.approx(2e6 / 1.5e-3 / 1e9)


def test_records_name_the_gpu_and_become_tables(records: list[Record], tmp_path: Path, part: GpuPart) -> None:
    for record in records:
        assert record.file_name.startswith("nvidia-made-up-9000-")
        assert record.file_name.endswith(f"-small-{record.kind}.json")
        write_record(record, tmp_path / record.file_name)
        assert read_record(tmp_path / record.file_name).measured == json.loads(json.dumps(record.measured))
    text = table.tables_from_records(records)
    for title in ("Crops", "The network", "From a 1080p frame"):
        assert f"### {title} on NVIDIA Made-up 9000: small" in text
    assert "Compute capability 9.0, CUDA 13.0, driver 580.1" in text
    assert "- torch.compile [8, 64]: no compiler" in text
    assert f"| crop kernel | 8 | {part.cases[1].time.p50_ms:.3f} |" in text
    with pytest.raises(InputError, match="of kind gpu-crops lacks or mistakes the field 'device'"):
        table.tables_from_records([dataclasses.replace(records[0], measured={})])


def test_pytorch_s_network(net: KeypointNet, crops: np.ndarray) -> None:
    wanted = reference(net, crops)
    ready = torch_network(net, crops, wanted, "cpu", compiled=False)
    assert ready.distance_px is not None
    assert 0 < ready.distance_px < 0.5
    assert next(net.parameters()).dtype == torch.float32  # the caller's stays as it is
    with pytest.raises(BackendError, match=r"wrong: a keypoint is .* px from PyTorch's, at most 0.5 px"):
        torch_network(net, crops, wanted + 3, "cpu", compiled=False)


def test_onnx_runtime_s_network(bundle: Path, crops: np.ndarray) -> None:
    wanted = tiny_keypoints(crops)
    ready = ort_network(bundle / "model.fp32.onnx", "fp32", crops, wanted, "cpu", graph=False)
    ready.run()
    assert ready.distance_px is not None
    assert ready.distance_px < 1e-3
    with pytest.raises(BackendError, match="wrong: a keypoint is"):
        ort_network(bundle / "model.fp32.onnx", "fp32", crops, wanted + 1, "cpu", graph=False)


def test_an_onnx_runtime_without_the_provider(bundle: Path, crops: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="has no CUDAExecutionProvider, only CPUExecutionProvider"):
        ort_network(bundle / "model.fp32.onnx", "fp32", crops, tiny_keypoints(crops), "cuda", graph=True)


def test_our_backends(bundle: Path, crops: np.ndarray) -> None:
    with pytest.raises(BackendError, match="ort-cpu takes no crops in the device's memory"):
        kp_network(bundle, "ort-cpu", crops, tiny_keypoints(crops))
    boxes = np.array([[20.0, 20, 80, 80]])
    model_xy = load(bundle, "ort-cpu")(FRAME, boxes).xy
    ready = kp_end_to_end(bundle, "ort-cpu", FRAME, boxes, model_xy + np.float32([0.03, 0.04]))
    assert ready.distance_px == pytest.approx(0.05, abs=1e-3)
    with pytest.raises(BackendError, match="wrong: a keypoint is"):
        kp_end_to_end(bundle, "ort-cpu", FRAME, boxes, model_xy + 1)


def test_our_backends_on_the_device(crops: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    double = DriverDouble(None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", double)
    traits: dict[str, bool] = {}
    monkeypatch.setattr("benchmarks.gpu_calls.open_backend", lambda *_: DeviceDouble(**traits))
    for graph in (False, True):
        ready = kp_network(ROOT, "ort-cuda", crops, tiny_keypoints(crops), precision="fp32", graph=graph)
        before = len(double.asked)
        ready.run()
        asked = [name for name, *_ in double.asked[before:]]
        assert ("cuGraphLaunch" in asked) == graph
        assert ready.distance_px == pytest.approx(0, abs=1e-3)
    traits["elsewhere"] = True  # what the runs before the capture left is not the crops' answer
    with pytest.raises(BackendError, match=r"wrong: a keypoint is .* px from PyTorch's"):
        kp_network(ROOT, "ort-cuda", crops, tiny_keypoints(crops), graph=True)


class Centroid(torch.nn.Module):
    """All keypoints at the middle of what is bright in a crop: shows whether pixels and keypoints go the same way."""

    def raw(self, crops: torch.Tensor) -> torch.Tensor:
        assert crops.dtype == torch.uint8
        weight = crops[:, 0].float()
        places = torch.arange(weight.shape[-1]).float()
        total = weight.sum((1, 2))
        return torch.stack([(weight.sum(1) * places).sum(1) / total, (weight.sum(2) * places).sum(1) / total], 1)

    def decode(self, raw: torch.Tensor) -> torch.Tensor:
        return raw[:, None].expand(-1, 68, 2)


def test_the_plain_way_finds_what_is_where_it_is() -> None:
    rows, columns = np.mgrid[:120, :200]
    middle = np.array([[61.0, 52], [140, 70]])
    bright = sum(np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 30) for x, y in middle)
    frame = np.ascontiguousarray((np.asarray(bright) * 255).astype(np.uint8)[..., None].repeat(3, 2))
    boxes = np.array([[45.0, 30, 85, 70], [120, 45, 165, 95]])
    wanted = np.repeat(middle[:, None], 68, 1).astype(np.float32)
    spec = ModelSpec("x", size=64, margin=1.2)
    ready = torch_end_to_end(Centroid(), spec, frame, boxes, wanted, "cpu", compiled=False)
    assert ready.distance_px is not None
    assert ready.distance_px < 0.3  # rounding of dim pixels to 0 moves the middle a little


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, kernel: EmulatedKernel, tmp_path: Path) -> CropBench:
    double = DriverDouble(kernel)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", double)
    (tmp_path / "kernel.cubin").write_bytes(b"cubin")
    monkeypatch.setenv("KP_CUBIN", str(tmp_path / "kernel.cubin"))
    return CropBench(CudaDriver(), ModelSpec("x", size=SIZE), FRAME, 20_000, box=40)


def test_crops_are_timed_from_graphs_and_checked(bench: CropBench) -> None:
    copy = bench.copy(4096, repeats=3)
    copy.run()
    assert (copy.repeats, copy.bytes_moved) == (3, 8192)
    one, many = bench.kernel(1), bench.kernel(5)
    for ready, faces in ((one, 1), (many, 5)):
        assert ready.bytes_moved is not None
        assert faces * SIZE**2 < ready.bytes_moved <= FRAME.nbytes + faces * SIZE**2
        assert ready.repeats * ready.bytes_moved >= 4 * 20_000
        ready.run()
    assert one.repeats > many.repeats >= 2
    assert bench.call(3).repeats == 1


def test_boxes_lie_on_faces() -> None:
    boxes = boxes_of_faces(5)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    eye_level = np.array([[475.0, 280], [1555, 280]])  # between brows and chin of the two, read off the frame
    assert np.abs(middle - eye_level[[0, 1, 0, 1, 0]]).max() < 10
    assert len(np.unique(boxes, axis=0)) == 5


def test_wrong_crops_are_not_timed(bench: CropBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CropKernels, "launch", lambda *_: None)
    with pytest.raises(BackendError, match=r"wrong: \d+ of \d+ grey levels are not the CPU path's"):
        bench.kernel(2)


def test_without_a_gpu_it_is_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Device:
        raise BackendError("there is no CUDA device")

    monkeypatch.setattr(gpu, "device_here", none)
    monkeypatch.setattr(sys, "argv", ["gpu", "--bundle", str(checkpoint)])
    with pytest.raises(SystemExit, match="1"):
        run(gpu.main)
    assert capsys.readouterr().err == "benchmarks: there is no CUDA device\n"
    monkeypatch.setattr(sys, "argv", ["gpu", "--bundle", str(checkpoint), "--out", "x.json"])
    with pytest.raises(SystemExit, match="1"):
        run(gpu.main)
    assert "give one --part with it" in capsys.readouterr().err


def test_each_part_has_its_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "device_here", lambda: DEVICE)
    monkeypatch.setattr(gpu, "plan", lambda *_: [Planned("x", 1, lambda: Ready(rest))])
    out = tmp_path / "x.json"
    words = ["--bundle", checkpoint, "--part", "network", "--seconds", 0, "--samples", 1, "--out", out]
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, words)])
    gpu.main()
    record = read_record(out)
    assert (record.kind, record.measured["device"]["name"]) == ("gpu-network", DEVICE.name)
    assert record.settings["batches"] == [1, 8, 64, 256]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kind"] == "gpu-network"


def session_of(folder: Path, python: str, **environment: str) -> subprocess.Popen[str]:
    """`scripts/gpu-session` with a shell script in Python's place, begun."""
    folder.mkdir(exist_ok=True)
    (folder / "python").write_text(f"#!/bin/sh\n{python}\n")
    (folder / "python").chmod(0o755)
    return subprocess.Popen(
        [ROOT / "scripts" / "gpu-session", folder / "out", "a-bundle"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHON": str(folder / "python")} | environment,
    )


def session(folder: Path, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same to its end."""
    with session_of(folder, python, **environment) as begun:
        out, err = begun.communicate()
    return subprocess.CompletedProcess(begun.args, begun.returncode, out, err)


def test_a_session_goes_on_after_a_failed_step(tmp_path: Path) -> None:
    done = session(
        tmp_path, 'echo "ran $*"; case "$*" in "-m pytest"*) exit 3;; *"--part crops"*) exec sleep 60;; esac', LIMIT="1"
    )
    said = [line.replace(",", " ").split()[:2] for line in done.stdout.splitlines()]
    # what was exported alone gets a plan, never the bundle that was given
    assert dict(said) == dict.fromkeys(STEPS, "ok") | {"plan": "left", "tests": "failed", "crops": "over"}
    assert not (tmp_path / "out" / "plan.log").exists()
    assert done.returncode == 1
    assert "tests.log: ran -m pytest -m gpu -s" in done.stdout
    assert (tmp_path / "out" / "summary.txt").read_text() in done.stdout
    assert "tests/test_pipeline_gpu.py" in (tmp_path / "out" / "tests.log").read_text()


def test_what_takes_minutes_to_make_ready_comes_last(tmp_path: Path) -> None:
    """It measures the rest once more, into the same file."""
    done = session(tmp_path, 'echo "$*"')
    assert tuple(line.split()[0] for line in done.stdout.splitlines()) == STEPS
    for part in ("end-to-end", "network"):
        quick, whole = ((tmp_path / "out" / f"{step}.log").read_text().strip() for step in (part, f"{part}-all"))
        assert whole.endswith(f"--part {part} --out {tmp_path / 'out' / f'gpu-{part}.json'}")
        assert quick == f"{whole} --without torch.compile --without ort-tensorrt"
    assert "without" not in (tmp_path / "out" / "crops.log").read_text()


def test_a_session_that_is_stopped_stops_its_step(tmp_path: Path) -> None:
    with session_of(tmp_path, 'echo $$ >"$(dirname "$0")/pid"; exec sleep 60') as begun:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        begun.terminate()
        assert begun.communicate(timeout=30)[0].startswith("doctor stopped, ")
    assert begun.returncode == 130
    step = Path("/proc") / (tmp_path / "pid").read_text().strip()
    until(lambda: not step.exists())  # it is told, and needs a moment
    assert not list((tmp_path / "out").glob("export*"))


def test_a_session_of_some_steps(tmp_path: Path) -> None:
    done = session(tmp_path, "exit 0", STEPS="doctor network")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["doctor.log", "network.log", "summary.txt"]


def test_a_session_tests_what_it_has_exported(tmp_path: Path) -> None:
    exports = 'case "$*" in *" export "*) mkdir -p "$9"; touch "$9/manifest.json";; esac; echo "$KP_GPU_BUNDLE $*"'
    done = session(tmp_path, exports)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "out" / "a-bundle"
    for step in ("plan", "tests", "network", "bench"):
        assert (tmp_path / "out" / f"{step}.log").read_text().startswith(f"{made} ")
    assert f"plan {made} --precision fp16 --max-batch 256" in (tmp_path / "out" / "plan.log").read_text()
    assert f"bench {made} --batch 1" in (tmp_path / "out" / "bench.log").read_text()


STEPS = (
    *("doctor", "export", "plan", "tests", "crops", "end-to-end", "network", "bench"),
    *("end-to-end-all", "network-all"),
)


def test_code_of_pytorch_s_library() -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        pytest.skip("this PyTorch is built without CUDA")
    known = {int(name.partition("_")[2]) for name in torch.cuda.get_arch_list() if name.startswith("sm_")}
    assert known
    assert known <= gpu_code_from_library(library).machine_code
