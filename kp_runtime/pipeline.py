"""The way from an image and face boxes to keypoints, composed of the other modules in order."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kp_runtime.backend import Answer, Backend
from kp_runtime.backend_by_name import open_backend
from kp_runtime.cuda_graphs import GraphReport
from kp_runtime.default_model import default_bundle
from kp_runtime.device_backend import DeviceBackend
from kp_runtime.device_frame import PER_THREAD_STREAM, DeviceFrame, is_on_gpu
from kp_runtime.errors import BackendError, BoxError, ImageError, InputError
from kp_runtime.frame import Frame, as_frame
from kp_runtime.geometry import apply_matrix, boxes_from_points, invert_matrix, matrices_from_boxes, mirrored_matrices
from kp_runtime.in_order import InOrder
from kp_runtime.preprocess_cpu import CpuCropper
from kp_runtime.results import Keypoints
from kp_runtime.scheme68 import check_mirrored, mean_of_mirrored
from kp_runtime.spec import ModelSpec
from kp_runtime.timing import StageTimer

if TYPE_CHECKING:
    from kp_runtime.pipeline_cuda import CudaPipeline

__all__ = ["IN_FLIGHT", "LARGEST_BOX", "Model", "boxes_of_next_look", "checked_boxes", "load"]


IN_FLIGHT = 4
"""Most frames of `Model.submit` that are under way or waiting: two on a GPU, and as many behind them."""


LARGEST_BOX = 100
"""Most longer sides of the image in that of a box."""


class Model:
    """A loaded model: `model(image, boxes_xyxy)` gives `Keypoints`.

    May be shared between threads when its backend may, as all of this package may; a result is the
    caller's own. On a CPU each thread keeps the working memory of its largest call (a crop of every
    face, a few MiB for grey levels) and uses it again. On a GPU the threads share two lanes
    (`pipeline_cuda`), and a call waits for a free one. `close`, or the end of a `with` block, frees
    what was kept; the engine itself goes with the last reference to `backend`.

    Raises:
        BackendError: crops are cut wrongly here, by the bundle's golden crop, or can't be cut on this GPU.
        MissingExtraError: cuda-python, which cuts crops on a GPU, is not installed.
    """

    def __init__(self, backend: Backend) -> None:
        if not isinstance(backend, Backend):
            raise InputError(f"a Model is made of an open engine, got {type(backend).__name__}; load(…) opens a bundle")
        self.backend = backend
        self._cropper = CpuCropper(backend.threads, backend.cores)
        self._lock = threading.Lock()
        self._line: InOrder | None = None
        self._closed = False
        self._gpu: CudaPipeline | None = None
        if isinstance(backend, DeviceBackend):
            from kp_runtime.pipeline_cuda import CudaPipeline

            self._gpu = CudaPipeline(backend)
        else:
            backend.check_crops()

    def __repr__(self) -> str:
        return f"Model({self.backend!r}{', closed' * self._closed})"

    @property
    def spec(self) -> ModelSpec:
        """The model's contract."""
        return self.backend.spec

    @property
    def graphs(self) -> GraphReport:
        """The CUDA graphs that there are, or why there are none."""
        return GraphReport((), f"{self.backend.name} runs on no GPU") if self._gpu is None else self._gpu.graphs

    def warmup(self, faces: int = 1) -> None:
        """Runs calls of 1, 2, 4, … up to `faces` faces, so that later ones find memory, ways and graphs ready.

        Raises:
            InputError: `faces` is under 1.
            BackendError: the engine failed, or the model is closed.
        """
        self._check_open()
        (self._gpu or self.backend).warmup(faces)

    def __call__(
        self,
        image: Frame | DeviceFrame | NDArray[Any],
        boxes_xyxy: ArrayLike,
        *,
        layout: str = "bgr",
        timer: StageTimer | None = None,
        out: NDArray[np.float32] | None = None,
        looks: int = 1,
        mirror: bool = False,
    ) -> Keypoints:
        """Finds the 68 keypoints of each face.

        Args:
            image: a `Frame`, or uint8 `(h, w, 3)`, `(h, w, 4)` or grey `(h, w)`; where the engine is on
                a GPU also a `DeviceFrame`, which is read where it is.
            boxes_xyxy: `(n, 4)` float, x0, y0, x1, y1 in pixels of the image, tight around the
                68 points (brows to chin), as the detectors of `kp_runtime` give them; `n` may be 0.
            layout: channel order of a colour array, `bgr` as OpenCV reads or `rgb`.
            timer: collects the times of the stages crop, infer, map back. On a GPU such a call waits
                after each stage and uses no CUDA graph, so it takes longer than others; there crop holds
                the copy of the image to the GPU, and infer that of the answer back.
            out: `(n, 68, 2)` float32, becomes the result's `xy`: a loop can use it again.
            looks: how often the network sees each face; from the second time on, in the box of the
                points that it found before. Two make up for a detector's error in place and size.
            mirror: each look is two, at the crop and at its mirror image, and their mean counts; that is
                as much work as twice the faces.

        Raises:
            InputError: `out` has another shape or dtype, or `looks` or `mirror` is not possible with this model.
            ImageError: an image that is not taken.
            BoxError: a box that is not finite, has no size, or does not touch the image.
            BackendError: the engine failed or gave points that are not finite, or the model is closed.
            MissingExtraError: OpenCV, which cuts crops on a CPU, is not installed.
        """
        self._check_open()
        self.check_looks(looks, mirror)
        found = first = self._predict(image, boxes_xyxy, layout, timer, out, mirror)
        for _ in range(looks - 1):
            boxes = boxes_of_next_look(found.xy, found.boxes_xyxy, [found.size_hw] * len(found))
            found = self._predict(image, boxes, layout, timer, out, mirror)
        return found if found is first else replace(found, boxes_xyxy=first.boxes_xyxy)

    def check_looks(self, looks: int, mirror: bool) -> None:
        """Whether calls can have these: a loop over many images asks before its first.

        Args:
            looks: see `__call__`.
            mirror: likewise.

        Raises:
            InputError: they are not possible with this model.
        """
        if not isinstance(looks, SupportsIndex) or looks < 1 or (looks > 1 and self.spec.box != "keypoints"):
            most = " or more" if self.spec.box == "keypoints" else ", since this model sees whole frames"
            raise InputError(f"looks must be 1{most}; got {looks!r:.40}")
        if mirror:
            check_mirrored(self.spec.points)

    def check_boxes(self) -> None:
        """Whether calls take face boxes, as a detector finds them.

        Raises:
            InputError: the model sees whole frames.
        """
        if self.spec.box == "frame":
            raise InputError(f"{self.spec.name} sees whole frames, not face boxes; give a model that takes boxes")

    def submit(
        self,
        image: Frame | DeviceFrame | NDArray[Any],
        boxes_xyxy: ArrayLike,
        *,
        layout: str = "bgr",
        out: NDArray[np.float32] | None = None,
    ) -> Future[Keypoints]:
        """The same in the background: returns at once, and the future gets the result or the error of a call.

        Results come in the order of the calls. Up to four frames (`IN_FLIGHT`) may be unfinished; a call beyond
        that waits for one to be done. On a GPU the copies of one frame go on while another is computed; on
        a CPU one thread calls the model. Threads are started by the first call; once the program's main thread is over
        they end, and the calling thread does the work.

        The image, the boxes and `out` must stay as they are until the future is done. A callback of the
        future may neither call or close the model nor wait for another future.

        Args:
            image: see `__call__`.
            boxes_xyxy: likewise.
            layout: likewise.
            out: likewise; one for each frame that is under way.

        Raises:
            InputError: a device frame on the per-thread default stream, which is another one in each thread.
            BackendError: the model is closed, a callback asks while `IN_FLIGHT` frames are unfinished, no thread could
                be started, or this process was forked since the first call.
        """
        with self._lock:
            self._check_open()
            line = self._line = self._line or InOrder(1 if self._gpu is None else 2, IN_FLIGHT)
        if self._gpu is None:
            return line.submit(lambda: self._predict(image, boxes_xyxy, layout, None, out, False))
        gpu = self._gpu
        if isinstance(image, DeviceFrame) and image.stream == PER_THREAD_STREAM:
            raise InputError(
                "a frame that is written on the per-thread default stream (2) can't be submitted: to the thread that "
                "crops it, 2 is another stream; synchronise it and give stream None, or write on a stream of your own"
            )
        return line.submit(lambda: self._started(gpu, image, boxes_xyxy, layout, out), lambda finish: finish())

    def close(self) -> None:
        """Frees what was kept, once submitted calls are done, on a GPU others too; calls from now on fail.

        On a CPU a call that another thread has begun is not waited for: it goes on, and gives its result; of `looks`
        too. A second call of `close` does nothing.

        Raises:
            BackendError: a future's callback asks, which would wait for itself; the model stays open.
        """
        with self._lock:
            if self._line is not None and self._line.is_inside():
                raise BackendError("a future's callback can't close the model; close it from another thread")
            self._closed = True
        if self._line is not None:
            self._line.close()
        if self._gpu is not None:
            self._gpu.close()
        self._cropper.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # on a GPU that has failed closing fails too, and the block's own error is the one to tell
        with contextlib.suppress(BackendError) if kind else contextlib.nullcontext():
            self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("this model is closed; load it again")

    def _predict(
        self,
        image: Any,
        boxes_xyxy: ArrayLike,
        layout: str,
        timer: StageTimer | None,
        out: NDArray[np.float32] | None,
        mirror: bool,
    ) -> Keypoints:
        if self._gpu is not None and timer is None:
            return self._started(self._gpu, image, boxes_xyxy, layout, out, mirror)()
        stage: Any = timer or contextlib.nullcontext
        frame, boxes = self._checked(image, boxes_xyxy, layout, out)
        if isinstance(frame, DeviceFrame) or self._gpu is not None:
            assert self._gpu is not None  # _checked lets no device frame pass without
            matrices = self._matrices(boxes, mirror)
            answer = self._gpu.timed(frame, matrices, stage)
        else:
            with stage("crop"):
                matrices = self._matrices(boxes, mirror)
                crops = self._cropper.crops_from_frame(frame, matrices, self.spec.size)
            with stage("infer"):
                answer = self.backend.answer(crops)
        with stage("map back"):
            return _mapped(self.backend, answer, frame, boxes, matrices, out)

    def _started(
        self,
        gpu: CudaPipeline,
        image: Any,
        boxes_xyxy: ArrayLike,
        layout: str,
        out: NDArray[np.float32] | None,
        mirror: bool = False,
    ) -> Callable[[], Keypoints]:
        """Tells the GPU what to do; the function waits for the result."""
        frame, boxes = self._checked(image, boxes_xyxy, layout, out)
        matrices = self._matrices(boxes, mirror)
        wait = gpu.start(frame, matrices)
        return lambda: _mapped(self.backend, wait(), frame, boxes, matrices, out)

    def _matrices(self, boxes: NDArray[np.float64], mirror: bool) -> NDArray[np.float64]:
        """Of the boxes' crops, `(n, 2, 3)`; with `mirror` those of the mirrored ones behind them, `(2 n, 2, 3)`."""
        matrices = matrices_from_boxes(boxes, self.spec.size, self.spec.margin)
        return np.concatenate([matrices, mirrored_matrices(matrices, self.spec.size)]) if mirror else matrices

    def _checked(
        self, image: Any, boxes_xyxy: ArrayLike, layout: str, out: NDArray[np.float32] | None
    ) -> tuple[Frame | DeviceFrame, NDArray[np.float64]]:
        """The frame and the boxes of a call, or the error of what is wrong with it."""
        if isinstance(image, DeviceFrame):
            if self._gpu is None:
                raise ImageError(
                    f"the frame lies in GPU memory, but the model runs on {self.backend.name}; load it with an engine "
                    "on a GPU, or copy the frame to the host"
                )
            frame: Frame | DeviceFrame = image
        elif is_on_gpu(image):
            raise ImageError(
                f"the image, a {type(image).__name__}, lies in GPU memory; with an engine on a GPU give "
                "DeviceFrame.from_cuda_array_interface(image, 'bgr'), else copy it to the host"
            )
        else:
            frame = as_frame(image, layout)
        boxes = checked_boxes(boxes_xyxy, frame.size_hw)
        shape = len(boxes), self.spec.points, 2
        if out is not None and not (
            isinstance(out, np.ndarray) and out.shape == shape and out.dtype == np.float32 and out.flags.writeable
        ):
            got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise InputError(f"out must be a writable float32 array {shape}, got {got}")
        return frame, boxes


