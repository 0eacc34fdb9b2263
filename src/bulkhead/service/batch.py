"""Jobs that a consumer holds, those that travel to a worker together, and the marks by which both know how far it is.

Short jobs travel together: one message to the pool for many of them. The worker marks in a shared file which one it
runs, so that whatever happens in the middle is put down to that one alone:

- the worker dies, or is ended: the marked job has failed; those before it have left their answers beside the mark, and
  those behind it run again;
- the marked job takes long: the worker begins nothing further of the batch (running.py), so those behind it are taken
  back and run elsewhere. Race: that is certain once a mark has stood for longer than a batch may take, as the worker
  marks a job before it looks at the clock a last time.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bulkhead.backends.base import Claim, Ending
from bulkhead.service.envelope import Envelope

if TYPE_CHECKING:
    from bulkhead.service.task import Task
    from bulkhead.tracker import Tracker

__all__ = ["NO_MARK", "SLOTS", "Batch", "HeldJob", "Marks"]

# Batches that may be on their way at once. Arbitrary, above any sensible number of workers times two.
SLOTS = 2048

NO_MARK = 0xFFFF

# For the answers of a batch (bytes): 500 of a few bytes each.
_ANSWER_BYTES = 32 << 10

_NO_ANSWER = bytes(4)


class Marks:
    """Of each batch on its way: which of its jobs the worker runs, and what has become of those before it.

    Both sides map the same file: a number for each slot, then for each a space that the worker fills with answers, each
    behind four bytes of length; a length of 0 ends them. What does not fit is left out: it runs again if the worker
    dies.

    Raises:
        OSError: The file cannot be made, or there is no room for it.
    """

    def __init__(self, path: str, *, create: bool = False) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        descriptor = os.open(path, flags, 0o600)
        size = SLOTS * (2 + _ANSWER_BYTES)
        # Owner: who has made the file, and any thread of it, for a slot that it has taken.
        self._descriptor = -1
        self._reserved: set[int] = set()
        try:
            if create:
                os.ftruncate(descriptor, size)  # Why so large: pages that are never written take no memory
                _reserve(descriptor, 0, 2 * SLOTS)
                self._descriptor = os.dup(descriptor)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        whole = memoryview(self._map)
        self.slots = whole[: 2 * SLOTS].cast("H")
        self._answers = whole[2 * SLOTS :]
        whole.release()

    def clear(self, slot: int) -> None:
        """Make a slot ready for another batch.

        Raises:
            OSError: The disk has no room for the answers.
        """
        self.slots[slot] = NO_MARK
        at = slot * _ANSWER_BYTES
        if slot not in self._reserved:
            _reserve(self._descriptor, 2 * SLOTS + at, _ANSWER_BYTES)
            self._reserved.add(slot)
        self._answers[at : at + 4] = _NO_ANSWER

    def recorder(self, slot: int) -> Callable[[bytes], None]:
        """Return what notes the next answer of a batch, in the worker."""
        answers, at, end = self._answers, slot * _ANSWER_BYTES, (slot + 1) * _ANSWER_BYTES

        def record(answer: bytes) -> None:
            nonlocal at, end
            behind = at + 4 + len(answer)
            if behind + 4 > end:
                end = 0  # nor any that follows: they are read in order
                return
            # Race: the length comes last, so that a worker that dies in between leaves the end where it was.
            answers[at + 4 : behind + 4] = answer + _NO_ANSWER
            answers[at : at + 4] = len(answer).to_bytes(4, "little")
            at = behind

        return record

    def answers(self, slot: int) -> list[bytes]:
        """Return what was noted."""
        found = []
        at = slot * _ANSWER_BYTES
        while size := int.from_bytes(self._answers[at : at + 4], "little"):
            found.append(bytes(self._answers[at + 4 : at + 4 + size]))
            at += 4 + size
        return found

    def close(self) -> None:
        """Unmap it."""
        self.slots.release()
        self._answers.release()
        self._map.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _reserve(descriptor: int, start: int, size: int) -> None:
    """Have the disk set room aside. Why: who first writes to a mapped page when there is none is killed by SIGBUS."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, start, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # This file system cannot set any aside.


