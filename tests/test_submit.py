"""Calls in the background and from several threads, on a CPU and on doubles of a GPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kp_runtime import BackendError, BoxError, Frame, ImageError, InputError, Model
from kp_runtime.pipeline import IN_FLIGHT
from kp_runtime.pipeline_cuda import LANES
from tests.conftest import until
from tests.cuda_driver_double import DriverDouble
from tests.device_double import DeviceDouble
from tests.test_pipeline_cuda import asked, boxes_of, on_device, picture


@pytest.fixture
def both(cpu: Model, model: Model) -> Iterator[list[Model]]:
    """A model on the CPU and one on the GPU."""
    with Model(cpu.backend) as other:
        yield [other, model]


def test_a_stream_that_is_another_one_in_each_thread_is_not_submitted(model: Model, driver: DriverDouble) -> None:
    device = on_device(driver, Frame(picture(0), "bgr"), stream=2)
    with pytest.raises(InputError, match="per-thread default stream"):
        model.submit(device, boxes_of(0, 1))
    assert len(model.submit(on_device(driver, Frame(picture(0), "bgr"), stream=1), boxes_of(0, 1)).result(30)) == 1


def test_submitted_frames_come_in_order_and_right(both: list[Model], cpu: Model) -> None:
    for either in both:
        done: list[int] = []
        futures = []
        for i in range(20):
            futures.append(either.submit(picture(i), boxes_of(i, i % 4)))
            futures[-1].add_done_callback(lambda _, i=i, done=done: done.append(i))
        for i, future in enumerate(futures):
            assert np.abs(future.result(60).xy - cpu(picture(i), boxes_of(i, i % 4)).xy).max(initial=0) <= 1e-3
        either.submit(picture(0), boxes_of(0, 1)).result(60)
        assert done == list(range(20))


def test_a_frame_is_copied_while_another_is_computed(model: Model, driver: DriverDouble, cpu: Model) -> None:
    model.warmup(2)
    driver.gate.clear()  # nobody is told that the first frame is done
    launches = asked(driver, "cuGraphLaunch")
    futures = [model.submit(picture(i), boxes_of(i, 2)) for i in range(IN_FLIGHT)]
    until(lambda: asked(driver, "cuGraphLaunch") == launches + LANES)
    streams = [call[2] for call in driver.asked if call[0] == "cuGraphLaunch"][-LANES:]
    assert len(set(streams)) == LANES
    assert not any(future.done() for future in futures)
    more = threading.Thread(target=lambda: futures.append(model.submit(picture(9), boxes_of(9, 2))))
    more.start()
    more.join(0.2)
    assert more.is_alive()  # one too many: it waits
    assert len(futures) == IN_FLIGHT
    driver.gate.set()
    more.join(60)
    for i, future in zip((*range(IN_FLIGHT), 9), futures, strict=True):
        assert np.abs(future.result(60).xy - cpu(picture(i), boxes_of(i, 2)).xy).max() <= 1e-3


def test_errors_arrive_in_the_future_and_in_order(both: list[Model]) -> None:
    for either in both:
        done: list[int] = []
        calls: list[tuple[Any, Any]] = [
            (picture(0), boxes_of(0, 1)),
            (picture(1), [[0, 0, np.nan, 1]]),
            (picture(2).astype(np.float32), boxes_of(2, 1)),
            (picture(3), boxes_of(3, 1)),
        ]
        futures = []
        for i, call in enumerate(calls):
            futures.append(either.submit(*call))
            futures[-1].add_done_callback(lambda _, i=i, done=done: done.append(i))
        assert len(futures[0].result(60)) == len(futures[3].result(60)) == 1
        assert isinstance(futures[1].exception(60), BoxError)
        assert isinstance(futures[2].exception(60), ImageError)
        until(lambda done=done: done == [0, 1, 2, 3])


def test_threads_are_started_by_the_first_submit(both: list[Model]) -> None:
    before = set(threading.enumerate())
    for either, most in zip(both, (1, 2), strict=True):
        either(picture(0), boxes_of(0, 1))
        assert set(threading.enumerate()) <= before
        either.submit(picture(0), boxes_of(0, 1)).result(60)
        assert 1 <= len(set(threading.enumerate()) - before) <= most
        either.close()
        assert set(threading.enumerate()) <= before


def test_a_future_can_be_cancelled_while_it_waits(model: Model, driver: DriverDouble) -> None:
    model.warmup(1)
    driver.gate.clear()
    futures = [model.submit(picture(i), boxes_of(i, 1)) for i in range(IN_FLIGHT)]
    assert futures[-1].cancel()
    driver.gate.set()
    assert all(len(future.result(60)) == 1 for future in futures[:-1])
    for i in range(2 * IN_FLIGHT):  # its room is free again
        model.submit(picture(i), boxes_of(i, 1))


def test_close_finishes_what_was_submitted(driver: DriverDouble, cpu: Model) -> None:
    for either in (Model(cpu.backend), Model(DeviceDouble())):
        with either:
            futures = [either.submit(picture(i), boxes_of(i, 1)) for i in range(IN_FLIGHT)]
        assert all(len(future.result(0)) == 1 for future in futures)
        either.close()
        with pytest.raises(BackendError, match="this model is closed; load it again"):
            either(picture(0), boxes_of(0, 1))
        with pytest.raises(BackendError, match="this model is closed; load it again"):
            either.submit(picture(0), boxes_of(0, 1))
    assert not driver.memory
    with pytest.raises(BackendError, match="this model is closed"):
        either.warmup(1)


def test_a_callback_that_closes_its_model_is_told(driver: DriverDouble, cpu: Model) -> None:
    for either in (Model(cpu.backend), Model(DeviceDouble())):
        gate, told = threading.Event(), Future[str]()

        def close(_: object, model: Model = either, told: Future[str] = told) -> None:
            try:
                model.close()
            except Exception as error:
                told.set_result(str(error))

        class Boxes:
            def __array__(self, *_: object, gate: threading.Event = gate, **__: object) -> np.ndarray:
                gate.wait(60)  # until the callback is there
                return boxes_of(0, 1)

        with either:
            either.submit(picture(0), Boxes()).add_done_callback(close)
            gate.set()
            assert told.result(60) == "a future's callback can't close the model; close it from another thread"
            assert len(either(picture(0), boxes_of(0, 1))) == 1
    assert not driver.memory


def test_a_model_that_nobody_closes_is_freed(driver: DriverDouble) -> None:
    model = Model(DeviceDouble())
    for i in range(3):
        model(picture(i), boxes_of(i, 2))
    model.submit(picture(0), boxes_of(0, 2)).result(60)
    del model
    gc.collect()
    until(lambda: not driver.memory and not driver.graphs and not driver.events)


# threads


def test_threads_share_a_model(model: Model, cpu: Model) -> None:
    wanted = [cpu(picture(i), boxes_of(i, i % 5)).xy for i in range(24)]

    def call(i: int) -> float:
        result = (
            model(picture(i), boxes_of(i, i % 5)) if i % 3 else model.submit(picture(i), boxes_of(i, i % 5)).result(60)
        )
        return float(np.abs(result.xy - wanted[i]).max(initial=0))

    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            assert max(pool.map(call, range(24))) <= 1e-3
    assert model.graphs.off is None


def test_warmups_of_two_threads(model: Model) -> None:
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(model.warmup, 2) for _ in range(2)]:
            done.result(60)
    assert model.graphs.captured == ((3, 1),) * LANES + ((3, 2),) * LANES
