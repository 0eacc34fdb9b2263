"""What limits have in common: asking before jobs are claimed where that can be, and afterwards where it cannot.

- `per="queue"`: the queue says what the limit counts, so that room is reserved first and no more is claimed than fits.
  Jobs keep their order in the queue.
- `per="all"`, `per="task"`, a function, or `tasks=`: what is counted is not a queue, so a job has to be claimed first.
  One that does not fit is given back for a while (pauses.py), and others of its queue go on. While nothing but such
  jobs is found, more are claimed at a time than could begin, so that hundreds of them do not hide others of the queue.
  Jobs that wait so may change their order.

Why "all" is not reserved for: whoever has just ended a job would take the room again for its own queue, at once, and
other queues would never find any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from bulkhead import validate
from bulkhead.errors import ConfigError
from bulkhead.service.envelope import failure_of
from bulkhead.service.middleware.base import Middleware
from bulkhead.service.middleware.choosing import Chosen, key_part
from bulkhead.service.pauses import Pauses, soon
from bulkhead.service.verdicts import Bury, GiveBack

if TYPE_CHECKING:
    from bulkhead.service.batch import HeldJob

__all__ = ["Limit", "Per"]

Per = Literal["queue", "all", "task"] | Callable[["HeldJob"], str | None]

_PER: dict[str, Callable[[HeldJob], str]] = {
    "queue": lambda job: job.claim.queue,
    "all": lambda _: "all",
    "task": lambda job: job.envelope.task,
}

# So many are claimed at a time at most while none of them may begin (arbitrary).
_MOST_SEARCHED = 100


class Limit(Middleware, ABC):
    """Base of limits. A subclass says how much room there is.

    Args:
        per: "queue" counts each queue by itself, "all" all of them together, "task" each task; a function gets the held
            job and returns what it counts as, or None for a job that is not limited; one of which it raises becomes a
            dead letter.
        queues: Jobs of these queues alone.
        tasks: Jobs of the tasks with these names alone.
    """

    def __init__(
        self, per: Per, queues: Iterable[str] | None = None, tasks: Iterable[str] | None = None
    ) -> None:
        self._chosen = Chosen(queues, tasks)
        self._is_known_before = per == "queue" and not self._chosen.is_by_task
        self._key = _key(per)
        self._pauses = Pauses()
        self._search: dict[
            str, int
        ] = {}  # how many to claim, by queue. Owner: the queue's own thread, for its key

    @abstractmethod
    def reserve(self, key: str, n: int) -> int:
        """Return for how many of `n` jobs, which are still to be claimed, there is room; it stays theirs."""

    @abstractmethod
    def use(self, key: str, n_reserved: int, jobs: Sequence[HeldJob]) -> Sequence[HeldJob]:
        """Let these jobs have the room that was reserved, and give up the rest; return those that have none.

        Invariant: called once for each `reserve` that has returned more than 0, whoever raises in between.
        """

    @abstractmethod
    def admit(self, key: str, jobs: Sequence[HeldJob], most: int) -> dict[HeldJob, float]:
        """Let as many of these jobs as there is room for have it, `most` at most.

        Returns:
            The others, and for how many seconds each is given back before it asks again.
        """

    def dequeue(self, queue: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        """See `Middleware`."""
        if not self._chosen.has_queue(queue):
            return forward(n)
        if self._is_known_before:
            return self._reserve_and_claim(key_part(queue), n, forward)
        return self._claim_and_admit(queue, n, forward)

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

    def _claim_and_admit(self, queue: str, n: int, forward: Callable[[int], list[HeldJob]]) -> list[HeldJob]:
        searched = max(n, self._search.get(queue, 0))
        jobs = forward(searched)
        groups: dict[str | None, list[HeldJob]] = {}
        for held in jobs:
            if held.verdict is not None:
                continue
            try:
                groups.setdefault(self._counted_as(held), []).append(held)
            # Why all: raised, it would hold up all that were claimed with it, for ever.
            except Exception as error:
                held.verdict = Bury(
                    f"a limit cannot tell what it counts as: {type(error).__name__}: {error}",
                    failure_of(error),
                )
        n_free = n
        for key, group in groups.items():
            n_free -= self._admit_some(key, group, n_free)
        if n_free < n:
            self._search.pop(queue, None)
        elif jobs:
            self._search[queue] = min(2 * searched, _MOST_SEARCHED)
        return jobs

    def _counted_as(self, held: HeldJob) -> str | None:
        if not self._chosen.has(held.claim.queue, held.envelope.task):
            return None
        key = self._key(held)
        return None if key is None else key_part(key)

    def _admit_some(self, key: str | None, jobs: Sequence[HeldJob], most: int) -> int:
        """Give back all but `most` of these jobs, and what finds no room; return how many go on."""
        if key is None or not most:
            left = dict.fromkeys(jobs[most:], 0.0)
        else:
            left = self.admit(key, jobs, most)
        n_admitted = len(jobs) - len(left)
        if n_admitted and key is not None:
            self._pauses.begun(key)
        for held, pause in left.items():
            # Why at once: the limit has room, it is the consumer that has none.
            held.verdict = GiveBack(pause if n_admitted < most else 0.0)
        return n_admitted


def _key(per: Per) -> Callable[[HeldJob], str | None]:
    if isinstance(per, str):
        if per not in _PER:
            raise ConfigError(f"per must be one of {', '.join(_PER)}, or a function, not {per!r}")
        return _PER[per]
    made: Callable[[HeldJob], str | None] = validate.function("per", per)
    return made
