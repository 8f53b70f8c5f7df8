"""CUDA source to machine code for one kind of GPU, by NVRTC, and kept on disk.

Needs no GPU. An entry's name has a hash of the source and the options, the compute capability and
NVRTC's version; its first line has the sha256 of the rest, so that a damaged entry is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from kp_runtime.cuda_driver import bindings
from kp_runtime.errors import BackendError, KpError, reason_of
from kp_runtime.files import writing

__all__ = ["cache_folder", "cubin_from_source"]

OPTIONS = ("--std=c++17", "--fmad=false")
_HEAD = b"kp-cubin sha256 "


def cache_folder() -> Path:
    """Where compiled kernels and engines are kept: `$KP_CACHE`, or `kp-edge` in the user's cache folder.

    Raises:
        BackendError: the user has no home, and neither variable is set.
    """
    if given := os.environ.get("KP_CACHE"):
        return Path(given)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "kp-edge"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kp-edge"
    except RuntimeError as error:
        raise BackendError("this user has no home; set KP_CACHE to a folder for what is compiled") from error


def cubin_from_source(source: str, arch: str, name: str, folder: Path | None = None) -> bytes:
    """Compiles CUDA source, or takes what an earlier call compiled.

    A folder that can't be written costs the next process a second, and nothing else.

    Args:
        source: CUDA C++.
        arch: such as `sm_87`.
        name: of the program, in messages and file names.
        folder: where results are kept; `cache_folder` when None.

    Raises:
        MissingExtraError: cuda-python is not installed.
        BackendError: NVRTC is missing, does not know the architecture, or finds a fault.
    """
    if not re.fullmatch(r"sm_\d{2,3}[af]?", arch):
        raise BackendError(f"a GPU architecture is named like 'sm_87', got {arch!r}")
    nvrtc = bindings("nvrtc")
    version = _version(nvrtc)
    digest = hashlib.sha256("\0".join((source, *OPTIONS)).encode()).hexdigest()[:16]
    try:
        entry = (folder or cache_folder()) / f"{name}.{arch}.nvrtc{version}.{digest}.cubin"
    except BackendError:  # a user without a home
        return _compiled(nvrtc, source, arch, name, version)
    if (kept := _kept(entry)) is not None:
        return kept
    cubin = _compiled(nvrtc, source, arch, name, version)
    with contextlib.suppress(KpError), writing(entry) as temporary:
        temporary.write_bytes(_HEAD + hashlib.sha256(cubin).hexdigest().encode() + b"\n" + cubin)
    return cubin


def _kept(entry: Path) -> bytes | None:
    """What an entry holds, or None where it is missing or damaged."""
    try:
        head, _, cubin = entry.read_bytes().partition(b"\n")
    except OSError:
        return None
    return cubin if head == _HEAD + hashlib.sha256(cubin).hexdigest().encode() else None


def _version(nvrtc: Any) -> str:
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the loader's errors are of another kind in each release
        raise BackendError(
            f"the crop kernel can't be compiled: NVRTC can't be loaded ({reason_of(error, lines=1)}); put the CUDA "
            "toolkit's lib64 into LD_LIBRARY_PATH, or run: pip install nvidia-cuda-nvrtc (CUDA 12: "
            "nvidia-cuda-nvrtc-cu12), or name a compiled kernel in KP_CUBIN"
        ) from error
    return f"{major}.{minor}"


def _compiled(nvrtc: Any, source: str, arch: str, name: str, version: str) -> bytes:
    status, known = nvrtc.nvrtcGetSupportedArchs()
    known = [f"sm_{number}" for number in known]
    if status == 0 and arch.rstrip("af") not in known:
        raise BackendError(
            f"NVRTC {version} can't compile for {arch}, only for {', '.join(known)}; install another NVRTC, or name a "
            "compiled kernel in KP_CUBIN"
        )
    status, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
    _check(status, name, arch, "")
    try:
        options = [f"--gpu-architecture={arch}".encode(), *(option.encode() for option in OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        _check(status, name, arch, "" if status == 0 else _log(nvrtc, program))
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(status, name, arch, "")
        cubin = b"\0" * size
        (status,) = nvrtc.nvrtcGetCUBIN(program, cubin)  # fills the bytes
        _check(status, name, arch, "")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _log(nvrtc: Any, program: Any) -> str:
    """The first error that the compiler found."""
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b"\0" * size
    nvrtc.nvrtcGetProgramLog(program, log)
    lines = log.decode(errors="replace").strip("\0\n ").splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "")


def _check(status: Any, name: str, arch: str, log: str) -> None:
    if status != 0:
        reason = log or getattr(status, "name", status)
        raise BackendError(f"{name}.cu can't be compiled for {arch}: {reason}; install another NVRTC, or set KP_CUBIN")
