"""What a machine is, as far as it decides how fast things run: enough to tell two results apart.

All is read from files and from one command, none of which has to be there: what is missing is
None. The files of Jetsons are read as NVIDIA's L4T documentation describes them; this was tested
with made-up files alone, never on a Jetson.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kp_runtime.cores import cpu_quota, usable_cores

__all__ = [
    "INSTRUCTIONS",
    "JETSON_GPUS",
    "NO_JETSON_WHEEL",
    "Jetson",
    "Machine",
    "changes",
    "driver_version",
    "jetson_from_system",
    "l4t_release",
    "load_average",
    "machine_conditions",
    "machine_from_system",
]

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
"""Instruction sets that decide how fast float32 and int8 run, by their names in /proc/cpuinfo."""

JETSON_GPUS = ("sm_87", "sm_110")
"""Orin's and Thor's, which no other board has. A container may hide the system's files, but not these."""

NO_JETSON_WHEEL = (
    "no wheel on PyPI has code for a Jetson's GPU, and the Jetson AI Lab's were not tried: take the backend tensorrt "
    "(kp plan), or ort-cpu"
)
"""What is told of ONNX Runtime there."""

_GPU = re.compile(r"gpu|gm20b|gp10b|gv11b|ga10b|gb10b")
"""Names of Jetson GPUs among the devices whose clock changes."""

_BY_ENGINES = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch", "cuda.bindings")
"""Modules that engines on a GPU load; one that does not fit can end a process, so they are not loaded to be asked."""


@dataclass(frozen=True)
class Jetson:
    """What only a Jetson has.

    Attributes:
        l4t: first line of /etc/nv_tegra_release.
        power_mode: what `nvpmodel -q` prints, in one line.
        power_status: /var/lib/nvpmodel/status, in one line.
        gpu_mhz: the GPU's clock now; it is allowed `gpu_mhz_least` to `gpu_mhz_most`.
        gpu_mhz_least: see `gpu_mhz`.
        gpu_mhz_most: see `gpu_mhz`.
    """

    l4t: str | None
    power_mode: str | None
    power_status: str | None
    gpu_mhz: float | None
    gpu_mhz_least: float | None
    gpu_mhz_most: float | None


@dataclass(frozen=True)
class Machine:
    """A machine and the software on it.

    Attributes:
        cpu: the processor's name.
        cores: logical cores of the machine.
        cores_usable: those that this process may run on.
        cpu_quota: cores' worth of time that a container's or systemd unit's limit leaves (cgroup v2).
        architecture: such as `x86_64` or `aarch64`.
        instructions: those of `INSTRUCTIONS` that the processor has.
        mhz: clock of the first core now; its governor may choose `mhz_least` to `mhz_most`.
            Virtual machines mostly do not tell.
        mhz_least: see `mhz`.
        mhz_most: see `mhz`.
        governor: the policy that sets the clock, such as `performance` or `schedutil`.
        memory_mib: main memory.
        system: the operating system's name and version.
        kernel: its kernel's release.
        device: the board's name, where a device tree tells it.
        jetson: None on other machines.
        versions: of python, kp, numpy, onnxruntime and opencv, of NVIDIA's driver, and of those of `_BY_ENGINES` that
            are loaded.
    """

    cpu: str
    cores: int
    cores_usable: int
    cpu_quota: float | None
    architecture: str
    instructions: tuple[str, ...]
    mhz: float | None
    mhz_least: float | None
    mhz_most: float | None
    governor: str | None
    memory_mib: int | None
    system: str
    kernel: str
    device: str | None
    jetson: Jetson | None
    versions: dict[str, str | None]


def machine_from_system(root: Path = Path("/"), *, versions: bool = True) -> Machine:
    """Describes the machine that this runs on; `root` is where its files lie.

    Without `versions` the packages, whose import takes its time, are left out.
    """
    cpufreq = root / "sys/devices/system/cpu/cpu0/cpufreq"
    info = _text(root / "proc/cpuinfo") or ""
    flags = set((_field(info, "flags") or _field(info, "Features") or "").split())
    device = _text(root / "proc/device-tree/model")
    memory = re.search(r"\d+", _field(_text(root / "proc/meminfo") or "", "MemTotal") or "")
    return Machine(
        cpu=_cpu(info),
        cores=os.cpu_count() or 1,
        cores_usable=usable_cores(),
        cpu_quota=cpu_quota(root),
        architecture=platform.machine(),
        instructions=tuple(name for name in INSTRUCTIONS if name in flags),
        mhz=_number(cpufreq / "scaling_cur_freq", 1e3),
        mhz_least=_number(cpufreq / "scaling_min_freq", 1e3),
        mhz_most=_number(cpufreq / "scaling_max_freq", 1e3),
        governor=_text(cpufreq / "scaling_governor"),
        memory_mib=int(memory[0]) // 1024 if memory else None,
        system=(_field(_text(root / "etc/os-release") or "", "PRETTY_NAME", "=") or platform.system()).strip('"'),
        kernel=platform.release(),
        device=device,
        jetson=jetson_from_system(root),
        versions=_versions(root) if versions else {},
    )


