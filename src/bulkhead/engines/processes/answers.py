"""Answers of workers: unpickled by the driver before it takes the pool's lock, told to the kernel under it (`tell`).

Users' code runs while they are unpickled, whatever it does: an answer that cannot be rebuilt becomes an error of its
job.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from bulkhead._kernel.records import SlotState
from bulkhead._kernel.scheduler import Scheduler
from bulkhead.chunk import Chunk
from bulkhead.engines.processes import chunks
from bulkhead.engines.processes.chronicle import SHORT, noted
from bulkhead.engines.processes.chunks import Outcome, Parts
from bulkhead.engines.processes.payload import NONE, message_of, text_of, unpack_error, unpack_value
from bulkhead.engines.processes.progress import ERROR, VALUES, Progress, Record, records_in
from bulkhead.engines.processes.worker import Worker
from bulkhead.engines.processes.worker_main import Kind
from bulkhead.errors import RemoteError, type_name_of

__all__ = ["Answer", "decoded", "recorded", "tell"]

# Why names of their own: looking into a class takes time on the way of every job, and into an enum twice as much.
_VALUE, _PART = Kind.VALUE, Kind.PART
_OF_STARTS = frozenset({Kind.READY, Kind.NOT_READY})
_OF_CHUNKS = frozenset({Kind.PART, Kind.CHUNK_DONE})
_BUSY = SlotState.BUSY

_SECONDS = struct.Struct("<d")

Body = bytes | bytearray | memoryview

# Worker, kind of frame, number of message, bytes, value, error.
Answer = tuple[Worker, int, int, int, Any, BaseException | None]


def decoded(worker: Worker, kind: int, number: int, body: Body) -> Answer:
    """Return what a frame says."""
    if kind == _VALUE:
        if body == NONE:  # as most jobs return
            return worker, kind, number, len(body), None, None
        value, error = _value(body)
        return worker, kind, number, len(body), value, error
    if kind == Kind.NOTED:
        return _noted(worker, number, body)
    if kind == Kind.CHUNK_DONE:
        return _chunk_done(worker, number, body)
    return worker, kind, number, len(body), None, None if kind == Kind.READY else unpack_error(body)


def recorded(worker: Worker) -> list[Answer]:
    """Return what a worker that is gone had recorded of its last chunk, and of the one that was sent ahead."""
    number, ahead = worker.message, worker.ahead
    size, outcomes = _outcomes(_records(worker.progress, number))
    if not worker.has_begun_ahead() or not worker.progress.is_over(number):
        return [(worker, Kind.PART, number, size, Parts(outcomes, None), None)]
    # So the last one has ended, even if its answer is lost. If it is not, this one comes too late and is ignored.
    answers: list[Answer] = [(worker, Kind.CHUNK_DONE, number, size, Parts(outcomes, None), None)]
    size, outcomes = _outcomes(_records(worker.progress_ahead, ahead))
    return [*answers, (worker, Kind.PART, ahead, size, Parts(outcomes, None), None)]


def tell(  # noqa: C901 - on the way of every job
    scheduler: Scheduler,
    worker: Worker,
    kind: int,
    number: int,
    size: int,
    value: Any,
    error: BaseException | None,
    now: float,
) -> None:
    """Tell the kernel what a worker has answered. Under the lock; the rest of the arguments are an `Answer`."""
    slot = worker.slot
    if kind in _OF_STARTS:
        _came_up(scheduler, worker, number, error, now)
        return
    if slot.worker is not worker or number != worker.message:
        return
    job = slot.job
    if kind in _OF_CHUNKS:
        # Also from a worker that is being ended: what is done is done.
        if isinstance(job, Chunk):
            chunks.take(job, value, size)
        if kind == _PART:
            return
    if slot.state is not _BUSY:
        return
    # Race: whatever else comes under this number, perhaps in the same breath, belongs to no job any more.
    worker.message += 1
    worker.jobs += 1
    took = now - worker.began
    worker.busy_seconds += took
    assert job is not None
    due = job.due
    ahead = None
    if isinstance(job, Chunk):
        error = chunks.ended(job, error)
        ahead = worker.end_chunk()
        is_plain = False
    else:
        job.value = value
        job.size = size
        # Invariant: a success that is to be recorded is, before anybody can see it.
        if error is None and job.journal is not None:
            error = job.journal.record(job)
        is_plain = error is None and due is None
    if scheduler.wear is None:
        scheduler.attempt_ended(slot, error, now)
    else:
        scheduler.attempt_ended(slot, error, now, worker.usage())
    if is_plain and took < SHORT and now < worker.gather_until and job.function is worker.gathers:
        worker.ended = now
    else:
        worker.record(worker, job, None if is_plain else noted(job, due, error), now)
    if ahead is not None:
        worker.go_on(ahead, now)


def _came_up(scheduler: Scheduler, worker: Worker, pid: int, error: BaseException | None, now: float) -> None:
    if error is not None:
        worker.failure = error
    elif worker.slot.state is SlotState.STARTING:
        worker.pid = pid
        worker.came_up = now
        scheduler.worker_ready(worker.slot, now)


def _noted(worker: Worker, number: int, body: Body) -> Answer:
    notes = worker.exchange.unwrap(body)
    kind, *rest = notes.extra
    try:
        opened = worker.exchange.open(notes, number)
    except (OSError, MemoryError) as error:
        refusal = _unreadable(error)
        if kind == Kind.PART:
            # The worker goes on with its other items.
            return worker, kind, number, 0, Parts([(rest[0], [], refusal)], None), None
        return worker, Kind.ERROR, number, 0, None, refusal
    size = len(opened.body) + opened.size
    if kind == _VALUE:
        return worker, kind, number, size, *_value(opened.body, opened.buffers)
    if kind == Kind.PART:
        [position] = rest
        if position < 0:
            _, outcomes = _outcomes(records_in(memoryview(opened.body)))
        else:
            value, failure = _value(opened.body, opened.buffers)
            outcomes = [(position, [value], failure)]
        return worker, kind, number, size, Parts(outcomes, None), None
    return decoded(worker, kind, number, opened.body)


def _chunk_done(worker: Worker, number: int, body: Body) -> Answer:
    # Race: what was sent ahead has begun to be told of in the other half, which is not this one's.
    progress = worker.progress_ahead if number == worker.ahead != worker.message else worker.progress
    size, outcomes = _outcomes(_records(progress, number))
    (seconds,) = _SECONDS.unpack(body)
    return worker, Kind.CHUNK_DONE, number, size, Parts(outcomes, seconds), None


def _records(progress: Progress, number: int) -> list[Record]:
    try:
        return progress.records(number)
    except ValueError:  # Race: another thread has given the pool up and closed the view
        return []


def _outcomes(records: Iterable[Record]) -> tuple[int, list[Outcome]]:
    size = 0
    outcomes: list[Outcome] = []
    for position, n, kind, body in records:
        size += len(body)
        if kind == ERROR:
            outcomes.append((position, [], unpack_error(body)))
            continue
        value, error = _value(body)
        values = value if kind == VALUES and error is None else [value] * n
        outcomes.append((position, values, error))
    return size, outcomes


def _value(body: Body, buffers: list[memoryview] | tuple[()] = ()) -> tuple[Any, BaseException | None]:
    try:
        return unpack_value(body, buffers), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return None, _unreadable(error)


def _unreadable(error: BaseException) -> RemoteError:
    name = type_name_of(error)
    text = f"the job's result could not be unpickled in the caller: {name}: {message_of(error)}"
    trace = text_of(error, error.__traceback__)
    # Why as text: an error may be kept for long, and the frames would keep the black box or a segment mapped.
    BaseException.with_traceback(error, None)
    remote = RemoteError(text, type_name=name, traceback=trace, is_unreadable=True)
    remote.__cause__ = error
    return remote
