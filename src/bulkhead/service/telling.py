"""Letting the backend know what has become of jobs, in an order in which nothing is lost whenever we die.

First the jobs that follow are enqueued: their ids are fixed, so doing it twice changes nothing. Then outcomes are
saved, then the jobs are acked. A failure is told to the broker first, which checks that the job is still ours: so a
consumer that was too late cannot put its failure in the place of another's success.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead.backends.base import Burial, Message, Outcome, OutcomeState, Place, Return
from bulkhead.errors import MessageTooLarge
from bulkhead.service.envelope import Failure, encoded, failure, failure_of
from bulkhead.service.status import progress_key
from bulkhead.service.verdicts import Bury, Cancel, Discard, GiveBack, Succeed, TryAgain, Verdict

if TYPE_CHECKING:
    from bulkhead.service.app import App
    from bulkhead.service.batch import HeldJob

__all__ = ["Teller", "guarded", "last_outcome", "outcome_of"]

_log = logging.getLogger("bulkhead")

Judged = Sequence[tuple["HeldJob", Verdict]]


class Teller:
    """Tells the backend, the tasks' callbacks and the middlewares of one queue. Owner: the queue's threads."""

    def __init__(self, app: App, queue: str) -> None:
        self._app = app
        self._queue = queue

    def tell(self, judged: Judged, *, is_again: bool = False) -> None:
        """Let the backend know. Jobs that turn out to be no longer ours are marked `is_lost`. May be repeated.

        Args:
            judged: The jobs, and what is to become of them.
            is_again: An earlier call may have been carried out, or not.

        Raises:
            BrokerUnavailable: Some, all or none of it is known.
        """
        broker = self._app.backend.broker
        follows = [
            message
            for held, verdict in judged
            if held.envelope.on_success or held.envelope.on_error
            for message in self._follows(held, verdict)
        ]
        if follows:
            broker.enqueue_many(follows)
        ended = [one for one in judged if isinstance(one[1], (Succeed, Cancel, Discard))]
        if ended:
            self._save(ended)
            self._note_lost(ended, broker.ack([held.claim.hold for held, _ in ended]), is_again)
        returned = [one for one in judged if isinstance(one[1], (TryAgain, GiveBack))]
        if returned:
            done = broker.nack([_return_of(held, verdict) for held, verdict in returned])
            self._note_lost(returned, done, is_again)
        buried = [one for one in judged if isinstance(one[1], Bury)]
        if buried:
            done = broker.bury([_burial_of(held, verdict) for held, verdict in buried])
            self._note_lost(buried, done, is_again)
            self._save([one for one in buried if not one[0].is_lost])
        for held, _ in judged:
            if held.has_reported and not held.is_lost:
                self._app.backend.registry.delete(progress_key(held.id))

    def bury(self, held: HeldJob, verdict: Bury) -> None:
        """Let the backend know that a job has failed for good, and nothing else."""
        self._note_lost([(held, verdict)], self._app.backend.broker.bury([_burial_of(held, verdict)]), False)
        if not held.is_lost:
            self._save([(held, verdict)])

    def report(self, held: HeldJob, verdict: Verdict) -> None:
        """Call the task's callback, and the middlewares. `on_retry` is called before the broker knows."""
        options = held.task.options
        if isinstance(verdict, Succeed):
            self.call_back(held, options.on_success)
        elif isinstance(verdict, (Bury, Discard)):
            self.call_back(held, options.on_failure, _told(verdict))
        for middleware in self._app.middlewares:
            guarded(middleware.settled, held, verdict)

    def call_back(self, held: HeldJob, callback: Callable[..., object] | None, *told: Any) -> None:
        """Call a callback of a task, if there is one; what it raises is logged."""
        if callback is not None:
            guarded(callback, held, *told)

    def _follows(self, held: HeldJob, verdict: Verdict) -> list[Message]:
        codec = held.envelope.codec
        if isinstance(verdict, Succeed):
            follows, previous = held.envelope.on_success, verdict.value
        elif isinstance(verdict, (Bury, Discard)) and held.envelope.on_error:
            told = _told(verdict)
            follows, previous = (
                held.envelope.on_error,
                encoded(codec, [told.type, told.message, told.traceback]),
            )
        else:
            return []
        envelopes = [msgspec.structs.replace(one.envelope, previous=previous) for one in follows]
        return [
            self._app.submitting.message(one, envelope)
            for one, envelope in zip(follows, envelopes, strict=True)
        ]

    def _save(self, judged: Judged) -> None:
        outcomes = [self._outcome(held, verdict) for held, verdict in judged if held.envelope.keep]
        if not outcomes:
            return
        results = self._app.backend.results
        try:
            results.save_many(outcomes)
        except MessageTooLarge:
            # Nobody knows which: one by one, and in the place of one that is too large that it is.
            for one in outcomes:
                try:
                    results.save_many([one])
                except MessageTooLarge as error:
                    _log.error(
                        "queue %s: the result of job %s cannot be kept: %s", self._queue, one.id, error
                    )
                    results.save_many([one._replace(value=None, error=failure_of(error))])

    def _outcome(self, held: HeldJob, verdict: Verdict) -> Outcome:
        if isinstance(verdict, Succeed):
            value = self._app.sealer.seal_value(held.id, held.envelope.codec, verdict.value)
            return outcome_of(held, OutcomeState.SUCCEEDED, value=value)
        if isinstance(verdict, (Bury, Discard)):
            return outcome_of(held, OutcomeState.FAILED, error=msgspec.msgpack.encode(_told(verdict)))
        return outcome_of(held, OutcomeState.CANCELLED)

    def _note_lost(self, judged: Judged, done: Sequence[bool], is_again: bool) -> None:
        missed = [held for (held, _), is_done in zip(judged, done, strict=True) if not is_done]
        if missed and is_again:
            # Race: what we have told before the connection broke has ended our claim. Only who runs is somebody else's.
            records = self._app.backend.broker.find([held.id for held in missed])
            missed = [
                held
                for held, record in zip(missed, records, strict=True)
                if record is not None and record.place is Place.RUNNING
            ]
        for held in missed:
            held.is_lost = True
            _log.warning(
                "queue %s: job %s was no longer ours when it ended; it may run twice", self._queue, held.id
            )


