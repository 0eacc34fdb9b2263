"""`DiscardAfter`: a job that fails too often is dropped, and no dead letter is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from bulkhead import validate
from bulkhead.service.envelope import failure
from bulkhead.service.middleware.base import Middleware
from bulkhead.service.middleware.choosing import Chosen
from bulkhead.service.verdicts import MOST_LOSSES, Bury, Discard, TryAgain, Verdict

if TYPE_CHECKING:
    from bulkhead.service.batch import HeldJob

__all__ = ["DiscardAfter"]


class DiscardAfter(Middleware):
    """Drop a job when `n` attempts have failed, whatever its `max_retries` say. It has failed then, with the reason.

    A job that fails for good before that (`max_retries`, `Unrecoverable`) becomes a dead letter as always. One whose
    consumer died may not have begun: it runs again, up to three times beyond `n`.

    Args:
        n: How many attempts, at least 1.
        queues: Jobs of these queues alone.
        tasks: Jobs of the tasks with these names alone.

    Raises:
        ConfigError: A value cannot work.
    """

    def __init__(
        self, n: int, *, queues: Iterable[str] | None = None, tasks: Iterable[str] | None = None
    ) -> None:
        self.n = validate.whole_number("n", n, at_least=1)
        self._chosen = Chosen(queues, tasks)

    def dequeue(self, queue: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        """See `Middleware`. Attempts in which the consumer died are seen only here."""
        jobs = forward(n)
        for held in jobs:
            attempt = held.claim.attempt
            is_open = held.verdict is None or isinstance(held.verdict, Bury)
            # Why more than its attempts: what a consumer had claimed when it died may not have begun.
            is_over = attempt > self.n + MOST_LOSSES
            if is_open and is_over and self._chosen.has(queue, held.envelope.task):
                held.verdict = Discard(
                    f"discarded after {attempt - 1} attempts, in the last of which its worker died or lost the lease"
                )
        return jobs

    def judge(self, job: HeldJob, verdict: Verdict) -> Verdict:
        """See `Middleware`."""
        if not isinstance(verdict, (TryAgain, Bury)) or job.claim.attempt < self.n:
            return verdict
        if not self._chosen.has(job.claim.queue, job.envelope.task):
            return verdict
        return self._discard(verdict.error)

    def _discard(self, error: bytes | None) -> Discard:
        told = failure(error)
        last = f"; the last one with {told.type}: {told.message}" if told is not None else ""
        return Discard(f"discarded after {self.n} failed attempt{'s' * (self.n > 1)}{last}")
