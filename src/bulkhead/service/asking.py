"""What can be asked about an application's jobs, and what is done to dead letters. `App` has the words for users."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from bulkhead import validate
from bulkhead._kernel.lifecycle import JobState
from bulkhead.backends.base import OutcomeState, Place
from bulkhead.errors import BulkheadError, ConfigError, JobCancelled, RemoteError, ResultNotFound
from bulkhead.service.envelope import Failure, failure
from bulkhead.service.status import QueuedJob, from_outcome, from_record
from bulkhead.service.task import job_id

if TYPE_CHECKING:
    from bulkhead.service.app import App

__all__ = ["Asking"]

# A round trip carries so many jobs.
_PER_CALL = 1000

# Where the jobs of a state are looked for.
_PLACES = {
    JobState.QUEUED: Place.READY,
    JobState.SCHEDULED: Place.SCHEDULED,
    JobState.RUNNING: Place.RUNNING,
}
_OUTCOMES = {
    JobState.SUCCEEDED: OutcomeState.SUCCEEDED,
    JobState.FAILED: OutcomeState.FAILED,
    JobState.CANCELLED: OutcomeState.CANCELLED,
}


class Asking:
    """Asks an application's backend. Concurrency: any thread."""

    def __init__(self, app: App) -> None:
        self._app = app

    def find(self, ids: Sequence[str]) -> list[QueuedJob | None]:
        """Return what is known of jobs, in order."""
        checked = [job_id(one) for one in validate.several("ids", ids)]
        return [job for part in _parts(checked) for job in self._find(part)]

    def _find(self, ids: Sequence[str]) -> list[QueuedJob | None]:
        backend, sealer = self._app.backend, self._app.sealer
        records = backend.broker.find(ids)
        # Race: a job's outcome is saved before its broker forgets it, so who asks in this order misses none.
        settled = [one for one, record in zip(ids, records, strict=True) if record is None]
        outcomes = dict(zip(settled, backend.results.get_many(settled), strict=True)) if settled else {}
        found: list[QueuedJob | None] = []
        for one, record in zip(ids, records, strict=True):
            outcome = outcomes.get(one)
            if record is not None:
                found.append(from_record(record, sealer, backend.registry))
            elif outcome is not None and outcome.state is not OutcomeState.RUNNING:
                found.append(from_outcome(outcome))
            else:
                found.append(None)
        return found

    def page(self, state: JobState | str, queue: str | None, offset: int, limit: int) -> list[QueuedJob]:
        """Return jobs in a state."""
        wanted = _state(state)
        if wanted in _PLACES:
            return self._page_of(_PLACES[wanted], queue, offset, limit)
        page = _page(queue, offset, limit)
        outcomes = self._app.backend.results.outcomes(_OUTCOMES[wanted], **page)
        return [from_outcome(one) for one in outcomes]

    def dead_page(self, queue: str | None, offset: int, limit: int) -> list[QueuedJob]:
        """Return dead letters."""
        return self._page_of(Place.DEAD, queue, offset, limit)

    def _page_of(self, place: Place, queue: str | None, offset: int, limit: int) -> list[QueuedJob]:
        page = _page(queue, offset, limit)
        backend = self._app.backend
        records = backend.broker.records(place, **page)
        return [from_record(one, self._app.sealer, backend.registry) for one in records]

    def counts(self) -> dict[JobState, int]:
        """Return how many jobs are in each state."""
        queues = self._app.backend.broker.counts().values()
        outcomes = self._app.backend.results.counts()
        return {
            JobState.QUEUED: sum(one.ready for one in queues),
            JobState.SCHEDULED: sum(one.scheduled for one in queues),
            JobState.RUNNING: sum(one.running for one in queues),
            **{state: outcomes.get(outcome, 0) for state, outcome in _OUTCOMES.items()},
        }

    def result(self, one: str) -> Any:
        """Return what a job has left, or raise what has become of it instead."""
        (outcome,) = self._app.backend.results.get_many([job_id(one)])
        if outcome is None:
            raise _no_outcome(self._app.job(one))
        told = failure(outcome.error)
        if outcome.state is OutcomeState.CANCELLED:
            raise JobCancelled(f"job {one!r} was cancelled")
        if outcome.state is OutcomeState.FAILED:
            raise _remote_error(one, told or Failure("unknown", ""))
        if outcome.value is None:
            why = "" if told is None else f": {told.message}"
            raise ResultNotFound(f"job {one!r} has left no result{why}")
        return self._app.sealer.open_value(one, outcome.value)

    def revive(self, ids: Sequence[str]) -> list[bool]:
        """Enqueue dead letters anew."""
        backend = self._app.backend
        # Why before: what has become of it the last time must not be taken for what becomes of it now.
        records = backend.broker.find(ids)
        dead = [one.id for one in records if one is not None and one.place is Place.DEAD]
        if dead:
            backend.results.delete(dead)
        return backend.broker.revive(ids)

    def each_dead(self, queue: str | None, act: Callable[[Sequence[str]], list[bool]]) -> int:
        """Do something to all dead letters; return to how many it was done."""
        queue = _queue(queue)
        broker = self._app.backend.broker
        # Why all are looked up first: a job that is enqueued anew may be a dead letter again in a moment.
        found: dict[str, None] = {}
        while records := broker.records(Place.DEAD, queue=queue, offset=len(found), limit=_PER_CALL):
            known = len(found)
            found.update((one.id, None) for one in records)
            if len(found) == known:
                break
        return sum(sum(act(part)) for part in _parts(list(found)))


def _page(queue: str | None, offset: int, limit: int) -> dict[str, Any]:
    return {
        "queue": _queue(queue),
        "offset": validate.whole_number("offset", offset, at_least=0, at_most=2**53),
        "limit": validate.whole_number("limit", limit, at_least=1, at_most=10_000),
    }


def _queue(queue: str | None) -> str | None:
    return None if queue is None else validate.text("queue", queue)


def _state(state: JobState | str) -> JobState:
    listed = (*_PLACES, *_OUTCOMES)
    if state not in listed:
        known = ", ".join(one.value for one in listed)
        hint = "; those that wait for another attempt are among the scheduled ones" * (
            state == JobState.RETRYING
        )
        raise ConfigError(f"state must be one of {known}, not {validate.shown(state)}{hint}")
    return JobState(state)


def _no_outcome(job: QueuedJob) -> BulkheadError:
    # Of a dead letter no outcome is kept if its message cannot be read, or its task keeps none.
    if job.state is JobState.FAILED:
        told = Failure(job.error_type or "unknown", job.error_message or job.reason, job.traceback or "")
        return _remote_error(job.id, told)
    return ResultNotFound(f"job {job.id!r} is {job.state} and has left no result")


def _remote_error(one: str, told: Failure) -> RemoteError:
    return RemoteError(
        f"job {one!r} failed: {told.type}: {told.message}", type_name=told.type, traceback=told.traceback
    )


def _parts(things: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (things[at : at + _PER_CALL] for at in range(0, len(things), _PER_CALL))
