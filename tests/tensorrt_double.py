"""A double of the module tensorrt, in this process, for a version: it plays the build, and the tiny network.

It has exactly the names that the real bindings of that version have (tests/data): any other name,
member or attribute raises AttributeError, as the real one does. What it is told and asked is
recorded in `Tape`; what it answers is set in `Script`. It does not know TensorRT: that a real
builder accepts a graph, or what its inspector really prints, can't be learned from it.
"""

from __future__ import annotations

import ctypes
import enum
import json
import types
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kp_export.cuda_device import CudaDevice
from tests.models import SIZE, tiny_outputs
from tests.real_tensorrt import committed_listing

ORIN = CudaDevice(0, "Orin", "8.7", "12.6", "540.4.0", "R36 (release), REVISION: 4.0")
PLAN = b"ftrt the engine's bytes"


TENSORS = {
    "crops": ("INPUT", "UINT8", (-1, 1, SIZE, SIZE)),
    "keypoints": ("OUTPUT", "FLOAT", (-1, 68, 2)),
    "lost_score": ("OUTPUT", "FLOAT", (-1, 1)),
}
"""Of the plan that it loads: mode, type and shape."""


@dataclass
class Script:
    """What the double answers."""

    parse_errors: tuple[str, ...] = ()
    built: bytes | None = PLAN
    build_message: str = ""
    raises: BaseException | None = None
    loads: bool = True
    refuses: bytes | None = None  # another plan than that, of bytes that it does not take
    weights: str = "Half"
    dynamic_text: str = "N/A due to dynamic shapes"
    dla_cores: int = 0
    dla_convolutions: int = 0
    profile_index: int = 0
    cache_accepted: bool = True
    inputs: tuple[str, ...] = ("crops",)
    inspector: str | None = None
    cuda_error: str = ""
    makes_runtime: bool = (
        True  # also where CUDA does not work, as the lean package does; the full one gives a TypeError
    )
    device: Any = None
    profile: tuple[int, int, int] = (1, 8, 32)
    tensors: dict[str, tuple[str, str, tuple[int, ...]]] = field(default_factory=lambda: dict(TENSORS))
    contexts: int = 1000
    executes: bool = True
    warning: str = ""


@dataclass
class Tape:
    """What the double was told."""

    network_flags: list[int] = field(default_factory=list)
    flags_set: list[str] = field(default_factory=list)
    flags_cleared: list[str] = field(default_factory=list)
    shapes: list[Any] = field(default_factory=list)
    pools: dict[str, int] = field(default_factory=dict)
    caches: list[bytes] = field(default_factory=list)
    parsed: list[bytes] = field(default_factory=list)
    config: Any = None
    host_code: bool = False
    dla_core: int | None = None
    ended: int = 0
    asked_runtime: int = 0
    batches: list[int] = field(default_factory=list)


def tensorrt_double(version: str, **answers: Any) -> Any:
    """The double of TensorRT 10.3.0 or 11.4.0; `answers` are fields of `Script`."""
    return _Double(committed_listing(version), Script(**answers))


class _Double(types.ModuleType):
    def __init__(self, listing: dict[str, Any], script: Script) -> None:
        super().__init__("tensorrt")
        self.script, self.tape, self.listing = script, Tape(), listing
        self.__version__ = listing["version"]
        for name, members in listing["enums"].items():
            setattr(self, name, _enum(name, members))
        self.ILogger = _checked(_Logger, "ILogger", self)
        self.IProgressMonitor = _checked(_Monitor, "IProgressMonitor", self)
        for name, played in _PLAYED.items():
            setattr(self, name, _checked(played, name, self))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.listing["names"]:
            raise AttributeError(f"module 'tensorrt' has no attribute '{name}'")
        raise NotImplementedError(f"the double does not play {name}")


def _enum(name: str, members: list[str]) -> Any:
    """As in the real bindings: `int()` gives the value, but a member is no integer."""
    return enum.Enum(name, {member: index for index, member in enumerate(members)}, type=_Number)


class _Number:
    def __int__(self) -> int:
        value: int = self.value  # type: ignore[attr-defined]
        return value


def _checked(base: type, name: str, double: Any) -> Any:
    """A class that refuses each public name that the real class of this version does not have."""
    real = set(double.listing["classes"][name])

    def refuse(attribute: str) -> None:
        if not attribute.startswith("_") and attribute not in real:
            raise AttributeError(f"'tensorrt.{name}' object has no attribute '{attribute}'")

    def get(self: Any, attribute: str) -> Any:
        if type(self) is made:
            refuse(attribute)
        return object.__getattribute__(self, attribute)

    def put(self: Any, attribute: str, value: Any) -> None:
        if type(self) is made:
            refuse(attribute)
        object.__setattr__(self, attribute, value)

    made = type(name, (base,), {"__getattribute__": get, "__setattr__": put, "_double": double})
    return made


