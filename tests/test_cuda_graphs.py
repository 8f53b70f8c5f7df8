"""CUDA graphs of a GPU's whole way: when they are made, the canary before one is used, what goes wrong with them."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kp_runtime import (
    BackendError,
    GraphWarning,
    InputError,
    Model,
)
from kp_runtime.cuda_driver import CudaDriver, Memory
from kp_runtime.cuda_graphs import captured
from kp_runtime.pipeline_cuda import GRAPHS, LANES
from tests.cuda_driver_double import DriverDouble, Result
from tests.device_double import DeviceDouble, LaneDouble
from tests.test_pipeline_cuda import asked, boxes_of, check, picture


def test_a_graph_serves_other_frames_and_boxes(model: Model, cpu: Model, driver: DriverDouble) -> None:
    for i in range(2):
        check(model, cpu, picture(i), boxes_of(i, 4))
    launches = asked(driver, "cuLaunchKernel")
    for i in range(10):
        check(model, cpu, picture(i, (8 * (20 + i), 8 * (40 - i), 3)), boxes_of(i, 4))
    assert asked(driver, "cuLaunchKernel") == launches  # all by the graph
    assert asked(driver, "cuGraphInstantiate") == 1


def test_graphs_are_bounded(model: Model, cpu: Model) -> None:
    most = GRAPHS + 2
    model(picture(0), boxes_of(0, most))
    for n in range(1, most + 1):
        for i in range(3):
            check(model, cpu, picture(i), boxes_of(i, n))
    assert model.graphs.captured == tuple((3, n) for n in range(1, GRAPHS + 1))


def test_warmup_opens_lanes_and_captures(model: Model, cpu: Model, driver: DriverDouble) -> None:
    model.warmup(np.int64(5))  # type: ignore[arg-type]
    assert model.graphs.captured == tuple((3, n) for n in (1, 2, 4, 5) for _ in range(LANES))
    names = ("cuGraphInstantiate", "cuStreamCreate", "cuLaunchKernel")
    made = [asked(driver, name) for name in names]
    for n in (5, 1, 2):
        check(model, cpu, picture(n), boxes_of(n, n))
    assert made == [asked(driver, name) for name in names]
    with pytest.raises(InputError, match="warmup needs the number of faces of a call, 1 or more; got 0"):
        model.warmup(0)


def test_warmup_keeps_the_largest_graphs(model: Model) -> None:
    model.warmup(16)
    assert model.graphs.captured == tuple((3, n) for n in (2, 4, 8, 16) for _ in range(LANES))


@pytest.mark.parametrize(
    ("trait", "message"),
    [
        ("keeps_crops", "a graph puts a keypoint .* px from where the same calls put it without one"),
        ("elsewhere", "a graph puts a keypoint"),
        ("waits", "cuStreamSynchronize says CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"),
        ("stale_scores", "a graph gives a lost score .* from what the same calls give without one"),
        ("blind", "two different pictures give the same keypoints"),
    ],
)
def test_graphs_that_the_canary_refuses(trait: str, message: str, driver: DriverDouble, cpu: Model) -> None:
    """A network that answers for old crops, is not in the capture, can't be captured, or can't be judged."""
    backend = DeviceDouble(**{trait: True})
    with Model(backend) as model:
        model(picture(0), boxes_of(0, 2))
        with pytest.warns(GraphWarning, match=f"CUDA graphs are off, and calls take longer: .*{message}") as warned:
            second = model(picture(1), boxes_of(1, 2))
        assert len(warned) == 1
        assert model.graphs.captured == ()
        assert model.graphs.off is not None
        if trait != "blind":
            assert np.abs(second.xy - cpu(picture(1), boxes_of(1, 2)).xy).max() <= 1e-3
            for i in range(3):  # said once, and right
                check(model, cpu, picture(i), boxes_of(i, 2))
        assert asked(driver, "cuGraphLaunch") <= 2  # the canary's alone
    assert not driver.memory
    assert not driver.graphs
    assert not driver.captures


@pytest.mark.parametrize("function", ["open_lane", "enqueue"])
def test_a_graph_for_which_there_is_no_room(
    function: str, driver: DriverDouble, cpu: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It alone is given up, also where the engine finds no memory at its first run."""
    backend, tried = DeviceDouble(), []

    def full(*_: Any) -> None:
        tried.append(1)
        raise BackendError("no memory for another context")

    with Model(backend) as model:
        for n in (4, 4, 2):
            check(model, cpu, picture(n), boxes_of(n, n))
        with monkeypatch.context() as patch:
            if function == "open_lane":
                patch.setattr(backend, "open_lane", full)
            else:
                feed = LaneDouble._feed
                patch.setattr(LaneDouble, "_feed", lambda self, *a: (feed if self.max_faces > 2 else full)(self, *a))
            told = "calls of 2 faces have no CUDA graph, and take longer: no memory .*; keypoints .*smaller --max-batch"
            with pytest.warns(GraphWarning, match=told):
                check(model, cpu, picture(1), boxes_of(1, 2))
            for n in (2, 4, 2):
                check(model, cpu, picture(n), boxes_of(n, n))
            assert tried == [1]
        model.warmup(4)  # with memory again: the other lane does not try it either
        assert (model.graphs.captured, model.graphs.off) == (((3, 1),) * LANES + ((3, 4),) * LANES, None)
    assert not driver.memory
    assert not driver.graphs