_marks: dict[tuple[int, str], Marks] = {}


def marks_beside(address: str) -> Marks:
    """Return the marks of the consumer with this address, in the worker."""
    key = os.getpid(), address
    if key not in _marks:
        _marks.clear()
        _marks[key] = Marks(marks_path(address))
    return _marks[key]


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
        sure_until: Until when its lease holds for certain, monotonic seconds; see leases.py.
        is_settling: Its end is being told.
        has_reported: It has told how far it is.
        seconds: How long the attempt took.
        notes: For middlewares, which need not be serialised.
        told: The verdict that was told to the broker, and the `Ending` that it means there.
        ending: What has become of it, when it is settled.
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
    sure_until: float = 0.0
    is_settling: bool = False
    has_reported: bool = False
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)
    told: tuple[Any, Ending] | None = None
    ending: Any = None

    @property
    def id(self) -> str:
        """The job's id."""
        return self.claim.hold.id


class Batch:
    """Jobs that go to a worker in one message.

    Owner: `n_kept` is the holdings'; `overtime` and the standing are the pulse thread's; the rest is of the thread that
    sends it.

    Attributes:
        slot: Where it is marked which of its jobs runs; None for a single one, and for jobs that are not run.
        tracker: Of its run; None when it is not run.
        refusal: Why the pool has not taken it.
        n_kept: How many of its jobs are still its own; those behind are taken back.
        overtime: Number of the job that has had its time.
        is_withdrawn: It was to be taken out of the pool's line if it still stood there.
        made_at: Monotonic seconds.
    """

    def __init__(self, jobs: list[HeldJob], slot: int | None, marks: Marks | None) -> None:
        self.jobs = jobs
        self.slot = slot
        self.tracker: Tracker | None = None
        self.refusal: Exception | None = None
        self.n_kept = len(jobs)
        self.overtime: int | None = None
        self.is_withdrawn = False
        self.made_at = time.monotonic()
        self._marks = marks
        self._last_mark: int | None = None
        self._since = self.made_at
        self._is_ended = False

    @property
    def mark(self) -> int | None:
        """Which of its jobs runs, or None: none has begun, or it is a single one, whose tracker says so."""
        if self.slot is None or self._marks is None:
            return None
        mark = self._marks.slots[self.slot]
        return None if mark == NO_MARK else mark

    def recorded(self) -> list[bytes]:
        """Return the answers that its worker has noted."""
        return [] if self.slot is None or self._marks is None else self._marks.answers(self.slot)

    def has_begun(self) -> bool:
        """Tell whether a worker runs it."""
        if self.slot is not None:
            return self.mark is not None
        return self.tracker is not None and self.tracker.status().state == "running"

    def has_ended(self) -> bool:
        """Tell whether its run is over: its mark stands, and says nothing more about time."""
        return self.tracker is not None and self.tracker.done()

    def standing(self) -> tuple[int | None, float]:
        """Return the mark, and for how many seconds it is known to have stood."""
        # Race: the clock is read before the mark and, of a new one, after it, so that never more is told than is true.
        now = time.monotonic()
        mark = self.mark
        if mark != self._last_mark:
            self._last_mark, self._since = mark, time.monotonic()
        return mark, max(0.0, now - self._since)

    def end(self) -> None:
        """Have its run ended, or take it out of the pool's line; it comes back as any other. Again does nothing."""
        if self.tracker is not None and not self._is_ended:
            self._is_ended = True
            self.tracker.cancel()

    def withdraw(self) -> None:
        """Take it out of the pool's line; it goes on if it has been sent to a worker."""
        self.is_withdrawn = True
        if self.tracker is not None:
            self.tracker.withdraw()