class _Logger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity


class _Monitor:
    pass


class _Builder:
    _double: Any

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    @property
    def num_DLA_cores(self) -> int:  # noqa: N802
        return int(self._double.script.dla_cores)

    def create_network(self, flags: int = 0) -> Any:
        self._double.tape.network_flags.append(flags)
        return self._double.INetworkDefinition()

    def create_builder_config(self) -> Any:
        self._double.tape.config = self._double.IBuilderConfig()
        return self._double.tape.config

    def create_optimization_profile(self) -> Any:
        return self._double.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        script, severity = self._double.script, self._double.ILogger.Severity
        self._logger.log(severity.VERBOSE, "not kept")
        self._logger.log(severity.INFO, "Detected 1 inputs and 1 output network tensors.")
        if script.build_message:
            self._logger.log(severity.ERROR, script.build_message)
        if script.raises is not None:
            raise script.raises
        monitor = getattr(config, "progress_monitor", None)
        if monitor is not None and not _play(monitor):
            return None
        return None if script.built is None else _HostMemory(script.built)


def _play(monitor: Any) -> bool:
    monitor.phase_start("Building Engine", None, 2)
    for step in range(2):
        if not monitor.step_complete("Building Engine", step):
            return False
    monitor.phase_finish("Building Engine")
    return True


class _Network:
    _double: Any

    @property
    def num_inputs(self) -> int:
        return len(self._double.script.inputs)

    def get_input(self, index: int) -> Any:
        tensor = self._double.ITensor()
        tensor.name, tensor.shape = self._double.script.inputs[index], (-1, 1, 64, 64)
        return tensor


