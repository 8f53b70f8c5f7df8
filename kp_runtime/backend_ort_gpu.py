"""ONNX Runtime's CUDA and TensorRT providers as inference engines, on this project's stream and buffers.

Nothing may run elsewhere: ONNX Runtime's own fallback to the CPU is off twice (Python's retry and the
session's), and after the load its record of which provider took each node is read, where the
release has one. **Neither has been run on a GPU yet.**

ONNX Runtime takes a stream for a session, not for a call. So each lane has a session of its own, with its
stream, its copy of the weights and its arena: lanes overlap, and what is captured on one shares nothing with
other calls. CUDA graphs are captured around a session's calls by `pipeline_cuda`, crop kernel and copies
included. ONNX Runtime's own (`enable_cuda_graph`) is off: it holds the network alone, belongs to the thread
that captured it, forbids all other threads' allocations while it captures, and in releases up to the middle
of 2026 waits for the GPU after each launch.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
from collections import deque
from typing import Any

import numpy as np

from kp_runtime.backend_ort import check_contract, import_onnxruntime
from kp_runtime.cubin import cache_folder
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.device_backend import DeviceBackend, Lane
from kp_runtime.errors import BackendError, reason_of
from kp_runtime.machine import JETSON_GPUS, NO_JETSON_WHEEL
from kp_runtime.manifest import FileEntry
from kp_runtime.spec import ModelSpec

__all__ = ["OrtCudaBackend", "OrtGpuBackend", "OrtTensorRtBackend"]


class OrtGpuBackend(DeviceBackend):
    """One of ONNX Runtime's providers for a GPU.

    Args:
        model: the ONNX file's bytes.
        entry: its entry in the manifest.
        spec: the contract that it must have.
        driver: the device, open.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BackendError: the installed onnxruntime has no such provider or it can't be loaded, the file is refused, or
            a part of the network would run elsewhere.
    """

    provider: str
    device_type = "cuda"
    batches: tuple[int, int | None] = (1, None)

    def __init__(self, model: bytes, entry: FileEntry, spec: ModelSpec, driver: CudaDriver) -> None:
        super().__init__(spec, driver)
        ort = import_onnxruntime("ort-gpu", "running ONNX files on a GPU")
        if self.provider not in ort.get_available_providers():
            raise BackendError(_absent(ort, self.provider, driver))
        options = self.provider_options(entry)
        self._sessions = _Sessions(ort, model, driver, self.provider, options, _preloaded(ort))
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        first = self._sessions.take()
        check_contract(first.session, spec, "the ONNX file")
        _check_placement(first.session, self.provider)
        self._sessions.give(first)

    def provider_options(self, entry: FileEntry) -> dict[str, str]:
        """The provider's options, without the stream; what they need is there.

        Raises:
            BackendError: a folder that they name can't be made.
        """
        return {"device_id": str(self.driver.device_id)}

    def open_lane(self, max_faces: int) -> Lane:
        """See `DeviceBackend.open_lane`."""
        opened = self._sessions.take()
        try:
            lane = _OrtLane(self.driver, self.spec, max_faces, self.batches, opened.stream)
        except BaseException:
            self._sessions.give(opened)
            raise
        lane.open(opened, self._sessions, self._run_options, self.device_type)
        return lane


class OrtCudaBackend(OrtGpuBackend):
    """The CUDA provider."""

    name = "ort-cuda"
    provider = "CUDAExecutionProvider"

    def provider_options(self, entry: FileEntry) -> dict[str, str]:
        """Without TF32, so that float32 is float32; kernels by heuristic, as each batch size asks for its own."""
        more = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": "0"}
        return super().provider_options(entry) | more


class OrtTensorRtBackend(OrtGpuBackend):
    """The TensorRT provider: builds an engine at the first load, minutes, and keeps it on disk."""

    name = "ort-tensorrt"
    provider = "TensorrtExecutionProvider"
    batches = (1, 32)

    def provider_options(self, entry: FileEntry) -> dict[str, str]:
        """One profile for all batches; engines are kept in the user's cache folder, one folder a file.

        Neither `trt_fp16_enable` nor `trt_int8_enable`: with one of them the network is weakly typed, and TensorRT may
        choose other types than the file's.
        """
        size, (least, most) = self.spec.size, self.batches
        shapes = {"min": least, "opt": 8, "max": most}
        folder = cache_folder() / "ort-tensorrt" / entry.sha256
        try:
            folder.mkdir(parents=True, exist_ok=True)  # the provider makes one level alone
        except OSError as error:
            raise BackendError(
                f"no engine can be kept in {folder} ({error.strerror}); set KP_CACHE to a folder"
            ) from error
        return super().provider_options(entry) | {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            **{f"trt_profile_{which}_shapes": f"crops:{n}x1x{size}x{size}" for which, n in shapes.items()},
        }


class _Sessions:
    """Opens sessions of one file, each with a stream of its own; the last one that a lane has left waits for the next.

    May be shared between threads.
    """

    def __init__(
        self, ort: Any, model: bytes, driver: CudaDriver, provider: str, options: dict[str, str], missing: str
    ) -> None:
        self._ort, self._model, self._driver = ort, model, driver
        self._provider, self._options, self._missing = provider, options, missing
        self._left: deque[_Opened] = deque(maxlen=1)  # no lock: what is forgotten comes back at any time

    def take(self) -> _Opened:
        """A session that nobody else uses.

        Raises:
            BackendError: ONNX Runtime refuses the file, or no memory is left for another session.
        """
        with contextlib.suppress(IndexError):
            return self._left.pop()
        return self._open()

    def give(self, opened: _Opened) -> None:
        """Takes a session back, whose stream has nothing to do."""
        self._left.append(opened)

    def _open(self) -> _Opened:
        ort = self._ort
        self._driver.make_current()
        opened = _Opened(self._driver)
        providers = [(self._provider, self._options | {"user_compute_stream": str(opened.stream)})]
        try:
            opened.session = ort.InferenceSession(
                self._model, _session_options(ort), providers=providers, enable_fallback=0
            )
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            reason, kept = reason_of(error), self._options.get("trt_engine_cache_path", "")
            advice = (
                "see that the CUDA and cuDNN that it is made for are installed (pip install "
                f"'onnxruntime-gpu[cuda,cudnn]{_release(self._driver)}') and that the GPU has free memory, or take the "
                "backend ort-cpu"
            )
            if "deserialize engine" in reason:
                remove = f"rm -r {shlex.quote(kept)}"
                advice = f"the engine kept there is cut off or another TensorRT's; {remove} has it built anew"
            told = f"can't run the file by {self._provider} alone: {reason}{self._missing}; {advice}"
            raise BackendError(f"ONNX Runtime {ort.__version__} {told}") from error
        return opened


def _preloaded(ort: Any) -> str:
    """Loads CUDA and cuDNN as pip installs them; returns the middle of a sentence that says which were not found."""
    if not hasattr(ort, "preload_dlls"):
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ort.preload_dlls()
    missing = [line for line in said.getvalue().splitlines() if line.startswith("Failed to load")]
    return f" ({'; '.join(missing[:3])})" if missing else ""


def _release(driver: CudaDriver) -> str:
    """Which releases of onnxruntime-gpu are for the driver's CUDA: those on PyPI are for CUDA 13 from 1.27 on."""
    return "<1.27" if driver.cuda.startswith("12.") else ""


