from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from kp_runtime.errors import BackendError
from kp_runtime.in_order import InOrder, SideBySide
from tests.conftest import no_thread_at

WAIT = 60


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_steps_pass_values_and_results_come_in_order(workers: int) -> None:
    line, done = InOrder(workers, 4), []
    steps = [lambda: 1, *[lambda value: value * 10] * (workers - 1)]
    futures = []
    for i in range(30):
        futures.append(line.submit(*steps))
        futures[-1].add_done_callback(lambda _, i=i: done.append(i))
    assert [future.result(WAIT) for future in futures] == [10 ** (workers - 1)] * 30
    line.close()
    assert done == list(range(30))


def test_an_error_skips_the_other_steps_and_keeps_its_place() -> None:
    line, gate, done = InOrder(2, 4), threading.Event(), []
    first = line.submit(lambda: 1, lambda value: (gate.wait(WAIT), value)[1])
    second = line.submit(lambda: 1 / 0, lambda value: done.append("never"))
    for name, future in (("first", first), ("second", second)):
        future.add_done_callback(lambda _, name=name: done.append(name))
    assert not second.done()  # it failed before the first was over, and waits for its turn
    gate.set()
    assert isinstance(second.exception(WAIT), ZeroDivisionError)
    line.close()
    assert done == ["first", "second"]


def test_what_ends_a_program_is_an_answer_like_any_error() -> None:
    line = InOrder(1, 4)
    assert isinstance(line.submit(sys.exit).exception(WAIT), SystemExit)
    assert line.submit(lambda: 1).result(WAIT) == 1
    line.close()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fails", range(2))
