"""`DiscardTooOld`: a job that nobody needs any more is not run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from bulkhead import validate
from bulkhead.service.middleware.base import Middleware
from bulkhead.service.middleware.choosing import Chosen
from bulkhead.service.verdicts import Discard

if TYPE_CHECKING:
    from bulkhead.service.batch import HeldJob

__all__ = ["DiscardTooOld"]


class DiscardTooOld(Middleware):
    """Drop a job that was enqueued more than so many seconds before an attempt would begin.

    It has failed then, with the reason; no dead letter is kept. A delay and the pauses between attempts count.

    Args:
        seconds: The age. By the clocks of the server, when it was enqueued, and of the consumer, when it begins.
        queues: Jobs of these queues alone.
        tasks: Jobs of the tasks with these names alone.

    Raises:
        ConfigError: A value cannot work.
    """

    def __init__(
        self, seconds: float, *, queues: Iterable[str] | None = None, tasks: Iterable[str] | None = None
    ) -> None:
        self.seconds = validate.seconds("seconds", seconds)
        self._chosen = Chosen(queues, tasks)

    def dequeue(self, queue: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        """See `Middleware`."""
        jobs = forward(n)
        now = time.time()
        for held in jobs:
            age = now - held.claim.enqueued_at
            if age > self.seconds and held.verdict is None and self._chosen.has(queue, held.envelope.task):
                held.verdict = Discard(
                    f"too old: enqueued {age:.3f} s before, and {self.seconds:g} s are allowed"
                )
        return jobs
