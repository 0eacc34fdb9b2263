"""The caller's handle on one worker process: its pipes, and what it has done."""

from __future__ import annotations

import os
from typing import Any

from bulkhead._kernel.records import Slot
from bulkhead.engines.processes import blackbox
from bulkhead.engines.processes.channel import FrameReader, FrameWriter

__all__ = ["Worker"]


class Worker:
    """One worker process from the moment it is asked for. Owner: the pool's lock, but for `reader` (who drives).

    Attributes:
        number: Its own, unique in the pool.
        message: Number of the last message sent to it; the answer carries the same.
        began: When that was sent, monotonic seconds.
        failure: What kept it from getting ready.
    """

    __slots__ = (
        "_box",
        "_life",
        "_theirs",
        "began",
        "busy_seconds",
        "failure",
        "jobs",
        "message",
        "number",
        "pid",
        "reader",
        "slot",
        "writer",
    )

    def __init__(self, number: int, slot: Slot) -> None:
        self.number = number
        self.slot = slot
        self.pid: int | None = None
        self.message = 0
        self.began = 0.0
        self.jobs = 0
        self.busy_seconds = 0.0
        self.failure: BaseException | None = None
        opened: list[int] = []
        try:
            for _ in range(3):
                opened += os.pipe()
            opened.append(blackbox.create())
            self._box = blackbox.ReadMark(opened[-1])
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        jobs_read, jobs_write, results_read, results_write, life_read, self._life, box = opened
        self._theirs: Any = (jobs_read, results_write, life_read, box)
        self.writer = FrameWriter(jobs_write)
        self.reader = FrameReader(results_read)

    def give_away(self) -> tuple[int, int, int, int]:
        """Return what is the worker's: its ends of the pipes for jobs, results and life line, and its black box."""
        return self._theirs  # type: ignore[no-any-return]

    def close_theirs(self) -> None:
        """Close the worker's ends here, once it has them."""
        theirs, self._theirs = self._theirs, ()
        for fd in theirs:
            os.close(fd)

    def has_begun(self) -> bool:
        """Tell whether the worker has begun to read its last message."""
        return self._box.last_read() == self.message

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
        self._box.close()
        self.cut()
