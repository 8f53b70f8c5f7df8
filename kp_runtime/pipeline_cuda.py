"""From a frame to keypoints of the crops on a GPU: copies, crop kernel, network and result on one stream.

A **lane** is an engine's stream and buffers (`device_backend.Lane`) with the pinned memory around it. A frame
of the host goes to pinned memory and to the device, a device frame stays where it is; the kernel writes
crops where the network reads them; only what it answers comes back. From its second call on, a number of faces
has a CUDA graph: one launch of records' copy, kernel, network and answer's copy. What changes between calls
(the pixels' address and layout, the matrices) lies in memory that the graph reads, so a graph serves every frame.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kp_runtime.backend import Answer, warmup_sizes
from kp_runtime.cuda_driver import Closing, CudaDriver, Memory
from kp_runtime.cuda_graphs import GraphReport, GraphSwitch, canary_fault, captured
from kp_runtime.device_backend import DeviceBackend, Lane, arrays_of
from kp_runtime.device_frame import DeviceFrame
from kp_runtime.errors import BackendError
from kp_runtime.frame import CHANNELS, Frame
from kp_runtime.geometry import matrices_from_boxes
from kp_runtime.golden import check_golden_crop
from kp_runtime.preprocess_cuda import CropKernels, CropRecords, check_frame, crops_to_host, faces_from_matrices

__all__ = ["GRAPHS", "LANES", "CudaPipeline"]

LANES = 2
"""One copies while the other computes."""

GRAPHS = 4
"""Most graphs of a lane; the sizes that first come twice have them, others run without. Each has an engine's lane
of its own (buffers, and a TensorRT context or an ONNX Runtime session): TensorRT's graphs are void once their context
has seen another batch size, and ONNX Runtime's would share its arena and kernels with plain calls."""

_LEAST_FACES = 8  # of a lane, so that it is not replaced for every face that is found


