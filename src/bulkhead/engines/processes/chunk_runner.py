"""Running a chunk of a map in a worker: many small calls in one message, each with an end of its own.

Each item is noted before it is called, and results are put where they outlive the worker (see progress.py). Why in
groups: that costs about a microsecond, and many items take less. A group is as long as takes some 50 microseconds, so
the result of an item that takes longer is recorded at once. What a dying worker can take with it are the results of
quick items just before the one it ran; those run again.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from bulkhead import forks
from bulkhead.engines.processes.parcels import Parcel
from bulkhead.engines.processes.payload import cannot, pack_error, pack_value
from bulkhead.engines.processes.progress import (
    BEGAN,
    ERROR,
    NOBODY,
    RUNNING,
    VALUE,
    VALUES,
    Progress,
    record,
)
from bulkhead.engines.processes.segments import SegmentPool
from bulkhead.engines.processes.use import WorkerUse
from bulkhead.errors import RemoteError

__all__ = ["ChunkOrder", "leave_copy", "run_chunk"]

# How long a group of items takes (seconds), and how many it may have.
_GROUP = 50e-6
_MAX_GROUP = 4096
_GROWTH = 8

# A chunk that was made for short items and has taken so long gives the rest back (seconds): the caller deals it anew.
_ENOUGH = 0.05

# Results of these types can be rebuilt by any process and never change, so a whole group is pickled in one go. Others
# are pickled one by one and at once: the next item may change them, and one that cannot be rebuilt takes no other with
# it.
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})

_PROTOCOL = 5

# Plain results of this size on average are packed one by one, so that large ones go into segments (bytes).
_LARGE_VALUES = 16 << 10


class ChunkOrder(NamedTuple):
    """What is to be done with the items of a message.

    Attributes:
        todo: Which items to run, as indices; positions are places in here.
        is_star: Each item is a tuple of arguments.
        is_timed: Note when each item begins.
        may_stop: Give the rest back when it takes long.
    """

    todo: Sequence[int]
    is_star: bool
    is_timed: bool
    may_stop: bool


def run_chunk(
    fn: Callable[..., Any],
    items: list[Any],
    order: ChunkOrder,
    message: int,
    progress: Progress,
    send: Callable[[int, bytes | Parcel], bool],
    segments: SegmentPool,
    use: WorkerUse | None = None,
) -> float:
    """Run the items one after the other until all are done or the caller wants no more; return the seconds it took.

    Args:
        fn: Called with each item.
        items: All items of the message.
        order: Which of them, and how.
        message: Number of the message.
        progress: Where results go that are small.
        send: Sends a result, with its position, that is too large for there; tells whether it could.
        segments: Where large parts of results go.
        use: Counts the items. Those that are beyond its limits are given back.
    """
    chunk = _Chunk(fn, _chosen(items, order.todo), order, message, progress, send, segments)
    chunk.run(use)
    return time.perf_counter() - chunk.began


def _chosen(items: list[Any], todo: Sequence[int]) -> list[Any]:
    if isinstance(todo, range):
        return items if len(todo) == len(items) else items[todo.start : todo.stop]
    return [items[index] for index in todo]


def leave_copy(depth: int) -> None:
    """End this process if it is a copy that a job has forked: it would answer a second time, into the same memory.

    Args:
        depth: `forks.depth` before the job.
    """
    if forks.depth != depth:
        os._exit(0)


class _Chunk:
    group: ClassVar[list[Any]] = []  # that is being run

    def __init__(
        self,
        fn: Callable[..., Any],
        batch: list[Any],
        order: ChunkOrder,
        message: int,
        progress: Progress,
        send: Callable[[int, bytes | Parcel], bool],
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

    def run(self, use: WorkerUse | None) -> None:
        run_group = self._run_starred if self._order.is_star else self._run_plain
        if self._order.is_timed:
            run_group = self._run_timed
        position, size = 0, 1
        total = len(self._batch)
        if use is not None and use.jobs_left is not None:
            total = min(total, use.jobs_left)
        now = self.began
        while position < total and not self._progress.is_stopped(self._message):
            if self._order.may_stop and now - self.began > _ENOUGH:
                break
            if use is not None and position and use.is_heavy():
                break
            values: list[Any] = []
            _Chunk.group = group = self._batch[position : min(position + size, total)]
            error = run_group(position, group, values)
            leave_copy(self._depth)
            n_run = len(values) + (error is not None)
            self._put(position, values)
            position += n_run
            del values
            if error is not None:
                self._put_packed(position - 1, 1, ERROR, pack_error(error))
            before, now = now, time.perf_counter()
            took = max(now - before, 1e-9)
            size = max(1, min(int(n_run * _GROUP / took), _GROWTH * n_run, _MAX_GROUP))
        if use is not None:
            use.count(position)
        _Chunk.group = []  # or it would keep the last items' data
        self._marks[RUNNING] = NOBODY

    # Every item of a map goes through one of these loops. They put its position into the counters before it is called;
    # why as a target of `for`: that takes half the time of a line of its own.

    def _run_plain(self, position: int, group: list[Any], values: list[Any]) -> BaseException | None:
        marks, call, plain = self._marks, self._fn, _PLAIN
        try:
            for marks[1], item in enumerate(group, position):
                value = call(item)
                values.append(value)
                if value is not None and type(value) not in plain:
                    break
        except BaseException as error:
            return error
        return None

    def _run_starred(self, position: int, group: list[Any], values: list[Any]) -> BaseException | None:
        marks, call, plain = self._marks, self._fn, _PLAIN
        try:
            for marks[1], item in enumerate(group, position):
                value = call(*item)
                values.append(value)
                if value is not None and type(value) not in plain:
                    break
        except BaseException as error:
            return error
        return None

    def _run_timed(self, position: int, group: list[Any], values: list[Any]) -> BaseException | None:
        marks, call, plain = self._marks, self._fn, _PLAIN
        clock = time.monotonic_ns
        try:
            for item in group:
                # Why the time first: whoever looks between the two sees an item that has just begun.
                marks[BEGAN] = clock()
                marks[RUNNING] = position
                position += 1
                value = call(*item)
                values.append(value)
                if value is not None and type(value) not in plain:
                    break
        except BaseException as error:
            return error
        return None

    def _put(self, position: int, values: list[Any]) -> None:
        if not values:
            return
        last = len(values) - 1
        if type(values[last]) not in _PLAIN:
            # The loops end a group with such a value.
            self._put_one(position + last, values.pop())
            if not values:
                return
        packed = pickle.dumps(values, _PROTOCOL)
        if len(packed) < _LARGE_VALUES * len(values):
            self._put_packed(position, len(values), VALUES, packed)
            return
        for value in values:
            self._put_one(position, value)
            position += 1

    def _put_one(self, position: int, value: Any) -> None:
        # Should the pickling kill this process or take too long, that is this item's doing.
        self._marks[BEGAN] = time.monotonic_ns()
        self._marks[RUNNING] = position
        try:
            packed = pack_value(value, self._segments)
        except BaseException as error:
            named = f"the result of type {type(value).__qualname__} cannot be pickled"
            self._put_packed(position, 1, ERROR, pack_error(cannot(named, error)))
            return
        if isinstance(packed, bytes):
            self._put_packed(position, 1, VALUE, packed)
        elif not self._send(position, packed):
            unsent = RemoteError("the item's result could not be sent in shared memory")
            self._put_packed(position, 1, ERROR, pack_error(unsent))

    def _put_packed(self, position: int, n: int, kind: int, body: bytes) -> None:
        data = record(position, n, kind, body)
        if not self._progress.add(data):
            self._send(-1, data)


def _end_group() -> None:
    """In a copy that an item has forked: the rest of the group is not its business."""
    _Chunk.group.clear()


os.register_at_fork(after_in_child=_end_group)