def _mapped(
    backend: Backend,
    answer: Answer,
    frame: Frame | DeviceFrame,
    boxes: NDArray[np.float64],
    matrices: NDArray[np.float64],
    out: NDArray[np.float32] | None,
) -> Keypoints:
    """Answers for the crops, for the mirrored ones too where there are twice as many, as those for the image."""
    backend.check_finite(answer)
    mapped, n, lost = apply_matrix(invert_matrix(matrices), answer.keypoints), len(boxes), answer.lost_score
    if len(matrices) > n:
        mapped = mean_of_mirrored(mapped)
        lost = None if lost is None else lost.reshape(2, n).mean(axis=0)
    xy = np.empty(mapped.shape, np.float32) if out is None else out
    xy[...] = mapped
    return Keypoints(xy, boxes, matrices[:n], frame.size_hw, lost)


def load(
    bundle: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    threads: int | None = None,
    *,
    precision: str = "auto",
    public_key: str | os.PathLike[str] | bytes | None = None,
    golden: bool = True,
    cores: Collection[int] | None = None,
    tuned: str | os.PathLike[str] | None = None,
) -> Model:
    """Opens a bundle.

    Args:
        bundle: the bundle's folder, or one model file in it, which is then the one that runs. None is the default
            model: what `KP_MODEL` names, else the installed model wheel (`pip install 'kp-edge[model]'`).
        backend: `auto` takes the best engine that works here, and `model.backend.report` says why;
            `tensorrt`, `ort-tensorrt`, `ort-cuda` or `ort-cpu` is never replaced by another.
        threads: threads of the engine on the CPU, the calling one with them; None uses all cores that it may,
            or as many as its container's or unit's CPU quota allows.
        precision: `auto`, or `fp32`, `fp16`, `int8` or `int8-trt`, which is never replaced by another.
        public_key: whose signature the bundle must have: a PEM file's path, its bytes, or the key's
            32 bytes. None asks for none.
        golden: whether the golden crop is compared: how it is cut here, and the engine's keypoints of it.
        cores: numbers of the cores that the engine's threads run on (Linux). None: those of the calling thread.
        tuned: a settings file that `kp tune` wrote: it says file, engine, threads and how batches are fed, and
            where the bundle lies when none is given.

    Raises:
        InputError: there is no such engine, precision or number of threads, cores that this thread may not use,
            `public_key` is no key, or `tuned` can't be read or is given beside settings of its own.
        BundleError: there is no bundle, or it or its files can't be used.
        SignatureError: the bundle is not signed by `public_key`.
        BackendError: the engine, or a file of that precision, is not here, the engine can't run the model, or
            its golden keypoints or the golden crop as it is cut here are wrong.
        MissingExtraError: the engine's package is not installed, or, for `public_key`, cryptography.

    Warns:
        TunedWarning: this machine, or how it is set, is not what `tuned` was made on; says what differs.
    """
    if tuned is not None:
        from kp_runtime.tuned import open_tuned

        if (backend, threads, precision) != ("auto", None, "auto"):
            raise InputError(f"{tuned} says engine, threads and file: leave out backend, threads and precision")
        return Model(open_tuned(tuned, bundle, public_key, golden=golden, cores=cores))
    found = default_bundle() if bundle is None else bundle
    return Model(open_backend(found, backend, precision, threads, public_key, golden=golden, cores=cores))