class CudaPipeline:
    """Frames and crop matrices to the network's answers. May be shared between threads.

    Lanes are opened when they are first needed. A call waits for a free one.

    Args:
        backend: the engine.

    Raises:
        BackendError: no kernel for this GPU, or one that cuts the golden crop wrongly.
        MissingExtraError: cuda-python is not installed.
    """

    def __init__(self, backend: DeviceBackend) -> None:
        self._backend = backend
        backend.release()  # what the golden crop's check left
        self._kernels = CropKernels(backend.driver)
        check_golden_crop(backend.golden, backend.spec, partial(crops_to_host, backend.driver, self._kernels))
        self._switch = GraphSwitch()
        self._free: list[_Lane] = []
        self._taken: weakref.WeakSet[_Turn] = weakref.WeakSet()
        self._changed = threading.Condition()
        self._warming = threading.Lock()
        self._closed = False

    @property
    def graphs(self) -> GraphReport:
        """The graphs that there are."""
        with self._changed:
            lanes = [*self._free, *(turn.lane for turn in self._taken if turn.lane is not None)]
        return GraphReport(tuple(sorted(key for lane in lanes for key in lane.graph_keys())), self._switch.off)

    def start(self, frame: Frame | DeviceFrame, crop_from_image: NDArray[np.float64]) -> Callable[[], Answer]:
        """Tells the GPU what to do, and gives the function that waits for the answer.

        That function is called once, by any thread, or forgotten. The frame must stay as it is until then.

        Args:
            frame: the image.
            crop_from_image: `(n, 2, 3)` float64; `n` may be 0.

        Returns:
            A function for the answer, keypoints in pixels of the crops.

        Raises:
            InputError: matrices or a frame that are not taken.
            BackendError: CUDA or the engine failed, or no memory is left; what was open before stays usable.
        """
        spec = self._backend.spec
        if len(crop_from_image) == 0:
            return lambda: Answer.empty(spec)
        faces = faces_from_matrices(crop_from_image, spec.size, frame.size_hw)
        turn = self._take(len(faces))
        try:
            turn.opened().start(frame, faces)
        except BaseException:
            turn.close()
            raise
        return turn

    def timed(self, frame: Frame | DeviceFrame, crop_from_image: NDArray[np.float64], stage: Any) -> Answer:
        """The same without a graph, and with a wait after each stage; `stage` is a `timing.StageTimer`."""
        spec = self._backend.spec
        if len(crop_from_image) == 0:
            with stage("crop"), stage("infer"):
                return Answer.empty(spec)
        faces = faces_from_matrices(crop_from_image, spec.size, frame.size_hw)
        with self._take(len(faces)) as turn:
            return turn.opened().timed(frame, faces, stage)

    def warmup(self, faces: int) -> None:
        """Opens all lanes with room for `faces`; captures graphs of the largest of 1, 2, 4, … and `faces` BGR faces.

        Raises:
            InputError: `faces` is under 1.
            BackendError: CUDA or the engine failed.
        """
        sizes = warmup_sizes(faces)[::-1]  # a lane keeps the first graphs
        with self._warming, contextlib.ExitStack() as turns:  # two that wait for each other's lanes would wait for ever
            for turn in [turns.enter_context(self._take(sizes[0])) for _ in range(LANES)]:
                for n in sizes:
                    turn.opened().warmup(CHANNELS["bgr"], n)

    def close(self) -> None:
        """Waits for the calls under way and frees everything; later calls fail. A second call does nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._taken)
            lanes, self._free = self._free, []
        with contextlib.ExitStack() as last:  # one that fails does not keep the others
            last.callback(self._kernels.close)
            for lane in lanes:
                last.callback(lane.close)

    def _take(self, faces: int) -> _Turn:
        """A turn at a free lane with room for so many faces; opened, or waited for."""
        turn = _Turn(self._give, faces)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._free or len(self._taken) < LANES)
            if self._closed:
                raise BackendError("this model is closed; load it again")
            self._taken.add(turn)
            turn.lane = self._free.pop() if self._free else None
        if (smaller := turn.lane) is not None and smaller.max_faces >= faces:
            return turn
        try:
            room = max(_LEAST_FACES, 1 << (faces - 1).bit_length())
            turn.lane = _Lane(self._backend, self._kernels, self._switch, room)
        except BaseException:
            turn.close()  # with a smaller one nothing is lost
            raise
        if smaller is not None:
            with contextlib.suppress(BackendError):  # no reason against the new one
                smaller.close()
        return turn

    def _give(self, turn: _Turn) -> None:
        with self._changed:
            self._taken.discard(turn)
            if turn.lane is not None:
                self._free.append(turn.lane)
                turn.lane = None
            self._changed.notify_all()


class _Turn(Closing):
    """A call's turn at a lane, which is free again once this is closed or forgotten: an error may come at any time.

    Called, it waits for the answer.
    """

    def __init__(self, give: Callable[[_Turn], None], faces: int) -> None:
        self._give, self._faces = give, faces
        self.lane: _Lane | None = None

    def opened(self) -> _Lane:
        """The lane, while it has one."""
        assert self.lane is not None
        return self.lane

    def __call__(self) -> Answer:
        with self:
            return self.opened().answer(self._faces)

    def close(self) -> None:
        """Gives the lane back; a second call does nothing."""
        if self.lane is not None:
            self.lane.leave()
        self._give(self)


@dataclass(frozen=True)
class _Graph:
    """A graph, and the engine's lane that it runs on; nothing else does."""

    lane: Lane
    handle: Any

    def close(self, driver: CudaDriver) -> None:
        driver.call("cuGraphExecDestroy", self.handle)
        self.lane.close()


