"""`kp doctor` on made-up machines (files, package records, answers of probes) and on this one."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kp_runtime import doctor
from kp_runtime.backend_by_name import BACKENDS
from kp_runtime.doctor import Diagnosis, diagnose
from kp_runtime.doctor_checks import Finding, Surroundings
from kp_runtime.geometry import way_to_sample
from kp_runtime.manifest import FileEntry, Manifest, file_entry
from kp_runtime.probes import Outcome, ask
from tests.conftest import DETECTOR
from tests.models import tiny_bundle

CPU = ["CPUExecutionProvider"]
GPU = ["TensorrtExecutionProvider", "CUDAExecutionProvider", *CPU]
DEVICE = {"name": "Orin", "capability": 87, "status": 0, "free": 5 << 30, "total": 15 << 29}
ORIN = {"cuda": 12060, "status": 0, "devices": [DEVICE]}
JETSON_FILES = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano",
    "var/lib/nvpmodel/status": "pmode:0002",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000",
    "var/lib/dpkg/status": "Package: bash\nVersion: 5\n\nPackage: nvidia-jetpack\nStatus: ok\nVersion: 6.2+b77\n\n",
    "dev/nvhost-gpu": "",
}


def answered(**facts: Any) -> Outcome:
    return Outcome("answered", facts=facts)


ABSENT = Outcome("absent", "not installed")
PLAIN = {
    "driver": ABSENT,
    "nvrtc": ABSENT,
    "onnxruntime": answered(version="1.23.0", providers=CPU, gpu_code=None),
    "module tensorrt": ABSENT,
    "module tensorrt_lean": ABSENT,
    "module tensorrt_dispatch": ABSENT,
    "cv2": answered(version="4.12.0", sampling="warp"),
    "detector": answered(name="own=wheel", missed=""),
    "backend ort-cpu": answered(file="model.onnx", golden_error_px=0.25),
}
WITH_GPU = PLAIN | {
    "driver": answered(**ORIN),
    "nvrtc": answered(version="12.6"),
    "crops": answered(levels=8192, different=0),
    "onnxruntime": answered(version="1.23.0", providers=GPU, gpu_code={"machine_code": [87], "ptx": []}),
    "module tensorrt": answered(version="10.3.0", file="trt.py"),
    "backend tensorrt": answered(file="model.plan", golden_error_px=0.5),
    "backend ort-tensorrt": answered(file="model.onnx", golden_error_px=0.5),
    "backend ort-cuda": answered(file="model.onnx", golden_error_px=0.5),
}
FOUR = ("tensorrt", "ort-tensorrt", "ort-cuda", "ort-cpu")


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    """A bundle with a plan and a file that every provider runs."""
    folder = tiny_bundle(tmp_path / "planned", precision="fp16")
    (folder / "model.plan").write_bytes(b"plan")
    manifest = Manifest.read(folder)
    plan: dict[str, FileEntry] = {"model.plan": file_entry(folder / "model.plan", "plan", precision="fp16")}
    dataclasses.replace(manifest, files=manifest.files | plan).write(folder)
    return folder


def looked(
    bundle: Path | None,
    root: Path,
    answers: dict[str, Outcome],
    packages: Iterable[str] = (),
    files: dict[str, str] | None = None,
    environment: dict[str, str] | None = None,
    numpy: str = "1.26.4",
    folders: Iterable[Path] = (),
) -> Diagnosis:
    """The report of a made-up machine; a probe that it has no answer for must not be asked."""
    for name, text in (files or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    def answer(*words: str, seconds: float) -> Outcome:
        told = {"backend": 2, "detector": 1, "nvrtc": 1}  # paths, and the GPU's architecture, come behind
        return answers.get(" ".join(words)) or answers[" ".join(words[: told.get(words[0])])]

    versions = dict(package.split("==") for package in packages)
    here = Surroundings(root, versions, [str(folder) for folder in folders], environment or {}, numpy, answer)
    return diagnose(bundle, here=here)


def about(diagnosis: Diagnosis, subject: str) -> Finding:
    (finding,) = (finding for finding in diagnosis.findings if finding.subject == subject)
    assert bool(finding.advice) == (finding.status in ("warning", "problem"))
    return finding


def states(diagnosis: Diagnosis) -> dict[str, str]:
    return {finding.subject: finding.status for finding in diagnosis.findings}


@pytest.fixture
def all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "BACKENDS", FOUR)


def test_this_machine(bundle: Path) -> None:
    diagnosis = diagnose(bundle)
    assert "ort-cpu" in diagnosis.working
    assert about(diagnosis, "ort-cpu").found == "model.fp32.onnx: golden keypoints 0.000 px from PyTorch's"
    assert np.__version__ in about(diagnosis, "computer").found
    assert set(BACKENDS) < set(states(diagnosis))


@pytest.mark.usefixtures("all_backends")
def test_a_pc_without_a_gpu(bundle: Path, tmp_path: Path) -> None:
    diagnosis = looked(bundle, tmp_path, PLAIN, ["onnxruntime==1.23.0"])
    assert (diagnosis.working, diagnosis.healthy) == (("ort-cpu",), True)
    absent = {"GPU", "cuda-python", "NVRTC", "TensorRT", "tensorrt", "ort-tensorrt", "ort-cuda"}
    assert {subject for subject, status in states(diagnosis).items() if status == "absent"} == absent
    assert set(states(diagnosis).values()) == {"ok", "absent"}


def test_what_a_remote_engineer_needs_is_in_the_report(bundle: Path, tmp_path: Path) -> None:
    files = {
        "etc/os-release": 'PRETTY_NAME="Ubuntu 22.04"',
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "x",
    }
    environment = {"KP_MODEL": "/srv/kp", "NVIDIA_API_KEY": "secret", "PASSWORD": "secret"}
    diagnosis = looked(
        bundle, tmp_path, PLAIN | {"backend ort-cpu": ask("backend", "ort-cpu", str(bundle), seconds=60)},
        ["onnxruntime==1.23.0", "flask==3.0"], files, environment,
    )  # fmt: skip
    (engine,) = diagnosis.engines
    assert (engine["backend"], engine["file"]) == ("ort-cpu", "model.fp32.onnx")
    assert engine["sha256"] == Manifest.read(bundle).files["model.fp32.onnx"].sha256
    machine = diagnosis.machine
    assert machine is not None
    assert (machine.system, machine.governor) == ("Ubuntu 22.04", "x")
    assert machine.versions == {"onnxruntime": "1.23.0"}
    assert diagnosis.environment == {"KP_MODEL": "/srv/kp"}


@pytest.mark.usefixtures("all_backends")
def test_a_jetson_on_which_all_works(planned: Path, tmp_path: Path) -> None:
    packages = ["onnxruntime-gpu==1.23.0", "cuda-bindings==12.9.0"]
    diagnosis = looked(planned, tmp_path, WITH_GPU, packages, JETSON_FILES)
    assert set(states(diagnosis).values()) == {"ok"}
    assert (diagnosis.working, diagnosis.healthy) == (FOUR, True)
    assert about(diagnosis, "JetPack").found == "6.2+b77, L4T R36 (release), REVISION: 4.3, GCID: 1"
    assert about(diagnosis, "power mode").found == "pmode:0002, GPU up to 1020 MHz"
    text = "Orin, compute capability 8.7, 5.0 of 7.5 GiB free; driver unknown, CUDA 12.6"
    assert about(diagnosis, "GPU").found == text


BROKEN = DEVICE | {"name": "H200", "capability": 90, "status": 46}


@pytest.mark.usefixtures("all_backends")
def test_a_line_for_each_gpu(bundle: Path, tmp_path: Path) -> None:
    """The first one is used; that another is busy is no problem."""
    answers = {name: answer for name, answer in WITH_GPU.items() if name != "backend tensorrt"}
    two = answers | {"driver": answered(**ORIN | {"devices": [DEVICE, BROKEN]})}
    diagnosis = looked(bundle, tmp_path, two, ["cuda-bindings==12.9.0"])
    assert about(diagnosis, "GPU 0, used").found.startswith("Orin, compute capability 8.7, 5.0 of 7.5 GiB free; driver")
    other = about(diagnosis, "GPU 1")
    assert other.status == "warning"
    text = "H200, compute capability 9.0; it can't be opened (CUDA error 46); CUDA_VISIBLE_DEVICES=1 takes this one"
    assert other.found == text
    assert diagnosis.healthy
    turned = answers | {"driver": answered(**ORIN | {"devices": [BROKEN, DEVICE]})}
    diagnosis = looked(bundle, tmp_path, turned)
    assert about(diagnosis, "GPU 0, used").status == "problem"
    assert about(diagnosis, "GPU 1").status == "ok"
    assert about(diagnosis, "NVRTC").found.endswith("compiles the crop kernel for sm_90")  # of the one that is used
    assert not diagnosis.healthy


LIBCUDA = r"""
#include <string.h>
typedef unsigned long size;
static int current = -1;
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, device ? "Two" : "One", length); return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = what == 75 ? 8 + device : 7 * !device; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(device + 1L); return device ? 2 : 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(void *context) { current = (int)(long)context - 1; return 0; }
int cuMemGetInfo_v2(size *free, size *total) { *free = 5UL << 30; *total = 8UL << 30; return current != 0; }
"""


def test_the_driver_s_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a library in the driver's place, whose second GPU can't be opened."""
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("no C compiler")
    (tmp_path / "cuda.c").write_text(LIBCUDA)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, tmp_path / "cuda.c"], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    answer = ask("driver", seconds=60)
    one = {"name": "One", "capability": 87, "status": 0, "free": 5 << 30, "total": 8 << 30}
    two = {"name": "Two", "capability": 90, "status": 2, "free": 0, "total": 0}
    assert answer == answered(cuda=12060, status=0, devices=[one, two])


