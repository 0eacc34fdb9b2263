"""What a middleware may do: look at, change or hold up jobs on their way in, out and through.

    producer:  enqueue ──▶ broker
    consumer:  broker ──▶ dequeue ──▶ (worker process: handle) ──▶ judge ──▶ broker ──▶ settled
               started before all that, beat about once a second, stopped after it

The first one listed is outermost: it sees what goes in first, and what comes out last.

Invariant: for each job that `forward` of `dequeue` has returned, `settled` is called once in the same process, whatever
becomes of the job and whoever raises, unless the process dies. So what was taken in `dequeue` (a permit, a place, a
span) can be given back there. That, and `headers`, which travel from `enqueue` to `handle`, is also all that counters
and traces need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bulkhead.service.app import App
    from bulkhead.service.batch import HeldJob
    from bulkhead.service.context import JobContext
    from bulkhead.service.envelope import Envelope
    from bulkhead.service.task import Call
    from bulkhead.service.verdicts import Verdict

__all__ = ["Middleware", "Submission"]


@dataclass(slots=True, eq=False)
class Submission:
    """A job on its way into the queue.

    Attributes:
        id: The job's id.
        is_own_id: The caller has chosen it.
        call: What the caller wants to have run.
        queue: Where it will wait.
        envelope: It as it travels, without the headers below.
        headers: Texts that travel with the job; a middleware may add to them.
        duplicate_of: Set to the id of a job that stands for this one, which then is not enqueued.
        notes: What a middleware wants to know of it later in the same call, by a name of its own.
        brought_by: Of a job of a group or chain: the ids of what has to come before it is at the broker.
    """

    id: str
    is_own_id: bool
    call: Call
    queue: str
    envelope: Envelope
    headers: dict[str, str] = field(default_factory=dict)
    duplicate_of: str | None = None
    brought_by: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)


class Middleware:
    """Base of middlewares: each method passes on unless a subclass says otherwise. The first listed is outermost.

    A middleware is made where the application is made, so in producers, consumers and worker processes alike: it must
    not connect to anything when it is made.
    """

    def attach(self, app: App) -> None:
        """Called once when the application is made."""

    def started(self, queues: Sequence[str]) -> None:
        """In the consumer, before it claims the first job of these queues.

        What is raised here keeps it from starting.
        """

    def stopped(self) -> None:
        """In the consumer, after everything has ended; not when `started` has raised.

        Race: an application may have several consumers in one process, which share its middlewares.
        """

    def claim_wait(self, queue: str) -> float | None:
        """Return for how many seconds a claim of this queue may wait at the broker; None does not mind."""
        return None

    def enqueue(
        self, submissions: Sequence[Submission], forward: Callable[[Sequence[Submission]], None]
    ) -> None:
        """Around the enqueueing of jobs, in the producer. What is not passed to `forward` is not enqueued.

        What is raised here reaches the caller. The jobs of a group or chain come through here when it is enqueued,
        which is a moment later, and may fail. Jobs that follow others by `options(on_success=…)` do not: they are part
        of the job that does.
        """
        forward(submissions)

    def refused(self, submissions: Sequence[Submission], is_certain: bool) -> None:
        """In the producer: these jobs of a group or chain have come to `enqueue`, and it was not enqueued as a whole.

        Where it is not certain the server did not answer, and nobody knows. What it raises is logged.
        """

    def dequeue(self, queue: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        """Around the claiming of up to `n` jobs, in the consumer, in the queue's own thread.

        A job whose `verdict` is set is not run: that becomes of it. What is left out of the list is given back, to be
        claimed again a second later. Who wants no job may return [] without `forward`, and is asked again within
        0.05 s.
        What is raised here is logged; what was claimed is given back, and the queue goes on after a pause.
        """
        return forward(n)

    def asked(self, queue: str, n: int) -> None:
        """In the consumer, when the server was asked for jobs of a queue and has given `n`; in that queue's thread."""

    def handle(self, job: JobContext, forward: Callable[[JobContext], Any]) -> Any:
        """Around the run of a job, in the worker process. Returns what the task returns.

        What is raised here is the attempt's failure, as if the task had raised it: Snooze, Unrecoverable and
        JobDiscarded mean what they mean there.
        """
        return forward(job)

    def judge(self, job: HeldJob, verdict: Verdict) -> Verdict:
        """Return what is to become of a job whose attempt is over; called before the broker knows.

        What it raises is logged, and the verdict stays.
        """
        return verdict

    def settled(self, job: HeldJob, verdict: Verdict) -> None:
        """After an attempt is over and the broker knows, in the consumer; also after a crash or a `dequeue` verdict.

        `Lost` stands for a job that is no longer ours: what becomes of it, somebody else decides.
        """

    def beat(self, queue: str, jobs: Sequence[HeldJob]) -> None:
        """About once a second in the consumer, with the jobs of a queue that it holds."""

    def wrapped_handle(self, forward: Callable[[JobContext], Any]) -> Callable[[JobContext], Any]:
        """Return `forward` with `handle` around it; itself where `handle` does nothing."""
        if type(self).handle is Middleware.handle:
            return forward
        return lambda job: self.handle(job, forward)
