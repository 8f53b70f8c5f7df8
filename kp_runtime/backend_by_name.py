"""Which engine runs a bundle and which of its files, by name or by what works here.

`open_backend` picks both, says why, and compares the golden crop before anything is returned.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kp_runtime.backend import Backend, BackendReport
from kp_runtime.cores import checked_cores, checked_threads, on_cores, usable_cores
from kp_runtime.cuda_driver import CudaDriver, has_driver
from kp_runtime.errors import BackendError, InputError
from kp_runtime.files import as_path
from kp_runtime.golden import GOLDEN_NAME, Golden, golden_from_bytes
from kp_runtime.manifest import PRECISIONS, FileEntry, Manifest, folder_of

__all__ = [
    "AUTO",
    "BACKENDS",
    "CPU_ORDER",
    "GOLDEN_TOLERANCE_PX",
    "MADE_BY",
    "ORDER",
    "best_first",
    "golden_distance",
    "golden_error",
    "kind_of",
    "open_backend",
]

BACKENDS = ("tensorrt", "ort-tensorrt", "ort-cuda", "ort-cpu")
AUTO = ("tensorrt", "ort-cuda", "ort-cpu")
"""What `auto` tries, best first. ONNX Runtime's TensorRT provider takes minutes at its first load: by name alone."""

CPU_ORDER = ("int8", "fp32", "fp16")
"""What ONNX Runtime runs on a CPU, best first: float16 has no fast arithmetic on most of them."""

ORDER = {
    "tensorrt": ("int8", "fp16", "fp32"),
    "ort-tensorrt": ("int8-trt", "fp16"),
    "ort-cuda": ("fp16", "fp32"),
    "ort-cpu": CPU_ORDER,
}
"""The precisions of the files that each engine runs, best first. ONNX Runtime's TensorRT provider computes float32 in
TF32, which no option of it turns off: an fp32 file would be none there."""

GOLDEN_TOLERANCE_PX = {"fp32": 0.02, "fp16": 0.5, "int8": 2.0, "int8-trt": 2.0}
"""Largest distance of a golden keypoint from PyTorch's answer, in pixels of a crop of 224; of others in proportion, as
the limits of an export."""

GOLDEN_TOLERANCE_SCORE = {"fp32": 0.002, "fp16": 0.02, "int8": 0.2, "int8-trt": 0.2}
"""Of its lost score; that of what is no face is about 1."""

MADE_BY = {"plan": ("TensorRT plan", "kp plan"), "onnx": ("ONNX file", "kp export")}
"""Kinds of files that run: what they are called, and the command that makes them."""


