"""What a middleware may do: look at, change or hold up jobs on their way in, out and through."""

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
    """

    id: str
    is_own_id: bool
    call: Call
    queue: str
    envelope: Envelope
    headers: dict[str, str] = field(default_factory=dict)
    duplicate_of: str | None = None


class Middleware:
    """Base of middlewares: each method passes on unless a subclass says otherwise. The first listed is outermost.

    A middleware is made where the application is made, so in producers, consumers and worker processes alike: it must
    not connect to anything when it is made.
    """

    def attach(self, app: App) -> None:
        """Called once when the application is made."""

    def enqueue(
        self, submissions: Sequence[Submission], forward: Callable[[Sequence[Submission]], None]
    ) -> None:
        """Around the enqueueing of jobs, in the producer. What is not passed to `forward` is not enqueued."""
        forward(submissions)

    def dequeue(self, queue: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        """Around the claiming of up to `n` jobs, in the consumer, in the queue's own thread.

        A job whose `verdict` is set is not run: that becomes of it. Who takes no job may return [] without `forward`;
        it is asked again a moment later.
        """
        return forward(n)

    def handle(self, job: JobContext, forward: Callable[[JobContext], Any]) -> Any:
        """Around the run of a job, in the worker process. Returns what the task returns; may raise Snooze."""
        return forward(job)

    def settled(self, job: HeldJob, verdict: Verdict) -> None:
        """After an attempt is over and the broker knows, in the consumer; also after a crash or a `dequeue` verdict."""

    def beat(self, queue: str, jobs: Sequence[HeldJob]) -> None:
        """About once a second in the consumer, with the jobs of a queue that it holds."""

    def wrapped_handle(self, forward: Callable[[JobContext], Any]) -> Callable[[JobContext], Any]:
        """Return `forward` with `handle` around it; itself where `handle` does nothing."""
        if type(self).handle is Middleware.handle:
            return forward
        return lambda job: self.handle(job, forward)
