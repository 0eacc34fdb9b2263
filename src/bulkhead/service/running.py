"""What runs in a worker process: the jobs of one message to the pool, one after the other, each with its own outcome.

    consumer ── (tasks, items) ──▶ run_batch ── middlewares' handle ── the user's function
             ◀── an answer for each item ──┘

A batch gives back what it has not begun when it takes long, so that a slow job holds up no other for long: the consumer
sends the rest anew. What a job has raised is described here, where the traceback is.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from bulkhead import validate
from bulkhead.errors import ConfigError, JobCancelled, JobDiscarded, Snooze, Unrecoverable
from bulkhead.service import context
from bulkhead.service.batch import marks_beside
from bulkhead.service.context import JobContext
from bulkhead.service.envelope import Envelope, encoded, failure_of
from bulkhead.service.link import line_to
from bulkhead.service.task import Task

__all__ = [
    "BATCH_SECONDS",
    "CANCELLED",
    "DISCARDED",
    "DONE",
    "FAILED",
    "SNOOZED",
    "UNRECOVERABLE",
    "Answer",
    "Item",
    "answer_of",
    "run_batch",
]

# Nothing further of a batch is begun after so many seconds.
BATCH_SECONDS = 0.02

# What became of an item.
DONE, FAILED, UNRECOVERABLE, SNOOZED, CANCELLED, DISCARDED = range(6)

# (kind, encoded result or failure or reason or None, seconds; of a snoozed one its delay)
Answer = tuple[int, bytes | None, float]

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode
_open = msgspec.msgpack.Decoder(Envelope).decode


class Item(NamedTuple):
    """A job as it goes to a worker; the envelope is verified."""

    task: int
    id: str
    queue: str
    attempt: int
    enqueued_at: float
    envelope: bytes


def run_batch(
    tasks: Sequence[Task[..., Any]], items: Sequence[Item], address: str, slot: int | None
) -> list[Answer]:
    """Run jobs in this process; the answers are those of the first items, at least of one.

    Args:
        tasks: What the items' `task` counts in.
        items: The jobs.
        address: Of the consumer's link.
        slot: Where it is marked which of them runs; None for a single one.
    """
    line = line_to(address)
    marks, record = _marking(address, slot)
    end = time.monotonic() + BATCH_SECONDS
    answers: list[Answer] = []
    for number, item in enumerate(items):
        marks[slot] = number
        began = time.monotonic()
        # Invariant: what a consumer has taken back because the mark stood for longer than this is never begun. Race: so
        # the clock is read when the mark has moved; a worker that is held up between the two does not begin the job.
        if answers and began > end:
            break
        envelope = _open(item.envelope)
        job = JobContext(line, item.id, item.queue, item.attempt, item.enqueued_at, envelope)
        kind, data, delay = _run(tasks[item.task], job, envelope)
        answers.append((kind, data, delay if kind == SNOOZED else time.monotonic() - began))
        if record is not None:
            record(_pack(answers[-1]))
    return answers


def answer_of(noted: bytes) -> Answer:
    """Return the answer that a worker has noted."""
    kind, data, seconds = _unpack(noted)
    return kind, data, seconds


def _marking(address: str, slot: int | None) -> tuple[Any, Callable[[bytes], None] | None]:
    """Return where to mark what runs, and what notes an answer. A single job needs neither."""
    if slot is None:
        return {}, None
    marks = marks_beside(address)
    return marks.slots, marks.recorder(slot)


def _run(task: Task[..., Any], job: JobContext, envelope: Envelope) -> Answer:
    context.running = job
    try:
        value = _handler(task)(job)
        if value is None and job.saved is not None:
            return DONE, job.saved, 0.0
        return _encoded(envelope.codec, value)
    except Snooze as snooze:
        return _snoozed(snooze)
    except JobCancelled as error:
        return (CANCELLED if job.is_cancelled else FAILED), _described(error), 0.0
    except JobDiscarded as error:
        return DISCARDED, str(error).encode("utf-8", "replace"), 0.0
    except Unrecoverable as error:
        return UNRECOVERABLE, _described(error), 0.0
    except BaseException as error:  # Why all: what a job raises must not take the others of its batch with it
        return FAILED, _described(error), 0.0
    finally:
        context.running = None


def _handler(task: Task[..., Any]) -> Callable[[JobContext], Any]:
    """Return the task with the application's middlewares around it."""
    if task.handler is None:
        found: Callable[[JobContext], Any] = _Arguments(task.fn)
        for middleware in reversed(task.app.middlewares):
            found = middleware.wrapped_handle(found)
        task.handler = found
    return task.handler


class _Arguments:
    """Calls the function with what the job has brought."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    def __call__(self, job: JobContext) -> Any:
        args, kwargs = job.arguments()
        return self._fn(*args, **kwargs)


def _encoded(codec: str, value: Any) -> Answer:
    try:
        return DONE, encoded(codec, value), 0.0
    except Exception as error:
        # Why no retry: the job has done its work, and would return the same again.
        error.add_note(f"the job has run; what it returned cannot be encoded in {codec}")
        return UNRECOVERABLE, _described(error), 0.0


def _snoozed(snooze: Snooze) -> Answer:
    try:
        return SNOOZED, None, validate.seconds("delay", snooze.delay, zero=True)
    except ConfigError as error:  # of a subclass of the user's, or set later
        return FAILED, _described(error), 0.0


def _described(error: BaseException) -> bytes:
    return failure_of(error, "".join(traceback.format_exception(error)))
