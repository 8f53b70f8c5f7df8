"""What `kp doctor` says of each part of a machine: a finding, from files, package records and a probe's answer.

What is said of GPUs, TensorRT and Jetsons was tested on made-up machines alone.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from kp_runtime.backend_trt import OLDEST, is_too_old
from kp_runtime.gpu_code import GpuCode
from kp_runtime.machine import JETSON_GPUS, NO_JETSON_WHEEL, driver_version, jetson_from_system
from kp_runtime.probes import Outcome, ask

__all__ = [
    "ABSENT",
    "OK",
    "PROBLEM",
    "WARNING",
    "Finding",
    "Gpu",
    "Surroundings",
    "computer",
    "cuda_python",
    "detector",
    "gpu_crops",
    "gpus_found",
    "jetson",
    "nvrtc",
    "onnxruntime",
    "opencv",
    "provider",
    "tensorrt",
]

OK, ABSENT, WARNING, PROBLEM = "ok", "absent", "warning", "problem"

ORT_WHEELS = re.compile(r"onnxruntime(-gpu|-training|-training-cpu|-openvino|-directml|-silicon|-qnn|-rocm|-migraphx)?")
OPENCV_WHEELS = re.compile(r"opencv(-contrib)?-python(-headless)?")
TENSORRT_WHEELS = re.compile(r"tensorrt-cu(\d+)")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        status: `ok`, `absent` (not here and not needed), `warning` (something could be better) or
            `problem` (something is broken).
        found: what is there.
        advice: what to do, for warnings and problems.
    """

    subject: str
    status: str
    found: str
    advice: str = ""


def _installed() -> dict[str, str]:
    """Installed distributions by normalised name; of two of a name, the one that Python takes."""
    found: dict[str, str] = {}
    for wheel in metadata.distributions():
        with contextlib.suppress(UnicodeDecodeError, OSError):  # a damaged record
            about = wheel.metadata
            if "Name" in about and "Version" in about:
                found.setdefault(re.sub(r"[-_.]+", "-", about["Name"]).lower(), about["Version"])
    return found


def _holds(folder: Path, module: str) -> bool:
    try:
        return (folder / module).is_dir() or any(folder.glob(f"{module}.*.so"))
    except OSError:  # it may not be read: Python's import passes over it too
        return False


@dataclass(frozen=True)
class Surroundings:
    """What is looked at; the defaults are this machine.

    Attributes:
        root: where the system's files lie.
        packages: versions of the installed distributions, by normalised name.
        search_path: folders in which modules are looked for, in order.
        environment: the environment's variables.
        numpy: numpy's version.
        ask: as `probes.ask`.
    """

    root: Path
    packages: Mapping[str, str]
    search_path: Sequence[str]
    environment: Mapping[str, str]
    numpy: str
    ask: Callable[..., Outcome]

    @classmethod
    def here(cls) -> Surroundings:
        """This machine."""
        return cls(Path("/"), _installed(), sys.path, os.environ, np.__version__, ask)

    def wheels(self, pattern: re.Pattern[str]) -> list[str]:
        """Names of the installed distributions that match."""
        return sorted(name for name in self.packages if pattern.fullmatch(name))

    def folders_with(self, module: str) -> list[Path]:
        """Folders of the search path that hold a module, each once."""
        folders = dict.fromkeys(Path(folder).resolve() for folder in self.search_path)
        return [folder for folder in folders if _holds(folder, module)]

    def has_nvinfer(self) -> bool:
        """Whether the system has TensorRT's library, with or without its Python modules."""
        return any((self.root / "usr/lib").glob("*/libnvinfer.so*"))


@dataclass(frozen=True)
class Gpu:
    """The device that is used.

    Attributes:
        capability: its compute capability times ten.
        cuda: major version of the driver's CUDA.
    """

    capability: int
    cuda: int

    @property
    def arch(self) -> str:
        """Its architecture, such as `sm_87`."""
        return f"sm_{self.capability}"


def computer(here: Surroundings) -> Finding:
    """The system, Python, numpy and kp."""
    kp = here.packages.get("kp-edge", "from its source")
    text = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, numpy {here.numpy}, kp {kp}"
    return Finding("computer", OK, text)


def jetson(here: Surroundings) -> list[Finding]:
    """JetPack and the power mode; nothing on other machines."""
    board = jetson_from_system(here.root)
    if board is None:
        return []
    release = Finding("JetPack", WARNING, "no /etc/nv_tegra_release", "in a container, mount it from the host")
    if board.l4t:
        release = Finding("JetPack", OK, f"{_jetpack(here.root)}, L4T {board.l4t.lstrip('# ')}")
    mode = board.power_mode or board.power_status
    clock = f", GPU up to {board.gpu_mhz_most:.0f} MHz" if board.gpu_mhz_most else ""
    power = (
        Finding("power mode", OK, mode + clock)
        if mode
        else Finding("power mode", WARNING, "can't be read", "run: sudo nvpmodel -q")
    )
    return [release, power]


