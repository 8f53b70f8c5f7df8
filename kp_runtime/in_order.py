"""Work on other threads whose results come in the order in which it was given."""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from kp_runtime.cores import check_process
from kp_runtime.errors import BackendError

__all__ = ["InOrder", "SideBySide", "no_thread"]

Part = TypeVar("Part")
Result = TypeVar("Result")


class InOrder:
    """A line of workers, a thread each: every task passes them in order, and no task another. For any thread.

    Threads are started at once. Once the program's main thread is over they end, and who gives a task does it himself.

    Args:
        workers: how many steps a task has; while a worker does one, others do other tasks' steps.
        most: tasks that may be under way or waiting; `submit` blocks beyond it.

    Raises:
        BackendError: no thread could be started.
    """

    def __init__(self, workers: int, most: int) -> None:
        self._line = [ThreadPoolExecutor(1, f"kp-submit-{i}") for i in range(workers)]
        try:
            for worker in self._line:  # work that is none: a task would stay in the queue of a thread that fails
                worker.submit(int)
        except RuntimeError as error:
            if "interpreter shutdown" not in str(error):
                raise no_thread(error) from error
        self._room = threading.BoundedSemaphore(most)
        self._closed = False
        self._turn = threading.Lock()
        self._inside = threading.local()
        self._process = os.getpid()

    def submit(self, *steps: Callable[..., Any]) -> Future[Any]:
        """Gives a task: the first step has no argument, each other one what the step before returned.

        Returns:
            The future of what the last step returns, or of the error that a step raised.

        Raises:
            BackendError: the line is closed; a future's callback, which would wait for itself, asks while the line is
                full or the main thread is over; or this process was forked from the one with the threads.
        """
        check_process(self._process)
        if not self._room.acquire(blocking=not self.is_inside()):
            raise BackendError("a future's callback can't submit while the line is full; submit from another thread")
        future: Future[Any] = Future()
        task = [future, steps, None, None]
        try:
            self._line[0].submit(self._step, task, 0)
        except RuntimeError as error:
            if self._closed or self.is_inside():
                self._room.release()
                raise BackendError(
                    "this model is closed; load it again"
                    if self._closed
                    else "a future's callback can't submit once the main thread is over; submit from another thread"
                ) from error
            with self._turn:
                for worker in self._line:
                    worker.shutdown()  # waits for the tasks before
                self._step(task, 0)
                self._inside.worker = False
        return future

    def is_inside(self) -> bool:
        """Whether the calling thread is one of the line's, as it is in a future's callback."""
        return getattr(self._inside, "worker", False)

    def _step(self, task: list[Any], at: int) -> None:
        """What one worker does of a task, `[future, steps, value, error]`.

        An error keeps the frames that it passed and all below, this one too. What they know of the task is emptied
        before the future is answered: image, model and engine would else wait for the garbage collector.
        """
        self._inside.worker = True
        if at == 0 and not task[0].set_running_or_notify_cancel():
            self._room.release()
            return
        if task[3] is None:
            try:
                task[2] = task[1][at](task[2]) if at else task[1][at]()
            except BaseException as raised:  # it is the future's
                task[3] = raised
        if at + 1 < len(self._line):
            try:
                self._line[at + 1].submit(self._step, task, at + 1)
            except RuntimeError:  # the interpreter ends and takes no more: whoever waits is answered from here
                self._step(task, at + 1)
            return
        self._room.release()
        _answer(task)

    def close(self) -> None:
        """Waits for every task that was given; later ones are refused. A second call does nothing."""
        self._closed = True
        for worker in self._line:
            worker.shutdown()


def no_thread(error: RuntimeError) -> BackendError:
    """What to say where the system starts no thread."""
    return BackendError(f"no thread could be started ({error}); end other programs, or raise the limit: ulimit -u")


def _answer(task: list[Any]) -> None:
    future, _, value, error = task
    task.clear()
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


class SideBySide:
    """Parts of a piece of work on several threads, which are started when they are first needed. For any thread.

    Args:
        threads: most threads of a call, the calling one with them; all calls share the others.
        name: what their names begin with.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._new = functools.partial(ThreadPoolExecutor, max(1, threads - 1), name)
        self._pool = self._new()

    def run(self, do: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
        """What `do` gives for each part. The calling thread does parts too: all of them where no thread can be started.

        An error that `do` raises is raised again, once no thread is at work any more.
        """
        left, done, pool = deque(enumerate(parts)), dict[int, Result](), self._pool
        helpers: list[Future[None]] = []

        def work() -> None:
            while left:
                try:
                    i, part = left.popleft()
                except IndexError:  # another thread was faster
                    return
                done[i] = do(part)

        try:
            for _ in parts[1:]:
                helpers.append(pool.submit(work))
        except RuntimeError:  # the system starts no more, the main thread is over, or `close` was faster
            self._leave(pool).shutdown(cancel_futures=True)  # nothing stays there, or with another's thread
        try:
            work()
        finally:
            helpers = [helper for helper in helpers if not helper.cancel()]
            wait(helpers)
        while helpers:  # what is raised here knows this frame: it may find no future that knows it
            helpers.pop().result()
        return [done[i] for i in range(len(parts))]

    def close(self) -> None:
        """Waits for the threads and ends them; a later call starts others."""
        self._leave(self._pool).shutdown()

    def _leave(self, pool: ThreadPoolExecutor) -> ThreadPoolExecutor:
        if self._pool is pool:
            self._pool = self._new()
        return pool
