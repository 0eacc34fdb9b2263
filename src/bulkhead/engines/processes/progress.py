"""How far a worker is with a chunk of a map, in memory that outlives it: what has ended before it dies is not lost.

The worker notes which item it runs and puts the results of ended items into records; the caller reads them when the
chunk has ended or the worker has. The memory is a part of the black box (see blackbox.py).

Invariant: a record is complete before it is counted in, so whoever reads after the writer's death reads no half of one.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from bulkhead.engines.processes.blackbox import PROGRESS_AT, PROGRESS_SIZE

__all__ = [
    "BEGAN",
    "ERROR",
    "NOBODY",
    "RUNNING",
    "SPAN",
    "VALUE",
    "VALUES",
    "Progress",
    "Record",
    "record",
    "records_in",
]

# Kinds of records: a pickled list of results, one pickled result that all items of the record have, one packed error.
VALUES = 1
VALUE = 2
ERROR = 3

NOBODY = (1 << 64) - 1  # no item runs

_HEAD = struct.Struct("<QQBQ")  # first position, number of items, kind, length of the body
_RECORDS_AT = 64

# Counters of eight bytes: message, position of the running item, bytes of records, message whose chunk is to stop, when
# the running item began (ns of the monotonic clock, which all processes share; only for chunks with a timeout), and how
# many items from that position on may be the running one (more than 1 only for very short ones).
_MESSAGE, RUNNING, _USED, _STOP, BEGAN, SPAN = range(6)

Record = tuple[int, int, int, memoryview]


class Progress:
    """Either side's view. Owner of the counters: the worker, but for the wish to stop, which is the caller's."""

    __slots__ = ("_marks", "_memory")

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._marks = memory[:_RECORDS_AT].cast("Q")

    @classmethod
    def in_box(cls, fd: int, half: int = 0) -> Progress:
        """Return a view of one half of what the black box behind a descriptor has for this."""
        return cls(memoryview(mmap.mmap(fd, PROGRESS_SIZE, offset=PROGRESS_AT + half * PROGRESS_SIZE)))

    # The worker's side

    def begin(self, message: int) -> memoryview:
        """Note that the chunk of a message begins; return the counters."""
        marks = self._marks
        marks[_MESSAGE] = 0
        marks[RUNNING] = NOBODY
        marks[_USED] = 0
        marks[SPAN] = 1
        marks[_MESSAGE] = message
        return marks

    def add(self, data: bytes) -> bool:
        """Add a record; False when there is no room left."""
        start = _RECORDS_AT + self._marks[_USED]
        if start + len(data) > PROGRESS_SIZE:
            return False
        self._memory[start : start + len(data)] = data
        self._marks[_USED] += len(data)
        return True

    def is_stopped(self, message: int) -> bool:
        """Tell whether the caller wants no more items of this chunk to begin."""
        return self._marks[_STOP] == message

    # The caller's side

    def stop(self, message: int) -> None:
        """Let no more items of this message's chunk begin."""
        self._marks[_STOP] = message

    def running(self, message: int) -> tuple[int, float] | None:
        """Return which item runs, or did when the worker died; None when the chunk has not begun.

        Returns:
            Its position, and its start in monotonic seconds.
        """
        marks = self._marks
        if marks[_MESSAGE] != message:
            return None
        return marks[RUNNING], marks[BEGAN] / 1e9

    def is_over(self, message: int) -> bool:
        """Tell whether the worker has ended the chunk of a message."""
        try:
            running = self.running(message)
        except ValueError:  # Race: another thread has given the pool up and closed the view
            return False
        return running is not None and running[0] == NOBODY

    def span(self) -> int:
        """Return how many items from the running one's position on it may be, when it is not known better."""
        return self._marks[SPAN]

    def records(self, message: int) -> list[Record]:
        """Return the records of a message's chunk. They refer to this memory, which the next chunk overwrites."""
        if self._marks[_MESSAGE] != message:
            return []
        return list(records_in(self._memory[_RECORDS_AT : _RECORDS_AT + self._marks[_USED]]))

    def close(self) -> None:
        """Give the view up."""
        self._marks.release()
        self._memory.release()


def record(first: int, n: int, kind: int, body: bytes) -> bytes:
    """Return the bytes of one record.

    Args:
        first: Position of its first item.
        n: Number of its items.
        kind: What the body is.
        body: Pickled.
    """
    return _HEAD.pack(first, n, kind, len(body)) + body


def records_in(data: memoryview) -> Iterator[Record]:
    """Return first position, number, kind and body of each record."""
    start = 0
    while start < len(data):
        first, n, kind, length = _HEAD.unpack_from(data, start)
        start += _HEAD.size
        yield first, n, kind, data[start : start + length]
        start += length
