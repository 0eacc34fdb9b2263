"""Jobs that a consumer holds, those that travel to a worker together, and the marks by which both know how far it is.

Short jobs travel together: one message to the pool for many of them. The worker marks in a shared file which one it
runs, so that whatever happens in the middle is put down to that one alone:

- the worker dies, or is ended: the marked job has failed; those before it (their answers died with the worker) and
  those behind it run again;
- the marked job takes long: the worker begins nothing further of the batch (running.py), so those behind it are taken
  back and run elsewhere. Race: that is certain once a mark has stood for longer than a batch may take.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bulkhead.backends.base import Claim
from bulkhead.errors import BulkheadError
from bulkhead.service.envelope import Envelope

if TYPE_CHECKING:
    from bulkhead.service.task import Task
    from bulkhead.tracker import Tracker

__all__ = ["NO_MARK", "SLOTS", "Batch", "HeldJob", "Marks"]

# Batches that may be on their way at once. Arbitrary, above any sensible number of workers times two.
SLOTS = 2048

NO_MARK = 0xFFFF


class Marks:
    """A number for each batch on its way: which of its jobs the worker runs. Both sides map the same file."""

    def __init__(self, path: str, *, create: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if create:
                os.ftruncate(descriptor, 2 * SLOTS)
            self._map = mmap.mmap(descriptor, 2 * SLOTS)
        finally:
            os.close(descriptor)
        self.slots = memoryview(self._map).cast("H")

    def close(self) -> None:
        """Unmap it."""
        self.slots.release()
        self._map.close()


_marks: dict[tuple[int, str], Marks] = {}


def marks_beside(address: str) -> memoryview:
    """Return the marks of the consumer with this address, in the worker."""
    key = os.getpid(), address
    if key not in _marks:
        _marks.clear()
        _marks[key] = Marks(marks_path(address))
    return _marks[key].slots


def marks_path(address: str) -> str:
    """Return where a consumer's marks are."""
    return str(Path(address).with_name("marks"))


@dataclass(slots=True, eq=False)
class HeldJob:
    """A claimed job. Owner: the thread that fetches until it is dispatched, then the thread that settles.

    Attributes:
        verdict: Set by a middleware in `dequeue` to keep the job from being run: what is to become of it.
        is_returned: It is given back if it does not end by itself: the consumer stops.
        is_lost: Its lease is lost: whatever it does, nothing is told to the broker.
        is_cancelled: Somebody has asked for it to be cancelled; since `cancelled_at`, monotonic seconds.
        asked_at: When it last asked whether it is, monotonic seconds.
        seconds: How long the attempt took.
        notes: For middlewares, which need not be serialised.
    """

    claim: Claim
    envelope: Envelope
    task: Task[..., Any]
    packed: bytes
    verdict: Any = None
    batch: Batch | None = None
    is_returned: bool = False
    is_lost: bool = False
    is_cancelled: bool = False
    cancelled_at: float = 0.0
    asked_at: float | None = None
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The job's id."""
        return self.claim.hold.id


class Batch:
    """Jobs that go to a worker in one message. Owner: the consumer's lock, for what changes."""

    def __init__(self, jobs: list[HeldJob], slot: int | None, marks: memoryview) -> None:
        self.jobs = jobs
        self.slot = slot
        self.tracker: Tracker | None = None
        self.n_kept = len(jobs)  # those from here on are taken back
        self.overtime: int | None = None
        self.refusal: BulkheadError | None = None
        self._marks = marks
        self._last_mark = NO_MARK
        self._since = time.monotonic()

    @property
    def mark(self) -> int | None:
        """Which of its jobs runs, or None: none has begun, or it is a single one, whose tracker says so."""
        if self.slot is None:
            return None
        mark = self._marks[self.slot]
        return None if mark == NO_MARK else mark

    def standing(self, now: float) -> tuple[int | None, float]:
        """Return the mark, and for how many seconds it is known to have stood."""
        mark = self.mark
        if mark != self._last_mark:
            self._last_mark = NO_MARK if mark is None else mark
            self._since = now
        return mark, now - self._since
