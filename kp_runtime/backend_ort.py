"""ONNX Runtime as the inference engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend import Backend
from kp_runtime.errors import BackendError, MissingExtraError
from kp_runtime.spec import ModelSpec

__all__ = ["OrtCpuBackend"]


class OrtCpuBackend(Backend):
    """ONNX Runtime's CPU provider. `infer` may be called from several threads at once.

    Args:
        model: path of the ONNX file.
        spec: the contract that it must have.
        threads: threads inside an operator; None lets ONNX Runtime use all cores.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BackendError: ONNX Runtime refuses the file, or its inputs are not the contract's.
    """

    name = "ort-cpu"

    def __init__(self, model: Path, spec: ModelSpec, threads: int | None = None) -> None:
        super().__init__(spec)
        ort = _import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        try:
            self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            reason = str(error).strip().splitlines()[-1]
            raise BackendError(
                f"ONNX Runtime {ort.__version__} can't open {model}: {reason}; update onnxruntime or export again"
            ) from error
        self._check_contract(model)

    def _check_contract(self, model: Path) -> None:
        size = self.spec.size
        found = [(n.name, n.type, n.shape[1:]) for n in (*self._session.get_inputs(), *self._session.get_outputs())]
        wanted = [
            ("crops", "tensor(uint8)", [1, size, size]),
            ("keypoints", "tensor(float)", [self.spec.points, 2]),
        ]
        if found != wanted:
            raise BackendError(f"{model} does not have the contract's input and output: {found} instead of {wanted}")

    def _run(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            (keypoints,) = self._session.run(["keypoints"], {"crops": np.ascontiguousarray(crops)})
        except Exception as error:  # as above
            reason = str(error).strip().splitlines()[-1]
            raise BackendError(f"ONNX Runtime failed on {len(crops)} crops: {reason}; try fewer at once") from error
        return keypoints  # type: ignore[no-any-return]


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "ort", "running ONNX files on the CPU") from error
    return onnxruntime