def test_a_graph_that_can_not_be_looked_into(model: Model, cpu: Model, driver: DriverDouble) -> None:
    for n in (3, 3, 2):
        check(model, cpu, picture(n), boxes_of(n, n))
    before = len(driver.graphs), asked(driver, "cuStreamDestroy")
    driver.failing["cuGraphGetNodes"] = Result.CUDA_ERROR_INVALID_VALUE
    reason = "CUDA does not tell what a graph does: cuGraphGetNodes"
    with pytest.warns(GraphWarning, match=f"CUDA graphs are off, and calls take longer: {reason}.*Report it"):
        check(model, cpu, picture(1), boxes_of(1, 2))
    check(model, cpu, picture(2), boxes_of(2, 3))
    assert (before[0], len(driver.graphs)) == (1, 0)  # what the proven one has is given back
    assert asked(driver, "cuStreamDestroy") == before[1] + 2  # and the lanes of both


def test_what_is_forgotten_within_a_capture_is_freed_behind_it(driver: DriverDouble, cpu: Model) -> None:
    forgotten = Memory(CudaDriver())
    forgotten.reserve(8)
    with Model(DeviceDouble(forgets=forgotten)) as model:
        del forgotten
        for i in range(3):
            check(model, cpu, picture(i), boxes_of(i, 2))
        assert (model.graphs.captured, model.graphs.off) == (((3, 2),), None)
    gc.collect()
    assert not driver.memory


def test_the_collector_rests_until_the_last_of_two_captures_has_ended(
    driver: DriverDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, resting, end = CudaDriver(), [], driver._cuStreamEndCapture

    def ended(stream: int) -> int | Result:
        resting.append(not gc.isenabled())
        return end(stream)

    monkeypatch.setattr(driver, "_cuStreamEndCapture", ended)

    def capture(work: Callable[[], None]) -> None:
        own.make_current()
        captured(own, own.call("cuStreamCreate", 1), work)

    other = threading.Thread(target=capture, args=(lambda: time.sleep(0.05),))

    def first() -> None:
        other.start()
        time.sleep(0.02)

    capture(first)
    other.join()
    assert resting == [True, True]
    assert gc.isenabled()


def test_warnings_that_are_errors_leave_the_model_usable(driver: DriverDouble, cpu: Model) -> None:
    with Model(DeviceDouble(elsewhere=True)) as model:
        model(picture(0), boxes_of(0, 2))
        with pytest.raises(GraphWarning):  # as pytest makes them
            model(picture(1), boxes_of(1, 2))
        check(model, cpu, picture(1), boxes_of(1, 2))


def test_engines_that_can_not_be_captured(driver: DriverDouble, cpu: Model) -> None:
    with Model(DeviceDouble(capturable=False)) as model:
        for i in range(3):
            check(model, cpu, picture(i), boxes_of(i, 2))
        assert (model.graphs.captured, model.graphs.off) == ((), "double can't be captured")
    assert asked(driver, "cuStreamBeginCapture") == 0


def test_graphs_of_a_model_on_the_cpu(cpu: Model) -> None:
    assert (cpu.graphs.captured, cpu.graphs.off) == ((), "ort-cpu runs on no GPU")