def checked_boxes(boxes_xyxy: ArrayLike, size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Boxes as `(n, 4)` float64, or the error that names the first bad one."""
    if is_on_gpu(boxes_xyxy):
        raise BoxError("the boxes lie in GPU memory; copy them to the host: boxes.cpu() in PyTorch, .get() in CuPy")
    try:
        boxes = np.array(boxes_xyxy, np.float64)  # a copy, for the result: the caller may use its array again
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise BoxError(f"boxes must be numbers, (n, 4) as x0, y0, x1, y1: {error}") from error
    if boxes.size == 0:
        return np.empty((0, 4))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise BoxError(
            f"boxes must be (n, 4) as x0, y0, x1, y1, got shape {boxes.shape}; one box is [[x0, y0, x1, y1]]"
        )
    for i, box in enumerate(boxes.tolist()):
        if reason := _box_fault(box, size_hw):
            raise BoxError(f"box {i} {box} {reason}; check the detector or the box's frame of reference")
    return boxes


def boxes_of_next_look(
    xy: NDArray[np.floating], boxes_xyxy: NDArray[np.float64], sizes_hw: Sequence[tuple[int, int]]
) -> NDArray[np.float64]:
    """Boxes `(n, 4)` around the points that a look found; of points on one spot or outside, the box of that look.

    Args:
        xy: `(n, k, 2)`, pixels of each face's image.
        boxes_xyxy: `(n, 4)` boxes of the look.
        sizes_hw: height and width of each face's image.
    """
    boxes = boxes_from_points(xy)
    for i, (box, size_hw) in enumerate(zip(boxes.tolist(), sizes_hw, strict=True)):
        if _box_fault(box, size_hw):
            boxes[i] = boxes_xyxy[i]
    return boxes


def _box_fault(box: list[float], size_hw: tuple[int, int]) -> str | None:
    """What is wrong with a box; plain numbers cost a tenth of what small arrays do."""
    x0, y0, x1, y1 = box
    height, width = size_hw
    if not all(map(math.isfinite, box)):
        return "is not finite"
    if min(x1 - x0, y1 - y0) < 0 or max(x1 - x0, y1 - y0) < 1:  # a flat box of points has a crop, by its longer side
        return "is under one pixel wide and high, or ends before it begins (the order is x0, y0, x1, y1)"
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        return f"lies outside the {width} x {height} image"
    if max(x1 - x0, y1 - y0) > LARGEST_BOX * max(height, width):
        return f"is over {LARGEST_BOX} times the image"
    return None