def test_a_task_that_failed_is_gone_without_the_garbage_collector(workers: int, fails: int) -> None:
    line, thing = InOrder(workers, 4), type("Thing", (), {})()
    known = weakref.ref(thing)
    steps = [lambda *_, at=at, thing=thing: 1 // abs(at - fails) for at in range(workers)]
    gc.collect()
    gc.disable()
    try:
        future = line.submit(*steps)
        assert (future.exception(WAIT) is None) == (fails >= workers)
        line.close()
        del future, steps, thing
        assert known() is None
    finally:
        gc.enable()


def test_steps_of_two_tasks_run_at_the_same_time() -> None:
    line, meeting = InOrder(2, 4), threading.Barrier(2)
    first = line.submit(lambda: None, lambda _: meeting.wait(WAIT))
    second = line.submit(lambda: meeting.wait(WAIT), lambda _: None)  # its first step meets the other's second
    assert first.exception(WAIT) is second.exception(WAIT) is None
    line.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_line_makes_others_wait(workers: int) -> None:
    line, gate, futures = InOrder(workers, 2), threading.Event(), []
    steps = [lambda: gate.wait(WAIT), *[lambda _: True] * (workers - 1)]
    futures = [line.submit(*steps) for _ in range(2)]
    third = threading.Thread(target=lambda: futures.append(line.submit(*steps)))
    third.start()
    third.join(0.1)
    assert third.is_alive()
    gate.set()
    third.join(WAIT)
    assert [future.result(WAIT) for future in futures] == [True] * 3
    line.close()


def test_a_callback_that_would_wait_for_itself_is_told() -> None:
    line, gate, told = InOrder(1, 1), threading.Event(), Future()

    def greedy(_: object) -> None:
        line.submit(lambda: None)  # the room of the task that is over
        try:
            line.submit(lambda: None)
        except BackendError as error:
            told.set_result(str(error))

    line.submit(lambda: gate.wait(WAIT)).add_done_callback(greedy)
    gate.set()
    assert told.result(WAIT) == ("a future's callback can't submit while the line is full; submit from another thread")
    line.close()


def test_cancelled_tasks_leave_their_room() -> None:
    line, gate = InOrder(1, 2), threading.Event()
    line.submit(lambda: gate.wait(WAIT))
    waiting = line.submit(lambda: 1 / 0)
    assert waiting.cancel()
    gate.set()
    assert [line.submit(lambda i=i: i).result(WAIT) for i in range(5)] == list(range(5))
    line.close()


AT_THE_END = """
import threading, time
from kp_runtime.in_order import InOrder
future = InOrder(2, 4).submit(lambda: time.sleep(0.5), lambda _: 1)
threading.Thread(target=lambda: print(future.result(20))).start()
"""


def test_a_task_between_two_steps_when_the_program_ends() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "1\n", done.stderr


AFTER_THE_MAIN_THREAD = """
import threading, time
from concurrent.futures import thread
from kp_runtime.errors import BackendError
from kp_runtime.in_order import InOrder, SideBySide

def the_end():
    while not thread._shutdown:
        time.sleep(0.01)

def told(line):
    try:
        line.submit(int)
    except BackendError as error:
        print(f"{error}\\n", end="")  # in one piece: two threads do

def give(line, i, step=int):
    future = line.submit(step, *[lambda value: value] * (len(line._line) - 1))
    future.add_done_callback(lambda _: done[line].append(i))
    return future

def work():
    the_end()
    done[InOrder(2, 4)] = []
    for line in done:
        print(give(line, 2).done(), done[line], line.is_inside())
        line.close()
        told(line)
    print(SideBySide(2, "parts").run(lambda part: part + 1, [1, 2, 3]), pool.run(lambda part: part + 1, [1, 2, 3]))

done, pool = {InOrder(1, 4): [], InOrder(2, 4): []}, SideBySide(2, "parts")
pool.run(int, [1, 2, 3])
for line in done:
    give(line, 0, the_end).add_done_callback(lambda _, line=line: told(line))
    give(line, 1)
threading.Thread(target=work).start()
"""


def test_work_goes_on_in_the_thread_that_gives_it_once_the_main_thread_is_over() -> None:
    command = [sys.executable, "-c", AFTER_THE_MAIN_THREAD]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    *lines, parts = done.stdout.splitlines()
    assert parts == "[2, 3, 4] [2, 3, 4]", done.stderr
    callback = "a future's callback can't submit once the main thread is over; submit from another thread"
    assert [lines.count(line) for line in (callback, "this model is closed; load it again")] == [2, 3]
    assert [line for line in lines if line[0] == "T"] == ["True [0, 1, 2] False"] * 2 + ["True [2] False"]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_thread_that_can_not_be_started_is_told_at_once(fails: int, monkeypatch: pytest.MonkeyPatch) -> None:
    no_thread_at(monkeypatch, fails)
    with pytest.raises(BackendError, match=r"no thread could be started \(can't start new thread\)"):
        InOrder(2, 1)
    line = InOrder(2, 1)
    assert [line.submit(lambda: 1, lambda value: value + 1).result(WAIT) for _ in range(3)] == [2, 2, 2]
    line.close()


def test_where_a_thread_can_not_be_started_another_calls_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes free just then, and takes a part of the call that could not have one of its own."""
    pool, start, shutdown = SideBySide(3, "parts"), threading.Thread.start, ThreadPoolExecutor.shutdown
    busy, free, taken, asked = (threading.Event() for _ in range(4))

    def first(part: int) -> None:
        if threading.current_thread() is not other:
            busy.set()
        assert (busy if threading.current_thread() is other else free).wait(WAIT)

    def second(part: int) -> int:
        if threading.current_thread().name.startswith("parts"):
            taken.set()
            assert asked.wait(WAIT)
        return part + 1

    def fails(thread: threading.Thread) -> None:
        if not thread.name.startswith("parts"):
            return start(thread)
        free.set()
        assert taken.wait(WAIT)
        raise RuntimeError("can't start new thread")

    def noted(pool: ThreadPoolExecutor, wait: bool = True, **rest: bool) -> None:
        if wait:
            asked.set()
        shutdown(pool, wait, **rest)

    other = threading.Thread(target=pool.run, args=(first, [1, 2]))
    other.start()
    assert busy.wait(WAIT)
    monkeypatch.setattr(threading.Thread, "start", fails)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", noted)
    try:
        assert pool.run(second, [1, 2, 3]) == [2, 3, 4]
    finally:
        asked.set()
        other.join()


def test_a_closed_line() -> None:
    line = InOrder(2, 1)
    line.close()
    for _ in range(2):  # nothing is used up
        with pytest.raises(BackendError, match="this model is closed"):
            line.submit(lambda: None, lambda _: None)
