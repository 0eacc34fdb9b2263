"""What is to happen at which instant: a heap whose entries are not removed when they become moot, but found out.

A job that ends leaves its timeout behind in the heap. Such entries are dropped when they come to the top, and swept out
when they make up more than half, so that the heap stays within twice the number of live entries however many jobs pass.
They hold no job alive: an alarm refers to a slot, or to a job's handle, which is emptied when the job settles.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from heapq import heapify, heappop, heappush
from typing import Any

__all__ = ["Alarm", "Deadlines"]

# Fewer entries than this are not worth a sweep (arbitrary).
_SWEEP_FROM = 256


class Alarm(IntEnum):
    """What an entry is about."""

    JOB_DUE = 0
    START_DEADLINE = 1
    TIMEOUT = 2
    RESPAWN = 3


class Deadlines:
    """A heap of (instant, order, alarm, subject, stamp). Invariant: entries of one instant fire in insertion order.

    Args:
        is_live: Tells whether an alarm for a subject, added with a stamp, still means something.
    """

    def __init__(self, is_live: Callable[[Alarm, Any, int], bool]) -> None:
        self._is_live = is_live
        self._heap: list[tuple[float, int, Alarm, Any, int]] = []
        self._order = 0
        self._sweep_at = _SWEEP_FROM

    def __len__(self) -> int:
        return len(self._heap)

    def next(self) -> float | None:
        """Return the earliest live instant, or None."""
        heap = self._heap
        while heap and not self._is_live(*heap[0][2:]):
            heappop(heap)
        return heap[0][0] if heap else None

    def add(self, instant: float, alarm: Alarm, subject: Any, stamp: int = 0) -> None:
        """Let `alarm` fire for `subject` at `instant`. `stamp` (the number of a start) tells stale from live."""
        self._order += 1
        heappush(self._heap, (instant, self._order, alarm, subject, stamp))
        if len(self._heap) > self._sweep_at:
            self._sweep()

    def pop(self, now: float) -> tuple[Alarm, Any] | None:
        """Remove and return the earliest live entry that is due, or None."""
        instant = self.next()
        if instant is None or instant > now:
            return None
        _, _, alarm, subject, _ = heappop(self._heap)
        return alarm, subject

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if self._is_live(*entry[2:])]
        heapify(self._heap)
        self._sweep_at = max(_SWEEP_FROM, 2 * len(self._heap))
