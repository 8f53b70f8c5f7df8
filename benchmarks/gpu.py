"""How fast a CUDA GPU is at this: crops, the network in each engine, and the whole way from a frame.

    python -m benchmarks.gpu --bundle out/resnet18-68

Three parts, each with its own results file: `crops` (the kernel against a copy on the device), `network`
(on crops that are on the device) and `end-to-end` (from a 1920 x 1080 frame in the host's memory). What can't
run is listed with its reason. Within a part all cases run in turns. The last line of stdout of each part
is one JSON document. **It has not been run on a GPU yet.**
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import check_batches, parser, run
from benchmarks.crop_path import FRAME_HW, wide_frame
from benchmarks.faces import BOX_XYXY, varied_crops
from benchmarks.gpu_calls import (
    CropBench,
    Ready,
    kp_end_to_end,
    kp_network,
    ort_network,
    reference,
    torch_end_to_end,
    torch_network,
)
from benchmarks.record import record_from
from benchmarks.table import finish
from kp_export.cuda_device import cuda_device
from kp_runtime.backend_by_name import BACKENDS
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.errors import BackendError, InputError, reason_of
from kp_runtime.frame import as_frame
from kp_runtime.geometry import apply_matrix, invert_matrix, matrices_from_boxes
from kp_runtime.preprocess_cpu import crops_from_frame
from kp_runtime.timing import TimeSummary, measure_in_turns, summary_from_turns
from kp_train.checkpoint import load_checkpoint

__all__ = [
    "PARTS",
    "Device",
    "GpuCase",
    "GpuPart",
    "NotRun",
    "Planned",
    "boxes_of_faces",
    "measure",
    "plan",
]

PARTS = ("crops", "network", "end-to-end")
COPY = "copy on the device"
EAGER, COMPILED = "PyTorch fp16", "torch.compile max-autotune fp16"
PORTRAIT_HEIGHT = 512
SMI = "clocks.sm,clocks.mem,temperature.gpu,power.draw"


@dataclass(frozen=True)
class Device:
    """The GPU that was measured.

    Attributes:
        name: as the driver tells it.
        compute_capability: such as `9.0`.
        cuda: the newest CUDA that the driver runs.
        driver: the kernel driver's version.
        l2_bytes: of its L2 cache.
        smi: `SMI` as nvidia-smi tells it right after the measurement; None where it does not run.
    """

    name: str
    compute_capability: str
    cuda: str
    driver: str | None
    l2_bytes: int
    smi: str | None = None


@dataclass(frozen=True)
class Planned:
    """One case: `make` gets it ready and checks it, or raises."""

    what: str
    batch: int | None
    make: Callable[[], Ready]


@dataclass(frozen=True)
class GpuCase:
    """What was measured.

    Attributes:
        what: which engine or work.
        batch: faces a call; None for the copy.
        distance_px: largest distance to PyTorch's fp32 keypoints from the CPU: pixels of the crop in the part
            `network`, of the frame in `end-to-end`.
        time: of one call.
        repeats: calls in a sample; each counts with its share.
        gb_a_second: the least bytes that a call must move, over the median, in 1e9 bytes.
        of_copy: the same as a share of the copy's.
        turns_ms: all samples by turn, rounded to 0.1 µs.
    """

    what: str
    batch: int | None
    distance_px: float | None
    time: TimeSummary
    repeats: int
    gb_a_second: float | None
    of_copy: float | None
    turns_ms: list[list[float]]


@dataclass(frozen=True)
class NotRun:
    """Cases that have no number, and why: the batch sizes of one thing with one reason."""

    what: str
    batches: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class GpuPart:
    """One part of a run on one device."""

    device: Device
    cases: tuple[GpuCase, ...]
    not_run: tuple[NotRun, ...]


def plan(part: str, bundle: Path, batches: Sequence[int], device: Device, where: str = "cuda") -> list[Planned]:
    """All cases of a part, none of them made.

    Args:
        part: one of `PARTS`.
        bundle: its checkpoint is the reference.
        batches: faces a call.
        device: the GPU.
        where: PyTorch's name of it.

    Raises:
        InputError: there is no such part, or a batch size that makes no sense.
    """
    if part not in PARTS:
        raise InputError(f"there is no part {part!r}; choose from {', '.join(PARTS)}")
    check_batches(batches)
    make = {"crops": _crops_plan, "network": _network_plan, "end-to-end": _end_to_end_plan}[part]
    return make(bundle, batches, device, where)


def _crops_plan(bundle: Path, batches: Sequence[int], device: Device, where: str) -> list[Planned]:
    spec = load_checkpoint(bundle)[1].spec
    bench = functools.cache(lambda: CropBench(CudaDriver(), spec, wide_frame(), device.l2_bytes))
    kernels = [Planned("crop kernel", n, functools.partial(lambda n: bench().kernel(n), n)) for n in batches]
    calls = [Planned("CudaCropper", n, functools.partial(lambda n: bench().call(n), n)) for n in batches]
    return [Planned(COPY, None, lambda: bench().copy()), *kernels, *calls]


def _network_plan(bundle: Path, batches: Sequence[int], device: Device, where: str) -> list[Planned]:
    net, manifest = load_checkpoint(bundle)
    crops = varied_crops(max(batches), manifest.spec)
    wanted = functools.cache(lambda: reference(net, crops))

    def torch(compiled: bool, n: int) -> Ready:
        return torch_network(net, crops[:n], wanted()[:n], where, compiled=compiled)

    def ort(precision: str, graph: bool, n: int) -> Ready:
        names = [name for name, e in manifest.files.items() if (e.kind, e.precision) == ("onnx", precision)]
        if not names:
            raise BackendError(f"the bundle has no {precision} file; kp export adds one")
        model = manifest.check_file(bundle, names[0])
        return ort_network(model, precision, crops[:n], wanted()[:n], where, graph=graph)

    def kp(name: str, precision: str, graph: bool, n: int) -> Ready:
        return kp_network(bundle, name, crops[:n], wanted()[:n], precision=precision or "auto", graph=graph)

    ours = {  # of `ort-cuda` both precisions, of the others the one that is chosen
        f"kp_runtime {name}{more}{', CUDA graph' if graph else ''}": functools.partial(kp, name, more.strip(), graph)
        for name in BACKENDS
        if not name.endswith("-cpu")
        for more in ((" fp32", " fp16") if name == "ort-cuda" else ("",))
        for graph in (False, True)
    }
    made: dict[str, Callable[[int], Ready]] = {
        EAGER: functools.partial(torch, False),
        COMPILED: functools.partial(torch, True),
        "ONNX Runtime CUDA fp32": functools.partial(ort, "fp32", False),
        "ONNX Runtime CUDA fp32, CUDA graph": functools.partial(ort, "fp32", True),
        "ONNX Runtime CUDA fp16": functools.partial(ort, "fp16", False),
        "ONNX Runtime CUDA fp16, CUDA graph": functools.partial(ort, "fp16", True),
        **ours,
    }
    return [Planned(what, n, functools.partial(make, n)) for n in batches for what, make in made.items()]


def _end_to_end_plan(bundle: Path, batches: Sequence[int], device: Device, where: str) -> list[Planned]:
    net, manifest = load_checkpoint(bundle)
    spec, frame = manifest.spec, wide_frame()

    @functools.cache
    def scene(n: int) -> tuple[Any, Any]:
        """Boxes, and the reference's keypoints in them, pixels of the frame."""
        boxes = boxes_of_faces(n)
        matrices = matrices_from_boxes(boxes, spec.size, spec.margin)
        keypoints = reference(net, crops_from_frame(as_frame(frame), matrices, spec.size))
        return boxes, apply_matrix(invert_matrix(matrices), keypoints)

    def kp(name: str, n: int) -> Ready:
        return kp_end_to_end(bundle, name, frame, *scene(n))

    def torch(compiled: bool, n: int) -> Ready:
        return torch_end_to_end(net, spec, frame, *scene(n), where, compiled=compiled)

    made: dict[str, Callable[[int], Ready]] = {
        **{f"kp_runtime {name}": functools.partial(kp, name) for name in BACKENDS},
        EAGER: functools.partial(torch, False),
        COMPILED: functools.partial(torch, True),
    }
    return [Planned(what, n, functools.partial(make, n)) for n in batches for what, make in made.items()]