def outcome_of(
    held: HeldJob, state: OutcomeState, *, value: bytes | None = None, error: bytes | None = None
) -> Outcome:
    """Return the outcome of a held job, as of now."""
    claim, now = held.claim, time.time()
    return Outcome(
        held.id,
        claim.queue,
        held.envelope.task,
        state,
        value,
        error,
        claim.attempt,
        claim.enqueued_at,
        now - held.seconds,
        now,
        held.envelope.keep,
    )


def last_outcome(held: HeldJob) -> Outcome:
    """Return the outcome of a settled job of which nothing is kept."""
    kinds = {Succeed: OutcomeState.SUCCEEDED, Cancel: OutcomeState.CANCELLED}
    return outcome_of(held, kinds.get(type(held.ending), OutcomeState.FAILED))


def guarded(call: Callable[..., object], *args: Any) -> None:
    """Call something of the user's; what it raises is logged."""
    try:
        call(*args)
    except BaseException:  # Why all: a callback that calls sys.exit() must not end a thread of ours
        _log.exception("%r raised", call)


def _told(verdict: Bury | Discard) -> Failure:
    if isinstance(verdict, Discard):
        return Failure("Discarded", verdict.reason)
    return failure(verdict.error) or Failure("BulkheadError", verdict.reason)


def _return_of(held: HeldJob, verdict: Verdict) -> Return:
    if isinstance(verdict, TryAgain):
        return Return(held.claim.hold, verdict.delay, True, verdict.error)
    assert isinstance(verdict, GiveBack)
    return Return(held.claim.hold, verdict.delay, False, keeps_place=verdict.keeps_place)


def _burial_of(held: HeldJob, verdict: Verdict) -> Burial:
    assert isinstance(verdict, Bury)
    return Burial(held.claim.hold, verdict.reason, verdict.error)
