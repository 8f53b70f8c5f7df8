"""How a batch is fed to an engine: whole, in parts, or in parts side by side.

Which is fastest depends on the processor, the size of the crops and the number of faces, so it is
measured on the calls themselves: the first calls of a size try each way in turn, and from then on
the fastest is kept. Every way gives the same keypoints, to the last bits of a float.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kp_runtime.errors import InputError

__all__ = ["WAYS", "Feeder", "Way"]

TRIES = 4
"""Timed calls of each way before one is chosen; one more before them finds memory and threads ready."""


@dataclass(frozen=True)
class Way:
    """One way to feed a batch.

    Attributes:
        name: for people.
        part: crops a call of the engine; None: all of them, or each thread's share side by side.
        side_by_side: parts run at the same time, each on one thread of its own.
    """

    name: str
    part: int | None
    side_by_side: bool = False


WAYS = (Way("whole", None), Way("by 4", 4), Way("one by one", 1), Way("side by side", None, side_by_side=True))


class Feeder:
    """Chooses a way for each size of batch; sizes up to 2, 4, 8, 16, … are kept apart.

    May be used from several threads; their calls then disturb each other's times, not their results.
    """

    def __init__(self, ways: Sequence[Way]) -> None:
        self._ways = tuple(ways)
        self._seconds: dict[tuple[int, Way], list[float]] = {}
        self._settled: dict[int, Way] = {}
        self._lock = threading.Lock()

    def ways(self, faces: int) -> list[Way]:
        """What can be tried for so many faces; parts that would hold them all are the whole."""
        return [way for way in self._ways if way.part is None or way.part < faces]

    def settle(self, faces: int, name: str) -> None:
        """Feeds batches of this size in the way of this name from now on; nothing is tried.

        Raises:
            InputError: there is no such way.
        """
        with self._lock:
            ways = {way.name: way for way in self._ways}
            if name not in ways:
                raise InputError(f"there is no way {name!r:.40} to feed a batch; choose from {', '.join(ways)}")
            self._settled[_size(faces)] = ways[name]

    def drop(self, way: Way) -> None:
        """Takes away a way that does not work here."""
        with self._lock:
            self._ways = tuple(other for other in self._ways if other != way)
            self._settled = {size: other for size, other in self._settled.items() if other != way}

    def next(self, faces: int) -> Way:
        """The way to feed this call: one that was tried too little, or the chosen one."""
        size = _size(faces)
        with self._lock:
            if size in self._settled:
                return self._settled[size]
            tried = {way: self._seconds.setdefault((size, way), []) for way in self.ways(faces)}
            least = min(tried, key=lambda way: len(tried[way]))
            return least if len(tried[least]) <= TRIES else min(tried, key=lambda way: min(tried[way][1:]))

    def record(self, faces: int, way: Way, seconds: float) -> None:
        """Notes how long a call took; once every way was tried enough, nothing is noted any more."""
        with self._lock:
            taken = self._seconds.setdefault((_size(faces), way), [])
            if len(taken) <= TRIES:
                taken.append(seconds / faces)

    def decided(self, faces: int) -> bool:
        """Whether batches of this size have their way."""
        size = _size(faces)
        with self._lock:
            return size in self._settled or all(
                len(self._seconds.get((size, way), ())) > TRIES for way in self.ways(faces)
            )

    def times(self) -> dict[int, dict[str, float]]:
        """Largest size of a group of batches to each way's shortest time in ms a face, fastest first."""
        with self._lock:
            taken = {key: min(seconds[1:]) * 1e3 for key, seconds in self._seconds.items() if len(seconds) > 1}
        ranked = sorted(taken.items(), key=lambda item: (item[0][0], item[1]))
        return {size: {way.name: ms for (other, way), ms in ranked if other == size} for (size, _), _ in ranked}


def _size(faces: int) -> int:
    """The power of two that holds so many faces."""
    return 1 << (faces - 1).bit_length()
