"""A session of ONNX Runtime's GPU providers without a GPU: its CPU provider's, on the double of the driver.

What is real here: the session, its options, its record of what runs where, and the binding of our own
buffers. A call waits in the stream of the double until somebody waits for it, as a GPU's does, and can be captured
into the double's graphs after two plain ones, as ONNX Runtime's memory arena needs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from tests.cuda_driver_double import DriverDouble, Result

REAL = onnxruntime.InferenceSession


class Session:
    """A session on the CPU that says it is on the GPU.

    Attributes:
        said: what the last one was opened with.
        open: how many there are.
        room: how many more can be opened; None: any number.
        elsewhere: operators that run on the CPU.
        left_out: whether the provider was.
        fails: why no call succeeds.
        captured: what its captured calls do wrong: waits, frees, runs elsewhere, keeps its crops.
    """

    said: Any = None
    driver: DriverDouble
    open = 0
    room: int | None = None
    elsewhere: tuple[str, ...] = ()
    left_out = False
    fails = ""
    captured = ""

    def __init__(self, model: bytes, options: Any, providers: list[Any], enable_fallback: int) -> None:
        wanted = {"session.disable_cpu_ep_fallback": "1", "session.record_ep_graph_assignment_info": "1"}
        assert {key: options.get_session_config_entry(key) for key in wanted} == wanted
        assert enable_fallback == 0
        if self.room == 0:
            raise RuntimeError("Failed to allocate memory")
        if self.room is not None:
            type(self).room = self.room - 1
        type(self).open += 1
        self._runs, self._kept = 0, b""
        ((self._provider, chosen),) = providers
        type(self).said = SimpleNamespace(provider=self._provider, options=chosen)
        if kept := chosen.get("trt_engine_cache_path"):
            Path(kept).mkdir(exist_ok=True)  # the provider makes one level alone
        own = onnxruntime.SessionOptions()
        own.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self._real = REAL(model, own, providers=["CPUExecutionProvider"])
        self._stream = int(chosen["user_compute_stream"])

    def __del__(self) -> None:
        type(self).open -= "_runs" in self.__dict__  # one that could not be opened has none

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def io_binding(self) -> Binding:
        return Binding(self._real.io_binding())

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"] if self.left_out else [self._provider, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        def where(node: Any) -> str:
            return "CPUExecutionProvider" if node.op_type in self.elsewhere else self._provider

        real = [SimpleNamespace(op_type="Cast"), SimpleNamespace(op_type="Reshape")]
        if hasattr(REAL, "get_provider_graph_assignment_info"):  # not in the oldest release
            real = [node for part in self._real.get_provider_graph_assignment_info() for node in part.get_nodes()]
        return [SimpleNamespace(ep_name=where(node), get_nodes=lambda node=node: [node]) for node in real]

    def run_with_iobinding(self, binding: Binding, run_options: Any) -> None:
        assert run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        if self.fails:
            raise RuntimeError(self.fails)
        captured = self.captured if self._stream in self.driver.captures else ""
        if self._stream in self.driver.captures and (self._runs < 2 or captured == "waits"):
            assert self.driver.cuStreamSynchronize(self._stream)[0] != Result.CUDA_SUCCESS  # as cudaMalloc, too
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        self._runs += 1
        if captured == "frees":
            self.driver.work(self._stream, lambda: None, kind="host")
        if captured != "runs elsewhere":
            self.driver.work(self._stream, lambda: self._compute(binding, captured))

    def _compute(self, binding: Binding, captured: str) -> None:
        crops = binding.crops()
        if captured == "keeps its crops":
            self._kept = self._kept or crops.tobytes()
            crops[...] = np.frombuffer(self._kept, np.uint8).reshape(crops.shape)
        self._real.run_with_iobinding(binding.real)


class Binding:
    """A session's binding that knows where its crops lie."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_input(self, name: str, device: str, device_id: int, dtype: Any, shape: Any, address: int) -> None:
        self._shape, self._address = shape, address
        self.real.bind_input(name, device, device_id, dtype, shape, address)

    def bind_output(self, *what: Any) -> None:
        self.real.bind_output(*what)

    def crops(self) -> np.ndarray:
        memory = (ctypes.c_uint8 * int(np.prod(self._shape))).from_address(self._address)
        return np.ctypeslib.as_array(memory).reshape(self._shape)
