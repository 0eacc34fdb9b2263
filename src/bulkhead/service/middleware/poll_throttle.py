"""`PollThrottle`: asking the server for jobs less often."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from bulkhead import validate
from bulkhead.service.middleware.base import Middleware
from bulkhead.service.middleware.choosing import Chosen

if TYPE_CHECKING:
    from bulkhead.service.batch import HeldJob

__all__ = ["PollThrottle"]


class PollThrottle(Middleware):
    """Let a consumer ask for jobs of a queue less often.

    Each question is one short round trip then: the server is not waited at. In return a job may have been due for as
    long as the pause before it is seen.

    A limit may be listed before or behind it. `run_once` asks whatever was asked before.

    Args:
        empty: Seconds between the end of a question that brought no job and the next one, at least 0; while jobs come,
            the next one follows at once.
        every: Seconds between the end of a question and the next one, at least 0: a highest rate.
        queues: For these queues alone.

    Raises:
        ConfigError: A value cannot work.
    """

    def __init__(
        self, *, empty: float = 1.0, every: float = 0.0, queues: Iterable[str] | None = None
    ) -> None:
        self.empty = validate.seconds("empty", empty, zero=True)
        self.every = validate.seconds("every", every, zero=True)
        self._chosen = Chosen(queues, None)
        self._not_before: dict[str, float] = {}  # monotonic. Owner: the queue's own thread, for its key

    def claim_wait(self, queue: str) -> float | None:
        """See `Middleware`."""
        return 0.0 if self._chosen.has_queue(queue) else None

    def dequeue(self, queue: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        """See `Middleware`."""
        if not self._chosen.has_queue(queue):
            return forward(n)
        return [] if time.monotonic() < self._not_before.get(queue, 0.0) else forward(n)

    def asked(self, queue: str, n: int) -> None:
        """See `Middleware`. Why here: a limit within may have kept the server from being asked at all."""
        if self._chosen.has_queue(queue):
            self._not_before[queue] = time.monotonic() + (self.every if n else max(self.every, self.empty))

    def started(self, queues: Sequence[str]) -> None:
        """See `Middleware`. A consumer that begins, or `run_once`, asks at once."""
        for queue in queues:
            self._not_before.pop(queue, None)