def open_backend(
    bundle: str | os.PathLike[str],
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    public_key: str | os.PathLike[str] | bytes | None = None,
    *,
    golden: bool = True,
    cores: Collection[int] | None = None,
) -> Backend:
    """Opens a bundle's model on an inference engine.

    Args:
        bundle: the bundle's folder, or one model file in it, which is then the one that runs.
        backend: `auto` (a TensorRT plan that fits this machine, else ONNX Runtime's CUDA provider, else its CPU
            provider; the report says why; an engine on a GPU that can't cut crops there is passed over) or one of
            `BACKENDS`; a named one is never replaced by another.
        precision: `auto` or one of `manifest.PRECISIONS`; a named one is never replaced by another.
        threads: threads of the engine on the CPU, 1 to the cores that it may use; None uses all of them, or
            as many as its container's or unit's CPU quota allows. The calling thread is one of them: with 1 none is
            started. See docs/resources.md.
        public_key: whose signature the bundle must have: a PEM file's path, its bytes, or the key's
            32 bytes. None asks for none. See docs/signing.md.
        golden: whether the golden crop is compared.
        cores: numbers of the cores that the engine's threads run on, and the calling thread while it is in
            `infer` (Linux). None: those that the calling thread may use.

    Raises:
        InputError: there is no such engine, precision or number of threads; cores that this thread may not use, or
            there is no choosing here; `public_key` is no key.
        BundleError: the bundle or its files can't be used.
        SignatureError: the bundle is not signed by `public_key`.
        BackendError: the engine can't run the model, or its golden keypoints are wrong.
        MissingExtraError: the engine's package is not installed.
    """
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"there is no backend {backend!r}; choose auto or {', '.join(BACKENDS)}")
    if precision not in ("auto", *PRECISIONS):
        raise InputError(f"there is no precision {precision!r}; choose auto or {', '.join(PRECISIONS)}")
    chosen = None if cores is None else checked_cores(cores)
    most = usable_cores() if chosen is None else len(chosen)
    checked_threads(threads, most)
    path = as_path(bundle, "the bundle")
    folder = folder_of(path)
    manifest = Manifest.read(folder, public_key)
    asked = _Asked(folder, manifest, precision, path.name if folder != path else None, threads, chosen, golden)
    engines = [backend] if backend != "auto" else list(AUTO)
    if asked.file is not None:
        _check_named(path, manifest, precision)
        if backend == "auto":
            engines = [engine for engine in AUTO if kind_of(engine) == manifest.files[asked.file].kind]
    rejected: list[str] = []
    for engine in engines[:-1]:
        try:
            opened = _opened(engine, asked, rejected)
            opened.check_crops()
            return opened
        except BackendError as error:
            rejected.append(f"{engine}: {error}")
    try:
        return _opened(engines[-1], asked, rejected)
    except BackendError as error:
        has_plan = any(entry.kind == "plan" for entry in manifest.files.values())
        if not rejected or not (has_plan or has_driver()):
            raise
        raise BackendError(
            f"no engine runs {asked.folder} here: {'; '.join([*rejected, f'{engines[-1]}: {error}'])}"
        ) from error


@dataclass(frozen=True)
class _Asked:
    """What `open_backend` was asked for; `file` is one that was named by its path."""

    folder: Path
    manifest: Manifest
    precision: str
    file: str | None
    threads: int | None
    cores: frozenset[int] | None
    golden: bool


def kind_of(engine: str) -> str:
    """What an engine runs: a file's kind in the manifest."""
    return "plan" if engine == "tensorrt" else "onnx"


def _check_named(path: Path, manifest: Manifest, precision: str) -> None:
    """Checks what the manifest says of a file that was asked for by its path; it is hashed when it is read."""
    entry = manifest.entry(path.parent, path.name)
    if entry.kind not in ("onnx", "plan") or precision not in ("auto", entry.precision):
        raise BackendError(
            f"{path} is a {entry.kind} file of precision {entry.precision}; give an ONNX file or a plan of the bundle"
            + (f" with precision {precision}" if precision != "auto" else "")
        )


def _opened(engine: str, asked: _Asked, rejected: list[str]) -> Backend:
    """One engine with its best file, checked, and with its report."""
    if engine != "ort-cpu" and not has_driver():
        raise BackendError("this machine has no NVIDIA driver (libcuda.so.1); where there is a GPU, install it")
    names, passed_over = _files(engine, asked)
    with on_cores(asked.cores):  # what the engine starts stays there
        name, backend = _open(engine, asked, names, passed_over)
    backend.cores = asked.cores
    entry = asked.manifest.files[name]
    error = _checked_golden(backend, asked, entry) if asked.golden else None
    backend.report = BackendReport(
        engine, name, entry.precision or "fp32", (*rejected, *passed_over), error, backend.warnings, entry.sha256
    )
    return backend


def _files(engine: str, asked: _Asked) -> tuple[list[str], list[str]]:
    """The files that an engine may run, best first, and why not a preferred one."""
    kind, runs = kind_of(engine), ORDER[engine] if engine != "ort-cpu" else PRECISIONS
    what, make = MADE_BY[kind]
    of = {name: str(entry.precision) for name, entry in asked.manifest.files.items() if entry.kind == kind}
    if asked.file is not None and asked.file not in of:
        raise BackendError(f"{asked.file} is no {what}, and {engine} runs nothing else")
    if not of:
        raise BackendError(f"the bundle {asked.folder} holds no {what}; make one with: {make} {asked.folder}")
    wanted = asked.precision if asked.file is None else of[asked.file]
    if wanted not in ("auto", *runs):
        raise BackendError(
            f"{engine} runs files of precision {', '.join(runs)}, not {wanted}; take one of these, or another backend"
        )
    if asked.file is not None:
        return [asked.file], []
    order = ORDER[engine] if wanted == "auto" else (wanted,)
    names = best_first(of, order)
    if not names:
        have = ", ".join(sorted(set(of.values())))
        raise BackendError(
            f"the bundle {asked.folder} has no {' or '.join(order)} file, only {have}; {make} can add it"
        )
    return names, [f"{precision}: not in the bundle" for precision in order[: order.index(of[names[0]])]]


