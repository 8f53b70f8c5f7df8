"""Work in the background whose results come in the order in which it was given."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kp_runtime.cores import check_process, no_thread
from kp_runtime.errors import BackendError

__all__ = ["InOrder"]


class InOrder:
    """A line of workers, a thread each: every task passes them in order, and no task another. For any thread.

    Threads are started at once.

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
            raise no_thread(error) from error
        self._room = threading.BoundedSemaphore(most)
        self._inside = threading.local()
        self._process = os.getpid()

    def submit(self, *steps: Callable[..., Any]) -> Future[Any]:
        """Gives a task: the first step has no argument, each other one what the step before returned.

        Returns:
            The future of what the last step returns, or of the error that a step raised.

        Raises:
            BackendError: the line is closed, or is full and a future's callback, which would wait for
                itself, asks; or this process was forked from the one with the threads.
        """
        check_process(self._process)
        if not self._room.acquire(blocking=not self.is_inside()):
            raise BackendError("a future's callback can't submit while the line is full; submit from another thread")
        future: Future[Any] = Future()
        try:
            self._line[0].submit(self._step, [future, steps, None, None], 0)
        except RuntimeError as error:
            self._room.release()
            raise BackendError("this model is closed; load it again") from error
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
        for worker in self._line:
            worker.shutdown()


def _answer(task: list[Any]) -> None:
    future, _, value, error = task
    task.clear()
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
