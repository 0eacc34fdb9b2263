"""`LocalLimit`: so many jobs at once in each consumer process, whatever runs elsewhere."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from bulkhead import validate
from bulkhead.service.middleware.limiting import Limit, Per
from bulkhead.service.middleware.permits import FORGOTTEN, Permits, admitted

if TYPE_CHECKING:
    from bulkhead.service.batch import HeldJob
    from bulkhead.service.verdicts import Verdict

__all__ = ["LocalLimit"]

# As many keys have waiting jobs before the old ones are looked for (arbitrary).
_MANY = 1000


class LocalLimit(Limit):
    """Let a consumer hold at most `n` jobs at once: those that run, and those that it has claimed to run next.

    Args:
        n: How many, at least 1.
        per: What is counted by itself: each "queue", each "task", "all", or what a function of the held job returns.
        queues: Jobs of these queues alone.
        tasks: Jobs of the tasks with these names alone.

    Raises:
        ConfigError: A value cannot work.
    """

    def __init__(
        self,
        n: int,
        *,
        per: Per = "queue",
        queues: Iterable[str] | None = None,
        tasks: Iterable[str] | None = None,
    ) -> None:
        super().__init__(per, queues, tasks)
        self.n = validate.whole_number("n", n, at_least=1)
        self._lock = threading.Lock()  # guards what follows; nothing is called under it
        self._counts: Counter[str] = Counter()
        self._waiting: dict[str, Permits] = {}
        self._keys: dict[HeldJob, str] = {}

    def reserve(self, key: str, n: int) -> int:
        """See `Limit`."""
        with self._lock:
            n_free = max(0, min(n, self.n - self._counts[key]))
            self._counts[key] += n_free
            return n_free

    def use(self, key: str, n_reserved: int, jobs: Sequence[HeldJob]) -> Sequence[HeldJob]:
        """See `Limit`."""
        with self._lock:
            self._keys.update(dict.fromkeys(jobs, key))
            self._give_up(key, n_reserved - len(jobs))
        return []

    def admit(self, key: str, jobs: Sequence[HeldJob], most: int) -> dict[HeldJob, float]:
        """See `Limit`."""
        wanted = [(held.id, held.claim.enqueued_at) for held in jobs]
        with self._lock:
            known = self._waiting.pop(key, Permits())
            after, answers = admitted(known, self.n, "", self._counts[key], wanted, time.time(), most)
            if after.waiting:
                self._waiting[key] = after
            if len(self._waiting) > _MANY:
                self._forget_old()
            granted = [held for held, is_granted in zip(jobs, answers, strict=True) if is_granted]
            self._counts[key] += len(granted)
            self._keys.update(dict.fromkeys(granted, key))
            self._give_up(key, 0)
        return {
            held: self._pauses.next(key, longest=1.0 if held.id in after.waiting else 10.0)
            for held, is_granted in zip(jobs, answers, strict=True)
            if not is_granted
        }

    def settled(self, job: HeldJob, verdict: Verdict) -> None:
        """See `Middleware`."""
        with self._lock:
            key = self._keys.pop(job, None)
            if key is not None:
                self._give_up(key, 1)

    def _forget_old(self) -> None:
        """Forget the keys of which no job has asked for long: they may never be asked for again."""
        oldest = time.time() - FORGOTTEN
        self._waiting = {
            key: known
            for key, known in self._waiting.items()
            if any(one.seen > oldest for one in known.waiting.values())
        }

    def _give_up(self, key: str, n: int) -> None:
        self._counts[key] -= n
        if not self._counts[key]:
            del self._counts[key]
