"""The calls that `benchmarks.gpu` times, each compared with PyTorch on the CPU before it is timed.

Each maker returns a `Ready`, whose `run` comes back when the GPU is done, or raises what the engine
raises. Makers take a device's name, so that the tests run PyTorch's and ONNX Runtime's on a CPU; **none of
them has been run on a GPU yet.**
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.compare_engines import LIMITS_PX
from kp_runtime.backend_by_name import open_backend
from kp_runtime.cuda_driver import CudaDriver, Memory
from kp_runtime.cuda_graphs import captured
from kp_runtime.device_backend import DeviceBackend
from kp_runtime.device_frame import DeviceFrame
from kp_runtime.errors import BackendError, MissingExtraError
from kp_runtime.frame import as_frame
from kp_runtime.geometry import apply_matrix, crop_plan, invert_matrix, matrices_from_boxes
from kp_runtime.pipeline import load
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.preprocess_cuda import CropKernels, CudaCropper, faces_from_matrices, record_from_frame
from kp_runtime.spec import ModelSpec

__all__ = [
    "CropBench",
    "Ready",
    "kp_end_to_end",
    "kp_network",
    "ort_network",
    "reference",
    "torch_end_to_end",
    "torch_network",
]

Keypoints = NDArray[np.float32]


@dataclass(frozen=True)
class Ready:
    """A call whose result was compared.

    Attributes:
        run: does the work `repeats` times and returns when all of it is done.
        repeats: see `run`.
        bytes_moved: the least that one time must read and write in the device's memory.
        distance_px: largest distance to the reference's keypoints.
    """

    run: Callable[[], object]
    repeats: int = 1
    bytes_moved: int | None = None
    distance_px: float | None = None


def reference(net: Any, crops: NDArray[np.uint8]) -> Keypoints:
    """Keypoints of crops by PyTorch in fp32 on the CPU, pixels of the crop."""
    import torch

    with torch.inference_mode():
        return np.concatenate([net(torch.from_numpy(crops[i : i + 32])).numpy() for i in range(0, len(crops), 32)])


class CropBench:
    """The crop kernel on one device.

    Every time it reads and writes other memory, four times the L2 cache in all, so that what is measured is
    the device's memory and not its cache.

    Args:
        driver: the device.
        spec: whose crop size and margin are used.
        frame: `(h, w, 3)` uint8, BGR.
        l2_bytes: of the device's L2 cache.
        box: side of the faces' boxes in pixels of the frame.
    """

    def __init__(
        self, driver: CudaDriver, spec: ModelSpec, frame: NDArray[np.uint8], l2_bytes: int, box: int = 150
    ) -> None:
        self._driver, self._spec, self._frame, self._l2, self._box = driver, spec, frame, l2_bytes, box
        driver.make_current()
        self._stream = driver.call("cuStreamCreate", 1)  # 1: does not wait for the default stream

    def copy(self, size: int = 1 << 28, repeats: int = 8) -> Ready:
        """Copies on the device, `size` bytes read and as many written each time."""
        source, target = self._memory(size), self._memory(size)
        self._driver.call("cuMemsetD8Async", source.address, 0x5A, size, self._stream)

        def work() -> None:
            for _ in range(repeats):
                self._driver.call("cuMemcpyDtoDAsync", target.address, source.address, size, self._stream)

        return Ready(self._graph(work, source, target), repeats, 2 * size)

    def kernel(self, faces: int) -> Ready:
        """The kernel alone, from one CUDA graph of many launches."""
        size, sets = self._spec.size, self._sets(faces)
        matrices = [self._matrices(faces, seed) for seed in range(sets)]
        pixels, crop_bytes = self._pixels(min(sets, 64)), faces * size * size
        out = self._memory(sets * crop_bytes)
        records = [
            record_from_frame(self._device_frame(pixels, i)).tobytes()
            + faces_from_matrices(m, size, self._frame.shape[:2]).tobytes()
            for i, m in enumerate(matrices)
        ]
        on_device, kernels = self._memory(sum(map(len, records))), CropKernels(self._driver)
        self._upload(on_device, np.frombuffer(b"".join(records), np.uint8))
        step, head = len(records[0]), len(record_from_frame(self._device_frame(pixels, 0)).tobytes())

        def work() -> None:
            for i in range(sets):
                image = on_device.address + i * step
                kernels.launch(3, faces, image, image + head, size, out.address + i * crop_bytes, self._stream)

        run = self._graph(work, pixels, out, on_device, kernels)
        run()
        self._check(out.address, matrices[0])
        return Ready(run, sets, self._moved(matrices[0]))

    def call(self, faces: int) -> Ready:
        """A call of `CudaCropper` with the host's work, one at a time."""
        cropper, pixels = CudaCropper(self._driver.device_id), self._pixels(1)
        out, matrices = self._memory(faces * self._spec.size**2), self._matrices(faces, 0)
        frame = self._device_frame(pixels, 0)

        def run() -> None:
            cropper.crops_from_frame(frame, matrices, self._spec.size, out.address, int(self._stream))
            self._driver.call("cuStreamSynchronize", self._stream)

        run()
        self._check(out.address, matrices)
        return Ready(run)

    def _sets(self, faces: int) -> int:
        moved = self._moved(self._matrices(faces, 0))
        return min(1024, max(2, -(-4 * self._l2 // moved)))

    def _moved(self, matrices: NDArray[np.float64]) -> int:
        """Bytes of all pixels that any face needs, once, and of the crops."""
        needed = np.zeros(self._frame.shape[:2], bool)
        for matrix in matrices:
            plan = crop_plan(matrix, self._spec.size, self._frame.shape[:2])
            needed[plan.y0 : plan.y1, plan.x0 : plan.x1] = True
        return int(needed.sum()) * 3 + len(matrices) * self._spec.size**2

    def _matrices(self, faces: int, seed: int) -> NDArray[np.float64]:
        height, width = self._frame.shape[:2]
        box = min(self._box, height // 2)
        corner = np.random.default_rng(seed).uniform(0, 1, (faces, 2)) * [width - box, height - box]
        return matrices_from_boxes(np.concatenate([corner, corner + box], axis=1), self._spec.size, self._spec.margin)

    def _memory(self, size: int) -> Memory:
        memory = Memory(self._driver)
        memory.reserve(size)
        return memory

    def _pixels(self, frames: int) -> Memory:
        """As many copies of the frame, one behind the other."""
        pixels = self._memory(frames * self._frame.nbytes)
        self._upload(pixels, np.tile(self._frame.ravel(), frames))
        return pixels

    def _device_frame(self, pixels: Memory, i: int) -> DeviceFrame:
        height, width = self._frame.shape[:2]
        pointer = pixels.address + i * self._frame.nbytes % pixels.size
        return DeviceFrame(pointer, (height, width), width * 3, "bgr", owner=pixels)

    def _upload(self, memory: Memory, data: NDArray[np.uint8]) -> None:
        self._driver.call("cuMemcpyHtoDAsync", memory.address, data.ctypes.data, data.nbytes, self._stream)
        self._driver.call("cuStreamSynchronize", self._stream)

    def _graph(self, work: Callable[[], None], *alive: object) -> Callable[[], object]:
        """A function that launches the captured work and waits for it; what it uses lives as long."""
        graph = captured(self._driver, self._stream, work)

        def run(_: tuple[object, ...] = alive) -> None:
            self._driver.call("cuGraphLaunch", graph, self._stream)
            self._driver.call("cuStreamSynchronize", self._stream)

        return run

    def _check(self, out: int, matrices: NDArray[np.float64]) -> None:
        wanted = crops_from_frame(as_frame(self._frame), matrices, self._spec.size)
        found = np.zeros_like(wanted)
        self._driver.call("cuMemcpyDtoHAsync", found.ctypes.data, out, found.nbytes, self._stream)
        self._driver.call("cuStreamSynchronize", self._stream)
        if different := int((found != wanted).sum()):
            raise BackendError(f"wrong: {different} of {wanted.size} grey levels are not the CPU path's")


def _checked(run: Callable[[], object], found: Keypoints, wanted: Keypoints, precision: str) -> Ready:
    """The call, unless its keypoints are too far from the reference's, in pixels of the crop."""
    distance = float(np.linalg.norm(found - wanted, axis=-1).max())
    if not distance <= (most := LIMITS_PX[precision]):
        raise BackendError(f"wrong: a keypoint is {distance:.3f} px from PyTorch's, at most {most:g} px is right")
    return Ready(run, distance_px=distance)


def _torch_fp16(net: Any, device: str, compiled: bool) -> Callable[[Any], Any]:
    """The network in fp16 on a device, keypoints decoded in fp32; compiled anew for each batch size."""
    import copy

    import torch

    half = copy.deepcopy(net).half().to(device, memory_format=torch.channels_last)

    def keypoints(crops: Any) -> Any:
        return half.decode(half.raw(crops).float())

    if not compiled:
        return keypoints
    torch._dynamo.config.recompile_limit = 64  # each batch size is one more of the same function
    return torch.compile(keypoints, mode="max-autotune", fullgraph=True, dynamic=False)


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def torch_network(net: Any, crops: NDArray[np.uint8], wanted: Keypoints, device: str, *, compiled: bool) -> Ready:
    """PyTorch on crops that are on the device already."""
    import torch

    call, on_device = _torch_fp16(net, device, compiled), torch.from_numpy(crops).to(device)

    def run() -> Any:
        with torch.inference_mode():
            keypoints = call(on_device)
        _wait(device)
        return keypoints

    for _ in range(3):  # max-autotune captures its graph in the second call
        found = run().float().cpu().numpy()
    return _checked(run, found, wanted, "fp16")


def ort_network(
    model: Path, precision: str, crops: NDArray[np.uint8], wanted: Keypoints, device: str, *, graph: bool
) -> Ready:
    """ONNX Runtime's provider for the device on crops that are there already, with or without its CUDA graph."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError("onnxruntime-gpu", "ort-gpu", "ONNX Runtime on a GPU") from error
    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
    if provider not in (there := ort.get_available_providers()):
        raise BackendError(f"onnxruntime {ort.__version__} has no {provider}, only {', '.join(there)}")
    if device == "cuda" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN as pip installs them
    options = ort.SessionOptions()
    options.log_severity_level = 3
    more = {"use_tf32": "0", "enable_cuda_graph": str(int(graph))} if device == "cuda" else {}
    if device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(str(model), options, providers=[(provider, more)], enable_fallback=0)
    binding, out = session.io_binding(), ort.OrtValue.ortvalue_from_shape_and_type(wanted.shape, np.float32, device, 0)
    binding.bind_ortvalue_input("crops", ort.OrtValue.ortvalue_from_numpy(crops, device, 0))
    binding.bind_ortvalue_output("keypoints", out)

    def run() -> None:
        session.run_with_iobinding(binding)  # returns when the provider's stream is done

    for _ in range(3):  # a graph is captured on the way
        run()
    return _checked(run, out.numpy(), wanted, precision)


def kp_network(
    bundle: Path,
    backend: str,
    crops: NDArray[np.uint8],
    wanted: Keypoints,
    *,
    precision: str = "auto",
    graph: bool = False,
) -> Ready:
    """One of `kp_runtime`'s backends for GPUs on crops that are there already, with or without a CUDA graph."""
    opened = open_backend(bundle, backend, precision)
    if not isinstance(opened, DeviceBackend):
        raise BackendError(f"{backend} takes no crops in the device's memory")
    opened.release()  # what the golden crop's check left
    lane, call, n = opened.open_lane(len(crops)), opened.driver.call, len(crops)
    stream = opened.driver.api.CUstream(lane.stream)
    if graph and n > lane.at_once:
        raise BackendError(f"the engine takes {lane.at_once} faces at once; more are fed in parts, without a graph")
    for _ in range(lane.runs_before_capture):
        lane.enqueue(n)
        call("cuStreamSynchronize", stream)
    made = captured(opened.driver, stream, lambda: lane.enqueue(n)) if graph else None
    call("cuMemcpyHtoDAsync", lane.input_ptr, crops.ctypes.data, crops.nbytes, stream)

    def run() -> None:
        if made is None:
            lane.enqueue(n)
        else:
            call("cuGraphLaunch", made, stream)
        call("cuStreamSynchronize", stream)

    run()
    found = np.empty_like(wanted)
    call("cuMemcpyDtoHAsync", found.ctypes.data, lane.output_ptrs[0], found.nbytes, stream)
    call("cuStreamSynchronize", stream)
    return _checked(run, found, wanted, opened.report.precision.partition("-")[0])


def kp_end_to_end(
    bundle: Path, backend: str, frame: NDArray[np.uint8], boxes_xyxy: NDArray[np.float64], wanted: Keypoints
) -> Ready:
    """`kp_runtime` from a frame in the host's memory to keypoints of the frame; `wanted` are PyTorch's."""
    model = load(bundle, backend)
    model.warmup(len(boxes_xyxy))

    def run() -> Keypoints:
        return model(frame, boxes_xyxy).xy

    found, matrices = run(), matrices_from_boxes(boxes_xyxy, model.spec.size, model.spec.margin)
    seen, expected = (apply_matrix(matrices, xy).astype(np.float32) for xy in (found, wanted))
    ready = _checked(run, seen, expected, model.backend.report.precision.partition("-")[0])
    return replace(ready, distance_px=float(np.linalg.norm(found - wanted, axis=-1).max()))


def torch_end_to_end(
    net: Any,
    spec: ModelSpec,
    frame: NDArray[np.uint8],
    boxes_xyxy: NDArray[np.float64],
    wanted: Keypoints,
    device: str,
    *,
    compiled: bool,
) -> Ready:
    """The plain way: upload, grey, `grid_sample`, the network in fp16, download.

    Its crops are others, since it averages nothing; how far its keypoints are off is told, and nothing is refused.
    """
    import torch
    from torch.nn import functional as F

    call, size, (height, width) = _torch_fp16(net, device, compiled), spec.size, frame.shape[:2]
    column, row = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy")
    places = torch.stack([column, row, torch.ones_like(row)], -1).float().to(device)  # of the crop's pixels
    luma = torch.tensor([0.114, 0.587, 0.299], device=device)
    extent = torch.tensor([width, height], device=device)

    def run() -> Keypoints:
        image_from_crop = invert_matrix(matrices_from_boxes(boxes_xyxy, size, spec.margin))
        with torch.inference_mode():
            grey = torch.from_numpy(frame).to(device).float() @ luma
            matrices = torch.from_numpy(image_from_crop).float().to(device)
            grid = (torch.einsum("nij,hwj->nhwi", matrices, places) + 0.5) / extent * 2 - 1
            faces = grey.expand(len(grid), 1, height, width)
            crops = F.grid_sample(faces, grid, padding_mode="border", align_corners=False)
            keypoints = call(crops.round().to(torch.uint8)).cpu().numpy()
        return apply_matrix(image_from_crop, keypoints).astype(np.float32)

    for _ in range(3):  # max-autotune captures its graph in the second call
        found = run()
    return Ready(run, distance_px=float(np.linalg.norm(found - wanted, axis=-1).max()))
