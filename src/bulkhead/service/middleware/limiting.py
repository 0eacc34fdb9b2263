"""What limits have in common: asking before jobs are claimed where that can be, and afterwards where it cannot.

- `per="queue"`: the queue says what the limit counts, so that room is reserved first and no more is claimed than fits.
  Jobs keep their order in the queue.
- `per="all"`, `per="task"`, a function, or `tasks=`: what is counted is not a queue, so a job has to be claimed first.
  One that does not fit is given back for a moment, and others of its queue go on. Jobs that wait so may change their
  order.

Why "all" is not reserved for: whoever has just ended a job would take the room again for its own queue, at once, and
other queues would never find any.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from bulkhead import validate
from bulkhead.errors import ConfigError
from bulkhead.service.middleware.base import Middleware
from bulkhead.service.middleware.choosing import Chosen, key_part
from bulkhead.service.verdicts import GiveBack

if TYPE_CHECKING:
    from bulkhead.service.batch import HeldJob

__all__ = ["Limit", "Per", "soon"]

Per = Literal["queue", "all", "task"] | Callable[["HeldJob"], str | None]

_PER: dict[str, Callable[[HeldJob], str]] = {
    "queue": lambda job: job.claim.queue,
    "all": lambda _: "all",
    "task": lambda job: job.envelope.task,
}


class Limit(Middleware, ABC):
    """Base of limits. A subclass says how much room there is.

    Args:
        per: "queue" counts each queue by itself, "all" all of them together, "task" each task; a function gets the held
            job and returns what it counts as, or None for a job that is not limited.
        queues: Jobs of these queues alone.
        tasks: Jobs of the tasks with these names alone.
    """

    def __init__(
        self, per: Per, queues: Iterable[str] | None = None, tasks: Iterable[str] | None = None
    ) -> None:
        self._chosen = Chosen(queues, tasks)
        self._is_known_before = per == "queue" and not self._chosen.is_by_task
        self._key = _key(per)

    @abstractmethod
    def reserve(self, key: str, n: int) -> int:
        """Return for how many of `n` jobs, which are still to be claimed, there is room; it stays theirs."""

    @abstractmethod
    def use(self, key: str, n_reserved: int, jobs: Sequence[HeldJob]) -> Sequence[HeldJob]:
        """Let these jobs have the room that was reserved, and give up the rest; return those that have none.

        Invariant: called once for each `reserve` that has returned more than 0, whoever raises in between.
        """

    @abstractmethod
    def admit(self, key: str, jobs: Sequence[HeldJob]) -> dict[HeldJob, float]:
        """Let as many of these jobs as there is room for have it; return the others, and when they may ask again."""

    def dequeue(self, queue: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        """See `Middleware`."""
        if not self._chosen.has_queue(queue):
            return forward(n)
        if self._is_known_before:
            return self._reserve_and_claim(key_part(queue), n, forward)
        return self._claim_and_admit(n, forward)

    def _reserve_and_claim(self, key: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        n_reserved = self.reserve(key, n)
        if not n_reserved:
            return []
        jobs: list[HeldJob] = []
        try:
            jobs = forward(n_reserved)
        finally:
            for held in self.use(key, n_reserved, [held for held in jobs if held.verdict is None]):
                held.verdict = GiveBack(soon())
        return jobs

    def _claim_and_admit(self, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        jobs = forward(n)
        wanted: dict[str, list[HeldJob]] = {}
        for held in jobs:
            if held.verdict is None and self._chosen.has(held.claim.queue, held.envelope.task):
                key = self._key(held)
                if key is not None:
                    wanted.setdefault(key_part(key), []).append(held)
        for key, group in wanted.items():
            for held, delay in self.admit(key, group).items():
                held.verdict = GiveBack(delay)
        return jobs


def soon() -> float:
    """Return a pause in seconds before somebody asks again; random, so that not all do at once."""
    return random.uniform(0.1, 0.2)


def _key(per: Per) -> Callable[[HeldJob], str | None]:
    if isinstance(per, str):
        if per not in _PER:
            raise ConfigError(f"per must be one of {', '.join(_PER)}, or a function, not {per!r}")
        return _PER[per]
    made: Callable[[HeldJob], str | None] = validate.function("per", per)
    return made