class _Lane(Closing):
    """A lane of an engine with the memory around it, at fixed addresses but for the frame. For one thread at a time."""

    def __init__(self, backend: DeviceBackend, kernels: CropKernels, switch: GraphSwitch, max_faces: int) -> None:
        self._backend, self._kernels, self._switch = backend, kernels, switch
        self._driver, self._spec = backend.driver, backend.spec
        self.max_faces = max_faces
        self._closed = True  # until there is something to close
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._seen: set[tuple[int, int]] = set()
        self._frame: Frame | DeviceFrame | None = None  # kept alive while the GPU reads it
        call = self._driver.call
        self._driver.make_current()
        with contextlib.ExitStack() as owned:  # what is there already goes again where something is missing
            self._lane = owned.enter_context(backend.open_lane(max_faces))
            self._stream = self._driver.api.CUstream(self._lane.stream)
            self._records = CropRecords(self._driver, max_faces)
            owned.callback(self._records.free)
            self._answer, self._staged = Memory(self._driver, pinned=True), Memory(self._driver, pinned=True)
            self._pixels = Memory(self._driver)
            for memory in (self._answer, self._staged, self._pixels):
                owned.callback(memory.free)
            self._answer.reserve(max_faces * sum(self._spec.output_bytes))
            self._ready, self._done = (call("cuEventCreate", 2) for _ in range(2))  # 2: without times
            for event in (self._ready, self._done):
                owned.callback(call, "cuEventDestroy", event)
            self._owned = owned.pop_all()
        self._closed = False
        if not self._lane.capturable:
            switch.turn_off(f"{backend.name} can't be captured", warn=False)

    def graph_keys(self) -> list[tuple[int, int]]:
        """Bytes a pixel and faces of the graphs."""
        return [] if self._switch.off else list(self._graphs)

    def start(self, frame: Frame | DeviceFrame, faces: NDArray[np.void]) -> None:
        """Tells the stream the whole way for one frame; the one before must be over."""
        self._driver.make_current()
        key = CHANNELS[frame.layout], len(faces)
        try:
            graph = self._graph(*key)
            self._records.write(self._on_device(frame), faces)
            self._launch(*key, graph)
        except BaseException:
            self._settle()
            raise

    def answer(self, n: int) -> Answer:
        """Waits for the result."""
        self._driver.make_current()
        try:
            self._driver.call("cuEventSynchronize", self._done)
        except BaseException:
            self._settle()
            raise
        self._frame = None
        fetched = self._answer.array((n * sum(self._spec.output_bytes),), np.uint8).copy()
        return Answer.of(arrays_of(fetched, n, self._spec))

    def timed(self, frame: Frame | DeviceFrame, faces: NDArray[np.void], stage: Any) -> Answer:
        """The whole way with a wait after each stage."""
        self._driver.make_current()
        n = len(faces)
        try:
            with stage("crop"):
                self._records.write(self._on_device(frame), faces)
                self._crop(self._lane, CHANNELS[frame.layout], n)
                self._driver.call("cuStreamSynchronize", self._stream)
            with stage("infer"):
                self._infer(self._lane, n)
                self._driver.call("cuEventRecord", self._done, self._stream)
                return self.answer(n)
        except BaseException:
            self._settle()
            raise

    def warmup(self, bytes_a_pixel: int, n: int) -> None:
        """Runs so many faces once, and captures their graph."""
        self._driver.make_current()
        try:
            self._answer_to(self._canaries(bytes_a_pixel, n)[0])
            for _ in range(2):  # calls
                self._graph(bytes_a_pixel, n)
        except BaseException:
            self._settle()
            raise

    def close(self) -> None:
        """Waits for the stream and frees everything; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._driver.make_current()
        self._driver.call("cuStreamSynchronize", self._stream)
        self._close_graphs()
        self._owned.close()

    def _close_graphs(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].close(self._driver)

    def leave(self) -> None:
        """Waits for an answer that nobody took."""
        if self._frame is not None:
            self._settle()

    def _settle(self) -> None:
        """After an error: waits until the stream uses nothing any more."""
        with contextlib.suppress(BackendError):
            self._driver.make_current()
            self._driver.call("cuStreamSynchronize", self._stream)
        self._frame = None

    def _on_device(self, frame: Frame | DeviceFrame) -> DeviceFrame:
        """A frame that the stream's next work can read."""
        self._frame = frame
        if isinstance(frame, DeviceFrame):
            check_frame(frame, self._driver)
            self._driver.wait_for(frame.stream, self._stream, self._ready)
            return frame
        rows = frame.data[: frame.size_hw[0]]  # of video the luma plane alone
        pitch = frame.size_hw[1] * CHANNELS[frame.layout]
        on_device = self._uploaded([rows])
        return DeviceFrame(on_device, frame.size_hw, pitch, frame.layout, frame.range, self._driver.device_id)

    def _uploaded(self, arrays: list[NDArray[np.uint8]]) -> int:
        """The address on the device of arrays that are copied there one behind the other."""
        size = sum(array.size for array in arrays)
        self._staged.reserve(size)
        self._pixels.reserve(size)
        start = 0
        for array in arrays:
            np.copyto(self._staged.array(array.shape, np.uint8, start), array)
            start += array.size
        self._driver.call("cuMemcpyHtoDAsync", self._pixels.address, self._staged.address, size, self._stream)
        return self._pixels.address

    def _launch(self, bytes_a_pixel: int, n: int, graph: _Graph | None = None) -> None:
        if graph is None:
            self._enqueue(self._lane, bytes_a_pixel, n)
        else:
            self._driver.call("cuGraphLaunch", graph.handle, self._stream)
        self._driver.call("cuEventRecord", self._done, self._stream)

    def _enqueue(self, lane: Lane, bytes_a_pixel: int, n: int) -> None:
        """The whole way behind the frame, on an engine's lane and its stream."""
        self._crop(lane, bytes_a_pixel, n)
        self._infer(lane, n)

    def _crop(self, lane: Lane, bytes_a_pixel: int, n: int) -> None:
        stream = self._driver.api.CUstream(lane.stream)
        self._records.enqueue(self._kernels, bytes_a_pixel, n, self._spec.size, lane.input_ptr, stream)

    def _infer(self, lane: Lane, n: int) -> None:
        lane.enqueue(n)
        lane.fetch(n, self._answer.address)

    def _graph(self, bytes_a_pixel: int, n: int) -> _Graph | None:
        """The graph of so many faces, captured at their second call; None where there is none."""
        key = bytes_a_pixel, n
        if self._switch.off is not None:
            self._close_graphs()
        elif n > self._lane.at_once:
            return None
        elif key not in self._seen:
            self._seen.add(key)
        elif key not in self._graphs and len(self._graphs) < GRAPHS and key not in self._switch.given_up:
            self._prove(key)
        return self._graphs.get(key)

    def _prove(self, key: tuple[int, int]) -> None:
        """Captures a graph, and keeps it when it answers as plain calls do for two pictures."""
        canaries = self._canaries(*key)
        plain = [self._answer_to(canary) for canary in canaries]
        try:
            lane = self._lane_of_graph(*key)
        except BackendError as error:  # most often for want of memory, which speaks against no other graph
            self._switch.give_up(key, str(error))
            return
        graph = fault = None
        try:
            graph = self._captured(lane, *key)
            fault = canary_fault(plain, [self._answer_to(canary, graph) for canary in canaries])
        except BackendError as error:
            fault = str(error)
        if graph is not None and fault is None:
            self._graphs[key] = graph
            return
        self._settle()
        if graph is not None:
            with contextlib.suppress(BackendError):  # the fault is what there is to tell
                graph.close(self._driver)
        self._switch.turn_off(str(fault))

    def _lane_of_graph(self, bytes_a_pixel: int, n: int) -> Lane:
        """A lane that nothing else runs on, with what a capture needs ready."""
        lane = self._backend.open_lane(n)
        try:
            for _ in range(lane.runs_before_capture):  # engines make ready what a capture may not
                self._enqueue(lane, bytes_a_pixel, n)
                self._driver.call("cuStreamSynchronize", self._driver.api.CUstream(lane.stream))
        except BaseException:
            lane.close()
            raise
        return lane

    def _captured(self, lane: Lane, bytes_a_pixel: int, n: int) -> _Graph:
        """A graph on a lane, which is closed where there is none."""
        try:
            stream = self._driver.api.CUstream(lane.stream)
            return _Graph(lane, captured(self._driver, stream, lambda: self._enqueue(lane, bytes_a_pixel, n)))
        except BaseException:
            lane.close()
            raise

    def _canaries(self, bytes_a_pixel: int, n: int) -> list[tuple[DeviceFrame, NDArray[np.void]]]:
        """A dark and a bright picture of patches, of other size and address, and `n` faces at other places in each."""
        rng = np.random.default_rng(68)
        layout = {1: "gray", 3: "bgr", 4: "bgra"}[bytes_a_pixel]
        pictures = []
        for across, darkest in ((20, 0), (30, 128)):
            patches = rng.integers(darkest, darkest + 128, (25, across, bytes_a_pixel), dtype=np.uint8)
            pictures.append(patches.repeat(8, axis=0).repeat(8, axis=1))
        address = self._uploaded(pictures)
        canaries = []
        for picture in pictures:
            size_hw = picture.shape[0], picture.shape[1]
            frame = DeviceFrame(address, size_hw, size_hw[1] * bytes_a_pixel, layout, device_id=self._driver.device_id)
            corner = rng.uniform(0, 80, (n, 2))
            boxes = np.concatenate([corner, corner + rng.uniform(40, 80, (n, 2))], axis=1)
            matrices = matrices_from_boxes(boxes, self._spec.size, self._spec.margin)
            canaries.append((frame, faces_from_matrices(matrices, self._spec.size, size_hw)))
            address += picture.size
        return canaries

    def _answer_to(self, canary: tuple[DeviceFrame, NDArray[np.void]], graph: _Graph | None = None) -> Answer:
        frame, faces = canary
        self._records.write(frame, faces)
        self._launch(CHANNELS[frame.layout], len(faces), graph)
        return self.answer(len(faces))
