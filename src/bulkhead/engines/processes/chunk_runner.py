"""Running a chunk of a map in a worker: many small calls in one message, each with an end of its own.

Items are noted before they are called, and results are put where they outlive the worker (see progress.py). Why in
groups: that costs about a microsecond, and many items take less. A group is as long as takes some 50 microseconds, so
an item that takes longer is noted and recorded alone. What a dying worker can take with it are results of one group,
which cost next to nothing: its items run again, one by one, so that the one that kills is found.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Sequence
from itertools import starmap
from typing import Any, NamedTuple

from bulkhead import forks
from bulkhead.engines.processes.parcels import Parcel
from bulkhead.engines.processes.payload import cannot, pack_error, pack_value
from bulkhead.engines.processes.progress import (
    BEGAN,
    ERROR,
    N_RUNNING,
    NOBODY,
    RUNNING,
    VALUE,
    VALUES,
    Progress,
    record,
)
from bulkhead.engines.processes.segments import SegmentPool

__all__ = ["ChunkOrder", "leave_copy", "run_chunk"]

# How long a group of items takes (seconds), and how many it may have.
_GROUP = 50e-6
_MAX_GROUP = 4096
_GROWTH = 8

# A chunk that was made for short items and has taken so long gives the rest back (seconds): the caller deals it anew.
_ENOUGH = 0.05

# Results of these types can be rebuilt by any process, so a whole group is pickled in one go. Others are pickled one by
# one, so that one that cannot be rebuilt takes no other with it.
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})

_PROTOCOL = 5


class ChunkOrder(NamedTuple):
    """What is to be done with the items of a message.

    Attributes:
        todo: Which items to run, as indices; positions are places in here.
        is_star: Each item is a tuple of arguments.
        is_timed: Note when each item begins.
        may_stop: Give the rest back when it takes long.
        n_single: So many items at the beginning are not run in groups.
    """

    todo: Sequence[int]
    is_star: bool
    is_timed: bool
    may_stop: bool
    n_single: int


def run_chunk(
    fn: Callable[..., Any],
    items: Sequence[Any],
    order: ChunkOrder,
    message: int,
    progress: Progress,
    send: Callable[[int, bytes | Parcel], object],
    segments: SegmentPool,
) -> float:
    """Run the items one after the other until all are done or the caller wants no more; return the seconds it took.

    Args:
        fn: Called with each item.
        items: All items of the message.
        order: Which of them, and how.
        message: Number of the message.
        progress: Where results go that are small.
        send: Sends a result, with its position, that is too large for there.
        segments: Where large parts of results go.
    """
    chunk = _Chunk(fn, [items[index] for index in order.todo], order, message, progress, send, segments)
    chunk.run()
    return time.perf_counter() - chunk.began


def leave_copy(depth: int) -> None:
    """End this process if it is a copy that a job has forked: it would answer a second time, into the same memory.

    Args:
        depth: `forks.depth` before the job.
    """
    if forks.depth != depth:
        os._exit(0)


class _Chunk:
    def __init__(
        self,
        fn: Callable[..., Any],
        batch: list[Any],
        order: ChunkOrder,
        message: int,
        progress: Progress,
        send: Callable[[int, bytes | Parcel], object],
        segments: SegmentPool,
    ) -> None:
        self.began = time.perf_counter()
        self._fn = fn
        self._batch = batch if order.is_star or not order.is_timed else [(item,) for item in batch]
        self._order = order
        self._message = message
        self._progress = progress
        self._send = send
        self._segments = segments
        self._marks = progress.begin(message)
        self._depth = forks.depth

    def run(self) -> None:
        run_group = self._run_timed if self._order.is_timed else self._run_group
        position, size = 0, 1
        total = len(self._batch)
        now = self.began
        while position < total and not self._progress.is_stopped(self._message):
            if self._order.may_stop and now - self.began > _ENOUGH:
                break
            values: list[Any] = []
            error = run_group(position, self._batch[position : position + size], values)
            leave_copy(self._depth)
            self._put(position, values)
            position += len(values)
            del values
            if error is not None:
                self._put_packed(position, 1, ERROR, pack_error(error))
                position += 1
            before, now = now, time.perf_counter()
            took = max(now - before, 1e-9)
            size = max(1, min(int(size * _GROUP / took), _GROWTH * size, _MAX_GROUP))
            if position < self._order.n_single:
                size = 1
        self._marks[RUNNING] = NOBODY

    # Every item of a map goes through one of these.

    def _run_group(self, position: int, group: list[Any], values: list[Any]) -> BaseException | None:
        # Why the number first: whoever dies between the two has its items run one by one, which is never wrong.
        self._marks[N_RUNNING] = len(group)
        self._marks[RUNNING] = position
        try:
            # What was returned before an exception is in the list then.
            values.extend(starmap(self._fn, group) if self._order.is_star else map(self._fn, group))
        except BaseException as error:
            return error
        return None

    def _run_timed(self, position: int, group: list[Any], values: list[Any]) -> BaseException | None:
        marks, call, append = self._marks, self._fn, values.append
        clock = time.monotonic_ns
        marks[N_RUNNING] = 1
        try:
            for item in group:
                # Why the time first: whoever looks between the two sees an item that has just begun.
                marks[BEGAN] = clock()
                marks[RUNNING] = position
                position += 1
                append(call(*item))
        except BaseException as error:
            return error
        return None

    def _put(self, position: int, values: list[Any]) -> None:
        if not values:
            return
        if _PLAIN.issuperset(map(type, values)):
            self._put_packed(position, len(values), VALUES, pickle.dumps(values, _PROTOCOL))
            return
        for value in values:
            self._put_one(position, value)
            position += 1

    def _put_one(self, position: int, value: Any) -> None:
        try:
            packed = pack_value(value, self._segments)
        except BaseException as error:
            named = f"the result of type {type(value).__qualname__} cannot be pickled"
            self._put_packed(position, 1, ERROR, pack_error(cannot(named, error)))
            return
        if isinstance(packed, bytes):
            self._put_packed(position, 1, VALUE, packed)
        else:
            self._send(position, packed)

    def _put_packed(self, position: int, n: int, kind: int, body: bytes) -> None:
        data = record(position, n, kind, body)
        if not self._progress.add(data):
            self._send(-1, data)
