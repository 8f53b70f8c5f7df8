"""Compiling the crop kernel for real GPUs, which needs none, and what is kept of it on disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kp_runtime import preprocess_cuda, probes
from kp_runtime.cubin import cache_folder, cubin_from_source
from kp_runtime.errors import BackendError, MissingExtraError
from kp_runtime.preprocess_cuda import compile_cubin, kernel_source

SOURCE = Path(preprocess_cuda.__file__).with_name("preprocess.cu")


class Compiler:
    """NVRTC's functions, as cuda-python has them; its cubins are the source backwards."""

    def __init__(self) -> None:
        self.version = (12, 6)
        self.compiled: list[tuple[bytes, ...]] = []
        self.error = b""

    def double(self) -> Any:
        return SimpleNamespace(
            nvrtcVersion=lambda: (0, *self.version),
            nvrtcGetSupportedArchs=lambda: (0, [75, 87, 90]),
            nvrtcCreateProgram=lambda source, name, *_: (0, source),
            nvrtcCompileProgram=self.compile,
            nvrtcGetProgramLogSize=lambda program: (0, len(self.error)),
            nvrtcGetProgramLog=lambda program, log: self.fill(log, self.error),
            nvrtcGetCUBINSize=lambda program: (0, len(program)),
            nvrtcGetCUBIN=lambda program, cubin: self.fill(cubin, program[::-1]),
            nvrtcDestroyProgram=lambda program: (0,),
        )

    def compile(self, program: bytes, n: int, options: list[bytes]) -> tuple[int]:
        assert n == len(options)
        self.compiled.append(tuple(options))
        return (6 if self.error else 0,)

    @staticmethod
    def fill(target: bytes, content: bytes) -> tuple[int]:
        """NVRTC writes into the bytes that it is given."""
        import ctypes

        ctypes.memmove(target, content, len(content))
        return (0,)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", found.double())
    return found


def test_an_entry_is_used_again(compiler: Compiler, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for _ in range(3):
        assert cubin_from_source("abc", "sm_87", "test", folder) == b"cba"
    assert len(compiler.compiled) == 1
    assert b"--gpu-architecture=sm_87" in compiler.compiled[0]
    assert b"--fmad=false" in compiler.compiled[0]
    (entry,) = folder.iterdir()
    assert entry.name.startswith("test.sm_87.nvrtc12.6.")


def test_source_gpu_and_compiler_have_entries_of_their_own(compiler: Compiler, tmp_path: Path) -> None:
    cubin_from_source("abc", "sm_87", "test", tmp_path)
    assert cubin_from_source("abd", "sm_87", "test", tmp_path) == b"dba"
    cubin_from_source("abc", "sm_90", "test", tmp_path)
    compiler.version = (12, 8)
    cubin_from_source("abc", "sm_87", "test", tmp_path)
    assert len(compiler.compiled) == len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut off", "changed", "no head", "empty"])
def test_damaged_entries_are_made_again(compiler: Compiler, damage: str, tmp_path: Path) -> None:
    cubin_from_source("abcdef", "sm_87", "test", tmp_path)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    changed = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    entry.write_bytes({"cut off": whole[:-2], "changed": changed, "no head": b"fedcba", "empty": b""}[damage])
    assert cubin_from_source("abcdef", "sm_87", "test", tmp_path) == b"fedcba"
    assert len(compiler.compiled) == 2
    assert entry.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [entry]


def test_a_folder_that_cannot_be_written_costs_only_time(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert cubin_from_source("abc", "sm_87", "test", tmp_path / "file" / "folder") == b"cba"
    assert len(compiler.compiled) == 2


def test_folder(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KP_CACHE", str(tmp_path / "given"))
    assert cache_folder() == tmp_path / "given"
    compile_cubin("sm_87")
    assert len(list((tmp_path / "given").iterdir())) == 1
    monkeypatch.delenv("KP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "kp-edge"


def test_without_a_home_nothing_is_kept(compiler: Compiler, no_home: None) -> None:
    assert cubin_from_source("abc", "sm_87", "test") == b"cba"


def test_faults_in_the_source(compiler: Compiler, tmp_path: Path) -> None:
    compiler.error = b"warning first\ntest.cu(3): error: expected a ';'\nmore\n\0"
    with pytest.raises(
        BackendError, match=r"test\.cu can't be compiled for sm_87: test\.cu\(3\): error: expected a ';'"
    ):
        cubin_from_source("abc", "sm_87", "test", tmp_path)


def test_the_doctor_s_probe_compiles_the_kernel(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KP_CACHE", str(tmp_path))
    compiler.error = b"preprocess.cu(201): error: class has no member\0"
    with pytest.raises(BackendError, match=r"can't be compiled for sm_87: .* no member"):
        probes.nvrtc("sm_87")
    assert probes.nvrtc() == {"version": "12.6"}
    compiler.error = b""
    assert probes.nvrtc("sm_87") == {"version": "12.6"}


def test_a_gpu_that_the_compiler_does_not_know(compiler: Compiler, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"NVRTC 12\.6 can't compile for sm_120, only for sm_75, sm_87, sm_90"):
        cubin_from_source("abc", "sm_120", "test", tmp_path)


@pytest.mark.parametrize("arch", ["8.7", "sm87", "sm_87; rm", ""])
def test_names_that_are_no_architecture(arch: str) -> None:
    with pytest.raises(BackendError, match="is named like 'sm_87', got"):
        compile_cubin(arch)


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(MissingExtraError, match=r"cuda-python, which is not installed; run: pip install 'kp-edge\["):
        compile_cubin("sm_87")


def test_without_nvrtc(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("Failed to dlopen libnvrtc.so.12\nsecond line")

    monkeypatch.setattr(sys.modules["cuda.bindings.nvrtc"], "nvrtcVersion", missing)
    with pytest.raises(
        BackendError, match=r"dlopen libnvrtc\.so\.12\).*LD_LIBRARY_PATH.*pip install nvidia-cuda-nvrtc .*KP_CUBIN$"
    ):
        compile_cubin("sm_87")


@pytest.mark.parametrize("arch", ["sm_75", "sm_87", "sm_90", "sm_110", "sm_120"])
def test_the_kernel_compiles_for(arch: str, tmp_path: Path) -> None:
    """Turing, Jetson Orin, Hopper, Jetson Thor, desktop Blackwell."""
    cubin = really_compiled(arch, tmp_path)
    assert cubin.startswith(b"\x7fELF")
    for bytes_a_pixel in (b"1", b"3", b"4"):
        assert b"kp_crops_v2_" + bytes_a_pixel + b"\0" in cubin


def really_compiled(arch: str, folder: Path) -> bytes:
    """By NVRTC, or nvcc where there is no NVRTC; skips where there is neither, or the GPU is not known."""
    try:
        cubin = compile_cubin(arch, folder)
    except BackendError as error:
        nvcc = shutil.which("nvcc")
        if "error:" in str(error):
            raise
        if nvcc is None:
            pytest.skip(f"no compiler for {arch}, nvcc neither: {error}")
        output = folder / "kernel.cubin"
        command = [nvcc, f"-arch={arch}", "-std=c++17", "-fmad=false", "-cubin", str(SOURCE), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "Unsupported gpu architecture" in done.stderr:
            pytest.skip(f"this nvcc does not know {arch}")
        assert done.returncode == 0, done.stderr
        return output.read_bytes()
    assert compile_cubin(arch, folder) == cubin
    return cubin


def test_source_is_the_file() -> None:
    assert kernel_source() == SOURCE.read_text(encoding="utf-8")
