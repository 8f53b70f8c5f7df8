"""What every inference engine does the same. `Backend` owns the contract of `ModelSpec`; an engine fills in `_run`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from kp_runtime.cores import check_process, on_cores
from kp_runtime.errors import BackendError, InputError
from kp_runtime.frame import import_cv2
from kp_runtime.golden import Golden, check_golden_crop
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.spec import ModelSpec

__all__ = ["Answer", "Backend", "BackendReport", "warmup_sizes"]


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
        sha256: of the file, as the manifest has it.
    """

    backend: str
    file: str
    precision: str
    rejected: tuple[str, ...]
    golden_error_px: float | None
    warnings: tuple[str, ...] = ()
    sha256: str | None = None


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
        name: the engine's, one of `backend_by_name.BACKENDS`.
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
        report = getattr(self, "report", None)  # one that was not opened by its name has none
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

    def check_finite(self, answer: Answer) -> None:
        """Refuses an answer with a number that is none; `answer` itself gives it, for `kp verify` to look at.

        Raises:
            BackendError: a keypoint or a lost score is not finite.
        """
        if not all(np.isfinite(array).all() for array in answer.outputs()):
            report = getattr(self, "report", None)  # as in __repr__
            raise BackendError(
                f"{report.file if report else self.spec.name} on {self.name} answers points that are not finite, as "
                "fp16 does that overflows; take fp32, and ask kp verify which of the bundle's files are right"
            )

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


def warmup_sizes(faces: int) -> list[int]:
    """1, 2, 4, … and `faces`: the sizes of calls that a warm-up runs.

    Raises:
        InputError: `faces` is under 1, or no whole number.
    """
    if not isinstance(faces, SupportsIndex) or faces < 1:
        raise InputError(f"warmup needs the number of faces of a call, 1 or more; got {faces!r:.40}")
    faces = int(faces)  # it may be one of numpy's
    return [*(1 << i for i in range(faces.bit_length()) if 1 << i < faces), faces]
