"""Answers of workers, unpickled: what the driver makes of the frames it reads, before it takes the pool's lock.

Users' code runs in here, whatever it does: an answer that cannot be rebuilt becomes an error of its job.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

from bulkhead.engines.processes.payload import message_of, unpack_error, unpack_value
from bulkhead.engines.processes.progress import ERROR, VALUES, Record, records_in
from bulkhead.engines.processes.worker import Worker
from bulkhead.engines.processes.worker_main import Kind
from bulkhead.errors import RemoteError

__all__ = ["Answer", "Parts", "decoded", "recorded"]

_VALUE = Kind.VALUE
_SECONDS = struct.Struct("<d")

Body = bytes | bytearray | memoryview

# Worker, kind of frame, number of message, bytes, value, error.
Answer = tuple[Worker, int, int, int, Any, BaseException | None]

# Position, results of the items from there on, or the error of that one.
Outcome = tuple[int, list[Any], BaseException | None]


class Parts(NamedTuple):
    """What a frame or the records of a worker tell about a chunk."""

    outcomes: list[Outcome]
    seconds: float | None  # that the whole chunk took, at its end


def decoded(worker: Worker, kind: int, number: int, body: Body) -> Answer:
    """Return what a frame says."""
    if kind == _VALUE:
        return worker, kind, number, len(body), *_value(body)
    if kind == Kind.NOTED:
        return _noted(worker, number, body)
    if kind == Kind.CHUNK_DONE:
        return _chunk_done(worker, number, body)
    return worker, kind, number, len(body), None, None if kind == Kind.READY else unpack_error(body)


def recorded(worker: Worker) -> Answer:
    """Return what a worker that is gone had recorded of its last chunk."""
    number = worker.message
    size, outcomes = _outcomes(_records(worker, number))
    return worker, Kind.PART, number, size, Parts(outcomes, None), None


def _noted(worker: Worker, number: int, body: Body) -> Answer:
    try:
        opened = worker.exchange.open(body, number)
    except (OSError, MemoryError) as error:
        return worker, Kind.ERROR, number, 0, None, _unreadable(error)
    kind, *rest = opened.extra
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
    size, outcomes = _outcomes(_records(worker, number))
    (seconds,) = _SECONDS.unpack(body)
    return worker, Kind.CHUNK_DONE, number, size, Parts(outcomes, seconds), None


def _records(worker: Worker, number: int) -> list[Record]:
    try:
        return worker.progress.records(number)
    except ValueError:  # Race: another thread has given the pool up and closed the view
        return []


def _outcomes(records: Iterable[Record]) -> tuple[int, list[Outcome]]:
    size = 0
    outcomes: list[Outcome] = []
    for position, _, kind, body in records:
        size += len(body)
        if kind == ERROR:
            outcomes.append((position, [], unpack_error(body)))
            continue
        value, error = _value(body)
        outcomes.append((position, value if kind == VALUES and error is None else [value], error))
    return size, outcomes


def _value(body: Body, buffers: list[memoryview] | tuple[()] = ()) -> tuple[Any, BaseException | None]:
    try:
        return unpack_value(body, buffers), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return None, _unreadable(error)


def _unreadable(error: BaseException) -> RemoteError:
    name = type(error).__qualname__
    text = f"the job's result could not be unpickled in the caller: {name}: {message_of(error)}"
    remote = RemoteError(text, type_name=name)
    remote.__cause__ = error
    return remote
