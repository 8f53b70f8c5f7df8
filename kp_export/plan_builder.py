"""TensorRT's objects in the order in which it wants them: parse, configure, build, inspect.

The network is strongly typed: a flag that 10.x needs and 11.x takes and ignores. No flag that
lowers precision is ever set, and TF32, which TensorRT allows by default, is turned off, so that
float32 means float32. Every name used here exists in 10.3.0 and in 11.4.0, which
tests/test_tensorrt_api.py holds against the real bindings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kp_export.build_log import BuildLog, build_monitor, parser_errors
from kp_export.cuda_device import CudaDevice
from kp_export.plan_options import INPUT, PlanOptions
from kp_runtime.backend_trt import tensorrt_logger
from kp_runtime.errors import ExportError, KpError
from kp_runtime.files import write_file

__all__ = ["PlanBuilder", "Progress"]

Progress = Callable[[str, float], None]


@dataclass
class PlanBuilder:
    """One build.

    Attributes:
        trt: the module tensorrt.
        device: the device, already open.
        options: what the plan is built for.
        log: gets TensorRT's messages.
        cache_folder: of timing caches, one file a device and TensorRT version.
        progress: told each phase's name and how far it is, 0 to 1.
    """

    trt: Any
    device: CudaDevice
    options: PlanOptions
    log: BuildLog
    cache_folder: Path
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.logger = tensorrt_logger(self.trt, self.log.tell)

    @property
    def cache_path(self) -> Path:
        """The timing cache of this device and TensorRT version."""
        name = "".join(letter if letter.isalnum() else "-" for letter in self.device.name.lower())
        return self.cache_folder / f"timing.{name}.{self.device.sm}.trt{self.trt.__version__}.cache"

    def plan(self, onnx: bytes) -> tuple[bytes, tuple[tuple[int, ...], ...]]:
        """Parses and builds; returns the plan and the shapes of its profile."""
        trt = self.trt
        builder = trt.Builder(self.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse(onnx):
            raise ExportError(f"TensorRT's parser refuses it: {parser_errors(parser, self.log)[0]}")
        config = builder.create_builder_config()
        shapes = self._configure(builder, network, config)
        monitor = build_monitor(trt, self.progress)
        if monitor is not None:
            config.progress_monitor = monitor
        serialized = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.error is not None:
            raise monitor.error
        if serialized is None:
            raise ExportError(
                f"TensorRT could not build it: {self.log.last_error()}; where memory ran out, close other programs, "
                f"or lower max_batch ({self.options.max_batch}) or workspace_mib ({self.options.workspace_mib})"
            )
        self._save_cache(config)
        return bytes(memoryview(serialized)), shapes

    def inspect(self, plan: bytes, shape: tuple[int, ...]) -> str:
        """The engine inspector's JSON, with the shapes that the plan is tuned for."""
        runtime = self.trt.Runtime(self.logger)
        if self.options.version_compatible:
            runtime.engine_host_code_allowed = True  # such a plan brings its own run-time; this one is ours
        if self.options.dla_core is not None:
            runtime.DLA_core = self.options.dla_core
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ExportError(f"TensorRT can't load the plan that it just built: {self.log.last_error()}")
        inspector = engine.create_engine_inspector()
        context = engine.create_execution_context()
        if context is not None and context.set_input_shape(INPUT, shape):
            inspector.execution_context = context  # without shapes it says "N/A" where they are dynamic
        text = str(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON))
        self.log.add("engine inspector", text)
        return text

    def _configure(self, builder: Any, network: Any, config: Any) -> tuple[tuple[int, ...], ...]:
        trt, options = self.trt, self.options
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
        config.clear_flag(trt.BuilderFlag.TF32)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            if self.device.l4t:
                raise ExportError(
                    "NVIDIA does not support hardware-compatible plans on JetPack; build without hardware_compatible"
                )
            if int(self.device.compute_capability.split(".")[0]) < 8:
                raise ExportError(
                    f"a hardware-compatible plan needs an Ampere GPU (8.0) or newer, {self.device.name} has "
                    f"{self.device.compute_capability}; build without hardware_compatible"
                )
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        self._load_cache(config)
        shapes = self._add_profile(builder, network, config)
        if options.dla_core is not None:
            self._use_dla(builder, config, options.dla_core)
        return shapes

    def _add_profile(self, builder: Any, network: Any, config: Any) -> tuple[tuple[int, ...], ...]:
        names = [network.get_input(index).name for index in range(network.num_inputs)]
        if names != [INPUT]:
            raise ExportError(f"the graph's inputs are {names}, a model of this project has {INPUT} alone")
        rest = tuple(int(size) for size in network.get_input(0).shape)[1:]
        options = self.options
        shapes = tuple((batch, *rest) for batch in (options.min_batch, options.opt_batch, options.max_batch))
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(
                f"TensorRT refuses the batch sizes {shapes[0][0]}, {shapes[1][0]}, {shapes[2][0]} for {INPUT}: "
                f"{self.log.last_error()}"
            )
        return shapes

    def _use_dla(self, builder: Any, config: Any, core: int) -> None:
        """Puts all that the DLA takes on it; `check_receipt` refuses a convolution that fell back."""
        cores = builder.num_DLA_cores
        if core >= cores:
            raise ExportError(
                f"DLA core {core} was asked for, TensorRT {self.trt.__version__} offers {cores} on {self.device.name}; "
                "build without dla_core"
            )
        config.default_device_type = self.trt.DeviceType.DLA
        config.DLA_core = core
        config.set_flag(self.trt.BuilderFlag.GPU_FALLBACK)  # uint8 input and fp32 head are not for the DLA

    def _load_cache(self, config: Any) -> None:
        """Timings of earlier builds on this device; a stale or broken file counts as none."""
        try:
            kept = self.cache_path.read_bytes()
        except OSError:
            kept = b""
        for data in (kept, b""):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                return

    def _save_cache(self, config: Any) -> None:
        cache = config.get_timing_cache()
        serialized = cache.serialize() if cache is not None else None
        if serialized is None:
            return
        try:
            write_file(self.cache_path, bytes(memoryview(serialized)))
        except KpError as error:  # the next build is slower, this one is good
            self.log.add("timing cache", str(error))
