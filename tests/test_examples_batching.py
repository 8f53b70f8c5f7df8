"""How examples/service.py joins the crops of several requests in one call of the engine."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kp_runtime
from kp_runtime.backend import Backend
from kp_runtime.spec import ModelSpec
from tests.conftest import until

ROOT = Path(__file__).resolve().parents[1]


class CountingBackend(Backend):
    """Answers with each crop's first pixel; a call waits until it is let through."""

    def __init__(self) -> None:
        super().__init__(ModelSpec("counting", size=32))
        self.name, self.report = "counting", kp_runtime.backend.BackendReport("counting", "-", "fp32", (), None)
        self.batches: list[int] = []
        self.may_run = threading.Event()
        self.started = threading.Event()

    def _run(self, crops: np.ndarray) -> list[np.ndarray]:
        self.batches.append(len(crops))
        self.started.set()
        assert self.may_run.wait(30)
        if crops[0, 0, 0, 0] == 255:
            raise kp_runtime.BackendError("the engine failed")
        return [np.broadcast_to(crops[:, 0, :1, :1].astype(np.float32), (len(crops), 68, 2))]


def crops_of(*levels: int) -> np.ndarray:
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), 1, 32, 32))


def test_what_waits_behind_a_call_shares_the_next(service: Any) -> None:
    engine = CountingBackend()
    batching = service.BatchingBackend(engine, wait_s=0.001, enough=100)
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(batching.infer, crops_of(1))
        assert engine.started.wait(30)
        behind = [threads.submit(batching.infer, crops_of(*[i] * n)) for i, n in ((2, 1), (3, 2), (4, 1))]
        until(lambda: batching._batch.faces == 4)
        engine.may_run.set()
        assert (first.result()[:, 0, 0] == [1]).all()
        assert [answer.result()[:, 0, 0].tolist() for answer in behind] == [[2.0], [3.0, 3.0], [4.0]]
    assert engine.batches == [1, 4]
    assert (batching.calls, batching.faces) == (2, 5)


def test_enough_faces_do_not_wait(service: Any) -> None:
    engine = CountingBackend()
    engine.may_run.set()
    batching = service.BatchingBackend(engine, wait_s=3600, enough=3)
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(batching.infer, crops_of(*levels)) for levels in ((1, 2), (3,))]
        assert [len(answer.result(30)) for answer in answers] == [2, 1]
    assert engine.batches == [3]


def test_an_error_is_everyones_and_the_next_call_works(service: Any) -> None:
    engine = CountingBackend()
    engine.may_run.set()
    batching = service.BatchingBackend(engine, wait_s=3600, enough=2)
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(batching.infer, crops_of(255)) for _ in range(2)]
        for answer in answers:
            with pytest.raises(kp_runtime.BackendError, match="the engine failed"):
                answer.result(30)
    assert len(batching.infer(crops_of(7, 8))) == 2


def test_one_thread_calls_the_engine(service: Any) -> None:
    """On a GPU each that does has a context of its own."""
    callers: set[int] = set()

    class Noting(CountingBackend):
        def _run(self, crops: np.ndarray) -> list[np.ndarray]:
            callers.add(threading.get_ident())
            return super()._run(crops)

    engine = Noting()
    engine.may_run.set()
    batching = service.BatchingBackend(engine, wait_s=0.001, enough=4)
    assert (batching.begin(crops_of(5))[:, 0, 0] == [5]).all()
    assert engine.batches == [1, 2, 4, 1]
    with ThreadPoolExecutor(8) as threads:
        assert [len(a) for a in threads.map(batching.infer, [crops_of(i) for i in range(30)])] == [1] * 30
    assert len(callers) == 1
    assert batching.faces == 30


def test_the_services_own_crops_are_held_to_the_golden_one(service: Any, bundle_with_image: Path) -> None:
    """Behind an engine on a GPU too, whose model cut others: the service cuts its crops on the CPU."""
    engine = kp_runtime.load(bundle_with_image, threads=1).backend
    assert engine.golden is not None
    kp_runtime.Model(service.BatchingBackend(engine, wait_s=0.001, enough=1))
    engine.golden = dataclasses.replace(engine.golden, crops=np.roll(engine.golden.crops, 5, axis=-1))
    with pytest.raises(kp_runtime.BackendError, match="the golden crop is cut with a grey level"):
        kp_runtime.Model(service.BatchingBackend(engine, wait_s=0.001, enough=1))


def test_the_health_check_shares_no_call(service: Any) -> None:
    """It is not held up for others, and what fails a call of many, such as their number, is no fault of the engine."""
    engine = CountingBackend()
    engine.may_run.set()
    batching = service.BatchingBackend(engine, wait_s=3600, enough=3)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(batching.infer, crops_of(255, 255))
        until(lambda: batching.waiting == 2)
        assert (batching.alone(crops_of(7))[:, 0, 0] == [7]).all()
        with pytest.raises(kp_runtime.BackendError, match="the engine failed"):
            batching.infer(crops_of(7))
        assert isinstance(waiting.exception(), kp_runtime.BackendError)
    assert engine.batches == [1, 3]


AT_THE_END = """
import threading, time
from concurrent.futures import thread
from examples.service import BatchingBackend
from tests.test_examples_batching import CountingBackend, crops_of

def work():
    while not thread._shutdown:
        time.sleep(0.01)
    print(batching.infer(crops_of(7))[0, 0, 0], batching.alone(crops_of(8))[0, 0, 0])

engine = CountingBackend()
engine.may_run.set()
batching = BatchingBackend(engine, 0.001, 1)
batching.begin(crops_of(5))
threading.Thread(target=work).start()
"""


def test_a_request_at_work_when_the_program_ends_is_answered(service: Any) -> None:
    """As after Ctrl-C under load; who else waits for the same call would hold the end up for ever."""
    command = [sys.executable, "-c", AT_THE_END]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("7.0 8.0\n", "")


def test_a_process_that_was_forked_from_the_one_with_the_engine_s_thread_is_refused(
    service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker of gunicorn --preload is."""
    engine = CountingBackend()
    engine.may_run.set()
    batching = service.BatchingBackend(engine, wait_s=0.001, enough=1)
    monkeypatch.setattr("os.getpid", lambda: 1)
    for ask_engine in (batching.infer, batching.infer, batching.alone):
        with pytest.raises(kp_runtime.BackendError, match=r"stayed behind when process \d+ forked this one"):
            ask_engine(crops_of(7))
    assert batching.waiting == 0