def boxes_of_faces(faces: int) -> NDArray[np.float64]:
    """Boxes `(faces, 4)` x0 y0 x1 y1 on the two faces of `wide_frame`, no two alike."""
    rng, (height, _) = np.random.default_rng(68), FRAME_HW
    boxes = np.tile(BOX_XYXY, (faces, 1)) * (height / PORTRAIT_HEIGHT) + rng.uniform(-8, 8, (faces, 4))
    boxes[1::2, ::2] += height  # the second one
    return boxes


def measure(
    planned: Sequence[Planned],
    device: Device,
    *,
    without: Sequence[str] = (),
    seconds: float = 2.0,
    samples: int = 50,
    warm_up: float = 0.2,
    step: Callable[[str], None] = lambda text: None,
) -> GpuPart:
    """Makes the cases, then times those that are right in one interleaved run.

    Args:
        planned: of one part.
        device: for the record.
        without: words; a case with one of them in its name is not made.
        seconds: least time measured for each case.
        samples: least number of samples for each case.
        warm_up: seconds that each case runs before anything is measured.
        step: told what is done next.
    """
    ready: dict[str, tuple[Planned, Ready]] = {}
    reasons: dict[tuple[str, str], list[int]] = {}
    for case in planned:
        name = case.what + (f", {case.batch} faces" if case.batch else "")
        step(f"making ready: {name}")
        try:
            if any(word in case.what for word in without):
                raise InputError("left out by --without")
            ready[name] = case, case.make()
        except Exception as error:  # engines and compilers share no base
            reasons.setdefault((case.what, reason_of(error)), []).extend([case.batch] if case.batch else [])
    step("measuring")
    calls = {name: one.run for name, (_, one) in ready.items()}
    turns = measure_in_turns(calls, seconds=seconds, samples=samples, warm_up=warm_up) if calls else {}
    cases = [_case(case, one, turns[name]) for name, (case, one) in ready.items()]
    copy = next((case.gb_a_second for case in cases if case.what == COPY), None)
    not_run = tuple(NotRun(what, tuple(batches), reason) for (what, reason), batches in reasons.items())
    return GpuPart(device, tuple(_beside_copy(case, copy) for case in cases), not_run)


