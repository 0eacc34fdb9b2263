"""Running a chunk of a map in a worker: many small calls in one message, each with an end of its own.

Each item is noted before it is called, and results are put where they outlive the worker (see progress.py). Why not
each by itself: that costs about a microsecond, and many items take less. Results of some 200 microseconds are recorded
together, that of an item that takes longer than 50 at once, or when the few behind it have ended that the clock is not
read for. What a dying worker can take with it are the results of short items just before the one it ran, and of a long
one among those; they run again.

The clock is read for each block of items. After a block of very short ones the next is noted as a whole, since a note
for each would take as long as the item. Then it is not known which of them killed the worker: all of the block run
again, elsewhere and with a note for each, and the one that kills its worker again is the one. Who has named the size of
the chunks, or a time limit, gets a note for each item in any case, and a look at the clock, so no long one runs again.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import length_hint
from typing import Any, ClassVar, NamedTuple

from bulkhead import forks
from bulkhead.engines.processes.parcels import Parcel
from bulkhead.engines.processes.payload import NONE, cannot, pack_error, pack_value
from bulkhead.engines.processes.progress import (
    BEGAN,
    ERROR,
    NOBODY,
    RUNNING,
    SPAN,
    VALUE,
    VALUES,
    Progress,
    record,
)
from bulkhead.engines.processes.segments import SegmentPool
from bulkhead.engines.processes.use import WorkerUse
from bulkhead.errors import RemoteError

__all__ = ["ChunkOrder", "leave_copy", "run_chunk"]

# A block should take so long (seconds), as far as the last one tells. Its results are recorded if it took longer, or if
# all that is not recorded yet did.
_BLOCK_SECONDS = 50e-6
_BLOCK_NS = round(_BLOCK_SECONDS * 1e9)
_TOGETHER = 200e-6

# How many items a block may have, and how many times as many as the last one. Why so few: those before one of them that
# takes long after all are recorded no sooner. More would save little: a block costs as much as some 50 no-ops.
_MAX_BLOCK = 1024
_GROWTH = 8

# After so many items of a block the clock is looked at: if it has taken too long it ends there. So no more than these
# are begun after one that takes long, be it that nobody wants them any more, or that other workers are idle.
_PIECE = 64

# After so many items in a block that took no longer each (seconds) the next one is noted as a whole.
_MANY = 256
_VERY_SHORT = 1e-6

# A chunk that was made for short items and has taken so long gives the rest back (seconds): the caller deals it anew.
_ENOUGH = 0.05

# Results of these types can be rebuilt by any process and never change, so many are pickled in one go. Others
# are pickled one by one and at once: the next item may change them, and one that cannot be rebuilt takes no other with
# it.
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})

_PROTOCOL = 5

# Runs the items of a block, which come in pieces, from a position on, and adds their results to a list; returns what
# the last one raised.
Block = list[list[Any]]
_NO_ITEMS: Iterator[Any] = iter(())
Loop = Callable[[int, Block, list[Any]], BaseException | None]

# Plain results of this size on average are packed one by one, so that large ones go into segments (bytes).
_LARGE_VALUES = 16 << 10


class ChunkOrder(NamedTuple):
    """What is to be done with the items of a message.

    Attributes:
        todo: Which items to run, as indices; positions are places in here.
        is_star: Each item is a tuple of arguments.
        is_timed: Note when each item begins.
        may_stop: Give the rest back when it takes long.
        is_exact: Note each item, however short.
        half: Which half of the progress memory is to be written.
        is_ahead: Sent before the last one was answered: to be begun only if it was not taken back meanwhile.
    """

    todo: Sequence[int]
    is_star: bool
    is_timed: bool
    may_stop: bool
    is_exact: bool
    half: int = 0
    is_ahead: bool = False


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
    block: ClassVar[Block] = []  # that is being run

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
        is_careful = order.is_timed or order.is_exact
        self._batch = batch if order.is_star or not is_careful else [(item,) for item in batch]
        self._order = order
        self._message = message
        self._progress = progress
        self._send = send
        self._segments = segments
        self._marks = progress.begin(message)
        self._depth = forks.depth
        self._values: list[Any] = []  # results that are not recorded yet

    def run(self, use: WorkerUse | None) -> None:
        loop, quick_loop = self._loops(use)
        position, size = 0, 1
        total = len(self._batch)
        if use is not None and use.jobs_left is not None:
            total = min(total, use.jobs_left)
        next_loop = loop
        now = recorded = self.began
        while position < total and not self._is_to_stop(now, None if position == 0 else use):
            end = min(position + size, total)
            n_before = len(self._values)
            error = next_loop(position, self._cut(position, end), self._values)
            leave_copy(self._depth)
            n_run = len(self._values) - n_before + (error is not None)
            if position + n_run > end:
                # Race: the handler of a signal that an item has asked for has raised behind the last item.
                error, n_run = None, n_run - 1
            position += n_run
            before, now = now, time.perf_counter()
            took = max(now - before, 1e-9)
            is_plain = error is None and type(self._values[-1]) in _PLAIN
            if not is_plain or took > _BLOCK_SECONDS or now - recorded > _TOGETHER:
                self._record(position, error)
                recorded = now
            size = max(1, min(int(n_run * _BLOCK_SECONDS / took), _GROWTH * n_run, _MAX_BLOCK))
            next_loop = quick_loop if n_run >= _MANY and took < n_run * _VERY_SHORT else loop
        self._record(position, None)
        if use is not None:
            use.count(position)
        _Chunk.block = []  # or it would keep the last items' data
        self._marks[RUNNING] = NOBODY

    def _cut(self, position: int, end: int) -> Block:
        batch = self._batch
        _Chunk.block = block = [batch[at : at + _PIECE] for at in range(position, end, _PIECE)]
        del block[-1][(end - position - 1) % _PIECE + 1 :]
        return block

    def _loops(self, use: WorkerUse | None) -> tuple[Loop, Loop]:
        """Return what runs a block, and what runs one of very short items."""
        if self._order.is_timed or self._order.is_exact:
            return self._run_carefully, self._run_carefully
        loop, quick_loop = self._run_plain, self._run_plain_quickly
        if self._order.is_star:
            loop, quick_loop = self._run_starred, self._run_starred_quickly
        # Why not with limits: an item may be ended for the memory that it takes, and that is to be done once.
        return loop, loop if use is not None else quick_loop

    def _is_to_stop(self, now: float, use: WorkerUse | None) -> bool:
        return (
            self._progress.is_stopped(self._message)
            or (self._order.may_stop and now - self.began > _ENOUGH)
            or (use is not None and use.is_heavy())
        )

    # Every item of a map goes through one of these loops. They put its position into the counters before it is called;
    # why as a target of `for`: that takes half the time of a line of its own.
    # Race: a worker may be killed between two counters; then the items behind are run again, which nobody has begun.
    # Why the type before the result is added: a metaclass of the user's may raise then, and that is this item's.

    def _run_plain(self, position: int, block: Block, values: list[Any]) -> BaseException | None:
        marks, call, plain, clock = self._marks, self._fn, _PLAIN, time.perf_counter
        marks[RUNNING] = position
        marks[SPAN] = 1
        late = clock() + _BLOCK_SECONDS
        try:
            for piece in block:
                for marks[1], item in enumerate(piece, position):
                    value = call(item)
                    if value is not None and type(value) not in plain:
                        values.append(value)
                        return None
                    values.append(value)
                if clock() > late:
                    break
                position += _PIECE
        except BaseException as error:
            return error
        return None

    def _run_starred(self, position: int, block: Block, values: list[Any]) -> BaseException | None:
        marks, call, plain, clock = self._marks, self._fn, _PLAIN, time.perf_counter
        marks[RUNNING] = position
        marks[SPAN] = 1
        late = clock() + _BLOCK_SECONDS
        try:
            for piece in block:
                for marks[1], item in enumerate(piece, position):
                    value = call(*item)
                    if value is not None and type(value) not in plain:
                        values.append(value)
                        return None
                    values.append(value)
                if clock() > late:
                    break
                position += _PIECE
        except BaseException as error:
            return error
        return None

    def _run_carefully(self, position: int, block: Block, values: list[Any]) -> BaseException | None:
        """Look at the clock after each item, so that the block ends with one that takes long."""
        marks, call, plain = self._marks, self._fn, _PLAIN
        clock = time.monotonic_ns
        now = clock()
        late = now + _BLOCK_NS
        try:
            for piece in block:
                for item in piece:
                    # Why the time first: whoever looks between the two sees an item that has just begun.
                    marks[BEGAN] = now
                    marks[RUNNING] = position
                    position += 1
                    value = call(*item)
                    if value is not None and type(value) not in plain:
                        values.append(value)
                        return None
                    values.append(value)
                    now = clock()
                    if now > late:
                        return None
        except BaseException as error:
            return error
        return None

    def _run_plain_quickly(  # noqa: C901 - a function for each loop would show in tracebacks of items
        self, position: int, block: Block, values: list[Any]
    ) -> BaseException | None:
        call, plain, clock = self._fn, _PLAIN, time.perf_counter
        self._marks[SPAN] = (len(block) - 1) * _PIECE + len(block[-1])
        self._marks[RUNNING] = position
        late = clock() + _BLOCK_SECONDS
        pieces, left = iter(block), _NO_ITEMS
        value, n = None, 0
        try:
            try:
                # Why apart: most functions return None always or never, and this loop takes a fifth less.
                for piece in pieces:
                    left = iter(piece)
                    n += len(piece)
                    for item in left:
                        value = call(item)
                        if value is not None:
                            break
                    else:
                        if clock() < late:
                            continue
                    break
            finally:
                values += [None] * (n - length_hint(left) - 1)
            if value is None or type(value) not in plain:
                values.append(value)
                return None
            values.append(value)
            for rest in chain((left,), pieces):
                for item in rest:
                    value = call(item)
                    if value is not None and type(value) not in plain:
                        values.append(value)
                        return None
                    values.append(value)
                if clock() > late:
                    break
        except BaseException as error:
            return error
        return None

    def _run_starred_quickly(self, position: int, block: Block, values: list[Any]) -> BaseException | None:
        call, plain, clock = self._fn, _PLAIN, time.perf_counter
        self._marks[SPAN] = (len(block) - 1) * _PIECE + len(block[-1])
        self._marks[RUNNING] = position
        late = clock() + _BLOCK_SECONDS
        try:
            for piece in block:
                for item in piece:
                    value = call(*item)
                    if value is not None and type(value) not in plain:
                        values.append(value)
                        return None
                    values.append(value)
                if clock() > late:
                    break
        except BaseException as error:
            return error
        return None

    def _record(self, end: int, error: BaseException | None) -> None:
        """Record what is not recorded yet of the items before `end`; `error` is that of the last of them."""
        values, self._values = self._values, []
        n_failed = error is not None
        self._put(end - n_failed - len(values), values)
        if error is not None:
            self._put_packed(end - 1, 1, ERROR, pack_error(error))

    def _put(self, position: int, values: list[Any]) -> None:
        if not values:
            return
        last = len(values) - 1
        if type(values[last]) not in _PLAIN:
            # The loops end a block with such a value.
            self._put_one(position + last, values.pop())
            if not values:
                return
        # Why by identity first: so it costs the others nothing.
        if values[0] is None and values.count(None) == len(values):
            self._put_packed(position, len(values), VALUE, NONE)
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
        self._marks[SPAN] = 1
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


def _end_block() -> None:
    """In a copy that an item has forked: the rest of the block is not its business."""
    for piece in _Chunk.block:
        piece.clear()
    _Chunk.block.clear()


os.register_at_fork(after_in_child=_end_block)