class _Config:
    _double: Any

    def set_flag(self, flag: Any) -> None:
        self._double.tape.flags_set.append(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self._double.tape.flags_cleared.append(flag.name)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._double.tape.pools[pool.name] = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        return int(self._double.script.profile_index)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        cache = self._double.ITimingCache()
        cache._data = serialized_timing_cache
        return cache

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self._double.tape.caches.append(cache._data)
        self._cache = cache
        return bool(self._double.script.cache_accepted or not cache._data)

    def get_timing_cache(self) -> Any:
        return self._cache


class _Cache:
    _data: bytes

    def serialize(self) -> Any:
        return _HostMemory(self._data + b"+timings")


class _HostMemory(bytes):
    """Has the buffer protocol, as the real one."""


class _Profile:
    _double: Any

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
        self._double.tape.shapes.append((input, min, opt, max))


class _Parser:
    _double: Any

    def __init__(self, network: Any, logger: Any) -> None:
        pass

    def parse(self, model: bytes, path: str | None = None) -> bool:
        self._double.tape.parsed.append(model)
        return not self._double.script.parse_errors

    @property
    def num_errors(self) -> int:
        return len(self._double.script.parse_errors)

    def get_error(self, index: int) -> Any:
        error = self._double.ParserError()
        error._text = self._double.script.parse_errors[index]
        return error


class _ParserError:
    _text: str

    def node(self) -> int:
        return 3

    def node_name(self) -> str:
        return "node_conv2d"

    def node_operator(self) -> str:
        return "Conv"

    def desc(self) -> str:
        return self._text

    def code(self) -> str:
        return "ErrorCode.UNSUPPORTED_NODE"


class _Runtime:
    """Where CUDA does not work, the lean package makes it all the same; to use or to free it ends the process."""

    _double: Any

    def __init__(self, logger: Any) -> None:
        self._allowed, self._logger = False, logger
        if self._double.script.cuda_error:
            logger.log(self._double.ILogger.ERROR, self._double.script.cuda_error)
        if not self._double.script.makes_runtime:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._double.tape.asked_runtime += 1

    def __del__(self) -> None:
        self._double.tape.ended += bool(self._double.script.cuda_error and self._double.script.makes_runtime)

    def _survive(self) -> None:
        if self._double.script.cuda_error:
            raise SegmentationFaultError

    @property
    def engine_host_code_allowed(self) -> bool:
        self._survive()
        return self._allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self._survive()
        self._allowed = self._double.tape.host_code = value

    @property
    def DLA_core(self) -> int:  # noqa: N802
        self._survive()
        return self._double.tape.dla_core or 0

    @DLA_core.setter
    def DLA_core(self, value: int) -> None:  # noqa: N802
        self._survive()
        self._double.tape.dla_core = value

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        self._survive()
        if serialized_engine == self._double.script.refuses:
            return None
        assert serialized_engine == self._double.script.built
        if self._double.script.warning:
            self._logger.log(self._double.ILogger.WARNING, self._double.script.warning)
        return self._double.ICudaEngine() if self._double.script.loads else None


class SegmentationFaultError(BaseException):
    """The real runtime would have ended the process."""


class _Engine:
    _double: Any

    def create_engine_inspector(self) -> Any:
        return self._double.EngineInspector()

    def create_execution_context(self) -> Any:
        self._double.script.contexts -= 1
        return self._double.IExecutionContext() if self._double.script.contexts >= 0 else None

    @property
    def num_io_tensors(self) -> int:
        return len(self._double.script.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._double.script.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._double.TensorIOMode[self._double.script.tensors[name][0]]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._double.DataType[self._double.script.tensors[name][1]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._double.script.tensors[name][2]
        return shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0
        return [(batch, *self.get_tensor_shape(name)[1:]) for batch in self._double.script.profile]


class _Context:
    """Computes the tiny network when the double of the driver, `Script.device`, comes so far.

    As with the real one, what is captured must have run with as many crops before.
    """

    _double: Any
    _shape: tuple[int, ...] | None = None
    _ran: tuple[int, ...] | None = None

    def __init__(self) -> None:
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._double.script.profile
        self._shape = tuple(shape)
        return name == "crops" and least <= shape[0] <= most

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._double.script.tensors and memory % 256 == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        script, shape = self._double.script, self._shape
        assert shape is not None
        least, _, most = script.profile
        if not (script.executes and least <= shape[0] <= most):
            return False
        if stream_handle in script.device.captures and shape != self._ran:
            script.device.cuStreamSynchronize(stream_handle)  # no capture survives it
            return False
        self._ran = shape
        self._double.tape.batches.append(shape[0])
        crops, *outputs = (self._addresses[name] for name in script.tensors)  # all must have been given

        def compute() -> None:
            given = np.frombuffer(ctypes.string_at(crops, int(np.prod(shape))), np.uint8).reshape(shape)
            for address, output in zip(outputs, tiny_outputs(given), strict=False):
                ctypes.memmove(address, output.tobytes(), output.nbytes)

        script.device.work(stream_handle, compute, crops, *outputs)
        return True


class _Inspector:
    _double: Any
    execution_context: Any = None

    def get_engine_information(self, format: Any) -> str:  # noqa: A002
        assert format.name == "JSON"
        script = self._double.script
        if script.inspector is not None:
            return str(script.inspector)
        new = self._double.__version__.startswith("11.")
        if self._double.tape.config.profiling_verbosity.name != "DETAILED":
            return json.dumps({"Layers": ["conv + relu", "linear"]})
        batch = self.execution_context._shape[0] if self.execution_context is not None else -1
        return json.dumps({"Layers": engine_layers(script, batch, new)})


def engine_layers(script: Script, batch: int, new: bool) -> list[dict[str, Any]]:
    """A reformat, two convolutions, a fp32 matrix product, in the layout of 10.x or of 11.x."""

    def tensor(name: str, shape: list[int], text: str) -> dict[str, Any]:
        text = text if batch > 0 else script.dynamic_text
        kind = {"DataType": text, "Format": "Channel major"} if new else {"Format/Datatype": text}
        return {"Name": name, "Dimensions": [batch, *shape], **kind}

    half = "Half" if new else "Channel major FP16 format where channel % 8 == 0"
    layers: list[dict[str, Any]] = [
        {"Name": "Reformatting CopyNode for Input Tensor 0", "LayerType": "Reformat",
         "Inputs": [tensor("crops", [1, 64, 64], "UInt8")], "Outputs": [tensor("x", [1, 64, 64], half)]},
    ]  # fmt: skip
    for index in range(2):
        layers.append({
            "Name": f"conv{index} + relu", "LayerType": "CaskConvolution", "ParameterType": "Convolution",
            "Inputs": [tensor("x", [16, 32, 32], half)], "Outputs": [tensor("y", [16, 32, 32], half)],
            "Weights": {"Type": script.weights, "Count": 2304}, "Bias": {"Type": "Half", "Count": 16},
        })  # fmt: skip
    for index in range(script.dla_convolutions):
        layers[1 + index] = {"Name": f"{{ForeignNode[conv{index}...relu]}}", "LayerType": "DLA", "Inputs": [],
                             "Outputs": [tensor("y", [16, 32, 32], half)]}  # fmt: skip
    layers.append({
        "Name": "linear", "LayerType": "gemm", "Inputs": [tensor("mean", [16], "Float"), {"Dimensions": [16, 136]}],
        "Outputs": [tensor("out", [136], "Float")],
    })  # fmt: skip
    return layers


class _Plain:
    """An object that only carries attributes."""


_PLAYED: dict[str, type] = {
    "Builder": _Builder,
    "EngineInspector": _Inspector,
    "IBuilderConfig": _Config,
    "ICudaEngine": _Engine,
    "IExecutionContext": _Context,
    "INetworkDefinition": _Network,
    "IOptimizationProfile": _Profile,
    "ITensor": _Plain,
    "ITimingCache": _Cache,
    "OnnxParser": _Parser,
    "ParserError": _ParserError,
    "Runtime": _Runtime,
}
