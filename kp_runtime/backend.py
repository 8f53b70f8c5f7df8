"""What every inference engine does the same: the checks, the golden crop, the choice.

`Backend` owns the contract of `ModelSpec`; an engine fills in `_run` alone. `open_backend` picks
a file and an engine, says why, and compares the golden crop before anything is returned.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from kp_runtime.cores import check_process, checked_cores, checked_threads, on_cores, usable_cores
from kp_runtime.cuda_driver import CudaDriver, has_driver
from kp_runtime.errors import BackendError, InputError
from kp_runtime.files import as_path
from kp_runtime.frame import import_cv2
from kp_runtime.golden import GOLDEN_NAME, Golden, check_golden_crop, golden_from_bytes
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.spec import PRECISIONS, FileEntry, Manifest, ModelSpec, folder_of

__all__ = [
    "BACKENDS",
    "GOLDEN_NAME",
    "MADE_BY",
    "Answer",
    "Backend",
    "BackendReport",
    "best_first",
    "golden_error",
    "kind_of",
    "open_backend",
    "warmup_sizes",
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


@dataclass(frozen=True)
class BackendReport:
    """What was opened and why.

    Attributes:
        backend: the engine's name, such as `ort-cpu`.
        file: the bundle's file that runs.
        precision: of that file.
        rejected: what would have been preferred, engines and then precisions, each with the reason against it.
        golden_error_px: largest distance of the golden keypoints; None where none were compared.
        warnings: what speaks against the file, which runs all the same, such as a plan of another board's GPU.
    """

    backend: str
    file: str
    precision: str
    rejected: tuple[str, ...]
    golden_error_px: float | None
    warnings: tuple[str, ...] = ()


class Answer(NamedTuple):
    """What the network gives for `n` crops.

    Attributes:
        keypoints: `(n, 68, 2)` float32, pixels of the crop, x then y.
        lost_score: `(n,)` float32, see `ModelSpec`; None of a model that does not say.
    """

    keypoints: NDArray[np.float32]
    lost_score: NDArray[np.float32] | None = None

    @classmethod
    def empty(cls, spec: ModelSpec) -> Answer:
        """That of no crop."""
        return cls.of([np.empty((0, *shape), np.float32) for shape in spec.outputs.values()])

    @classmethod
    def of(cls, outputs: Sequence[NDArray[np.float32]]) -> Answer:
        """That of the arrays of `ModelSpec.outputs`."""
        return cls(outputs[0], outputs[1].reshape(-1) if len(outputs) > 1 else None)

    def outputs(self) -> list[NDArray[np.float32]]:
        """The arrays of `ModelSpec.outputs`."""
        return [self.keypoints] if self.lost_score is None else [self.keypoints, self.lost_score[:, None]]


class Backend(ABC):
    """An engine with a model in it: crops in, keypoints out.

    Not thread-safe unless the engine's own class says so.

    Attributes:
        name: the engine's, one of `BACKENDS`.
        report: what was opened and why.
        warnings: those of the report.
        cores: where a thread runs while it is in `infer`; None leaves it where it is.
        threads: most threads of the host in a call, the calling one among them.
        golden: the bundle's golden crop; None where none was compared.
    """

    name: str
    report: BackendReport
    warnings: tuple[str, ...] = ()
    cores: frozenset[int] | None = None
    threads: int = 1
    golden: Golden | None = None

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._process = os.getpid()

    def __repr__(self) -> str:
        report = getattr(self, "report", None)  # one that `open_backend` did not open has none
        return f"{type(self).__name__}({self.spec.name!r}, {report.file if report else None!r})"

    def __reduce__(self) -> NoReturn:
        raise InputError("a model and its engine pass to no other process; load() the bundle in each of them")

    def infer(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The keypoints of `answer` alone: `(n, 68, 2)` float32, pixels of the crop, x then y."""
        return self.answer(crops).keypoints

    def answer(self, crops: NDArray[np.uint8]) -> Answer:
        """Runs the network.

        Args:
            crops: `(n, 1, size, size)` uint8, luma, C-contiguous; `n` may be 0.

        Raises:
            BackendError: wrong shape or dtype, the engine failed, or its threads are those of the process that forked
                this one.
        """
        if self.threads > 1:
            check_process(self._process)
        size = self.spec.size
        if crops.dtype != np.uint8 or crops.ndim != 4 or crops.shape[1:] != (1, size, size):
            raise BackendError(
                f"crops must be uint8 (n, 1, {size}, {size}), got {crops.dtype} {crops.shape}; "
                "crops_from_frame makes them"
            )
        if len(crops) == 0:
            return Answer.empty(self.spec)
        with on_cores(self.cores):
            given = self._run(crops)
        for array, shape in zip(given, self.spec.outputs.values(), strict=True):
            if array.shape != (wanted := (len(crops), *shape)) or array.dtype != np.float32:
                raise BackendError(
                    f"{self.name} gave {array.dtype} {array.shape} instead of float32 {wanted}: the file does not "
                    "compute what it declares; export the bundle again"
                )
        return Answer.of(given)

    def warmup(self, faces: int = 1) -> None:
        """Runs 1, 2, 4, … up to `faces` crops, until calls of these sizes find everything ready and chosen.

        Without it the first calls do the same on the way. With many faces it takes about twenty times
        as long as their call.

        Raises:
            InputError: `faces` is under 1.
            BackendError: the engine failed.
        """
        sizes, size = warmup_sizes(faces), self.spec.size
        crops = np.random.default_rng(0).integers(0, 256, (sizes[-1], 1, size, size), dtype=np.uint8)
        for n in sizes:
            self.infer(crops[:n])
            while not self._settled(n):
                self.infer(crops[:n])

    def _settled(self, faces: int) -> bool:
        """Whether nothing is left to be chosen for calls of so many faces."""
        return True

    def check_crops(self) -> int | None:
        """Cuts the golden crop as crops are cut for this engine, most of which take those of the CPU.

        Returns:
            The most grey levels that it is off by; None where the bundle has no image for it, or the CPU no OpenCV
            (a call with an image says so).

        Raises:
            BackendError: it is wrong, or can't be cut on this GPU; says what to do.
        """
        try:
            import_cv2()
        except BackendError:
            return None
        return check_golden_crop(self.golden, self.spec, crops_from_frame)

    def batch_times(self) -> dict[int, dict[str, float]]:
        """What was measured to choose how batches are fed: see `feeding.Feeder.times`; nothing where one way exists."""
        return {}

    def settle(self, faces: int, way: str) -> None:
        """Feeds batches of so many faces in this way, one of `batch_times`, instead of measuring which is fastest.

        Raises:
            InputError: there is no such way.
        """
        raise InputError(f"{self.name} knows one way to feed a batch; {way!r:.40} can't be chosen")

    @abstractmethod
    def _run(self, crops: NDArray[np.uint8]) -> Sequence[NDArray[np.float32]]:
        """Runs at least one crop of the right shape and dtype: an array for each of `ModelSpec.outputs`."""


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
        precision: `auto` or one of `spec.PRECISIONS`; a named one is never replaced by another.
        threads: threads of the engine on the CPU, 1 to the cores that it may use; None uses all of them, or
            as many as a container's CPU quota allows. The calling thread is one of them: with 1 none is started. See
            docs/resources.md.
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


