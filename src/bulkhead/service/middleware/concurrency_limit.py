"""`ConcurrencyLimit`: so many jobs at once over all consumers, on any number of machines.

Two kinds of values in the registry:

    permits/<name>/<key>          who has how many, see permits.py; changed by compare-and-set
    permits-alive/<consumer>      that a consumer lives; ends after the application's lease unless `beat` renews it

What a consumer that is gone had is taken back by whoever finds no permit left. So the permits of one that was killed
come back together with its jobs, when the lease ends, by the server's clock alone.

Invariant: a consumer writes down how many permits it has by its own knowledge, never "one less": so a change that was
carried out twice, or of which nobody knows whether it was, is made good by the next one.

Race: a consumer that stands still for longer than the lease has lost its permits and its jobs, which run elsewhere.
When it goes on it ends those jobs; until then there may be more than `n`, as with any lease.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from bulkhead import validate
from bulkhead.errors import BrokerUnavailable
from bulkhead.service.middleware.changing import Shared
from bulkhead.service.middleware.choosing import be_the_only_one, key_part
from bulkhead.service.middleware.limiting import Limit, Per
from bulkhead.service.middleware.permits import FORGOTTEN, Permits, admitted, released, reserved, without
from bulkhead.service.task import name as checked_name

if TYPE_CHECKING:
    from bulkhead.service.app import App
    from bulkhead.service.batch import HeldJob
    from bulkhead.service.verdicts import Verdict

__all__ = ["ConcurrencyLimit"]

R = TypeVar("R")

# What is written of a key is kept for so long (seconds), and written again after a third of it while it is in use.
_KEEP = 3600.0

# Those that wait longest get the next permits, so they ask sooner than others: their pause in relation to the time for
# which there was none, and at most (seconds); so many of them ask as often as one would. All ask before they are
# forgotten (permits.py).
_FIRST_SHARE = 0.1
_FIRST_LONGEST = 1.0
_FIRST_FEW = 5
_FIRST_MOST = FORGOTTEN / 2

_ALIVE = "permits-alive"


class ConcurrencyLimit(Limit):
    """Let at most `n` jobs run at once, over all consumers.

    Counted are the jobs that consumers hold: those that run, and those that they have claimed to run next.

    Args:
        n: How many, at least 1. All consumers should say the same; where they do not, each keeps to its own.
        per: What is counted by itself: each "queue", each "task", "all", or what a function of the held job returns.
        queues: Jobs of these queues alone.
        tasks: Jobs of the tasks with these names alone.
        name: Tells several of these middlewares apart.

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
        name: str = "default",
    ) -> None:
        super().__init__(per, queues, tasks)
        self.n = validate.whole_number("n", n, at_least=1, at_most=100_000)
        self.name = checked_name("name", name)
        self._prefix = f"permits/{key_part(name)}"
        # Guards what follows, and is held over calls of the registry: what we have must not change between the moment
        # that we read it and the moment that it is written down. Rank: the last; nothing else is acquired under it.
        self._lock = threading.Lock()
        self._me, self._pid = "", 0
        self._n_consumers = 0  # of this process
        self._counts: Counter[str] = Counter()
        self._keys: dict[HeldJob, str] = {}
        self._written: dict[str, float] = {}  # when, monotonic seconds
        self._unsaid: set[str] = set()  # keys of which the registry may not know how many we have
        self._alive_version: int | None = None
        self._alive_until = 0.0  # at least, monotonic seconds
        self._looked: dict[str, float] = {}  # for consumers that are gone; when, monotonic seconds
        self._last_beat = float("-inf")
        self._shared = Shared(Permits)

    def attach(self, app: App) -> None:
        """See `Middleware`."""
        self._app = app
        be_the_only_one(app, self, lambda one: one.name)

    def started(self, queues: Sequence[str]) -> None:
        """See `Middleware`."""
        with self._lock:
            self._n_consumers += 1

    def reserve(self, key: str, n: int) -> int:
        """See `Limit`."""

        def change(permits: Permits) -> tuple[Permits, int]:
            return reserved(permits, self.n, self._me, self._counts[key], n)

        with self._lock:
            self._be_alive()
            granted = self._changed(key, change)
            if granted < n and self._has_taken_back(key):
                granted = self._changed(key, change)
            self._have(key, granted)
            return granted

    def use(self, key: str, n_reserved: int, jobs: Sequence[HeldJob]) -> Sequence[HeldJob]:
        """See `Limit`."""
        with self._lock:
            self._keys.update(dict.fromkeys(jobs, key))
            self._give_up(key, n_reserved - len(jobs))
        return []

    def admit(self, key: str, jobs: Sequence[HeldJob], most: int) -> dict[HeldJob, float]:
        """See `Limit`."""
        wanted = [(held.id, held.claim.enqueued_at) for held in jobs]

        def change(permits: Permits) -> tuple[Permits | None, tuple[list[bool], set[str]]]:
            mine = self._counts[key]
            after, answers = admitted(permits, self.n, self._me, mine, wanted, time.time(), most)
            return None if after == permits else after, (answers, set(after.waiting))

        with self._lock:
            self._be_alive()
            answers, waiting = self._changed(key, change)
            if not any(answers) and self._has_taken_back(key):
                answers, waiting = self._changed(key, change)
            self._have(key, sum(answers))
            self._keys.update(
                (held, key) for held, is_granted in zip(jobs, answers, strict=True) if is_granted
            )
        return {
            held: self._pause_of_first(key, len(waiting)) if held.id in waiting else self._pauses.next(key)
            for held, is_granted in zip(jobs, answers, strict=True)
            if not is_granted
        }

    def settled(self, job: HeldJob, verdict: Verdict) -> None:
        """See `Middleware`."""
        with self._lock:
            key = self._keys.pop(job, None)
            if key is not None:
                self._give_up(key, 1)

    def beat(self, queue: str, jobs: Sequence[HeldJob]) -> None:
        """See `Middleware`."""
        now = time.monotonic()
        with self._lock:
            if self._alive_version is None or now - self._last_beat < self._pulse() / 2:
                return
            self._last_beat = now
            # The consumer says by itself that its server is out of reach; the next beat tries again.
            with contextlib.suppress(BrokerUnavailable):
                self._renew()
                for key in self._due(now):
                    self._say(key)
            self._looked = {key: when for key, when in self._looked.items() if now - when < self._pulse()}

    def stopped(self) -> None:
        """See `Middleware`."""
        with self._lock, contextlib.suppress(BrokerUnavailable):
            self._n_consumers -= 1
            if self._n_consumers or self._alive_version is None:
                return
            self._alive_version = None
            for key in [*self._unsaid]:
                self._say(key)
            self._app.backend.registry.delete(f"{_ALIVE}/{self._me}")

    def _pause_of_first(self, key: str, n_waiting: int) -> float:
        pause = self._pauses.next(key, share=_FIRST_SHARE, longest=_FIRST_LONGEST)
        return min(pause * max(1.0, n_waiting / _FIRST_FEW), _FIRST_MOST)

    # All of these under the lock

    def _changed(self, key: str, change: Callable[[Permits], tuple[Permits | None, R]]) -> R:
        # Whatever comes of it: until it is known, the registry may say something else than we do.
        self._unsaid.add(key)
        told = self._shared.change(self._app.backend.registry, f"{self._prefix}/{key}", _KEEP, change)
        self._unsaid.discard(key)
        self._written[key] = time.monotonic()
        return told

    def _say(self, key: str) -> None:
        """Let the registry know how many we have."""
        mine = self._counts[key]
        self._changed(key, lambda permits: (released(permits, self._me, mine), None))
        if not mine:
            del self._counts[key]
            self._written.pop(key, None)

    def _have(self, key: str, n: int) -> None:
        if n:
            self._counts[key] += n

    def _give_up(self, key: str, n: int) -> None:
        if n:
            self._counts[key] -= n
            self._unsaid.add(key)
            with contextlib.suppress(BrokerUnavailable):  # the next beat says it
                self._say(key)

    def _due(self, now: float) -> list[str]:
        old = [key for key, when in self._written.items() if now - when > _KEEP / 3]
        return list(dict.fromkeys([*self._unsaid, *old]))

    def _be_alive(self) -> None:
        """Let it be known that we are there. Race: before the first permit, so that nobody takes us for gone."""
        if self._pid != os.getpid():
            self._pid, self._me = os.getpid(), secrets.token_hex(8)
            self._alive_version = None
            for known in (self._counts, self._keys, self._written, self._unsaid, self._looked):
                known.clear()
        # Race: we may have stood still since the last beat, for longer than that was worth.
        if self._alive_version is None or time.monotonic() >= self._alive_until:
            self._renew()

    def _renew(self) -> None:
        version = self._put_alive(self._alive_version)
        if version is None:
            # We stood still for too long, and others may have taken what we had: say again what we have.
            self._unsaid.update(self._counts)
            version = self._put_alive(None)
        self._alive_version = version

    def _put_alive(self, expected: int | None) -> int | None:
        began = time.monotonic()
        version = self._app.backend.registry.put(
            f"{_ALIVE}/{self._me}", b"", expected=expected, keep=self._app.lease
        )
        if version is not None:
            self._alive_until = began + self._app.lease
        return version

    def _has_taken_back(self, key: str) -> bool:
        """Take back what consumers had that are gone, now and then; True if there was something."""
        now = time.monotonic()
        if now - self._looked.get(key, float("-inf")) < self._pulse():
            return False
        self._looked[key] = now
        registry = self._app.backend.registry

        def change(permits: Permits) -> tuple[Permits | None, bool]:
            # Race: asked after the permits were read. Who has one has been alive before it got it.
            alive = {entry.key.rpartition("/")[2] for entry in registry.entries(f"{_ALIVE}/")}
            gone = {one for one in permits.holders if one != self._me and one not in alive}
            return (without(permits, gone), True) if gone else (None, False)

        return self._changed(key, change)

    def _pulse(self) -> float:
        return min(1.0, self._app.lease / 3)
