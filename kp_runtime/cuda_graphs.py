"""CUDA graphs that have proven themselves: capture, and a canary before the first use.

A graph keeps the addresses and arguments of the calls that were captured. An engine that keeps more
(a result, a shape, memory that it frees again) or does part of its work elsewhere would give wrong
keypoints from then on, silently. So a graph's first two launches are for pictures whose keypoints are known.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kp_runtime.backend import Answer
from kp_runtime.cuda_driver import CudaDriver
from kp_runtime.errors import BackendError, KpWarning

__all__ = ["CANARY_PX", "GraphReport", "GraphSwitch", "GraphWarning", "canary_fault", "captured"]

CANARY_PX = 1e-3
"""Pixels of the crop: launches of a graph may differ less from plain ones, different pictures must differ more."""
CANARY_SCORE = 1e-4
"""What a graph's lost scores may differ by; that of what is no face is about 1."""

_RESTING = threading.Lock()


class GraphWarning(KpWarning):
    """A graph could not be made or gave wrong keypoints: the model goes on without it or any, right and slower."""


@dataclass(frozen=True)
class GraphReport:
    """The CUDA graphs of a model.

    Attributes:
        captured: bytes a pixel and number of faces of each graph, for every lane that has one, in order.
        off: why none is used; None where they are.
    """

    captured: tuple[tuple[int, int], ...]
    off: str | None


class GraphSwitch:
    """Whether a model uses graphs, and which are not tried again. Shared between its lanes and threads."""

    def __init__(self) -> None:
        self.off: str | None = None
        self.given_up: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def give_up(self, key: tuple[int, int], reason: str) -> None:
        """Has no more graphs made of so many faces, for which there was no room, and warns once; others stay."""
        with self._lock:
            if key in self.given_up:
                return
            self.given_up.add(key)
        warnings.warn(
            f"calls of {key[1]} faces have no CUDA graph, and take longer: {reason}; keypoints stay right. Each graph "
            "has memory of its own: where it is short, a plan with a smaller --max-batch takes less",
            GraphWarning,
            stacklevel=2,
        )

    def turn_off(self, reason: str, warn: bool = True) -> None:
        """Turns graphs off for good; the first reason stays, and is warned of."""
        with self._lock:
            if self.off is not None:
                return
            self.off = reason
        if warn:
            warnings.warn(
                f"CUDA graphs are off, and calls take longer: {reason}; keypoints stay right. Report it",
                GraphWarning,
                stacklevel=2,
            )


def captured(driver: CudaDriver, stream: Any, work: Callable[[], None]) -> Any:
    """What `work` tells a stream, as a graph that can be launched.

    Other threads may go on with other streams meanwhile.

    Raises:
        BackendError: something in it can't be captured, or is a call of the host's code, which each launch would
            repeat (what it frees would be freed again); the stream is as it was.
    """
    mode = driver.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    with _collector_at_rest():  # what a forgotten model has on the GPU can't be freed within a capture
        driver.call("cuStreamBeginCapture", stream, mode)
        try:
            work()
        except BaseException:
            with contextlib.suppress(BackendError):  # the capture has failed already; this ends it
                driver.call("cuGraphDestroy", driver.call("cuStreamEndCapture", stream))
            raise
        graph = driver.call("cuStreamEndCapture", stream)
    try:
        _check_nodes(driver, graph)
        return driver.call("cuGraphInstantiate", graph, 0)
    finally:
        driver.call("cuGraphDestroy", graph)


@contextlib.contextmanager
def _collector_at_rest() -> Iterator[None]:
    """No collection of garbage in any thread; one thread at a time, as the collector is everyone's."""
    with _RESTING:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def _check_nodes(driver: CudaDriver, graph: Any) -> None:
    host = driver.api.CUgraphNodeType.CU_GRAPH_NODE_TYPE_HOST
    status, _, count = driver.api.cuGraphGetNodes(graph)
    if status != driver.api.CUresult.CUDA_SUCCESS:
        raise BackendError(f"CUDA does not tell what a graph does: cuGraphGetNodes says {status}")
    nodes = driver.call("cuGraphGetNodes", graph, count) if count else []
    if any(driver.call("cuGraphNodeGetType", node) == host for node in nodes):
        raise BackendError("the work calls code of the host, which a graph would call again at each launch")


def canary_fault(plain: Sequence[Answer], launched: Sequence[Answer]) -> str | None:
    """What is wrong with a graph, judged by two pictures: the answers of plain calls, and of its launches."""
    if not (np.abs(plain[0].keypoints - plain[1].keypoints).max(axis=(1, 2)) > CANARY_PX).all():
        return "two different pictures give the same keypoints, so nothing can be said about a graph"
    for one, other in zip(plain, launched, strict=True):
        worst = float(np.abs(one.keypoints - other.keypoints).max())
        if not worst <= CANARY_PX:
            return f"a graph puts a keypoint {worst:.3g} px from where the same calls put it without one"
        if one.lost_score is not None and other.lost_score is not None:
            worst = float(np.abs(one.lost_score - other.lost_score).max())
            if not worst <= CANARY_SCORE:
                return f"a graph gives a lost score {worst:.3g} from what the same calls give without one"
    return None