def warmup_sizes(faces: int) -> list[int]:
    """1, 2, 4, … and `faces`: the sizes of calls that a warm-up runs.

    Raises:
        InputError: `faces` is under 1, or no whole number.
    """
    if not isinstance(faces, SupportsIndex) or faces < 1:
        raise InputError(f"warmup needs the number of faces of a call, 1 or more; got {faces!r:.40}")
    faces = int(faces)  # it may be one of numpy's
    return [*(1 << i for i in range(faces.bit_length()) if 1 << i < faces), faces]


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
        engine, name, entry.precision or "fp32", (*rejected, *passed_over), error, backend.warnings
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
    answer = backend.answer(golden.crops)
    worst = float(np.linalg.norm(answer.keypoints - golden.keypoints, axis=-1).max())
    off = 0.0
    if golden.lost_score is not None and answer.lost_score is not None:
        off = float(np.abs(answer.lost_score - golden.lost_score).max())
    most_px = GOLDEN_TOLERANCE_PX[precision] * backend.spec.size / 224
    most = GOLDEN_TOLERANCE_SCORE[precision]
    if not (worst <= most_px and off <= most):
        fault = f"gives a golden crop a lost score {off:.3f} from PyTorch's (at most {most}"
        if not worst <= most_px:
            fault = f"puts a golden keypoint {worst:.3f} px from PyTorch's (at most {most_px:g} px"
        raise BackendError(
            f"{backend.name} {fault} is right for {precision}): this machine computes the model wrongly; try another "
            "precision, and report it"
        )
    return worst