def best_first(precisions: Mapping[str, str], order: Sequence[str]) -> list[str]:
    """The names of a bundle's files that have a precision of `order`, best first.

    A plan for other TensorRTs or GPUs too is slower than one for these alone.
    """
    names = [name for name in precisions if precisions[name] in order]
    return sorted(names, key=lambda name: (order.index(precisions[name]), ".newer." in name or ".ampere." in name))


def _open(engine: str, asked: _Asked, names: list[str], passed_over: list[str]) -> tuple[str, Backend]:
    """One of the files, best first, on an engine: which one, and the engine; `passed_over` gets more reasons."""
    name, folder, manifest = names[0], asked.folder, asked.manifest
    if engine == "tensorrt":
        from kp_runtime.backend_trt import open_plan

        return open_plan(folder, manifest, names, passed_over)
    read = functools.partial(manifest.read_file, folder, name)
    if engine == "ort-cpu":
        from kp_runtime.backend_ort import OrtCpuBackend

        # it is read again, wherever the program is by then
        read = functools.partial(manifest.read_file, folder.absolute(), name)
        return name, OrtCpuBackend(folder / name, manifest.spec, asked.threads, read=read)
    from kp_runtime.backend_ort_gpu import OrtCudaBackend, OrtTensorRtBackend

    provider = OrtCudaBackend if engine == "ort-cuda" else OrtTensorRtBackend
    return name, provider(read(), manifest.files[name], manifest.spec, CudaDriver())


def _checked_golden(backend: Backend, asked: _Asked, entry: FileEntry) -> float | None:
    """`golden_error` of a bundle's golden crop, which the engine then has; None where there is none."""
    if GOLDEN_NAME not in asked.manifest.files:
        return None
    data, origin = asked.manifest.read_file(asked.folder, GOLDEN_NAME), str(asked.folder / GOLDEN_NAME)
    backend.golden = golden_from_bytes(data, asked.manifest.spec, origin)
    return golden_error(backend, backend.golden, entry.precision or "fp32")


def golden_error(backend: Backend, golden: Golden, precision: str) -> float:
    """Largest distance of an engine's answer to the golden keypoints, in pixels of the crop.

    Raises:
        BackendError: the keypoints or the lost scores are farther away than the precision may be.
    """
    worst, fault = golden_distance(backend, golden, precision)
    if fault is not None:
        raise BackendError(
            f"{backend.name} {fault}: this machine computes the model wrongly; try another precision, and report it"
        )
    return worst


def golden_distance(backend: Backend, golden: Golden, precision: str) -> tuple[float, str | None]:
    """As `golden_error`, and in words what is farther away than the precision may be; None where nothing is."""
    answer = backend.answer(golden.crops)
    worst = float(np.linalg.norm(answer.keypoints - golden.keypoints, axis=-1).max())
    off = 0.0
    if golden.lost_score is not None and answer.lost_score is not None:
        off = float(np.abs(answer.lost_score - golden.lost_score).max())
    most_px = GOLDEN_TOLERANCE_PX[precision] * backend.spec.size / 224
    most = GOLDEN_TOLERANCE_SCORE[precision]
    if worst <= most_px and off <= most:
        return worst, None
    fault = f"gives a golden crop a lost score {off:.3f} from PyTorch's (at most {most}"
    if not worst <= most_px:
        fault = f"puts a golden keypoint {worst:.3f} px from PyTorch's (at most {most_px:g} px"
    return worst, f"{fault} is right for {precision})"
