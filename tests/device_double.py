"""An engine on the double of the CUDA driver: its network answers with the tiny network's keypoints of the crops."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from kp_runtime.backend import BackendReport
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.device_backend import DeviceBackend, Lane
from kp_runtime.errors import BackendError
from kp_runtime.spec import ModelSpec
from tests.cuda_driver_double import DriverDouble
from tests.models import LOST_LIMIT, SIZE, tiny_outputs


class LaneDouble(Lane):
    """A lane that enqueues one piece of work; `DeviceDouble` says what else it does.

    As with TensorRT, what was captured is void once the lane has taken another number of crops.
    """

    double: DeviceDouble
    count = changes = 0

    def _feed(self, input_ptr: int, output_ptrs: tuple[int, ...], count: int) -> None:
        api: DriverDouble = self.driver.api
        if self.double.fails:
            raise BackendError("the engine failed")
        self.changes += count != self.count
        self.count = count
        changes, kept, in_capture = self.changes, [], self.stream in api.captures
        if in_capture and self.double.forgets:
            forgotten, self.double.forgets = [self.double.forgets], None
            forgotten.append(forgotten)
            del forgotten
            _ = [[] for _ in range(20_000)]  # until Python looks for what nobody can reach any more

        def compute() -> None:
            size = count * SIZE * SIZE
            crops = ctypes.string_at(input_ptr, size)
            if self.double.keeps_crops:
                kept.append(crops)
                crops = kept[0]
            given = np.frombuffer(crops, np.uint8).reshape(count, 1, SIZE, SIZE)
            keypoints, scores = tiny_outputs(given)
            if self.double.blind:
                keypoints[:] = 0
            if in_capture and changes != self.changes:
                keypoints[:] = -1
            if in_capture and self.double.stale_scores:
                scores[:] = -1
            for address, output in zip(output_ptrs, (keypoints, scores), strict=False):
                ctypes.memmove(address, output.tobytes(), output.nbytes)

        if self.double.elsewhere and in_capture:
            return  # work that a capture does not see
        api.work(self.stream, compute, input_ptr, *output_ptrs)
        if self.double.waits and in_capture:
            self.driver.call("cuStreamSynchronize", self.stream)


class DeviceDouble(DeviceBackend):
    """The engine.

    Attributes:
        lost_limit: of its model; None for one without a lost score.
        capturable: of its lanes.
        keeps_crops: the network answers for the first crops that a captured call has seen.
        elsewhere: the network runs where a capture does not see it.
        waits: the network waits for the stream, which a capture forbids.
        blind: all crops have the same keypoints.
        stale_scores: a captured call gives other lost scores.
        fails: the network can't be run.
        forgets: what nobody can reach any more from a captured call on.
    """

    name = "double"

    def __init__(self, **traits: Any) -> None:
        super().__init__(
            ModelSpec("tiny", size=SIZE, margin=1.3, lost_limit=traits.get("lost_limit", LOST_LIMIT)), CudaDriver()
        )
        self.capturable, self.keeps_crops, self.elsewhere, self.waits, self.blind, self.stale_scores, self.fails = (
            traits.get(name, name == "capturable")
            for name in ("capturable", "keeps_crops", "elsewhere", "waits", "blind", "stale_scores", "fails")
        )
        self.forgets: Any = traits.get("forgets")
        self.report = BackendReport("double", "none", "fp32", (), None)

    def open_lane(self, max_faces: int) -> Lane:
        lane = LaneDouble(self.driver, self.spec, max_faces)
        lane.double, lane.capturable = self, self.capturable
        return lane
