"""Crops on the CPU: a frame and crop matrices in, the network's input out."""

from __future__ import annotations

import functools
import os
import threading

import numpy as np
from numpy.typing import NDArray

from kp_runtime.cores import check_process, on_cores
from kp_runtime.frame import Frame, Scratch
from kp_runtime.geometry import crop_from_bands, crop_plan
from kp_runtime.in_order import SideBySide

__all__ = ["CpuCropper", "crops_from_frame"]

_FACES_A_THREAD = 4
"""Fewer are not worth a second thread: it costs about a crop's time to wake (docs/benchmarks.md)."""


def crops_from_frame(
    frame: Frame,
    crop_from_image: NDArray[np.floating],
    size: int,
    out: NDArray[np.uint8] | None = None,
    scratch: Scratch | None = None,
) -> NDArray[np.uint8]:
    """Cuts all faces of a frame by the crop rule (`geometry`).

    Only the part of the frame that a crop reads is turned grey.

    Args:
        frame: the image.
        crop_from_image: `(n, 2, 3)` float64.
        size: side of a crop in pixels.
        out: `(n, 1, size, size)` uint8, C-contiguous, filled when given.
        scratch: working memory to use again.

    Returns:
        `(n, 1, size, size)` uint8 (`out` when given).
    """
    crops = np.empty((len(crop_from_image), 1, size, size), np.uint8) if out is None else out
    scratch = scratch or Scratch()
    luma = functools.partial(frame.luma, scratch=scratch)
    for matrix, crop in zip(crop_from_image, crops, strict=True):
        plan = crop_plan(matrix, size, frame.size_hw)
        crop_from_bands(luma, plan, size, crop[0], scratch)
    return crops


class CpuCropper:
    """Crops for a model on the CPU, many faces on several threads. May be shared between threads.

    Each calling thread keeps the working memory of its largest call and uses it again. Threads are
    started by the first call with eight faces or more.

    Args:
        threads: most threads of a call; the calling one is one of them.
        cores: where they run; None leaves that to the system.
    """

    def __init__(self, threads: int = 1, cores: frozenset[int] | None = None) -> None:
        self._most, self._cores = threads, cores
        self._process = os.getpid()
        self._own = threading.local()
        self._threads = SideBySide(threads, "kp-crops")

    def crops_from_frame(self, frame: Frame, crop_from_image: NDArray[np.floating], size: int) -> NDArray[np.uint8]:
        """As the function of that name; the crops stay until the calling thread's next call.

        Raises:
            BackendError: this process was forked from the one with the threads.
        """
        n = len(crop_from_image)
        crops = self._scratch().array("crops", (n, 1, size, size))
        parts = min(self._most, n // _FACES_A_THREAD)
        if parts < 2:
            return crops_from_frame(frame, crop_from_image, size, crops, self._scratch())
        check_process(self._process)

        def cut(part: slice) -> None:
            crops_from_frame(frame, crop_from_image[part], size, crops[part], self._scratch())

        try:
            with on_cores(self._cores):
                self._threads.run(cut, [slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)])
        except BaseException:  # of a signal, which ends the wait for a thread that writes here still
            self._own.scratch = Scratch()
            raise
        return crops

    def close(self) -> None:
        """Ends the threads and frees the working memory; a later call makes them anew."""
        self._threads.close()
        self._own = threading.local()

    def _scratch(self) -> Scratch:
        """This thread's working memory."""
        found: Scratch | None = getattr(self._own, "scratch", None)
        if found is None:
            found = self._own.scratch = Scratch()
        return found