def _jetpack(root: Path) -> str:
    """The version of the package nvidia-jetpack, which a board may lack."""
    try:
        text = (root / "var/lib/dpkg/status").read_text(errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^Package: nvidia-jetpack\n(?:.+\n)*?Version: (\S+)", text, re.MULTILINE)
    return found[1] if found else "nvidia-jetpack is not installed"


def gpus_found(here: Surroundings, answer: Outcome) -> tuple[list[Finding], Gpu | None]:
    """A line for each GPU, the one that is used first, and that device where it answers."""
    devices = answer.facts.get("devices")
    if not devices:
        return [_no_gpu(here, answer)], None
    used = _gpu("GPU" if len(devices) == 1 else "GPU 0, used", devices[0], _versions(here, answer), PROBLEM)
    others = [
        _gpu(f"GPU {i}", device, f"CUDA_VISIBLE_DEVICES={i} takes this one", WARNING)
        for i, device in enumerate(devices[1:], 1)
    ]
    return [used, *others], Gpu(devices[0]["capability"], answer.facts["cuda"] // 1000)


def _gpu(subject: str, device: Mapping[str, Any], more: str, broken: str) -> Finding:
    told = f"{device['name']}, compute capability {device['capability'] / 10:.1f}"
    if device["status"]:
        advice = "end other programs on it, see what nvidia-smi (tegrastats on a Jetson) says of it, or reboot"
        return Finding(subject, broken, f"{told}; it can't be opened (CUDA error {device['status']}); {more}", advice)
    free, total = (device[name] / 2**30 for name in ("free", "total"))
    return Finding(subject, OK, f"{told}, {free:.1f} of {total:.1f} GiB free; {more}")


_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def _no_gpu(here: Surroundings, answer: Outcome) -> Finding:
    """Why there is none."""
    seen = _nvidia_hardware(here.root)
    if answer.broken or answer.state == "failed":
        advice = "see whether nvidia-smi (tegrastats on a Jetson) answers; reboot, or install the driver again"
        return Finding("GPU", PROBLEM, f"the CUDA driver fails: {answer.text}", advice)
    if answer.state == "absent":
        if not seen:
            return Finding("GPU", ABSENT, "no NVIDIA GPU and no CUDA driver")
        advice = "install NVIDIA's driver; in a container, start it with --gpus all (Jetson: --runtime nvidia)"
        return Finding("GPU", WARNING, f"{seen}, but libcuda can't be loaded", advice)
    versions = _versions(here, answer)
    hidden, status = here.environment.get("CUDA_VISIBLE_DEVICES"), answer.facts["status"]
    if hidden is not None and status in (0, _NO_DEVICE):
        advice = "unset CUDA_VISIBLE_DEVICES to use the GPU"
        return Finding("GPU", WARNING, f"none that CUDA_VISIBLE_DEVICES={hidden!r} shows; {versions}", advice)
    if not seen:
        return Finding("GPU", ABSENT, f"none; {versions}")
    advice = "see what nvidia-smi says; kernel module and library must be of one version: reboot after an update"
    text = f"{seen}, but CUDA finds no device (error {status}); {versions}"
    return Finding("GPU", PROBLEM, text, advice)


def _nvidia_hardware(root: Path) -> str | None:
    """What the system's files say of an NVIDIA GPU."""
    for name in ("proc/driver/nvidia/version", "dev/nvidia0", "dev/nvhost-gpu", "dev/nvgpu"):
        if os.path.exists(root / name):  # noqa: PTH110  pathlib's raises where it may not look
            return f"/{name} is there"
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        with contextlib.suppress(OSError):  # not there, or hidden from this user
            vendor, kind = ((folder / name).read_text().strip() for name in ("vendor", "class"))
            if vendor == "0x10de" and kind.startswith("0x03"):  # NVIDIA, a display controller
                return f"an NVIDIA GPU at PCI {folder.name}"
    return None


def _versions(here: Surroundings, answer: Outcome) -> str:
    """The driver's, and the newest CUDA's that it runs."""
    cuda = answer.facts["cuda"]
    return f"driver {driver_version(here.root) or 'unknown'}, CUDA {cuda // 1000}.{cuda % 1000 // 10}"


def cuda_python(here: Surroundings, gpu: Gpu | None) -> Finding:
    """Whether cuda-python is here, and not for a newer CUDA than the driver's."""
    version = here.packages.get("cuda-bindings") or here.packages.get("cuda-python")
    extra = f"pip install 'kp-edge[cuda{gpu.cuda}]'" if gpu else ""
    if version is None:
        text = "not installed"
        return Finding("cuda-python", WARNING, text, extra) if gpu else Finding("cuda-python", ABSENT, text)
    if gpu and int(version.partition(".")[0]) > gpu.cuda:
        text = f"{version} is for a newer CUDA than the driver's {gpu.cuda}"
        return Finding("cuda-python", PROBLEM, text, f"{extra}, or update the driver")
    return Finding("cuda-python", OK, version)


def nvrtc(gpu: Gpu | None, answer: Outcome) -> Finding:
    """Whether the crop kernel was compiled for this chip."""
    advice = "pip install nvidia-cuda-nvrtc (CUDA 12: nvidia-cuda-nvrtc-cu12), or name a compiled kernel in KP_CUBIN"
    if answer.broken:
        return Finding("NVRTC", PROBLEM, answer.text, advice)
    if answer.state != "answered":
        return Finding("NVRTC", WARNING, answer.text, advice) if gpu else Finding("NVRTC", ABSENT, "not usable here")
    return Finding("NVRTC", OK, answer.facts["version"] + (f", compiles the crop kernel for {gpu.arch}" if gpu else ""))


def gpu_crops(answer: Outcome) -> Finding:
    """Whether the crop kernel runs, and gives the CPU's grey levels."""
    if answer.state == "answered":
        different, levels = answer.facts["different"], answer.facts["levels"]
        if different:
            text = f"{different} of {levels} grey levels are not the CPU's"
            return Finding("GPU crops", PROBLEM, text, "report it with this output; meanwhile: --backend ort-cpu")
        return Finding("GPU crops", OK, f"the CPU's, all {levels} grey levels")
    status = PROBLEM if answer.broken else WARNING
    return Finding("GPU crops", status, answer.text, "no engine works on the GPU until cuda-python and NVRTC do")


def onnxruntime(here: Surroundings, answer: Outcome) -> Finding:
    """Whether one ONNX Runtime is here, and is the one that pip recorded."""
    subject, wheels = "ONNX Runtime", here.wheels(ORT_WHEELS)
    if len(wheels) > 1:
        text = f"{' and '.join(wheels)} are installed; they write into one folder"
        return Finding(subject, PROBLEM, text, f"pip uninstall -y {' '.join(wheels)}, then install one of them")
    if answer.state == "absent":
        return Finding(subject, WARNING, "not installed", "pip install 'kp-edge[ort]'")
    if answer.state != "answered":
        advice = f"pip install --force-reinstall --no-deps {wheels[0] if wheels else 'onnxruntime'}"
        return Finding(subject, PROBLEM, f"can't be imported: {answer.text}", advice)
    version, providers = answer.facts["version"], ", ".join(answer.facts["providers"])
    if wheels and not _same_version(here.packages[wheels[0]], version):
        text = f"{wheels[0]} {here.packages[wheels[0]]} is recorded, but {version} is imported"
        return Finding(subject, PROBLEM, text, f"pip install --force-reinstall --no-deps {wheels[0]}")
    return Finding(subject, OK, f"{version}: {providers}")


def _same_version(recorded: str, imported: str) -> bool:
    """Whether the release numbers are equal; a wheel's own suffix (+cu126, .post1) may differ."""
    numbers = [re.match(r"\d+(\.\d+)*", version) for version in (recorded, imported)]
    return all(numbers) and numbers[0][0] == numbers[1][0]  # type: ignore[index]


def provider(here: Surroundings, gpu: Gpu | None, answer: Outcome) -> list[Finding]:
    """Whether ONNX Runtime can use the GPU, as far as its files tell; nothing without a GPU."""
    if gpu is None or answer.state != "answered":
        return []
    subject = "ONNX Runtime on the GPU"
    advice = f"pip uninstall -y {' '.join(here.wheels(ORT_WHEELS)) or 'onnxruntime'}, then install onnxruntime-gpu"
    if gpu.arch in JETSON_GPUS:
        advice = NO_JETSON_WHEEL
    if "CUDAExecutionProvider" not in answer.facts["providers"]:
        return [Finding(subject, WARNING, "it has no CUDA provider", advice)]
    if not answer.facts["gpu_code"]:
        return [Finding(subject, WARNING, "its CUDA provider's library was not found", advice)]
    code = GpuCode(**{kind: frozenset(numbers) for kind, numbers in answer.facts["gpu_code"].items()})
    carried = [f"sm_{number}" for number in sorted(code.machine_code)] + [
        f"PTX {number}" for number in sorted(code.ptx)
    ]
    text = f"code for {', '.join(carried) or 'no GPU'}"
    if not code.runs_on(gpu.capability):
        return [Finding(subject, PROBLEM, f"{text}, none that {gpu.arch} runs", advice)]
    return [Finding(subject, OK, text)]


def tensorrt(here: Surroundings, gpu: Gpu | None, answers: Mapping[str, Outcome]) -> Finding:
    """Whether TensorRT's modules can be imported, are new enough, and for the driver's CUDA."""
    subject = "TensorRT"
    for name, answer in answers.items():
        if answer.state in ("failed", "crashed", "hung"):
            advice = (
                f"pip install --force-reinstall {name.replace('_', '-')}; on a Jetson: apt install python3-libnvinfer"
            )
            return Finding(subject, PROBLEM, f"{name} can't be imported: {answer.text}", advice)
    versions = {name: answer.facts["version"] for name, answer in answers.items() if answer.state == "answered"}
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    if not versions:
        advice = "on a Jetson: apt install python3-libnvinfer; elsewhere: pip install tensorrt-cu" + str(
            gpu and gpu.cuda
        )
        return Finding(subject, WARNING, "not installed", advice) if gpu else Finding(subject, ABSENT, "not installed")
    if any(map(is_too_old, versions.values())):
        advice = f"install TensorRT {OLDEST} or newer: JetPack 6.1 brings 10.3; meanwhile: --backend ort-cpu"
        return Finding(subject, WARNING, f"{told}: too old to build plans or to run them", advice)
    if len(set(versions.values())) > 1:
        return Finding(subject, WARNING, f"{told}: a plan runs in the version that built it", "install one version")
    built_for = {int(found[1]) for name in here.packages if (found := TENSORRT_WHEELS.fullmatch(name))}
    if len(built_for) > 1 or (gpu and any(cuda > gpu.cuda for cuda in built_for)):
        wheels = " and ".join(here.wheels(TENSORRT_WHEELS))
        keep = f"tensorrt-cu{gpu.cuda if gpu else min(built_for)}"
        advice = f"pip uninstall -y {wheels.replace(' and ', ' ')}, then pip install {keep}"
        return Finding(subject, PROBLEM, f"{wheels} are not for one CUDA, the driver's", advice)
    return Finding(subject, OK, told)


def detector(answer: Outcome) -> Finding:
    """Which face detector is used where none is named, and whether it can be."""
    subject = "detector"
    if answer.state == "absent":
        return Finding(subject, ABSENT, answer.text)
    if answer.state != "answered":
        return Finding(subject, PROBLEM, answer.text, "name another one: --detector own=BUNDLE, or yunet=FILE")
    if missed := answer.facts["missed"]:
        return Finding(subject, WARNING, missed, "KP_DETECTOR=haar, if that is what you want")
    return Finding(subject, OK, answer.facts["name"])


def opencv(here: Surroundings, answer: Outcome) -> Finding:
    """Whether one OpenCV is here, fits numpy, and samples as the crop rule says."""
    wheels, folders = here.wheels(OPENCV_WHEELS), here.folders_with("cv2")
    if len(wheels) > 1:
        text = f"{' and '.join(wheels)} are installed; they write into one folder"
        return Finding("OpenCV", PROBLEM, text, f"pip uninstall -y {' '.join(wheels)}, then install one of them")
    if answer.state == "absent":
        advice = "pip install 'kp-edge[image]'; on a Jetson: apt install python3-opencv"
        return Finding("OpenCV", WARNING, "not installed; photos can't be read nor cropped", advice)
    if answer.state != "answered":
        text = f"can't be imported: {answer.text}"
        if int(here.numpy.partition(".")[0]) >= 2 and not wheels:
            return Finding("OpenCV", PROBLEM, f"{text}; numpy is {here.numpy}", "pip install 'numpy<2'")
        return Finding("OpenCV", PROBLEM, text, f"pip install --force-reinstall {wheels[0] if wheels else 'numpy'}")
    if len(folders) > 1:
        others = ", ".join(str(folder) for folder in folders[1:])
        text = f"{answer.facts['version']} in {folders[0]} hides another one in {others}"
        return Finding("OpenCV", WARNING, text, "remove the one that you do not mean")
    if answer.facts["sampling"] == "numpy":
        text = f"{answer.facts['version']} samples otherwise than training did; crops are cut in numpy, slowly"
        return Finding("OpenCV", WARNING, text, "pip install 'kp-edge[image]'")
    return Finding("OpenCV", OK, answer.facts["version"])