def machine_conditions(machine: Machine) -> dict[str, object]:
    """What of a machine decides how fast it is, by a name for people."""
    jetson = machine.jetson
    return {
        "CPU": machine.cpu,
        "device": machine.device,
        "cores": machine.cores,
        "cores that the process may use": machine.cores_usable,
        "CPU quota": machine.cpu_quota or "none",
        "architecture": machine.architecture,
        "instructions": " ".join(sorted(machine.instructions)) or "none",
        "governor": machine.governor,
        "power mode": jetson and (jetson.power_mode or jetson.power_status),
    }


def changes(old: dict[str, object], new: dict[str, object]) -> list[str]:
    """`name old, then new` for each value that differs."""
    names = dict.fromkeys([*old, *new])
    return [
        f"{name} {_word(old.get(name))}, then {_word(new.get(name))}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _word(value: object) -> str:
    return "not known" if value is None else str(value)


def load_average(root: Path = Path("/")) -> tuple[float, ...] | None:
    """Means over 1, 5 and 15 minutes of how many threads wanted to run."""
    try:
        return tuple(map(float, (_text(root / "proc/loadavg") or "").split()[:3])) or None
    except ValueError:
        return None


def jetson_from_system(root: Path = Path("/")) -> Jetson | None:
    """What only a Jetson has; None on other machines. `root` is where its files lie."""
    device = _text(root / "proc/device-tree/model") or ""
    l4t = l4t_release(root)
    if l4t is None and "jetson" not in device.lower():
        return None
    devices = root / "sys/class/devfreq"
    gpu = next((d for d in sorted(devices.glob("*")) if _GPU.search(d.name)), devices)
    return Jetson(
        l4t,
        _output(root, "nvpmodel", "-q"),
        _joined(_text(root / "var/lib/nvpmodel/status")),
        _number(gpu / "cur_freq", 1e6),
        _number(gpu / "min_freq", 1e6),
        _number(gpu / "max_freq", 1e6),
    )


def l4t_release(root: Path = Path("/")) -> str | None:
    """First line of /etc/nv_tegra_release; None where there is none, as on all but Jetsons."""
    text = _text(root / "etc/nv_tegra_release")
    return text.splitlines()[0] if text else None


def driver_version(root: Path = Path("/")) -> str | None:
    """The version of NVIDIA's kernel module; None where the system does not tell."""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+[.\d]*)", _text(root / "proc/driver/nvidia/version") or "")
    return found[1] if found else None


def _cpu(info: str) -> str:
    """The processor's name; ARM's kernels tell numbers alone."""
    if name := _field(info, "model name"):
        return name
    parts = [(key, _field(info, f"CPU {key}")) for key in ("implementer", "part", "variant", "revision")]
    told = " ".join(f"{key} {value}" for key, value in parts if value)
    return told or platform.processor() or platform.machine() or "unknown"


def _versions(root: Path) -> dict[str, str | None]:
    modules = {"kp": "kp_runtime", "numpy": "numpy", "onnxruntime": "onnxruntime", "opencv": "cv2"}
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name, module in modules.items():
        try:
            versions[name] = getattr(importlib.import_module(module), "__version__", None)
        except ImportError:
            versions[name] = None
    versions |= {name: getattr(sys.modules[name], "__version__", None) for name in _BY_ENGINES if name in sys.modules}
    driver = driver_version(root)
    return versions | ({"NVIDIA driver": driver} if driver else {})


def _output(root: Path, command: str, *arguments: str) -> str | None:
    """What a system's command prints, in one line; None where it is missing or fails."""
    for folder in ("usr/sbin", "usr/bin"):
        try:
            done = subprocess.run([str(root / folder / command), *arguments], capture_output=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return _joined(done.stdout.decode(errors="replace"))
    return None


def _text(path: Path) -> str | None:
    """A small file's text without the zero bytes of device trees; None where it can't be read or is empty."""
    try:
        return path.read_bytes().decode(errors="replace").strip("\0 \t\r\n") or None
    except OSError:
        return None


def _joined(text: str | None) -> str | None:
    return " ".join(text.split()) or None if text else None


def _number(path: Path, divisor: float) -> float | None:
    try:
        return float(_text(path) or "") / divisor
    except ValueError:
        return None


def _field(text: str, name: str, mark: str = ":") -> str | None:
    """The first `name: value` of a text."""
    for line in text.splitlines():
        key, found, value = line.partition(mark)
        if found and key.strip() == name:
            return value.strip() or None
    return None
