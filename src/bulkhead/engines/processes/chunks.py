"""The chunks of a map in the caller's engine: jobs of which a part can be done, be lost, or have its own time.

A worker notes where in a chunk it is in its black box (see progress.py); what it has recorded there counts also when it
is gone. What follows for the items is the chunk's own business (see `bulkhead.chunk`).

Owner: the pool's lock, for all of this.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from bulkhead._kernel.lifecycle import JobState
from bulkhead._kernel.records import JobRecord, Loss
from bulkhead._kernel.scheduler import Scheduler
from bulkhead.chunk import Chunk
from bulkhead.engines.processes.chunk_runner import ChunkOrder
from bulkhead.engines.processes.worker import Worker
from bulkhead.errors import JobCancelled

__all__ = ["Outcome", "Parts", "abandon", "ended", "extended", "lost", "order", "take", "title"]

# How long a job has whose answer waits, before that is looked at again (seconds).
_LOOK_AGAIN = 1.0

# Position, results of the items from there on, or the error of that one.
Outcome = tuple[int, list[Any], BaseException | None]


class Parts(NamedTuple):
    """What a frame or the records of a worker tell about a chunk."""

    outcomes: list[Outcome]
    seconds: float | None  # that the whole chunk took, at its end


def order(chunk: Chunk, half: int, *, is_ahead: bool = False) -> ChunkOrder:
    """Return what a worker is told to do with the chunk's message; see `ChunkOrder` for `half` and `is_ahead`."""
    is_timed = chunk.timeout is not None
    return ChunkOrder(chunk.todo, chunk.is_star, is_timed, chunk.may_stop, chunk.is_exact, half, is_ahead)


def take(chunk: Chunk, parts: Parts, size: int) -> None:
    """Note what a worker tells of the items, in `size` bytes."""
    chunk.size += size
    for position, values, error in parts.outcomes:
        if error is None:
            chunk.take(position, values)
        else:
            chunk.take_error(position, error)
    if parts.seconds is not None:
        chunk.seconds = parts.seconds


def ended(chunk: Chunk, error: BaseException | None) -> BaseException | None:
    """Return what the kernel is to be told of a chunk's end; `error` is that of a worker that could not read it."""
    if error is not None:
        chunk.reject(error)
    return chunk.end_round(chunk.attempt)


def lost(worker: Worker, chunk: Chunk, error: BaseException) -> tuple[Loss, BaseException]:
    """Return what the worker's death means for a chunk, and the error that may be retried."""
    if chunk.lose(worker.progress.running(worker.message), error, worker.progress.span()):
        return Loss.REST, error
    failure = chunk.end_round(chunk.attempt)
    return (Loss.NOTHING, error) if failure is None else (Loss.ATTEMPT, failure)


def title(worker: Worker, chunk: Chunk) -> str:
    """Return what errors call that of the chunk which the worker ran."""
    return chunk.describe(worker.progress.running(worker.message), worker.progress.span())


def extended(job: JobRecord) -> float | None:
    """Return up to when a job has time whose time is up: one whose timeout counts for each of its items."""
    worker = job.slot.worker if job.slot is not None else None
    if worker is not None and worker.output is not None and worker.output.held:
        return time.monotonic() + _LOOK_AGAIN  # it has answered, and the answer waits for the job's output
    if not isinstance(job, Chunk) or worker is None:
        return None
    instant = job.time_left(worker.progress.running(worker.message), worker.began, time.monotonic())
    if instant is None:
        worker.progress.stop(
            worker.message
        )  # should the item bear the kill ladder's first rung, none follows it
    return instant


def abandon(chunk: Chunk, scheduler: Scheduler, now: float) -> None:
    """See to it that no more items of the chunk begin; those that run run to their end."""
    chunk.is_abandoned = True
    slot = scheduler.begun_ahead(chunk)
    if slot is not None:
        slot.worker.stop_ahead()
    elif chunk.state is None:
        scheduler.withdraw(chunk)
    elif chunk.state is JobState.RUNNING:
        worker = chunk.slot.worker if chunk.slot is not None else None
        if worker is not None:
            worker.progress.stop(worker.message)
    else:
        scheduler.cancel(chunk, JobCancelled("nobody reads on in the map"), now)