def _session_options(ort: Any) -> Any:
    """Nothing on the CPU, and a record of what runs where."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the exception, and which library lacks in `_preloaded`
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


class _Opened:
    """A session and its stream, which ends after it."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver, self._object = driver, driver.call("cuStreamCreate", 1)
        self.stream = int(self._object)
        self.session: Any = None

    def __del__(self) -> None:
        self.session = None
        with contextlib.suppress(Exception):  # a program that ends takes the driver away first
            self._driver.make_current()
            self._driver.call("cuStreamDestroy", self._object)


class _OrtLane(Lane):
    """A lane whose buffers are bound to its session's input and outputs."""

    capturable = True
    runs_before_capture = 2
    """As in ONNX Runtime's own capture: its second run still asks for memory, by the pattern of the first."""

    _opened: _Opened | None = None
    _session: Any = None
    _sessions: _Sessions | None = None

    def open(self, opened: _Opened, sessions: _Sessions, run_options: Any, device_type: str) -> None:
        """Takes what the calls need; the session goes back to `sessions` in the end."""
        self._opened, self._sessions, self._session = opened, sessions, opened.session
        self._run_options, self._device = run_options, (device_type, self.driver.device_id)
        self._bindings: dict[tuple[int, int], Any] = {}

    def _feed(self, input_ptr: int, output_ptrs: tuple[int, ...], count: int) -> None:
        binding = self._bindings.get((input_ptr, count)) or self._bind(input_ptr, output_ptrs, count)
        try:
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            self._sessions = None  # nobody else gets a session that failed
            reason = reason_of(error)
            raise BackendError(f"ONNX Runtime failed on {count} crops: {reason}; try fewer at once") from error

    def _bind(self, input_ptr: int, output_ptrs: tuple[int, ...], count: int) -> Any:
        spec, binding = self.spec, self._session.io_binding()
        binding.bind_input("crops", *self._device, np.uint8, (count, 1, spec.size, spec.size), input_ptr)
        for (name, shape), address in zip(spec.outputs.items(), output_ptrs, strict=True):
            binding.bind_output(name, *self._device, np.float32, (count, *shape), address)
        self._bindings[input_ptr, count] = binding
        return binding

    def close(self) -> None:
        """See `Lane.close`."""
        super().close()
        self._bindings = {}
        self._session = None
        if self._sessions is not None and self._opened is not None:
            self._sessions.give(self._opened)
        self._sessions = self._opened = None


def _check_placement(session: Any, provider: str) -> None:
    """Refuses a session that would run a node elsewhere."""
    if provider not in session.get_providers():
        raise BackendError(
            f"ONNX Runtime left {provider} out and opened {', '.join(session.get_providers())}; see that the CUDA and "
            "cuDNN that it is made for are installed"
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return  # an older release, which refuses to open a session with nodes on the CPU all the same
    placed = {
        f"{node.op_type} by {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    }
    elsewhere = sorted(name for name in placed if not name.endswith(f" by {provider}"))
    if elsewhere or not placed:
        raise BackendError(
            f"{provider} would not run the whole network: {', '.join(elsewhere) or 'no record of its nodes'}; take "
            "another precision or backend"
        )


def _absent(ort: Any, provider: str, driver: CudaDriver) -> str:
    """Why a provider is not there, and what to install or to remove."""
    from importlib import metadata

    have = f"onnxruntime {ort.__version__} has no {provider}, only {', '.join(ort.get_available_providers())}"
    if driver.arch in JETSON_GPUS:
        return f"{have}; {NO_JETSON_WHEEL}"
    wheel = f"'kp-edge[ort-gpu]'{_release(driver) and ' ' + repr('onnxruntime-gpu' + _release(driver))}"
    if all(any(metadata.distributions(name=name)) for name in ("onnxruntime", "onnxruntime-gpu")):
        return (
            f"{have}: onnxruntime and onnxruntime-gpu are both installed and write into one folder; remove "
            f"onnxruntime: pip uninstall -y onnxruntime onnxruntime-gpu && pip install {wheel}"
        )
    return f"{have}; run: pip uninstall -y onnxruntime && pip install {wheel}"