def _case(case: Planned, ready: Ready, turns: list[list[float]]) -> GpuCase:
    turns = [[sample / ready.repeats for sample in turn] for turn in turns]
    time = summary_from_turns(turns)
    rate = ready.bytes_moved / time.p50_ms / 1e6 if ready.bytes_moved else None
    rounded = [[round(sample * 1e3, 4) for sample in turn] for turn in turns]
    return GpuCase(case.what, case.batch, ready.distance_px, time, ready.repeats, rate, None, rounded)


def _beside_copy(case: GpuCase, copy: float | None) -> GpuCase:
    if not (copy and case.gb_a_second):
        return case
    return dataclasses.replace(case, of_copy=case.gb_a_second / copy)


def device_here() -> Device:
    """The GPU of this machine.

    Raises:
        BackendError: there is none that works.
    """
    found, driver = cuda_device(), CudaDriver()
    l2 = driver.call("cuDeviceGetAttribute", driver.api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 0)
    return Device(found.name, found.compute_capability, found.cuda, found.driver, int(l2))


def _smi() -> str | None:
    """Clocks, temperature and power now."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def main() -> None:
    """Measures one bundle, a results file a part."""
    made = parser(__doc__, bundle=False)
    made.add_argument("--bundle", type=Path, required=True, help="the bundle's folder, made by kp export")
    made.add_argument("--part", action="append", choices=PARTS, help="repeatable; all when left out")
    made.add_argument("--batch", type=int, action="append", help="faces a call, repeatable; 1, 8, 64 and 256, of which "
                      "end-to-end takes those up to 64")  # fmt: skip
    made.add_argument("--without", action="append", default=[], metavar="WORD", help="leaves out cases with this word, "
                      "such as torch.compile, which takes minutes to make ready; repeatable")  # fmt: skip
    made.add_argument("--seconds", type=float, default=2.0, help="least time measured for each case")
    made.add_argument("--samples", type=int, default=50, help="least number of samples for each case")
    args = made.parse_args()
    parts = args.part or PARTS
    if args.out and len(parts) > 1:
        raise InputError("--out names one file: give one --part with it")
    device = device_here()
    for part in parts:
        batches = args.batch or [n for n in (1, 8, 64, 256) if part != "end-to-end" or n <= 64]
        settings = {"batches": batches, "seconds": args.seconds, "samples": args.samples, "without": args.without}
        result = measure(
            plan(part, args.bundle, batches, device),
            device,
            without=args.without,
            seconds=args.seconds,
            samples=args.samples,
            step=lambda text: print(text, file=sys.stderr, flush=True),
        )
        result = dataclasses.replace(result, device=dataclasses.replace(device, smi=_smi()))
        finish(record_from(f"gpu-{part}", args.bundle, settings, result), args.out)


if __name__ == "__main__":
    run(main)
