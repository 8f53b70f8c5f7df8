"""ONNX Runtime as the inference engine."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend import Backend
from kp_runtime.cores import default_threads
from kp_runtime.errors import BackendError, KpError, KpWarning, missing_or_broken, reason_of
from kp_runtime.feeding import WAYS, Feeder, Way
from kp_runtime.in_order import SideBySide
from kp_runtime.spec import ModelSpec

__all__ = ["OrtCpuBackend", "check_contract", "import_onnxruntime", "open_session"]


class OrtCpuBackend(Backend):
    """ONNX Runtime's CPU provider. `infer` may be called from several threads at once.

    Batches are fed as `feeding` finds fastest here: one session uses all threads for a call; a second
    one, made when it is first tried, has one thread and runs the parts of a batch side by side.

    Args:
        model: path of the ONNX file.
        spec: the contract that it must have.
        threads: threads of a call; None is `cores.default_threads`.
        read: gives the file's bytes, for each session anew; the file is read as it is when None.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BackendError: ONNX Runtime refuses the file, or its inputs are not the contract's.
    """

    name = "ort-cpu"

    def __init__(
        self, model: Path, spec: ModelSpec, threads: int | None = None, *, read: Callable[[], bytes] | None = None
    ) -> None:
        super().__init__(spec)
        self._model, self._read = model, read or model.absolute().read_bytes
        self.threads = threads or default_threads()
        session = open_session(model, self._read, self.threads)
        check_contract(session, spec, str(model))
        self._ask = _asker(session, spec)
        self._feeder = Feeder([way for way in WAYS if self.threads > 1 or not way.side_by_side])
        self._lock = threading.Lock()
        self._ask_beside: Ask | None = None

    def _run(self, crops: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        try:
            if len(crops) == 1:
                return self._ask(crops)
            way = self._next_way(len(crops))
            start = time.perf_counter()
            outputs = self._fed(crops, way)
            self._feeder.record(len(crops), way, time.perf_counter() - start)
        except KpWarning:  # who has made warnings errors gets it as it is
            raise
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            reason = reason_of(error)
            raise BackendError(f"ONNX Runtime failed on {len(crops)} crops: {reason}; try fewer at once") from error
        return outputs

    def _next_way(self, faces: int) -> Way:
        """How to feed so many faces, with the second session ready where it needs that."""
        way = self._feeder.next(faces)
        if not way.side_by_side:
            return way
        with self._lock:
            if self._ask_beside is not None:
                return way
            try:
                session = open_session(self._model, self._read, 1)
            except KpError as error:  # the file was exchanged or removed since; the first session goes on
                self._feeder.drop(way)
                warnings.warn(f"faces are no longer fed side by side: {error}", KpWarning, stacklevel=4)
                return self._feeder.next(faces)
            self._ask_beside = _beside(_asker(session, self.spec), self.threads)
        return way

    def _fed(self, crops: NDArray[np.uint8], way: Way) -> list[NDArray[np.float32]]:
        if way.side_by_side:
            assert self._ask_beside is not None  # `_next_way` has made it
            return self._ask_beside(crops)
        if way.part is None:
            return self._ask(crops)
        return _joined([self._ask(crops[i : i + way.part]) for i in range(0, len(crops), way.part)])

    def _settled(self, faces: int) -> bool:
        return faces == 1 or self._feeder.decided(faces)

    def batch_times(self) -> dict[int, dict[str, float]]:
        """See `Backend.batch_times`."""
        return self._feeder.times()

    def settle(self, faces: int, way: str) -> None:
        """See `Backend.settle`."""
        self._feeder.settle(faces, way)


Ask = Callable[[NDArray[np.uint8]], list[NDArray[np.float32]]]


def _asker(session: Any, spec: ModelSpec) -> Ask:
    """What runs a session on crops; it knows nothing of the backend, which goes when its last user does."""
    names = list(spec.outputs)
    return lambda crops: session.run(names, {"crops": crops})


def _beside(ask: Ask, threads: int) -> Ask:
    """Parts of a batch at the same time, each on one thread, through one session, which `ask` runs."""
    pool = SideBySide(threads, "kp-faces")
    return lambda crops: _joined(pool.run(ask, [part for part in np.array_split(crops, threads) if len(part)]))


def _joined(parts: Sequence[list[NDArray[np.float32]]]) -> list[NDArray[np.float32]]:
    """The outputs of the parts of a batch, one behind the other."""
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def check_contract(session: Any, spec: ModelSpec, origin: str) -> None:
    """Compares a session's input and outputs with the contract's; `origin` stands in the message.

    Raises:
        BackendError: they are others.
    """
    try:
        found = [(node.name, node.type, node.shape[1:]) for node in (*session.get_inputs(), *session.get_outputs())]
    except UnicodeDecodeError as error:
        raise BackendError(
            f"{origin} names its inputs or outputs in bytes that are no text; export it again"
        ) from error
    outputs = [(name, "tensor(float)", list(shape)) for name, shape in spec.outputs.items()]
    wanted = [("crops", "tensor(uint8)", [1, spec.size, spec.size]), *outputs]
    if found != wanted:
        raise BackendError(f"{origin} does not have the contract's input and output: {found} instead of {wanted}")


def open_session(model: Path, read: Callable[[], bytes], threads: int) -> Any:
    """An ONNX Runtime session on the CPU, or the error that says why not."""
    ort = import_onnxruntime("ort", "running ONNX files on the CPU")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # its threads wait for each other by spinning, but not for the next call: see docs/resources.md
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # weights outside the file are in no manifest: they are looked for where there are none
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        session = ort.InferenceSession(read(), options, providers=["CPUExecutionProvider"])
    except KpError:  # it is not the file of the manifest
        raise
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        reason = reason_of(error)
        raise BackendError(
            f"ONNX Runtime {ort.__version__} can't open {model}: {reason}; update onnxruntime or export again"
        ) from error
    session._model_bytes = None  # it would keep the file for a change of providers, which there is none of
    return session


def import_onnxruntime(extra: str, purpose: str) -> Any:
    """The module onnxruntime, or the error that names the extra and what it is for.

    Its telemetry (a thread, a database in the user's folder, reports to its maker; Linux, from 1.29 on) stays off
    unless the variable `ORT_DISABLE_TELEMETRY` says 0, or the program imported it before.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_or_broken(error, "onnxruntime", "onnxruntime", extra, purpose) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise BackendError(
            f"ONNX Runtime is not whole: {list(onnxruntime.__path__)} holds none, as after an uninstall of one of two "
            "wheels; remove that folder, then install one wheel again"
        )
    return onnxruntime