def test_a_container_that_hides_the_board(bundle: Path, tmp_path: Path) -> None:
    diagnosis = looked(bundle, tmp_path, PLAIN, files={"proc/device-tree/model": "NVIDIA Jetson Orin Nano"})
    assert [about(diagnosis, name).status for name in ("JetPack", "power mode")] == ["warning", "warning"]
    assert diagnosis.healthy


KERNEL = {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Release Build\n"}
PCI = {
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
    "sys/bus/pci/devices/0000:00:01.0/vendor": "0x8086\n",
}
BRIDGE = PCI | {"sys/bus/pci/devices/0000:01:00.0/class": "0x068000\n"}  # of an NVLink switch, not of a GPU


@pytest.mark.parametrize(("driver", "files", "environment", "status", "found"), [
    (ABSENT, PCI, {}, "warning", "an NVIDIA GPU at PCI 0000:01:00.0, but libcuda can't be loaded"),
    (Outcome("hung", "no answer within 60 s"), {}, {}, "problem", "the CUDA driver fails: no answer within 60 s"),
    (Outcome("crashed", "ended by SIGSEGV"), {}, {}, "problem", "the CUDA driver fails: ended by SIGSEGV"),
    (answered(cuda=13000, status=803, devices=[]), KERNEL, {}, "problem",
     "/proc/driver/nvidia/version is there, but CUDA finds no device (error 803); driver 580.95.05, CUDA 13.0"),
    (answered(cuda=13000, status=100, devices=[]), KERNEL, {"CUDA_VISIBLE_DEVICES": ""}, "warning",
     "none that CUDA_VISIBLE_DEVICES='' shows; driver 580.95.05, CUDA 13.0"),
    (answered(cuda=13000, status=803, devices=[]), KERNEL, {"CUDA_VISIBLE_DEVICES": "0"}, "problem",
     "/proc/driver/nvidia/version is there, but CUDA finds no device (error 803); driver 580.95.05, CUDA 13.0"),
    (answered(cuda=12040, status=100, devices=[]), {}, {}, "absent", "none; driver unknown, CUDA 12.4"),
    (ABSENT, BRIDGE, {}, "absent", "no NVIDIA GPU and no CUDA driver"),
])  # fmt: skip
def test_gpus_that_do_not_work(
    driver: Outcome, files: dict[str, str], environment: dict[str, str], status: str, found: str,
    bundle: Path, tmp_path: Path,
) -> None:  # fmt: skip
    diagnosis = looked(bundle, tmp_path, PLAIN | {"driver": driver}, files=files, environment=environment)
    finding = about(diagnosis, "GPU")
    assert (finding.status, finding.found) == (status, found)
    assert diagnosis.healthy == (status != "problem")
    assert diagnosis.working == ("ort-cpu",)


@pytest.mark.usefixtures("all_backends")
@pytest.mark.parametrize(("changed", "packages", "subject", "status", "found", "advice"), [
    ({}, [], "cuda-python", "warning", "not installed", "pip install 'kp-edge[cuda12]'"),
    ({}, ["cuda-bindings==13.0.1"], "cuda-python", "problem", "13.0.1 is for a newer CUDA than the driver's 12",
     "pip install 'kp-edge[cuda12]', or update the driver"),
    ({"nvrtc sm_87": Outcome("failed", "preprocess.cu can't be compiled")}, [], "NVRTC", "warning",
     "preprocess.cu can't be compiled", "KP_CUBIN"),
    ({"nvrtc": Outcome("failed", "NVRTC can't be loaded")}, [], "NVRTC", "warning", "can't be loaded", "KP_CUBIN"),
    ({"nvrtc": Outcome("crashed", "ended by SIGSEGV")}, [], "NVRTC", "problem", "ended by SIGSEGV", "KP_CUBIN"),
    ({"crops": answered(levels=8192, different=3)}, [], "GPU crops", "problem", "3 of 8192 grey levels", "report it"),
    ({"crops": Outcome("hung", "no answer")}, [], "GPU crops", "problem", "no answer", "engine works on the GPU"),
    ({}, ["onnxruntime==1.23.0", "onnxruntime-gpu==1.22.0"], "ONNX Runtime", "problem",
     "onnxruntime and onnxruntime-gpu are installed", "pip uninstall -y onnxruntime onnxruntime-gpu, then"),
    ({}, ["onnxruntime-gpu==1.22.0"], "ONNX Runtime", "problem", "1.22.0 is recorded, but 1.23.0 is imported",
     "pip install --force-reinstall --no-deps onnxruntime-gpu"),
    ({}, ["onnxruntime-gpu==1.23.0.post1"], "ONNX Runtime", "ok", "1.23.0: TensorrtExecutionProvider", ""),
    ({"onnxruntime": answered(version="1.23.0", providers=CPU, gpu_code=None)}, ["onnxruntime==1.23.0"],
     "ONNX Runtime on the GPU", "warning", "no CUDA provider", "no wheel on PyPI has code for a Jetson's GPU"),
    ({"onnxruntime": answered(version="1.23.0", providers=CPU, gpu_code=None),
      "driver": answered(cuda=12060, status=0, devices=[DEVICE | {"capability": 90}])}, ["onnxruntime==1.23.0"],
     "ONNX Runtime on the GPU", "warning", "no CUDA provider", "pip uninstall -y onnxruntime, then"),
    ({"onnxruntime": answered(version="1.23.0", providers=GPU, gpu_code={"machine_code": [80, 90], "ptx": []})}, [],
     "ONNX Runtime on the GPU", "problem", "code for sm_80, sm_90, none that sm_87 runs", "tensorrt (kp plan)"),
    ({"module tensorrt": Outcome("failed", "ImportError: libnvinfer.so.10")}, [], "TensorRT", "problem",
     "tensorrt can't be imported: ImportError: libnvinfer.so.10", "python3-libnvinfer"),
    ({"module tensorrt": answered(version="8.6.2")}, [], "TensorRT", "warning",
     "tensorrt 8.6.2: too old to build plans or to run them", "install TensorRT 10.3 or newer"),
    ({"module tensorrt_lean": answered(version="10.4.0")}, [], "TensorRT", "warning", "tensorrt_lean 10.4.0", "one"),
    ({}, ["tensorrt-cu12==10.3.0", "tensorrt-cu13==10.3.0"], "TensorRT", "problem", "not for one CUDA",
     "pip uninstall -y tensorrt-cu12 tensorrt-cu13, then pip install tensorrt-cu12"),
    ({}, ["tensorrt-cu13==10.3.0"], "TensorRT", "problem", "not for one CUDA", "pip install tensorrt-cu12"),
    ({}, ["tensorrt-cu11==10.3.0"], "TensorRT", "ok", "10.3.0", ""),
    ({"module tensorrt": ABSENT}, [], "TensorRT", "warning", "not installed", "pip install tensorrt-cu12"),
    ({}, ["opencv-python==4.12", "opencv-contrib-python-headless==4.12"], "OpenCV", "problem",
     "opencv-contrib-python-headless and opencv-python are installed", "then install one"),
    ({"cv2": ABSENT}, [], "OpenCV", "warning", "not installed", "kp-edge[image]"),
    ({"cv2": answered(version="9.0.0", sampling="numpy")}, [], "OpenCV", "warning",
     "9.0.0 samples otherwise than training did; crops are cut in numpy", "kp-edge[image]"),
    ({"cv2": Outcome("failed", "ImportError: bad")}, ["opencv-python==4.12"], "OpenCV", "problem",
     "can't be imported: ImportError: bad", "pip install --force-reinstall opencv-python"),
    ({"backend ort-cuda": Outcome("crashed", "ended by SIGSEGV")}, [], "ort-cuda", "problem", "by SIGSEGV", "fit"),
    ({"backend ort-cuda": Outcome("crashed", "ended by SIGKILL, as")}, [], "ort-cuda", "problem", "KILL", "memory"),
    ({"backend ort-cuda": Outcome("hung", "no answer within 300 s")}, [], "ort-cuda", "problem", "300 s", "--timeout"),
    ({"backend ort-cuda": Outcome("failed", "no cuDNN")}, [], "ort-cuda", "problem", "no cuDNN", "another backend"),
    ({"backend tensorrt": answered(file="model.plan", golden_error_px=0.5, warnings=["built with 8", "b"])}, [],
     "tensorrt", "warning", "0.500 px from PyTorch's; built with 8; b", "build a plan here"),
    ({"backend tensorrt": Outcome("failed", "no plan for sm_87")}, [], "tensorrt", "warning", "for sm_87", "an"),
    ({"backend tensorrt": Outcome("failed", "puts a golden keypoint 9 px")}, [], "tensorrt", "problem", "9 px", "an"),
])  # fmt: skip
def test_what_does_not_fit(
    changed: dict[str, Outcome], packages: list[str], subject: str, status: str, found: str, advice: str,
    planned: Path, tmp_path: Path,
) -> None:  # fmt: skip
    diagnosis = looked(planned, tmp_path, WITH_GPU | changed, packages, JETSON_FILES)
    finding = about(diagnosis, subject)
    assert finding.status == status
    assert found in finding.found
    assert advice in finding.advice
    assert diagnosis.healthy == (status != "problem")
    assert "ort-cpu" in diagnosis.working


def test_numpy_2_beside_a_system_s_opencv(bundle: Path, tmp_path: Path) -> None:
    answers = PLAIN | {"cv2": Outcome("failed", "ImportError: numpy.core.multiarray failed to import")}
    finding = about(looked(bundle, tmp_path, answers, numpy="2.1.0"), "OpenCV")
    assert (finding.status, finding.advice) == ("problem", "pip install 'numpy<2'")
    assert "numpy is 2.1.0" in finding.found
    finding = about(looked(bundle, tmp_path, answers, ["opencv-python==4.12"], numpy="2.1.0"), "OpenCV")
    assert finding.advice == "pip install --force-reinstall opencv-python"


def test_the_opencv_of_this_machine() -> None:
    way = way_to_sample().__name__.removeprefix("_by_")
    assert ask("cv2", seconds=60) == answered(version=cv2.__version__, sampling=way)


@pytest.mark.parametrize(
    ("answer", "status", "found"),
    [
        (answered(name="own=wheel", missed=""), "ok", "own=wheel"),
        (answered(name="haar", missed="Haar, since …"), "warning", "Haar, since"),
        (Outcome("failed", "own=x is damaged"), "problem", "own=x is damaged"),
        (Outcome("absent", "OpenCV is not installed"), "absent", "OpenCV"),
    ],
)
def test_the_face_detector(bundle: Path, tmp_path: Path, answer: Outcome, status: str, found: str) -> None:
    finding = about(looked(bundle, tmp_path, PLAIN | {"detector": answer}), "detector")
    assert finding.status == status
    assert found in finding.found


def test_the_detector_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KP_DETECTOR", f"own={DETECTOR}")
    assert ask("detector", "", seconds=60) == answered(name=f"own={DETECTOR}", missed="")
    monkeypatch.setenv("KP_DETECTOR", "own=nowhere")
    answer = ask("detector", "", seconds=60)
    assert answer.state == "failed"
    assert "nowhere is not a bundle" in answer.text


def test_an_opencv_that_hides_another(bundle: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "wheel", tmp_path / "system"]
    (folders[0] / "cv2").mkdir(parents=True)
    folders[1].mkdir()
    (folders[1] / "cv2.cpython-310-aarch64-linux-gnu.so").touch()
    finding = about(looked(bundle, tmp_path, PLAIN, folders=[*folders, folders[0]]), "OpenCV")
    assert finding.status == "warning"
    assert finding.found == f"4.12.0 in {folders[0]} hides another one in {folders[1]}"


def test_what_may_not_be_read_is_no_end_of_the_report(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, look = tmp_path / "locked", os.stat

    def refused(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{locked}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path, *arguments, **options)

    shutil.copytree(bundle, locked / "bundle")
    monkeypatch.setattr(os, "stat", refused)
    assert about(looked(bundle, tmp_path, PLAIN, folders=[locked / "site"]), "OpenCV").status == "ok"
    assert about(looked(locked / "bundle", tmp_path, PLAIN), "bundle").subject == "bundle"
    outside = tmp_path / "model.onnx"
    outside.touch()
    assert "lies in no bundle" in about(looked(outside, tmp_path, PLAIN), "bundle").found


@pytest.mark.parametrize("hidden", ["proc/driver/nvidia/version", "sys/bus/pci/devices/0000:01:00.0/vendor"])
def test_files_of_the_system_that_are_hidden_are_no_end_of_the_report(
    hidden: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, read = os.stat, Path.read_text

    def refuse(path: Any) -> None:
        if str(path) == str(tmp_path / hidden):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", lambda path, *given, **named: refuse(path) or look(path, *given, **named))
    monkeypatch.setattr(Path, "read_text", lambda path, *given, **named: refuse(path) or read(path, *given, **named))
    diagnosis = looked(bundle, tmp_path, PLAIN, files={"sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de"})
    assert about(diagnosis, "GPU").status == "absent"
    assert diagnosis.healthy


def test_of_two_packages_of_a_name_the_one_that_python_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1", "2"):
        (tmp_path / version / f"d-{version}.dist-info").mkdir(parents=True)
        (tmp_path / version / f"d-{version}.dist-info/METADATA").write_text(f"Name: d\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / version) for version in ("1", "2")])
    assert Surroundings.here().packages == {"d": "1"}


def test_damaged_records_of_packages_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = {
        "a": b"Name: \xff\nVersion: 1\n",
        "b": b"Version: 1\n",
        "c": b"Name: c\n",
        "d": b"Name: D_d\nVersion: 2\n",
    }
    for name, text in records.items():
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info" / "METADATA").write_bytes(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert Surroundings.here().packages == {"d-d": "2"}


@pytest.mark.usefixtures("all_backends")
def test_backends_that_do_not_claim_to_work_are_not_tried(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "half", precision="fp16")
    answers = WITH_GPU | {"module tensorrt": ABSENT}
    answers = {name: answer for name, answer in answers.items() if "backend" not in name} | {
        "backend ort-cuda": WITH_GPU["backend ort-cuda"],
        "backend ort-cpu": PLAIN["backend ort-cpu"],
    }
    diagnosis = looked(bundle, tmp_path, answers)
    assert diagnosis.working == ("ort-cuda", "ort-cpu")
    assert about(diagnosis, "ort-tensorrt").found == "TensorRT is not installed"
    library = {"usr/lib/aarch64-linux-gnu/libnvinfer.so.10": ""}
    diagnosis = looked(bundle, tmp_path, WITH_GPU | answers | {"module tensorrt": ABSENT}, files=library)
    assert about(diagnosis, "ort-tensorrt").status == "ok"
    assert about(diagnosis, "tensorrt").found == "the bundle has no plan; kp plan builds one"


@pytest.mark.usefixtures("all_backends")
def test_a_bundle_without_a_file_for_the_gpu_is_no_fault_of_the_machine(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "packed")
    manifest = Manifest.read(bundle)
    files = {name: dataclasses.replace(entry, precision="int8") for name, entry in manifest.files.items()}
    dataclasses.replace(manifest, files=files).write(tmp_path / "packed")
    answers = {name: answer for name, answer in WITH_GPU.items() if "backend" not in name}
    diagnosis = looked(tmp_path / "packed", tmp_path, answers | {"backend ort-cpu": PLAIN["backend ort-cpu"]})
    assert diagnosis.healthy
    for name, kinds in (("ort-cuda", "fp16 or fp32"), ("ort-tensorrt", "int8-trt or fp16")):
        finding = about(diagnosis, name)
        told = f"the bundle has no {kinds} file; kp export BUNDLE --fp16 --out FOLDER makes one"
        assert (finding.status, finding.found) == ("absent", told)


def test_a_crash_on_the_cpu_is_no_fault_of_a_gpu(bundle: Path, tmp_path: Path) -> None:
    crash = Outcome("crashed", "the process was ended by SIGSEGV")
    finding = about(looked(bundle, tmp_path, PLAIN | {"backend ort-cpu": crash}), "ort-cpu")
    assert "memory is short" in finding.advice
    assert "GPU" not in finding.advice


def test_nothing_works(bundle: Path, tmp_path: Path) -> None:
    diagnosis = looked(bundle, tmp_path, PLAIN | {"onnxruntime": ABSENT})
    assert (diagnosis.working, diagnosis.healthy) == ((), False)
    assert about(diagnosis, "ONNX Runtime").status == "warning"
    assert about(diagnosis, "backends").status == "problem"


def test_no_bundle_and_a_damaged_one(bundle: Path, tmp_path: Path) -> None:
    assert about(looked(None, tmp_path, PLAIN), "bundle").found == "none was named"
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    (broken / "model.fp32.onnx").write_bytes(b"")
    diagnosis = looked(broken, tmp_path, PLAIN)
    assert "has 0 bytes" in about(diagnosis, "bundle").found
    assert about(diagnosis, "ort-cpu").status == "absent"
    assert not diagnosis.healthy


def test_wrong_keypoints_are_a_problem(bundle: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(bundle, wrong)
    with np.load(bundle / "golden.npz") as golden:
        np.savez(wrong / "golden.npz", **{**golden, "keypoints": golden["keypoints"] + 5})
    manifest = Manifest.read(wrong)
    golden_entry = {"golden.npz": file_entry(wrong / "golden.npz", "golden")}
    dataclasses.replace(manifest, files=manifest.files | golden_entry).write(wrong)
    answer = ask("backend", "ort-cpu", str(wrong), seconds=60)
    assert answer.state == "failed"
    assert "golden keypoint" in answer.text  # what tells a wrong plan from one that does not fit
    finding = about(looked(wrong, tmp_path, PLAIN | {"backend ort-cpu": answer}), "ort-cpu")
    assert finding.status == "problem"


def test_how_the_cpu_cuts_the_golden_crop(bundle_with_image: Path, tmp_path: Path) -> None:
    answer = ask("backend", "ort-cpu", str(bundle_with_image), seconds=60)
    found = about(looked(bundle_with_image, tmp_path, PLAIN | {"backend ort-cpu": answer}), "ort-cpu").found
    assert found == "model.fp32.onnx: golden keypoints 0.000 px from PyTorch's, golden crop 0 grey levels off"


def test_a_bundle_without_a_golden_crop_proves_nothing(bundle: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(bundle, bare)
    manifest = Manifest.read(bare)
    files = {name: entry for name, entry in manifest.files.items() if name != "golden.npz"}
    dataclasses.replace(manifest, files=files).write(bare)
    answer = ask("backend", "ort-cpu", str(bare), seconds=60)
    assert (answer.state, "no golden crop" in answer.text) == ("failed", True)
