"""The caller's handle on one worker process: its pipes, what it holds, and what it has done."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bulkhead._kernel.records import JobRecord, Slot, SlotState, Usage
from bulkhead.engines.processes import blackbox
from bulkhead.engines.processes.channel import FrameReader, FrameWriter
from bulkhead.engines.processes.parcels import Exchange, socket_pair
from bulkhead.engines.processes.progress import Progress
from bulkhead.engines.processes.segments import Borrowed

if TYPE_CHECKING:
    from bulkhead.engines.processes.output import WorkerOutput

__all__ = ["Worker"]


class Worker:
    """One worker process from the moment it is asked for. Owner: the pool's lock, but for `reader` (who drives).

    Attributes:
        number: Its own, unique in the pool.
        message: Number of the last message sent to it to be begun at once; the answer carries the same.
        ahead: Number of the last message that was sent before the one before it was answered.
        began: When that was sent, monotonic seconds.
        came_up: When it was ready for its first job.
        failure: What kept it from getting ready.
        exchange: Who has lent which segment to whom.
        let_go: What of it the worker has to be told.
        output: What it prints and logs; None when that is not captured.
        excess: The memory that it took, and the limit, when it was told to end for that (bytes).
        record: Takes what is to be remembered of an attempt.
        gathers, gather_until, gathered, ended: Of short attempts that are remembered as one (see chronicle.py).
    """

    __slots__ = (
        "_box",
        "_half",
        "_halves",
        "_life",
        "_theirs",
        "ahead",
        "began",
        "busy_seconds",
        "came_up",
        "ended",
        "excess",
        "exchange",
        "failure",
        "gather_until",
        "gathered",
        "gathers",
        "jobs",
        "let_go",
        "message",
        "number",
        "output",
        "pid",
        "reader",
        "record",
        "slot",
        "writer",
    )

    def __init__(self, number: int, slot: Slot, borrowed: Borrowed) -> None:
        self.number = number
        self.slot = slot
        self.pid: int | None = None
        self.message = self.ahead = 0
        self._half = 0
        self.began = 0.0
        self.came_up: float | None = None
        self.jobs = 0
        self.busy_seconds = 0.0
        self.failure: BaseException | None = None
        self.output: WorkerOutput | None = None
        self.excess: tuple[int, int] | None = None
        self.record: Callable[[Worker, Any, Any, float], None] = _forget
        self.gathers: str | None = None
        self.gather_until = 0.0
        self.gathered: Any = None
        self.ended = 0.0
        opened: list[int] = []
        try:
            for _ in range(3):
                opened += os.pipe()
            ours, theirs = socket_pair()
            opened += ours.detach(), theirs.detach()
            opened.append(blackbox.create())
            self._box = blackbox.ReadMark(opened[-1])
            self._halves = [Progress(memory) for memory in self._box.halves]
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        jobs_read, jobs_write, results_read, results_write, life_read, self._life, line, their_line, box = (
            opened
        )
        self._theirs: tuple[int, ...] = (jobs_read, results_write, life_read, their_line, box)
        self.writer = FrameWriter(jobs_write)
        self.reader = FrameReader(results_read)
        line_of_ours = socket.socket(fileno=line)
        line_of_ours.setblocking(False)
        self.exchange = Exchange(line_of_ours, borrowed)
        self.let_go = self.exchange.let_go

    def give_away(self) -> tuple[int, ...]:
        """Return what is the worker's: its ends of the pipes and of the line, its black box, its output."""
        return self._theirs if self.output is None else self._theirs + self.output.theirs

    def close_theirs(self) -> None:
        """Close the worker's ends here, once it has them."""
        theirs, self._theirs = self._theirs, ()
        for fd in theirs:
            os.close(fd)
        if self.output is not None:
            self.output.close_theirs()

    def has_begun(self) -> bool:
        """Tell whether the worker has begun to read its last message."""
        return self._box.last_read() == self.message

    @property
    def last_read(self) -> int:
        """Number of the last message that it began to read."""
        return self._box.last_read()

    # Chunks

    @property
    def progress(self) -> Progress:
        """How far it is with a chunk."""
        return self._halves[self._half]

    @property
    def half(self) -> int:
        """The half of the progress memory that is its chunk's."""
        return self._half

    @property
    def progress_ahead(self) -> Progress:
        """How far it is with a chunk that was sent ahead."""
        return self._halves[1 - self._half]

    def may_have_ahead(self) -> bool:
        """Tell whether what is sent ahead to it could be taken back."""
        return self._box.may_take_back()

    def next_ahead(self) -> int:
        """Give a number to a message that is sent ahead. Why by two: as of those that are sent one after the other."""
        self.ahead = max(self.message, self.ahead) + 2
        return self.ahead

    def take_back(self) -> bool:
        """Take back what was sent ahead; False when it is begun."""
        return self._box.take_back(self.ahead)

    def has_begun_ahead(self) -> bool:
        """Tell whether it has begun what was sent ahead."""
        return self.ahead > self.message and self._box.last_begun() == self.ahead

    def stop_ahead(self) -> None:
        """Let no more items begin of the chunk that was sent ahead."""
        self.progress_ahead.stop(self.ahead)

    def end_chunk(self) -> JobRecord | None:
        """Use none of the numbers again that were given until now; return what was sent ahead, if anything was."""
        self.message = max(self.message, self.ahead + 1)
        return self.slot.ahead if self.slot.is_ahead_sent else None

    def go_on(self, job: JobRecord, now: float) -> None:
        """What was sent ahead is what it is at from now on, if the kernel knows of nothing else."""
        if self.slot.job is not job:
            return
        self.message = self.ahead
        self._half = 1 - self._half
        self.began = now
        job.started_at = time.time()
        job.pid = self.pid

    def usage(self) -> Usage:
        """Return what it had done and taken when it sent its last answer."""
        return Usage(*self._box.use())

    @property
    def is_leaving(self) -> bool:
        """Whether it was sent home and its slot is another worker's."""
        return self.slot.worker is not self

    def leave_slot(self) -> None:
        """Give the slot to another worker."""
        index = self.slot.index
        self.slot.worker = None
        self.slot = Slot(index)
        self.slot.state = SlotState.ENDING

    def cut(self) -> None:
        """Close the life line: the kernel kills the worker and its group."""
        if self._life >= 0:
            life, self._life = self._life, -1
            os.close(life)

    def close(self) -> None:
        """Close all descriptors; a worker that is still there ends."""
        self.close_theirs()
        self.writer.close()
        self.reader.close()
        self.exchange.close()
        for half in self._halves:
            half.close()
        self._box.close()
        if self.output is not None:
            self.output.close()
        self.cut()


def _forget(_worker: Worker, _job: Any, _note: Any, _now: float) -> None:
    """Remember nothing: for a worker that no chronicle knows."""
