from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kp_runtime.machine import INSTRUCTIONS, Jetson, load_average, machine_from_system

CPUINFO = """processor\t: 0
model name\t: A Processor: fast
flags\t\t: fpu avx2 avx512f avx512_vnni avx2_not_this

processor\t: 1
model name\t: Another
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp i8mm
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd42
CPU revision\t: 1
"""


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def command(root: Path, text: str) -> None:
    path = put(root, {"usr/sbin/nvpmodel": f"#!/bin/sh\n{text}\n"}) / "usr/sbin/nvpmodel"
    path.chmod(0o755)


def test_a_pc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4}, raising=False)
    cpufreq = "sys/devices/system/cpu/cpu0/cpufreq/"
    root = put(tmp_path, {
        "proc/cpuinfo": CPUINFO,
        "proc/meminfo": "MemFree: 1 kB\nMemTotal:       16384000 kB\n",
        "proc/loadavg": "0.50 1.25 2.00 1/234 5678\n",
        "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04 LTS"\n',
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        cpufreq + "scaling_cur_freq": "2400000\n",
        cpufreq + "scaling_min_freq": "800000\n",
        cpufreq + "scaling_max_freq": "4700000\n",
        cpufreq + "scaling_governor": "powersave\n",
    })  # fmt: skip
    machine = machine_from_system(root)
    assert machine.cpu == "A Processor: fast"
    assert machine.instructions == ("avx2", "avx512f", "avx512_vnni")
    assert (machine.mhz, machine.mhz_least, machine.mhz_most, machine.governor) == (2400, 800, 4700, "powersave")
    assert (machine.memory_mib, machine.system, machine.cpu_quota) == (16000, "Ubuntu 24.04 LTS", 1.5)
    assert (machine.cores, machine.cores_usable) == (7, 3)
    assert (machine.device, machine.jetson) == (None, None)
    assert load_average(root) == (0.5, 1.25, 2.0)


def test_a_board_of_arm(tmp_path: Path) -> None:
    root = put(tmp_path, {"proc/cpuinfo": ARM, "proc/device-tree/model": "Raspberry Pi 5 Model B\0"})
    machine = machine_from_system(root)
    assert machine.cpu == "implementer 0x41 part 0xd42 variant 0x0 revision 1"
    assert machine.instructions == ("asimd", "asimddp", "i8mm")
    assert (machine.device, machine.jetson) == ("Raspberry Pi 5 Model B", None)


def test_a_jetson_as_its_documents_describe_it(tmp_path: Path) -> None:
    put(tmp_path, {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3\n# KERNEL_VARIANT: oot\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "var/lib/nvpmodel/status": "pmode:0002\nfmode:fanNull\n",
        "sys/class/devfreq/15340000.vic/cur_freq": "1\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    })  # fmt: skip
    command(tmp_path, "test \"$1\" = -q && printf 'NV Power Mode: MAXN\\n0\\n'")
    assert machine_from_system(tmp_path).jetson == Jetson(
        "# R36 (release), REVISION: 4.3", "NV Power Mode: MAXN 0", "pmode:0002 fmode:fanNull", 306, 306, 1020
    )
    command(tmp_path, "echo not root; exit 1")
    jetson = machine_from_system(tmp_path).jetson
    assert jetson is not None
    assert jetson.power_mode is None


def test_a_jetson_that_tells_nothing_but_its_name(tmp_path: Path) -> None:
    machine = machine_from_system(put(tmp_path, {"proc/device-tree/model": "NVIDIA Jetson Nano"}))
    assert machine.jetson == Jetson(None, None, None, None, None, None)


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    machine = machine_from_system(tmp_path)
    told = {key for key, value in asdict(machine).items() if value not in (None, ())}
    assert told == {"cpu", "cores", "cores_usable", "architecture", "system", "kernel", "versions"}
    assert load_average(tmp_path) is None


@pytest.mark.parametrize("text", ["max 100000", "-1 100000", "5 0", "5", "a b"])
def test_no_quota(tmp_path: Path, text: str) -> None:
    assert machine_from_system(put(tmp_path, {"sys/fs/cgroup/cpu.max": text})).cpu_quota is None


def test_odd_contents_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_bytes(b"model name : \xff\xfe\n")
    put(tmp_path, {"proc/meminfo": "MemTotal: much\n", "proc/loadavg": "high\n"})
    (tmp_path / "etc/os-release").mkdir(parents=True)
    machine = machine_from_system(tmp_path)
    assert (machine.cpu, machine.memory_mib) == ("\ufffd\ufffd", None)
    assert load_average(tmp_path) is None


def test_this_machine() -> None:
    machine = machine_from_system()
    assert set(machine.instructions) <= set(INSTRUCTIONS)
    assert machine.versions["numpy"] == np.__version__
    assert set(machine.versions) >= {"python", "kp", "numpy", "onnxruntime", "opencv"}


def test_versions_of_what_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_lean", "tensorrt_dispatch", "cuda.bindings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert not {"tensorrt", "cuda.bindings", "NVIDIA driver"} & machine_from_system(tmp_path).versions.keys()
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(__version__="12.9.4"))
    put(tmp_path, {"proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Kernel Module  540.4.0  Release Build\n"})
    versions = machine_from_system(tmp_path).versions
    told = versions["tensorrt"], versions["cuda.bindings"], versions["NVIDIA driver"]
    assert told == ("10.3.0", "12.9.4", "540.4.0")
