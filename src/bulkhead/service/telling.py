"""Letting the backend know what has become of jobs, in an order in which nothing is lost whenever we die.

First the jobs that follow are enqueued: their ids are fixed, so doing it twice changes nothing. Then claims end, and
their outcomes are kept: in one step where jobs and results are in one place (`Settler`), so that a consumer that was
too late, be it frozen at any instant, cannot put its outcome in the place of another's; elsewhere as `apart.py` says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from bulkhead.backends.base import Ending, Message, Outcome, OutcomeState, Place, Return
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
        ended = [one for one in judged if not isinstance(one[1], (TryAgain, GiveBack))]
        if ended:
            self._settle(ended, is_again)
        returned = [one for one in judged if isinstance(one[1], (TryAgain, GiveBack))]
        if returned:
            done = broker.nack([_return_of(held, verdict) for held, verdict in returned])
            self._note_lost([held for held, _ in returned], done, is_again)
        for held, _ in judged:
            if held.has_reported and not held.is_lost:
                self._app.backend.registry.delete(progress_key(held.id))

    def bury(self, held: HeldJob, verdict: Bury, *, is_again: bool = False) -> None:
        """Let the backend know that a job has failed for good, and nothing else."""
        self._settle([(held, verdict)], is_again)

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

    def _settle(self, ended: Judged, is_again: bool) -> None:
        endings = [self._ending(held, verdict) for held, verdict in ended]
        sure_until = min(held.sure_until for held, _ in ended)
        try:
            done = self._app.backend.settle(endings, sure_until=sure_until)
        except MessageTooLarge as error:
            if len(ended) > 1:
                # Nobody knows which: one by one. Those that were settled before are so again.
                for one in ended:
                    self._settle([one], True)
                return
            done = self._settle_without_value(ended[0][0], error, sure_until)
        self._note_lost([held for held, _ in ended], done, is_again)

    def _settle_without_value(self, held: HeldJob, error: MessageTooLarge, sure_until: float) -> list[bool]:
        """Keep that the outcome is too large in its place."""
        assert held.told is not None
        verdict, ending = held.told
        if ending.outcome is None:
            raise error
        _log.error("queue %s: the result of job %s cannot be kept: %s", self._queue, held.id, error)
        ending = ending._replace(outcome=ending.outcome._replace(value=None, error=failure_of(error)))
        held.told = verdict, ending
        return self._app.backend.settle([ending], sure_until=sure_until)

    def _ending(self, held: HeldJob, verdict: Verdict) -> Ending:
        """Return what a verdict means to the backend; the same each time, so that it is known when it is told again."""
        if held.told is not None and held.told[0] is verdict:
            return held.told[1]
        outcome = self._outcome(held, verdict) if held.envelope.keep else None
        ending = Ending(held.claim.hold, outcome)
        if isinstance(verdict, Bury):
            ending = ending._replace(reason=verdict.reason, error=verdict.error)
        held.told = verdict, ending
        return ending

    def _outcome(self, held: HeldJob, verdict: Verdict) -> Outcome:
        if isinstance(verdict, Succeed):
            value = self._app.sealer.seal_value(held.id, held.envelope.codec, verdict.value)
            return outcome_of(held, OutcomeState.SUCCEEDED, value=value)
        if isinstance(verdict, (Bury, Discard)):
            return outcome_of(held, OutcomeState.FAILED, error=msgspec.msgpack.encode(_told(verdict)))
        return outcome_of(held, OutcomeState.CANCELLED)

    def _note_lost(self, jobs: Sequence[HeldJob], done: Sequence[bool], is_again: bool) -> None:
        missed = [held for held, is_done in zip(jobs, done, strict=True) if not is_done]
        if is_again:
            # Race: what we told before the connection broke may have ended our claim. Where an outcome is kept the
            # backend knows it; else only who runs is somebody else's.
            unseen = [held for held in missed if not _leaves_outcome(held)]
            missed = [held for held in missed if _leaves_outcome(held)] + self._running_elsewhere(unseen)
        for held in missed:
            held.is_lost = True
            _log.warning(
                "queue %s: job %s was no longer ours when it ended; it may run twice", self._queue, held.id
            )

    def _running_elsewhere(self, jobs: Sequence[HeldJob]) -> list[HeldJob]:
        records = self._app.backend.broker.find([held.id for held in jobs]) if jobs else []
        return [
            held
            for held, record in zip(jobs, records, strict=True)
            if record is not None and record.place is Place.RUNNING
        ]


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


def _leaves_outcome(held: HeldJob) -> bool:
    return held.told is not None and held.told[1].outcome is not None


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
